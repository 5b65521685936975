"""The dump format, in both directions: schemas, session metadata, frames, journal, manifest, segments.

The reader uses this package and nothing else of ``eplb_dump``.
"""

#: The version of the package, which ``session.json`` states.
__version__ = "0.1.0"
