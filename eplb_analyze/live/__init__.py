"""A run while it is being written."""
