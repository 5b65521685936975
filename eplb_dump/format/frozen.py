"""Values that cannot be changed: as ``dataclass(frozen=True)``, but defined in a fifth of the time.

``dataclass`` writes the source of seven methods for each class and compiles it, 0.4 ms. A command defines a
hundred such classes before it reads anything. Only ``__init__`` has to be written for each; the other methods
are here, once.
"""

from __future__ import annotations

from dataclasses import MISSING, FrozenInstanceError, dataclass, field, fields
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
    dataclass; a subclass must be made by ``frozen``, too.
    """
    made: Any = dataclass(eq=False, repr=False)(cls)
    own = fields(made)
    made.__settable__ = frozenset(one.name for one in own if one.init or one.default_factory is not MISSING)
    compared = [one.name for one in own if one.compare]
    # A tuple also of one field: tuples find equal what is the same object, for instance NaN.
    names = compared * 2 if len(compared) == 1 else compared
    made.__compared__ = attrgetter(*names) if names else type
    for method in (__eq__, __hash__, __repr__, __setattr__, __delattr__):
        if vars(cls).get(method.__name__) is None:
            setattr(made, method.__name__, method)
    return cls


def __eq__(self: Any, other: Any) -> Any:
    if other.__class__ is not self.__class__:
        return NotImplemented
    values = self.__compared__
    return values(self) == values(other)


def __hash__(self: Any) -> int:
    return hash(self.__compared__(self))


def __repr__(self: Any) -> str:
    shown = (f"{one.name}={getattr(self, one.name)!r}" for one in fields(self) if one.repr)
    return f"{type(self).__qualname__}({', '.join(shown)})"


def __setattr__(self: Any, name: str, value: object) -> None:
    own = self.__dict__
    if name in own or name not in self.__settable__:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")
    own[name] = value


def __delattr__(self: Any, name: str) -> None:
    raise FrozenInstanceError(f"cannot delete field {name!r}")
