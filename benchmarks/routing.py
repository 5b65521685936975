"""Synthetic routing: how many tokens each expert gets in each step, for traffic of several kinds.

Each token chooses ``top_k`` different experts of a layer, with probabilities in proportion to their
popularity, one after another without replacement (it takes the largest sums of log-popularity and Gumbel
noise). The families differ in how popularity and the number of tokens change from step to step:

- ``uniform``: all experts are equally popular. The control: no policy can gain anything but chance.
- ``stationary``: Zipf's law, popularity of rank^-0.7, in an order of each layer's own, the same in all steps.
- ``drifting``: the same, but each expert's log-popularity takes a normal step of 0.05 in every step, back to
  where it began with a rate of 0.001.
- ``bursty``: the same as stationary, but a burst begins in every 40th step on average: one expert of each
  layer is eight times as popular for 20 steps on average.
- ``topic switch``: a new order of the experts in every quarter of the steps.
- ``prefill/decode``: every eighth step is a prefill with eight times the tokens and an order of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
#: Log-popularity ``[steps, layers, experts]``.
Popularity = Callable[[np.random.Generator, "Shape"], Float64]

EXPONENT = 0.7
DRIFT, RETURN = 0.05, 0.001
BURST_EVERY, BURST_STEPS, BURST_FACTOR = 40, 20, 8.0
TOPICS = 4
PREFILL_EVERY, PREFILL_FACTOR = 8, 8


@dataclass(frozen=True)
class Shape:
    steps: int = 1000
    layers: int = 4
    experts: int = 64
    top_k: int = 8
    #: Of a step; of a decode step, if there are prefill steps.
    tokens: int = 256


@dataclass(frozen=True)
class Routing:
    """The tokens of each expert ``[steps, layers, experts]``, and the tokens and phase of each step."""

    load: npt.NDArray[np.int32]
    num_tokens: npt.NDArray[np.int64]
    phase: list[str]


def _zipf(rng: np.random.Generator, shape: Shape) -> Float64:
    """Zipf's law in an order of each layer's own: ``[layers, experts]``."""
    ranks = np.tile(np.arange(1, shape.experts + 1), (shape.layers, 1))
    popularity: Float64 = -EXPONENT * np.log(rng.permuted(ranks, axis=1))
    return popularity


def _always(popularity: Float64, steps: int) -> Float64:
    return np.repeat(popularity[None], steps, axis=0)


def _uniform(_rng: np.random.Generator, shape: Shape) -> Float64:
    return np.zeros((shape.steps, shape.layers, shape.experts))


def _stationary(rng: np.random.Generator, shape: Shape) -> Float64:
    return _always(_zipf(rng, shape), shape.steps)


def _drifting(rng: np.random.Generator, shape: Shape) -> Float64:
    out = _stationary(rng, shape)
    away = np.zeros(out.shape[1:])
    for step in range(shape.steps):
        out[step] += away
        away = (1 - RETURN) * away + DRIFT * rng.standard_normal(away.shape)
    return out


def _bursty(rng: np.random.Generator, shape: Shape) -> Float64:
    out = _stationary(rng, shape)
    for first in np.flatnonzero(rng.random(shape.steps) < 1 / BURST_EVERY):
        steps, hot = rng.geometric(1 / BURST_STEPS), rng.integers(shape.experts, size=shape.layers)
        out[first : first + steps, np.arange(shape.layers), hot] += np.log(BURST_FACTOR)
    return out


def _topic_switch(rng: np.random.Generator, shape: Shape) -> Float64:
    orders = np.stack([_zipf(rng, shape) for _ in range(TOPICS)])
    return orders[np.arange(shape.steps) * TOPICS // shape.steps]


def _prefill_decode(rng: np.random.Generator, shape: Shape) -> Float64:
    out = _stationary(rng, shape)
    out[::PREFILL_EVERY] = _zipf(rng, shape)
    return out


FAMILIES: dict[str, Popularity] = {
    "uniform": _uniform,
    "stationary": _stationary,
    "drifting": _drifting,
    "bursty": _bursty,
    "topic switch": _topic_switch,
    "prefill/decode": _prefill_decode,
}


def generate(family: str, seed: int, shape: Shape) -> Routing:
    """The routing of a family; the same seed gives the same routing."""
    rng = np.random.default_rng([seed, list(FAMILIES).index(family)])
    popularity = FAMILIES[family](rng, shape)
    num_tokens = np.full(shape.steps, shape.tokens)
    phase = ["decode"] * shape.steps
    if family == "prefill/decode":
        num_tokens[::PREFILL_EVERY] *= PREFILL_FACTOR
        phase[::PREFILL_EVERY] = ["prefill"] * len(phase[::PREFILL_EVERY])
    load = np.zeros(popularity.shape, np.int32)
    for step, tokens in enumerate(num_tokens.tolist()):
        noise = rng.gumbel(size=(shape.layers, tokens, shape.experts))
        keys = popularity[step][:, None] + noise
        chosen = np.argpartition(keys, -shape.top_k, axis=-1)[..., -shape.top_k :]
        for layer in range(shape.layers):
            load[step, layer] = np.bincount(chosen[layer].reshape(-1), minlength=shape.experts)
    return Routing(load, num_tokens, phase)
