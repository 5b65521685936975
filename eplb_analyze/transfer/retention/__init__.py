"""`prune`, step by step: survey a dump, plan what is thinned and removed, carry it out."""
