"""Many runs, one row each: finding, reading, caching and comparing them. The library behind `postmortem`."""
