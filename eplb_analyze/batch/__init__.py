"""`postmortem`: many runs, one row each. Finding, reading, caching and comparing them."""
