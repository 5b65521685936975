"""The in-engine writer of eplb-dump: per-step expert loads and placements, appended to Parquet.

Only the names below are public; the format that the writer and the reader share is in
:mod:`eplb_dump.format`.
"""

from eplb_dump.format import FORMAT_VERSION
from eplb_dump.writer import ExpertLoadWriter, WriterStats

__all__ = ["FORMAT_VERSION", "ExpertLoadWriter", "WriterStats", "__version__"]
__version__ = "0.1.0"
