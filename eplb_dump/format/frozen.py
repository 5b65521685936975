"""Values that cannot be changed: as ``dataclass(frozen=True)``, but defined in a fifth of the time.

``dataclass`` writes the source of seven methods for each class and compiles it, 0.4 ms. A command defines a
hundred such classes before it reads anything. Only ``__init__`` has to be written for each; the other methods
are here, once.
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, field, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from typing import dataclass_transform
else:

    def dataclass_transform(**_: Any) -> Any:
        return lambda function: function


T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: type[T]) -> type[T]:
    """Make a class a dataclass whose attributes are set once, by its ``__init__``.

    Two values are equal if they are of one class and their fields are equal; then they have one hash. Methods
    that the class defines itself stay. ``dataclasses.fields``, ``replace`` and pickle work as with any
    dataclass.
    """
    made = dataclass(eq=False, repr=False)(cls)
    compared = [one.name for one in fields(made) if one.compare]  # type: ignore[arg-type]
    # Called by C code: some of these values are compared very often.
    made.__compared__ = attrgetter(*compared) if compared else type  # type: ignore[attr-defined]
    own = vars(cls)
    for method in (__eq__, __hash__, __repr__, __setattr__, __delattr__):
        if method.__name__ not in own:
            setattr(made, method.__name__, method)
    return made


def __eq__(self: Any, other: Any) -> bool:
    if other.__class__ is not self.__class__:
        return NotImplemented
    return bool(self.__compared__(self) == self.__compared__(other))


def __hash__(self: Any) -> int:
    return hash(self.__compared__(self))


def __repr__(self: Any) -> str:
    shown = (f"{one.name}={getattr(self, one.name)!r}" for one in fields(self) if one.repr)
    return f"{type(self).__qualname__}({', '.join(shown)})"


def __setattr__(self: Any, name: str, value: object) -> None:
    own = self.__dict__
    if name in own:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")
    own[name] = value


def __delattr__(self: Any, name: str) -> None:
    raise FrozenInstanceError(f"cannot delete field {name!r}")
