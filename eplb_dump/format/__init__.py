"""The dump format, reading and writing: schemas, session metadata, frames, journal, manifest, segments.

``eplb_analyze`` imports only this package of ``eplb_dump``.
"""

#: The package version, which ``session.json`` contains.
__version__ = "0.1.0"
