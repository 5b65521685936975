"""What is thinned and removed: ages first, then the bytes of the whole dump. Only decisions.

The unit is what the ranks of a run recorded of the same steps, so that no step is kept in full by some ranks
only. The sizes of files that are still to be written are upper bounds, from the footers of files that are
there: a dry run and the run decide alike, and the dump ends up within its limit. A number of bytes never
costs the newest steps: a limit that is too small is an error to report, not an order to empty the dump.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from eplb_analyze.errors import UsageError
from eplb_analyze.transfer.retention.sizes import size_at
from eplb_analyze.transfer.retention.survey import Piece, SurveyedRun
from eplb_dump.format.retention import NOTABLE_SHARE, SHARES, TIERS
from eplb_dump.format.schema import Tier

#: Clocks of hosts may differ by so much: what ended this long before a session began can be of its steps.
_CLOCKS_NS = 60 * 10**9


@dataclass(frozen=True)
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
    units: list[Unit] = field(default_factory=list)
    #: Why the whole run is removed: ``age`` or ``bytes``.
    removed: str | None = None
    #: Why pieces are thinned.
    reasons: dict[Piece, str] = field(default_factory=dict)
    #: The newest pieces of the dump, if it stays larger than its limit because they are never given up.
    newest: list[Piece] = field(default_factory=list)

    @property
    def moves(self) -> dict[Piece, Tier]:
        """The pieces that are thinned, with their new tiers."""
        if self.removed is not None:
            return {}
        moved = ((p, t) for unit in self.units for p, t in unit.tiers.items() if t is not p.tier)
        return {piece: tier for piece, tier in moved if piece.fault is None}

    @property
    def is_gone(self) -> bool:
        """Whether no piece holds any figure."""
        return all(t is Tier.GONE for unit in self.units for t in unit.tiers.values())

    def why_kept(self) -> str | None:
        """Why the run cannot be removed, whatever its age."""
        if self.run.live is not None or self.run.has_newborn:
            return self.run.live or "a rank began in it less than ten minutes ago"
        if self.run.foreign:
            return f"{self.run.foreign[0]} is not a file of a dump"
        return None


def make_plan(runs: Sequence[SurveyedRun], policy: Policy, now_ns: int) -> list[RunPlan]:
    """Decide what becomes of each run. Raises UnreachableError."""
    plans = [RunPlan(run) for run in runs]
    for plan in plans:
        plan.units = [*_units(plan)]
    for plan in plans:
        for unit in plan.units:
            _thin_to(unit, policy.tier_at(now_ns - unit.last_ns), "age")
        if plan.why_kept() is None and policy.outlives(now_ns - plan.run.last_ns):
            plan.removed = "age"
    for plan in plans:
        for piece, tier in plan.moves.items():
            size_at(piece, tier)  # finds what cannot be thinned
    if policy.max_bytes is not None:
        _Budget(plans, policy.max_bytes).apply()
    return plans


def _thin_to(unit: Unit, tier: Tier, reason: str) -> None:
    if unit.live is not None:
        return
    for piece, now in unit.tiers.items():
        if piece.fault is None and TIERS.index(now) < TIERS.index(tier):
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
        live=_live(plan.run, pieces),
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

    def __init__(self, plans: Sequence[RunPlan], max_bytes: int) -> None:
        self._plans, self._most = plans, max_bytes
        #: Bytes of segments by tier.
        self._of_tier: dict[Tier, int] = dict.fromkeys(TIERS, 0)
        self._of_run: dict[RunPlan, int] = {}
        self._pieces: dict[Piece, int] = {}
        for plan in plans:
            if plan.removed is not None:
                continue
            self._of_run[plan] = plan.run.size
            for unit in plan.units:
                for piece, tier in unit.tiers.items():
                    self._pieces[piece] = size = size_at(piece, tier)
                    self._of_tier[tier] += size
                    self._of_run[plan] += size - piece.size
        self._total = sum(self._of_run.values())
        #: It is never removed for bytes, nor are these thinned.
        self._newest_run = max(
            self._of_run, key=lambda plan: (plan.run.last_ns, plan.run.run_id), default=None
        )
        self._newest = self._newest_units()

    def apply(self) -> None:
        self._apply()
        if self._total > self._most:
            for unit in self._newest:
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

    def _apply(self) -> None:
        # What holds no figure any more goes first.
        for plan in sorted(self._of_run, key=lambda plan: plan.run.last_ns):
            if self._total <= self._most:
                return
            self._remove_if_gone(plan)
        units = [u for plan in self._of_run for u in plan.units if u.live is None and u not in self._newest]
        spared = self._spared(units)
        for some in ([u for u in units if u not in spared], [*spared]):
            self._thin([unit for unit in some if unit.run.removed is None])

    def _spared(self, units: Sequence[Unit]) -> set[Unit]:
        """The newest notable units in full that take no more than their share together."""
        spared: set[Unit] = set()
        taken = 0.0
        notable = [unit for unit in units if unit.notable and unit.tier is Tier.FULL]
        for unit in sorted(notable, key=_order, reverse=True):
            taken += sum(self._pieces[piece] for piece in unit.pieces)
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
            if now is before[piece]:
                continue
            size = size_at(piece, now)
            self._of_tier[before[piece]] -= self._pieces[piece]
            self._of_tier[now] += size
            change = size - self._pieces[piece]
            self._of_run[unit.run] += change
            self._total += change
            self._pieces[piece] = size
        self._remove_if_gone(unit.run)

    def _remove_if_gone(self, plan: RunPlan) -> None:
        """Remove a run if it holds nothing but what later steps would need."""
        if not plan.is_gone or plan.why_kept() is not None or plan.removed is not None:
            return
        if plan is self._newest_run:
            return
        if any(session.stuck is not None for session in plan.run.sessions):
            return
        plan.removed = "bytes"
        self._total -= self._of_run[plan]
        for unit in plan.units:
            for piece, tier in unit.tiers.items():
                self._of_tier[tier] -= self._pieces[piece]


def _order(unit: Unit) -> tuple[int, str, int]:
    """Oldest first; of equally old ones, by run and step."""
    return unit.last_ns, unit.run.run.run_id, min(piece.entry.first_step for piece in unit.pieces)
