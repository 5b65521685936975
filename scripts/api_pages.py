"""For mkdocs: in docs/api.md, classes made by ``frozen`` appear as the dataclasses that they are."""

from __future__ import annotations

from typing import Any

import griffe

FROZEN = "eplb_dump.format.frozen.frozen"


class FrozenClasses(griffe.Extension):
    """Read statically, a class shows its decorator only by name."""

    def on_class_instance(self, *, cls: griffe.Class, **_: Any) -> None:
        for decorator in cls.decorators:
            if decorator.callable_path == FROZEN:
                decorator.value = griffe.ExprName("dataclasses.dataclass")
