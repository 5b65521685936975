"""Tests of values that cannot be changed."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace

import pytest

from eplb_dump.format.frozen import frozen


@frozen
class Point:
    x: int
    y: int = 0
    label: str = field(default="", compare=False)
    secret: int = field(default=1, repr=False)
    fixed: int = field(default=9, init=False, repr=False)
    made: list[int] = field(default_factory=list, init=False, repr=False, compare=False)

    @functools.cached_property
    def total(self) -> int:
        return self.x + self.y


@frozen
class Point3(Point):
    z: int = 0


@frozen
class Named:
    name: str

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Named) and self.name.lower() == other.name.lower()

    def __hash__(self) -> int:
        return hash(self.name.lower())


@frozen
class Compared:  # noqa: PLW1641
    name: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Compared) and self.name == other.name


@frozen
class One:
    value: float


@frozen
class Nothing:
    pass


@functools.cache
def standard(of: type) -> type:
    """What the standard library makes of the same fields."""
    made = type(of.__qualname__, (), {"__annotations__": {}})
    for one in fields(of):
        made.__annotations__[one.name] = one.type
        if one.default is not one.default_factory:  # both MISSING: none
            options = {"compare": one.compare, "repr": one.repr, "init": one.init}
            setattr(
                made, one.name, field(default=one.default, default_factory=one.default_factory, **options)
            )
    return dataclass(frozen=True)(made)


@pytest.mark.parametrize("arguments", [(1,), (1, 2), (1, 2, "a"), (1, 2, "a", 3)])
def test_it_is_as_the_standard_library_makes_it(arguments: tuple[object, ...]) -> None:
    own, other = Point(*arguments), standard(Point)(*arguments)  # type: ignore[arg-type]
    assert repr(own) == repr(other)
    assert hash(own) == hash(other)
    for different in [(1,), (1, 2, "b"), (1, 2, "a", 4), (2, 2)]:
        same = standard(Point)(*different) == other
        assert (Point(*different) == own) is same  # type: ignore[arg-type]


def test_values_of_different_classes_are_never_equal() -> None:
    assert Point(1) != Point3(1)
    assert Point(1) != (1, 0)
    assert Point3(1, z=2) == Point3(1, z=2) != Point3(1, z=3)
    assert Nothing() == Nothing()
    assert hash(Nothing()) == hash(Nothing())


def test_nothing_of_it_can_be_changed() -> None:
    point = Point(1)
    assert point.total == 1
    for name in ("x", "label", "fixed", "made", "total", "unknown"):
        with pytest.raises(FrozenInstanceError, match=name):
            setattr(point, name, 3)
        with pytest.raises(FrozenInstanceError, match=name):
            delattr(point, name)
    assert (point, point.total, point.fixed) == (Point(1), 1, 9)
    assert point.made is not Point(1).made


def test_the_same_object_is_equal_to_itself() -> None:
    assert One(math.nan) == One(math.nan)  # math.nan is one object, as in a tuple
    assert One(float("nan")) != One(float("nan"))


def test_copies_are_equal() -> None:
    point = Point3(1, 2, "a", z=3)
    for other in (copy.copy(point), copy.deepcopy(point), pickle.loads(pickle.dumps(point))):  # noqa: S301
        assert (other, other.label, hash(other)) == (point, "a", hash(point))
    assert replace(point, z=4) == Point3(1, 2, z=4)


def test_methods_of_the_class_stay() -> None:
    assert repr(Named("a")) == "<a>"
    assert Named("A") == Named("a")
    assert len({Named("A"), Named("a")}) == 1
    assert len({Compared("a"), Compared("a"), Compared("b")}) == 2
