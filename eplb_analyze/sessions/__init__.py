"""The sessions of a dump and their segments, as files hold them."""
