"""Bars, heat colors and plots for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text


_COLD, _NEUTRAL, _HOT = (58, 110, 190), (236, 236, 226), (214, 48, 39)


def heat_style(times_mean: float) -> str:
    """A cell's style by its load over the mean: blue below, pale at 1, red from 2 on."""
    if times_mean <= 1:
        low, high, t = _COLD, _NEUTRAL, max(0.0, times_mean)
    else:
        low, high, t = _NEUTRAL, _HOT, min(1.0, times_mean - 1)
    r, g, b = (round(a + (c - a) * t) for a, c in zip(low, high, strict=True))
    ink = "black" if 0.3 * r + 0.59 * g + 0.11 * b > 120 else "white"
    return f"{ink} on #{r:02x}{g:02x}{b:02x}"


def heat(text: str, times_mean: float) -> Text:
    from rich.text import Text

    return Text(text, style=heat_style(times_mean))


def bar(share: float, width: int = 12) -> str:
    """A bar of eighths of blocks, ``share`` in 0 … 1."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")
