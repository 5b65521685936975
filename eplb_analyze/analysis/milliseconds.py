"""An estimate in milliseconds with its 95% interval: what `analysis` says of time."""

from __future__ import annotations

from eplb_analyze.metrics.bootstrap import Interval
from eplb_dump.format.frozen import frozen


@frozen
class Milliseconds:
    """An estimate and its 95% interval."""

    estimate: float
    low: float
    high: float

    @classmethod
    def of(cls, interval: Interval, scale: float = 1.0) -> Milliseconds:
        return cls(interval.value * scale, interval.low * scale, interval.high * scale)
