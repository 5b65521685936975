"""Reports: the base classes of all, their conversion to JSON documents, and how a notebook gets them.

This module imports nothing from the package, so every row can use it: the reader's counts and the reports
of ``analysis``, ``replay``, ``live``, ``transfer``, ``report`` and ``batch``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any, Concatenate, ParamSpec, TypeVar

from eplb_dump.format.frozen import frozen

#: The version of every JSON document that a command prints or saves. It goes up if a key is removed or
#: changes its meaning, not if one is added.
SCHEMA_VERSION = 1

Source = TypeVar("Source")
Arguments = ParamSpec("Arguments")

_PLAIN = frozenset({str, int, bool, type(None)})


def versioned(document: dict[str, Any]) -> dict[str, Any]:
    """A JSON document as users get it, with the key ``schema_version``."""
    return {"schema_version": SCHEMA_VERSION, **document}


def as_json(value: Any) -> Any:
    """Convert to JSON types: dataclasses to objects, tuples and arrays to lists, NaN and infinity to null.

    An object with a method ``to_json`` chooses its keys. Any other dataclass becomes its fields, in order. A
    data frame becomes a list of its rows, converted one by one, as there may be a million.
    """
    kind = type(value)
    if kind in _PLAIN:  # first, as a document has thousands of them
        return value
    if kind is float:
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: item if type(item) in _PLAIN else as_json(item) for key, item in value.items()}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):  # numpy's
        return None
    if hasattr(value, "to_json"):
        return as_json(value.to_json())
    if is_dataclass(value):
        return as_json(_fields(value))
    if hasattr(value, "iter_rows"):  # a frame of polars, which this module does not import
        return [as_json(row) for row in value.iter_rows(named=True)]
    if hasattr(value, "tolist"):  # numpy, which this module does not import
        return as_json(value.tolist())
    return str(value) if isinstance(value, PurePath) else value


def time_key(key: str, value: Any = 0) -> str | None:
    """The key of a step's clock time, ``first_time`` of ``first_step``; None if the key is of something else.

    Args:
        value: what the document has there; a step is an integer, or null.
    """
    if value is not None and type(value) is not int:
        return None
    if (key == "step" or key.endswith("_step")) and not key.endswith(("per_step", "of_step")):
        return f"{key[:-4]}time"
    if key in ("first", "last", "against") or (key == "since" and value is not None):
        return f"{key}_time"
    return None


def with_times(document: dict[str, Any], time_of: Callable[[int], str | None]) -> dict[str, Any]:
    """A document of JSON types that has the clock time beside each step.

    An object that states times by itself, ``since``, stays as it is.

    Args:
        time_of: the time of a step, ISO 8601 in UTC; called once for each step, in order.
    """
    times = {step: time_of(step) for step in sorted(set(_steps(document)))}

    def timed(value: Any) -> Any:
        if isinstance(value, list):
            return [timed(item) for item in value]
        if not isinstance(value, dict):
            return value
        result = {}
        for key, item in value.items():
            result[key] = timed(item)
            beside = _time_key(value, key)
            if beside is not None:
                result[beside] = None if item is None else times[item]
        return result

    found: dict[str, Any] = timed(document)
    return found


def _steps(value: Any) -> Iterator[int]:
    if isinstance(value, list):
        for item in value:
            yield from _steps(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _steps(item)
            if item is not None and _time_key(value, key) is not None:
                yield item


def _time_key(document: dict[str, Any], key: str) -> str | None:
    found = time_key(key, document[key])
    states_times = "since" in document and key != "since"
    return None if found is None or found in document or states_times else found


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


class Report:
    """A dataclass whose JSON document has its fields as keys, in order, unless it overrides ``to_json``."""

    #: The run that it is about, if :func:`remembers_run` made it. It has the clock times of steps.
    _run: Any = None

    def _repr_html_(self) -> str | None:
        """What a notebook shows: what the command prints. None: a notebook shows its ``repr``."""
        return _to_html(self)

    def to_json(self) -> dict[str, Any]:
        """The document that ``--json`` prints, without ``schema_version`` and clock times."""
        return self.document(_fields(self))

    def document(self, values: dict[str, Any]) -> dict[str, Any]:
        """The JSON document with these keys and values."""
        return {key: as_json(value) for key, value in values.items()}


@frozen
class RunReport(Report):
    """A report on one run. Its JSON document starts with ``"run": {"run_id": …, "model": …}``."""

    run_id: str
    model: str

    def document(self, values: dict[str, Any]) -> dict[str, Any]:
        head = {"run_id": self.run_id, "model": self.model}
        rest = {key: value for key, value in values.items() if key not in head}
        return super().document({"run": head, **rest})


AnyReport = TypeVar("AnyReport", bound=Report)


def remembers_run(
    analysis: Callable[Concatenate[Source, Arguments], AnyReport],
) -> Callable[Concatenate[Source, Arguments], AnyReport]:
    """A decorator of functions whose first argument is the run to report on: a notebook shows its clock."""

    @functools.wraps(analysis)
    def report(run: Source, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> AnyReport:
        made = analysis(run, *args, **kwargs)
        object.__setattr__(made, "_run", run)  # reports are frozen
        return made

    return report


def show_in_notebooks(html: Callable[[Report], str | None]) -> None:
    """Set what turns a report into HTML. Only the command line, far below, knows what reports look like."""
    global _to_html  # noqa: PLW0603 - it is a setting of the process
    _to_html = html


def _no_html(report: Report) -> str | None:
    return None


_to_html: Callable[[Report], str | None] = _no_html
