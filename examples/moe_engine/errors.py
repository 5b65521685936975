"""The one error of the engine whose text a user is meant to read."""


class EngineError(Exception):
    """Printed as one line; the process exits with 1."""
