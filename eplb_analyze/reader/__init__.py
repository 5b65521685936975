"""From sessions to one truth per step."""
