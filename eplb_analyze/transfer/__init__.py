"""Runs and placements in and out of a dump."""
