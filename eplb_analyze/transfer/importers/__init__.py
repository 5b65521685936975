"""Readers of other systems' dumps, one module a system, and what makes a dump of ours of them.

A reader is a function ``read(path, options) -> Reading``; it guesses nothing. :mod:`.formats` knows them
all, :mod:`.resolve` asks for what a source does not say, :mod:`.writing` writes.
"""
