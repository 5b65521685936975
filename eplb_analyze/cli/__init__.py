"""The command line `eplb-analyze`."""
