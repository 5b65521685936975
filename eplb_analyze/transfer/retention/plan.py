"""What is thinned and removed: ages first, then the bytes of the whole dump. Only decisions.

Ranks that can be merged are merged before anything is thinned for bytes. The caller merges them, or foresees
what the merge will leave, and the decision goes on with that.

The unit is what the ranks of a run recorded of the same steps, so that no step is kept in full by some ranks
only. The sizes of files that are still to be written are upper bounds, from the footers of files that are
there: a dry run and the run decide alike, but for the sizes of merged runs, and the dump ends up within its
limit. A number of bytes never costs the newest steps: a limit that is too small is an error to report, not an
order to empty the dump.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from eplb_analyze.errors import UsageError
from eplb_analyze.transfer.retention.sizes import size_at
from eplb_analyze.transfer.retention.survey import NEWBORN, Piece, SurveyedRun
from eplb_dump.format.frozen import frozen
from eplb_dump.format.retention import NOTABLE_SHARE, SHARES, TIERS
from eplb_dump.format.schema import Tier

#: Clocks of hosts may differ by so much: what ended this long before a session began can be of its steps.
_CLOCKS_NS = 60 * 10**9


@frozen
class Policy:
    """What is kept. Ages in ns, by the time of a step; None: without a limit."""

    max_bytes: int | None = None
    keep_full: int | None = None
    keep_ranks: int | None = None
    keep_minutes: int | None = None
    max_age: int | None = None

    def __post_init__(self) -> None:
        """Raises UsageError if no limit is given, or a finer tier is to be kept for longer."""
        named = {
            name: value for name, value in vars(self).items() if name.startswith("keep") and value is not None
        }
        if not named and self.max_age is None and self.max_bytes is None:
            raise UsageError(
                "say what to keep: --max-bytes, --max-age, --keep-full, --keep-ranks or --keep-minutes"
            )
        ages = [*named.items(), *([] if self.max_age is None else [("max_age", self.max_age)])]
        for (finer, age), (coarser, longer) in itertools.pairwise(ages):
            if age > longer:
                one, other = (f"--{name.replace('_', '-')}" for name in (finer, coarser))
                raise UsageError(
                    f"{one} is longer than {other}: {other} must be at least as long, because steps "
                    "pass from tier to tier and then are removed"
                )

    @property
    def limits(self) -> dict[Tier, int | None]:
        """The greatest age in each tier: a limit of a coarser tier limits the finer ones, too."""
        limits: dict[Tier, int | None] = {}
        least = self.max_age
        for tier, age in (
            (Tier.MINUTES, self.keep_minutes),
            (Tier.RANKS, self.keep_ranks),
            (Tier.FULL, self.keep_full),
        ):
            least = min((limit for limit in (least, age) if limit is not None), default=None)
            limits[tier] = least
        return limits

    def tier_at(self, age: int) -> Tier:
        """The finest tier in which steps of an age may be."""
        over = [tier for tier, limit in self.limits.items() if limit is not None and age > limit]
        return Tier.FULL if not over else TIERS[1 + max(map(TIERS.index, over))]

    def outlives(self, age: int) -> bool:
        """Whether something of an age is to be gone in every tier."""
        return self.tier_at(age) is Tier.GONE


@dataclass(eq=False)
class Unit:
    """The pieces of a run that cover the same steps, at the same time."""

    run: RunPlan
    pieces: list[Piece]
    #: Why none of it is thinned.
    live: str | None
    notable: bool
    last_ns: int
    #: The tier that each piece has, or gets.
    tiers: dict[Piece, Tier] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The model of all of them."""
        info = self.pieces[0].session.info
        return "" if info is None else info.model

    @property
    def tier(self) -> Tier:
        """The finest tier of what can be thinned; gone if nothing can."""
        return min((t for p, t in self.tiers.items() if p.fault is None), key=TIERS.index, default=Tier.GONE)


