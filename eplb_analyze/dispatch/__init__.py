"""How engines choose a replica for a token: tokens of experts in, tokens of slots and ranks out."""
