"""Readers of other systems' recordings, one module per system, and what turns them into a dump.

A reader is a function ``read(path, options) -> Reading`` that guesses nothing. :mod:`.detect` knows all of
them, :mod:`.plan` completes a reading with the user's options, :mod:`.write` writes the run.
"""
