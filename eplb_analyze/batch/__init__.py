"""Many runs, one row each, and where the work is done."""
