"""Runs and placements in and out of a dump: copy, compact, recover, import, export."""
