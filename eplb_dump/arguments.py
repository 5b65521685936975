"""Validation of the writer's arguments. Each function raises TypeError or ValueError naming the argument."""

from __future__ import annotations

import json
import operator
import os
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eplb_dump.format.schema import MAX_NUMBER, RUN_ID_PATTERN, Scope

#: Three decades; a thread cannot wait for much longer.
_MOST_SECONDS = 1e9
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGTP]?)(i?)B?", re.ASCII | re.IGNORECASE)
_AGE = re.compile(r"(\d+(?:\.\d+)?) ?([smhdw]?)", re.ASCII | re.IGNORECASE)
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
#: Characters of JSON. Readers refuse a session.json that is much larger.
_MAX_CONFIG = 1 << 20


def new_session_id(now_ns: int, host: str) -> str:
    """A name that is unique by time, host, process and a random number, and sorts by time."""
    moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now_ns // 10**9))
    name = "".join(c if c.isalnum() and c.isascii() else "-" for c in host)[:40]
    return f"{moment}.{now_ns % 10**9:09d}Z-{name}-{os.getpid()}-{secrets.token_hex(4)}"


def is_integer(value: Any) -> bool:
    """Whether it is an int or a numpy integer. A tensor is not: reading it would wait for the device."""
    return type(value) is int or isinstance(value, np.integer)


def is_duration(value: Any) -> bool:
    """Whether it is a Python or numpy number, at least 0 and finite."""
    if type(value) is not float:
        if not is_integer(value) and not isinstance(value, np.floating):
            return False
        try:
            value = float(value)  # a float16 cannot be compared with MAX_NUMBER
        except Exception:  # an int too large, or a subclass that does anything
            return False
    return bool(0 <= value < MAX_NUMBER)


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


def require_bytes(name: str, value: Any, least: int) -> int:
    """A number of bytes, also as a text: ``"2G"`` (10^9), ``"500M"``, ``"64MiB"`` (2^20)."""
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            raise ValueError(f"{name} must be a number of bytes, such as 500M, 64MiB or 2G, not {value!r}")
        power = " KMGTP".index(match[2].upper() or " ")
        value = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if is_integer(value) and 0 <= value < least:
        raise ValueError(f"{name} must be at least {least >> 20} MiB, not {value} bytes")
    return require_integer(name, value, least, MAX_NUMBER)


def require_age(name: str, value: Any) -> float:
    """A number of seconds, also as a text: ``"7d"``, ``"12h"``, ``"90m"``."""
    if isinstance(value, str):
        match = _AGE.fullmatch(value.strip())
        if match is None:
            raise ValueError(f"{name} must be a time such as 7d, 12h, 90m or 30s, not {value!r}")
        value = float(match[1]) * _SECONDS[match[2].lower()]
    return require_seconds(name, value)


def require_path(name: str, value: Any) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path, not {type(value).__name__}")
    return Path(value)


def require_name(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be the model's name, not {value!r}")
    return value


def require_scope(value: Any) -> Scope:
    if not isinstance(value, str) or value not in {s.value for s in Scope}:
        raise ValueError(f'scope must be "local" or "global", not {value!r}')
    return Scope(value)


def require_run_id(value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and RUN_ID_PATTERN.fullmatch(value)):
        raise ValueError(
            f"run_id must be 1 to 128 letters, digits, '.', '_' or '-', beginning with a letter "
            f"or digit, not {value!r}"
        )
    return value


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
        # A copy, as it will be read back: keys become strings.
        text = json.dumps(dict(value), allow_nan=False)
        fields: dict[str, Any] = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be plain JSON values: {error}") from None
    if len(text) > _MAX_CONFIG:
        raise ValueError(f"{name} must be at most {_MAX_CONFIG:,} characters of JSON, as all files repeat it")
    return fields