@dataclass(eq=False)
class RunPlan:
    """What becomes of one run."""

    run: SurveyedRun
    #: Why none of it is thinned now; None: it may be.
    stays: str | None = None
    units: list[Unit] = field(default_factory=list)
    #: Why the whole run is removed: ``age`` or ``bytes``.
    removed: str | None = None
    #: Why pieces are thinned.
    reasons: dict[Piece, str] = field(default_factory=dict)
    #: The newest pieces of the dump, if it stays larger than its limit because they are never given up.
    newest: list[Piece] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes of its files, of which those that are to be written are upper bounds."""
        moves = self.moves.items()
        return self.run.size + sum(size_at(piece, tier) - piece.size for piece, tier in moves)

    @property
    def moves(self) -> dict[Piece, Tier]:
        """The pieces that are thinned, with their new tiers."""
        if self.removed is not None:
            return {}
        return {piece: tier for piece, tier in self.tiers() if tier is not piece.tier and piece.fault is None}

    def tiers(self) -> Iterator[tuple[Piece, Tier]]:
        """All pieces, with the tiers that they have afterwards."""
        for unit in self.units:
            yield from unit.tiers.items()

    @property
    def is_gone(self) -> bool:
        """Whether no piece holds any figure."""
        return all(tier is Tier.GONE for _, tier in self.tiers())

    def why_kept(self) -> str | None:
        """Why the run cannot be removed, whatever its age."""
        if self.run.live is not None or self.run.has_newborn:
            return self.run.live or NEWBORN
        if self.run.foreign:
            return f"{self.run.foreign[0]} is not a file of a dump"
        return None


def plan_for_age(run: SurveyedRun, policy: Policy, now_ns: int, stays: str | None = None) -> RunPlan:
    """Decide what the ages leave of a run. Raises UnreachableError.

    ``stays``: why none of it is thinned now.
    """
    plan = RunPlan(run, stays)
    plan.units = [*_units(plan)]
    for unit in plan.units:
        _thin_to(unit, policy.tier_at(now_ns - unit.last_ns), "age")
    if plan.why_kept() is None and policy.outlives(now_ns - run.last_ns):
        plan.removed = "age"
    for piece, tier in plan.moves.items():
        size_at(piece, tier)  # finds what cannot be thinned
    return plan


def plan_for_bytes(plans: Iterable[RunPlan], most: int, merge: Callable[[RunPlan], RunPlan]) -> list[RunPlan]:
    """Decide what else is to go, so that all runs together take at most so many bytes.

    Before any is thinned, ranks are merged, of the oldest run first, until the dump fits.

    Args:
        plans: for ages.
        merge: returns the plan of the merged run, or the given one if its ranks are not merged.

    Returns the plans for all runs. Raises UnreachableError.
    """
    budget = _Budget(plans, most)
    budget.remove_gone()
    budget.merge(merge)
    budget.thin()
    return budget.plans


def is_coarser(tier: Tier, than: Tier) -> bool:
    """Whether less is kept in a tier than in another."""
    return TIERS.index(tier) > TIERS.index(than)


def _thin_to(unit: Unit, tier: Tier, reason: str) -> None:
    if unit.live is not None:
        return
    for piece, now in unit.tiers.items():
        if piece.fault is None and is_coarser(tier, now):
            unit.tiers[piece] = tier
            unit.run.reasons[piece] = reason


def _units(plan: RunPlan) -> Iterator[Unit]:
    windows: dict[tuple[str, int], list[Piece]] = defaultdict(list)
    for session in plan.run.sessions:
        if session.info is None or session.fault is not None:
            continue
        window = session.info.segment_steps * session.info.interval
        for piece in session.pieces:
            windows[session.info.model, piece.entry.first_step // window].append(piece)
    for pieces in windows.values():
        pieces.sort(key=lambda piece: piece.first_ns)
        together: list[Piece] = []
        for piece in pieces:
            # Starts that share a run id have the same steps at different times.
            if together and piece.first_ns > max(p.last_ns for p in together):
                yield _unit(plan, together)
                together = []
            together.append(piece)
        yield _unit(plan, together)


def _unit(plan: RunPlan, pieces: list[Piece]) -> Unit:
    return Unit(
        plan,
        pieces,
        live=_live(plan.run, pieces) or plan.stays,
        notable=any(piece.notable for piece in pieces),
        last_ns=max(piece.last_ns for piece in pieces),
        tiers={piece: piece.tier for piece in pieces},
    )


def _live(run: SurveyedRun, pieces: Sequence[Piece]) -> str | None:
    """Why pieces must stay: the writer of one of them, or of the same steps, may be alive.

    A protected session may hold steps in a journal, or in files that nothing lists. Everything that ranks of
    its model recorded since it began then counts as the same steps.
    """
    for piece in pieces:
        if piece.session.live is not None:
            return piece.session.live
    model = {piece.session.info.model for piece in pieces if piece.session.info is not None}
    last_ns = max(piece.last_ns for piece in pieces) + _CLOCKS_NS
    for session in run.sessions:
        if session.live is None or (session.info is not None and session.info.model not in model):
            continue
        since = session.unlisted_since
        if since is not None and last_ns >= since:
            return session.live
    return None


class _Budget:
    """Thins the oldest, of the finest tier above its share, until the dump is within a number of bytes."""

    def __init__(self, plans: Iterable[RunPlan], most: int) -> None:
        self.plans = sorted(plans, key=lambda plan: (plan.run.last_ns, plan.run.run_id))
        self._most = most
        #: Bytes of each run, of all of them, and of segments by tier.
        self._of_run: dict[RunPlan, int] = {}
        self._total = 0
        self._of_tier: dict[Tier, int] = dict.fromkeys(TIERS, 0)
        for plan in self.plans:
            if plan.removed is None:
                self._count(plan)

    def _count(self, plan: RunPlan) -> None:
        self._of_run[plan] = plan.size
        self._total += plan.size
        for piece, tier in plan.tiers():
            self._of_tier[tier] += size_at(piece, tier)

    def _forget(self, plan: RunPlan) -> None:
        self._total -= self._of_run.pop(plan)
        for piece, tier in plan.tiers():
            self._of_tier[tier] -= size_at(piece, tier)

    def remove_gone(self) -> None:
        """Remove what holds no figure any more."""
        for plan in self.plans:
            if self._total > self._most:
                self._remove_if_gone(plan)

    def merge(self, merge: Callable[[RunPlan], RunPlan]) -> None:
        """Merge the ranks of the oldest runs until the dump fits."""
        for index, plan in enumerate(self.plans):
            if self._total > self._most and plan.removed is None:
                self.plans[index] = merged = merge(plan)
                if merged is not plan:
                    self._forget(plan)
                    self._count(merged)

    def thin(self) -> None:
        """Thin until the dump fits, or nothing is left that may be."""
        newest = self._newest_units()
        units = [u for plan in self._of_run for u in plan.units if u.live is None and u not in newest]
        spared = self._spared(units)
        for some in ([u for u in units if u not in spared], [*spared]):
            self._thin([unit for unit in some if unit.run.removed is None])
        if self._total > self._most:
            for unit in newest:
                if unit.live is None:
                    unit.run.newest += [piece for piece in unit.pieces if piece.fault is None]

    def _newest_units(self) -> set[Unit]:
        """Of the newest run that holds figures: the newest unit of each model, if possible in full."""
        units = [unit for plan in self._of_run for unit in plan.units if unit.tier is not Tier.GONE]
        run = max(units, key=_order).run if units else None
        newest: dict[str, Unit] = {}
        for unit in sorted(
            (u for u in units if u.run is run), key=lambda u: (u.tier is Tier.FULL, _order(u))
        ):
            newest[unit.model] = unit
        return {*newest.values()}

    def _spared(self, units: Sequence[Unit]) -> set[Unit]:
        """The newest notable units in full that take no more than their share together."""
        spared: set[Unit] = set()
        taken = 0.0
        notable = [unit for unit in units if unit.notable and unit.tier is Tier.FULL]
        for unit in sorted(notable, key=_order, reverse=True):
            taken += sum(size_at(piece, unit.tiers[piece]) for piece in unit.pieces)
            if taken > NOTABLE_SHARE * self._most:
                break
            spared.add(unit)
        return spared

    def _thin(self, units: Sequence[Unit]) -> None:
        queues: dict[Tier, list[tuple[tuple[int, str, int], int, Unit]]] = {tier: [] for tier in SHARES}
        for number, unit in enumerate(units):
            if unit.tier is not Tier.GONE:
                queues[unit.tier].append((_order(unit), number, unit))
        for queue in queues.values():
            heapq.heapify(queue)
        while self._total > self._most:
            some = [tier for tier in SHARES if queues[tier]]
            if not some:
                return
            above = [tier for tier in some if self._of_tier[tier] > SHARES[tier] * self._most]
            tier = (above or some)[0]
            item = heapq.heappop(queues[tier])
            to = TIERS[TIERS.index(tier) + 1]
            self._move(item[2], to)
            if to is not Tier.GONE:
                heapq.heappush(queues[to], item)

    def _move(self, unit: Unit, tier: Tier) -> None:
        before = dict(unit.tiers)
        _thin_to(unit, tier, "bytes")
        for piece, now in unit.tiers.items():
            if now is not before[piece]:
                was, size = size_at(piece, before[piece]), size_at(piece, now)
                self._of_tier[before[piece]] -= was
                self._of_tier[now] += size
                self._of_run[unit.run] += size - was
                self._total += size - was
        self._remove_if_gone(unit.run)

    def _remove_if_gone(self, plan: RunPlan) -> None:
        """Remove a run if it holds nothing but what later steps would need; the newest run stays."""
        if not plan.is_gone or plan.why_kept() is not None or plan.removed is not None:
            return
        if plan is next(p for p in reversed(self.plans) if p.removed != "age"):
            return
        if any(session.stuck is not None for session in plan.run.sessions):
            return
        plan.removed = "bytes"
        self._forget(plan)


def _order(unit: Unit) -> tuple[int, str, int]:
    """Oldest first; of equally old ones, by run and step."""
    return unit.last_ns, unit.run.run.run_id, min(piece.entry.first_step for piece in unit.pieces)
