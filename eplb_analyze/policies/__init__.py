"""Placement policies: loads in, placements out. The engines' policies, a user's own, and bounds."""

from eplb_analyze.policies.policy import POLICIES, Problem, lower_bound, named, place

__all__ = ["POLICIES", "Problem", "lower_bound", "named", "place"]
