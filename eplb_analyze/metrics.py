"""The balance formulas of the field, each under its own name, as functions of numpy arrays.

All take ``T``: float64 ``[steps, layers, ep_ranks]``, the tokens on each EP rank, and return float64
``[steps]``; NaN where a step has no active layer. A layer is active in a step when its maximum is
above 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Formula:
    """A formula with what a reader needs to trust it."""

    name: str
    text: str
    source: str
    better: Literal["higher", "lower"]
    perfect: float
    per_step: Callable[[Float64], Float64]
    warning: str = ""


def _mean_over_active(values: Float64, active: npt.NDArray[np.bool_]) -> Float64:
    """Mean over layers ``[steps, layers]`` that are active; NaN where none is."""
    total: Float64 = np.where(active, values, 0.0).sum(axis=1)
    return _ratio(total, active.sum(axis=1).astype(np.float64))


def _mean_max(T: Float64) -> tuple[Float64, Float64, npt.NDArray[np.bool_]]:
    mean: Float64 = T.mean(axis=2)
    maximum: Float64 = T.max(axis=2)
    return mean, maximum, maximum > 0


def _ratio(numerator: Float64, denominator: Float64) -> Float64:
    out: Float64 = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=out, where=denominator > 0)
    return out


def balancedness(T: Float64) -> Float64:
    """Mean over active layers of mean_r T / max_r T, in (0, 1]; vLLM PR 39178."""
    mean, maximum, active = _mean_max(T)
    return _mean_over_active(_ratio(mean, maximum), active)


def imbalance(T: Float64) -> Float64:
    """Mean over active layers of max_r T / mean_r T, at least 1; vLLM PR 39178's text."""
    mean, maximum, active = _mean_max(T)
    return _mean_over_active(_ratio(maximum, mean), active)


def vllm(T: Float64) -> Float64:
    """Σ_l mean_r T / Σ_l max_r T; vLLM's log line since PR 51813."""
    mean, maximum, _ = _mean_max(T)
    return _ratio(mean.sum(axis=1), maximum.sum(axis=1))


def vllm_legacy(T: Float64) -> Float64:
    """Σ_r mean_l T / Σ_r max_l T; vLLM before PR 51813, wrong, kept to read old logs."""
    return _ratio(T.mean(axis=1).sum(axis=1), T.max(axis=1).sum(axis=1))


def sglang(T: Float64) -> Float64:
    """Mean over all layers of (mean_r T + 1e-5) / (max_r T + 1e-5); SGLang's expert_distribution.py."""
    mean, maximum, active = _mean_max(T)
    value: Float64 = ((mean + 1e-5) / (maximum + 1e-5)).mean(axis=1)
    value[~active.any(axis=1)] = np.nan
    return value


def trtllm(T: Float64) -> Float64:
    """Mean over active layers of max_r T / mean_r T − 1; TensorRT-LLM's report_load_statistics.py."""
    return imbalance(T) - 1.0


FORMULAS: dict[str, Formula] = {
    formula.name: formula
    for formula in (
        Formula(
            "balancedness",
            "mean over active layers of mean_r T / max_r T",
            "vLLM PR 39178",
            "higher",
            1.0,
            balancedness,
        ),
        Formula(
            "imbalance",
            "mean over active layers of max_r T / mean_r T",
            "vLLM PR 39178, its text",
            "lower",
            1.0,
            imbalance,
        ),
        Formula(
            "vllm",
            "Σ_l mean_r T / Σ_l max_r T",
            "vLLM's log line since PR 51813 (seen in 0.33.0)",
            "higher",
            1.0,
            vllm,
        ),
        Formula(
            "vllm-legacy",
            "Σ_r mean_l T / Σ_r max_l T",
            "vLLM's log line before PR 51813",
            "higher",
            1.0,
            vllm_legacy,
            "wrong: [[100, 200], [100, 200]] gives 1.0 where balancedness is 0.75; kept to read old logs",
        ),
        Formula(
            "sglang",
            "mean over all layers of (mean_r T + 1e-5) / (max_r T + 1e-5)",
            "SGLang's expert_distribution.py",
            "higher",
            1.0,
            sglang,
        ),
        Formula(
            "trtllm",
            "mean over active layers of max_r T / mean_r T − 1",
            "TensorRT-LLM's report_load_statistics.py",
            "lower",
            0.0,
            trtllm,
        ),
    )
}


def idle_terms(T: Float64) -> tuple[float, float]:
    """Σ_{s,l} mean_r T and Σ_{s,l} max_r T: terms to add over blocks.

    The idle fraction is 1 minus their ratio: the share of rank time lost if time is proportional to
    tokens.
    """
    mean, maximum, _ = _mean_max(T)
    return float(mean.sum()), float(maximum.sum())


def per_layer(formula: Formula, T: Float64) -> Float64:
    """A formula for each layer by itself, as if the model had only that one: ``[steps, layers]``."""
    columns = [formula.per_step(T[:, i : i + 1]) for i in range(T.shape[1])]
    return np.stack(columns, axis=1) if columns else np.empty((len(T), 0))


@dataclass(frozen=True)
class Spread:
    """A figure over the steps of a run: its mean, low percentiles and extreme, with its step."""

    mean: float | None
    p5: float | None
    p50: float | None
    p95: float | None
    min: float | None
    min_step: int | None
    max: float | None
    max_step: int | None

    @classmethod
    def of(cls, values: Float64, steps: npt.NDArray[np.int64]) -> Spread:
        """Over the steps with an active layer; all None where there is none."""
        known = ~np.isnan(values)
        values, steps = values[known], steps[known]
        if not len(values):
            return cls(None, None, None, None, None, None, None, None)
        p5, p50, p95 = (float(v) for v in np.percentile(values, [5, 50, 95]))
        low, high = int(values.argmin()), int(values.argmax())
        return cls(
            float(values.mean()),
            p5,
            p50,
            p95,
            float(values[low]),
            int(steps[low]),
            float(values[high]),
            int(steps[high]),
        )
