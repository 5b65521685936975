"""The dispatches that have a name: those of engines, the ideal, and the bound."""

from __future__ import annotations

from collections.abc import Callable

from eplb_analyze.dispatch import sources
from eplb_analyze.dispatch.deal import ByPosition, Dealt
from eplb_analyze.dispatch.even import Even
from eplb_analyze.dispatch.lp import LeastMaximum
from eplb_analyze.dispatch.rule import Dispatch
from eplb_analyze.errors import UsageError
from eplb_analyze.text import listed
from eplb_dump.format.frozen import frozen
from eplb_dump.format.journal import Int32

#: As the recorded replicas share their tokens.
MEASURED = "measured"
#: The bound, which no engine reaches.
LP = "lp"

#: The replica that each source rank has chosen: of a placement ``[layers, slots]``, the number of experts, of
#: ranks and of nodes. See :mod:`eplb_analyze.dispatch.sources`.
Table = Callable[[Int32, int, int, int], Int32]


@frozen
class NamedDispatch:
    """A dispatch, and which replica it has a source rank choose."""

    rule: Dispatch
    #: Until the first rearrangement, and from it on; None: it does not depend on the source rank.
    at_start: Table | None = None
    rearranged: Table | None = None

    @property
    def by_source(self) -> bool:
        """Whether it depends on the source rank."""
        return self.at_start is not None or self.rearranged is not None


def _ascend(placement: Int32, num_logical_experts: int, ranks: int, num_nodes: int) -> Int32:
    return sources.ascend(placement, num_logical_experts, ranks)  # on any node


def _sglang_dynamic(token_replication: int) -> NamedDispatch:
    """If all ranks see all tokens, there is no all-to-all, and the token's row chooses the replica.

    Else a random number does, among the replicas in the table. The table of the start has only the nearest
    one; the table of a rearrangement has all (SGLang 0.5.23, ``init_by_mapping`` and ``init_by_eplb``).
    """
    if token_replication > 1:
        return NamedDispatch(ByPosition(0.0, token_replication, hashed=False))
    return NamedDispatch(Dealt(), at_start=sources.sglang_nearest)


def _sglang_static(token_replication: int) -> NamedDispatch:
    rule = Dealt(0.0, token_replication)
    return NamedDispatch(rule, sources.sglang_static_at_start, sources.sglang_static)


#: What each name is, given how many times the engine counts a token.
DISPATCHES: dict[str, Callable[[int], NamedDispatch]] = {
    "even": lambda copies: NamedDispatch(Even(copies)),
    "random": lambda copies: NamedDispatch(Dealt(0.0, copies)),
    "vllm": lambda copies: NamedDispatch(ByPosition(0.0, copies)),
    "sglang-static": _sglang_static,
    "sglang-dynamic": _sglang_dynamic,
    "vllm-ascend": lambda copies: NamedDispatch(Dealt(0.0, copies), _ascend, _ascend),
    LP: lambda copies: NamedDispatch(LeastMaximum()),
}
NAMES = (MEASURED, *DISPATCHES)


def named(name: str, measured: Dispatch, token_replication: int = 1) -> NamedDispatch:
    """The dispatch of a name; ``measured`` is the one that the recording shows. Raises UsageError."""
    if name == MEASURED:
        return NamedDispatch(measured)
    check(name)
    return DISPATCHES[name](token_replication)


def check(name: str) -> None:
    """Raises UsageError if there is no dispatch of this name."""
    if name not in NAMES:
        raise UsageError(f"there is no dispatch {name!r}; known: {listed(NAMES)}")
