"""A half-open range of steps."""

from __future__ import annotations

from typing import NamedTuple

#: Larger than the number of every step.
NO_END = 2**62


class StepRange(NamedTuple):
    """Steps ``first`` to ``end - 1``. Where the library takes one, a plain ``(first, end)`` will do."""

    first: int = 0
    end: int = NO_END

    @classmethod
    def of(cls, steps: tuple[int, int] | None) -> StepRange:
        """The range that a user asked for; all steps for None."""
        return cls() if steps is None else cls(*steps)

    def clip(self, first: int, end: int) -> StepRange:
        """The part of it that is in another half-open range."""
        return StepRange(max(self.first, first), min(self.end, end))

    def __str__(self) -> str:
        """``M-N`` as the option ``--steps`` takes it: both ends included, ``M-`` without an end."""
        return f"{self.first}-{'' if self.end >= NO_END else self.end - 1}"
