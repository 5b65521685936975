"""Validation of what an engine passes to the writer."""

from __future__ import annotations

import json
import operator
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

#: A thread cannot wait for much longer than this, three decades.
_MOST_SECONDS = 1e9


#: Characters of JSON; of a larger session.json no reader would take a byte.
_MAX_CONFIG = 1 << 20


def package_version() -> str:
    from eplb_dump.format import __version__

    return __version__


def new_session_id(now_ns: int, host: str) -> str:
    """Unique by time, host, process and chance; sorts by time."""
    moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now_ns // 10**9))
    name = "".join(c if c.isalnum() and c.isascii() else "-" for c in host)[:40]
    return f"{moment}.{now_ns % 10**9:09d}Z-{name}-{os.getpid()}-{secrets.token_hex(4)}"


def is_integer(value: Any) -> bool:
    """An int or a numpy integer, no bool. A tensor is none: on CUDA, reading it would wait."""
    return type(value) is int or isinstance(value, np.integer)


def require_integer(name: str, value: Any, least: int, most: int = 2**31 - 1) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name} must be at least {least}, not {value!r}")
    if number > most:
        raise ValueError(f"{name} must be at most {most}, not {value!r}")
    return number


def require_seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    if not 0 < value <= _MOST_SECONDS:
        raise ValueError(f"{name} must be above 0 seconds and at most {_MOST_SECONDS:.0e}, not {value!r}")
    return float(value)


def require_text(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a text, not {type(value).__name__}")
    return value


def require_layers(layers: Sequence[int] | None) -> tuple[int, ...] | None:
    if layers is None:
        return None
    if not isinstance(layers, Iterable):
        raise TypeError(f"moe_layers must be a sequence of integers, not {type(layers).__name__}")
    numbers = tuple(require_integer("each of moe_layers", n, 0) for n in layers)
    if not numbers or list(numbers) != sorted(set(numbers)):
        raise ValueError("moe_layers must be the model's layer numbers, ascending, each once")
    return numbers


def require_json_mapping(name: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping, not {type(value).__name__}")
    try:
        # As it will be read back: keys become texts, and later changes of it do not show.
        text = json.dumps(dict(value), allow_nan=False)
        fields: dict[str, Any] = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be plain JSON values: {error}") from None
    if len(text) > _MAX_CONFIG:
        raise ValueError(f"{name} must be at most {_MAX_CONFIG:,} characters of JSON, as all files repeat it")
    return fields
