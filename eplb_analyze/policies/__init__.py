"""Placement policies: loads in, placements out. The engines' policies, a user's own, and bounds."""
