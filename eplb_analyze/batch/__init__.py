"""Many runs, one row each: where they are found, who reads them, what is kept, how they compare."""
