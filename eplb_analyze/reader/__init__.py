"""From files to one truth per step."""
