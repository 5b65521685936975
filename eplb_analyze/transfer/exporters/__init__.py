"""Placements and loads as files that other programs read."""
