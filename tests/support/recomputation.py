"""The figures of a run once more, from its Parquet files alone, as docs/format.md and docs/metrics.md say.

This module uses numpy, pyarrow and json, and none of the project's code: an error in a reader or a formula
shows as a difference. It wants sealed runs, and is slow and plain on purpose.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

#: The order in which rows of one step of one rank count.
ORDER = {"recorded": 0, "dummy": 1}
#: States of a step, the gravest last: if no rank recorded it, the gravest of any rank is its state.
STATES = ("dummy", "not_sampled", "dropped", "rejected")
EMPTY = -1
#: With fewer steps on a side, a rearrangement is not measured.
LEAST = 8


@dataclass
class Row:
    """What counts of a rank in a step."""

    status: str
    #: [layers, slots]; None unless recorded.
    load: Any = None
    ep_size: int = 0


def _table(session: Path, name: str) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    for path in sorted(session.glob(f"{name}-*.parquet")):
        table = pq.ParquetFile(path).read()
        for column in table.column_names:
            if column != "time":
                columns.setdefault(column, []).extend(table[column].to_pylist())
    return columns


class Recomputation:
    """A run's steps, loads and placements, joined over its ranks and sessions."""

    def __init__(self, run: Path) -> None:
        folders = [path.parent for path in run.rglob("session.json")]
        metadata = {folder: json.loads((folder / "session.json").read_text()) for folder in folders}
        folders.sort(key=lambda folder: (metadata[folder]["created_unix_ns"], folder.name))
        first = metadata[folders[0]]
        self.scope: str = first["scope"]
        self.experts: int = first["num_logical_experts"]
        self.replication: int = first["token_replication"]
        self.ranks_per_node: int | None = first["ranks_per_node"]
        #: The row that counts, by step and rank.
        self.rows: dict[int, dict[int, Row]] = {}
        changes: dict[tuple[int, int], dict[int, Any]] = {}
        layers: set[int] = set(first["moe_layers"] or ())
        begins: dict[int, int] = {}
        for folder in reversed(folders):
            # From the first step of a rank's newer session on, what an older one says of placements is void.
            metadata[folder]["end"] = begins.get(metadata[folder]["ep_rank"], 2**62)
            own = min(_table(folder, "steps").get("step", [2**62]))
            begins[metadata[folder]["ep_rank"]] = min(own, metadata[folder]["end"])
        for folder in folders:
            rank = metadata[folder]["ep_rank"]
            loads, steps, placements = (_table(folder, name) for name in ("loads", "steps", "placements"))
            by_step: dict[int, dict[int, Any]] = {}
            size: dict[int, int] = {}
            for step, layer, ep_size, load in zip(
                *(loads.get(c, []) for c in ("step", "layer", "ep_size", "load")), strict=True
            ):
                by_step.setdefault(step, {})[layer] = load
                size[step] = ep_size
                layers.add(layer)
            for step, status in zip(steps.get("step", []), steps.get("status", []), strict=True):
                row = Row(status)
                if status == "recorded":
                    row = Row(status, np.array([by_step[step][n] for n in sorted(by_step[step])]), size[step])
                old = self.rows.setdefault(step, {}).get(rank)
                # Sessions come from the oldest to the newest, and among equals the newest counts.
                if old is None or ORDER.get(status, 2) <= ORDER.get(old.status, 2):
                    self.rows[step][rank] = row
            for step, layer, ep_size, slots in zip(
                *(placements.get(c, []) for c in ("step", "layer", "ep_size", "physical_to_logical")),
                strict=True,
            ):
                if step < metadata[folder]["end"]:
                    changes.setdefault((layer, step), {})[rank] = (ep_size, np.array(slots))
        self.layers = sorted(layers)
        #: By layer: (step, EP size, experts in the slots), each time that these changed.
        self.history: dict[int, list[tuple[int, int, Any]]] = {layer: [] for layer in self.layers}
        for layer, step in sorted(changes):
            ep_size, slots = next(iter(changes[layer, step].values()))
            before = self.history[layer][-1:]
            if not before or before[0][1] != ep_size or not np.array_equal(before[0][2], slots):
                self.history[layer].append((step, ep_size, slots))
        self._join()

    def _join(self) -> None:
        self.state: dict[int, str] = {}
        #: Of complete, recorded steps: tokens [layers, slots], and the EP size.
        self.load: dict[int, Any] = {}
        self.ep_size: dict[int, int] = {}
        last = max((row.ep_size for rows in self.rows.values() for row in rows.values()), default=1)
        for step in sorted(self.rows):
            rows = self.rows[step]
            sizes = {row.ep_size for row in rows.values() if row.status == "recorded"}
            last = sizes.pop() if len(sizes) == 1 else last
            writers = range(last) if self.scope == "local" else sorted(rows)[:1]
            states = [rows[rank].status if rank in rows else "absent" for rank in writers]
            if set(states) <= set(STATES):
                self.state[step] = max(states, key=STATES.index)
            else:
                self.state[step] = "recorded" if set(states) <= {"recorded", "dummy"} else "incomplete"
            if self.state[step] == "recorded":
                parts = [rows[rank].load for rank in writers if rows[rank].status == "recorded"]
                self.load[step] = np.sum(parts, axis=0, dtype=np.int64)
                self.ep_size[step] = last
        self.recorded = sorted(self.load)

    # ---- the parts of figures

    def tokens(self, step: int) -> Any:
        """Tokens per EP rank: float64 [layers, ranks]."""
        load = self.load[step]
        return load.reshape(len(load), self.ep_size[step], -1).sum(axis=2) / self.replication

    def placement(self, layer: int, step: int, slots: int | None = None) -> Any:
        """The experts in a layer's slots at a step, by the model's number of the layer; None: not known."""
        found = [row[2] for row in self.history[layer] if row[0] <= step]
        return found[-1] if found and slots in (None, len(found[-1])) else None

    def logical(self, step: int) -> Any:
        """Tokens per logical expert: [layers, experts]; nan in a layer without a known placement."""
        load = self.load[step]
        out = np.zeros((len(load), self.experts))
        for i, layer in enumerate(self.layers):
            slots = self.placement(layer, step, load.shape[1])
            if slots is None:
                out[i] = np.nan
                continue
            for slot, expert in enumerate(slots):
                if expert != EMPTY:
                    out[i, expert] += load[i, slot]
        return out / self.replication

    def shape(self, step: int) -> tuple[int, int]:
        return self.ep_size[step], self.load[step].shape[1]

    def last_configuration(self) -> list[int]:
        """The complete steps since EP size or slots changed last."""
        last = self.shape(self.recorded[-1])
        other = [step for step in self.recorded if self.shape(step) != last]
        return [step for step in self.recorded if not other or step > other[-1]]

    # ---- commands

    def steps(self) -> dict[str, int]:
        seen = sorted(self.state)
        found = {"first": seen[0], "last": seen[-1], "seen": len(seen)}
        for name in ("recorded", "dummy", "not_sampled", "dropped", "rejected", "incomplete"):
            found[name] = sum(state == name for state in self.state.values())
        return {**found, "missing": seen[-1] - seen[0] + 1 - len(seen)}

    def per_step(self, name: str, layer: int | None = None) -> dict[int, float]:
        """A formula over all layers, or one, by its index; only steps with an active layer."""
        found = {}
        for step in self.recorded:
            T = self.tokens(step) if layer is None else self.tokens(step)[layer : layer + 1]
            mean, largest = T.mean(axis=1), T.max(axis=1)
            active = largest > 0
            if not active.any():
                continue
            found[step] = float({
                "balancedness": lambda m, x: (m / x).mean(),
                "imbalance": lambda m, x: (x / m).mean(),
                "trtllm": lambda m, x: (x / m - 1).mean(),
                "vllm": lambda m, x: m.sum() / x.sum(),
            }[name](mean[active], largest[active]) if name not in ("sglang", "vllm-legacy") else
                ((mean + 1e-5) / (largest + 1e-5)).mean() if name == "sglang"
                else T.mean(axis=0).sum() / T.max(axis=0).sum())  # fmt: skip
        return found

    def spread(self, name: str) -> dict[str, float]:
        values = self.per_step(name)
        array = np.array(list(values.values()))
        p5, p50, p95 = np.percentile(array, [5, 50, 95])
        figures = {
            "mean": array.mean(),
            "p5": p5,
            "p50": p50,
            "p95": p95,
            "min": array.min(),
            "max": array.max(),
        }
        return {key: float(value) for key, value in figures.items()}

    def idle_fraction(self, steps: list[int], layer: int | None = None) -> float:
        T = [self.tokens(step)[slice(None) if layer is None else slice(layer, layer + 1)] for step in steps]
        return 1 - sum(t.mean(axis=1).sum() for t in T) / sum(t.max(axis=1).sum() for t in T)

    def waiting(self, steps: list[int]) -> tuple[Any, Any, Any]:
        """By layer and rank, how often it was the slowest and what that cost; by layer, the uneven steps."""
        ranks = self.ep_size[steps[-1]]
        slowest, cost = np.zeros((2, len(self.layers), ranks))
        uneven = np.zeros(len(self.layers))
        for step in steps:
            for layer, row in enumerate(self.tokens(step)):
                top = row == row.max()
                if not top.all():
                    uneven[layer] += 1
                    slowest[layer] += top / top.sum()
                    cost[layer] += top / top.sum() * (row.max() - row.mean())
        return slowest, cost, uneven

    def ranks(self) -> dict[str, Any]:
        steps = self.last_configuration()
        T = np.array([self.tokens(step) for step in steps])
        slowest, cost, _ = self.waiting(steps)
        active = int((T.max(axis=2) > 0).sum())
        load = T.sum(axis=(0, 1))

        def figures(group: list[int]) -> dict[str, Any]:
            return {
                "load": load[group].sum(),
                "times_mean": load[group].mean() / load.mean(),
                "slowest": slowest[:, group].sum(),
                "slowest_share": slowest[:, group].sum() / active,
                "excess_tokens": cost[:, group].sum(),
                "excess_share": cost[:, group].sum() / cost.sum() if cost.any() else None,
            }

        ranks, size = range(T.shape[2]), self.ranks_per_node
        nodes = [list(ranks[low : low + size]) for low in range(0, len(ranks), size)] if size else []
        return {
            "first_step": steps[0], "last_step": steps[-1], "recorded": len(steps), "active": active,
            "loss_tokens": cost.sum(), "idle_fraction": self.idle_fraction(steps),
            "ranks": [figures([rank]) for rank in ranks],
            "nodes": [figures(node) for node in nodes],
        }  # fmt: skip

    def layer(self, number: int) -> dict[str, Any]:
        """One layer over the last configuration: ``layer N``."""
        index, steps = self.layers.index(number), self.last_configuration()
        load = np.sum([self.load[step][index] for step in steps], axis=0) / self.replication
        balance = [self.per_step(name, index) for name in ("balancedness", "imbalance")]
        logical = np.array([self.logical(step)[index] for step in steps])
        return {
            "ranks": load.reshape(self.ep_size[steps[-1]], -1).sum(axis=1).tolist(),
            "slots": load.tolist(),
            "experts": np.nansum(logical, axis=0).tolist(),
            "balancedness": _mean([balance[0][s] for s in steps if s in balance[0]]),
            "imbalance": _mean([balance[1][s] for s in steps if s in balance[1]]),
        }

    def expert_figures(self, window: int, factor: float = 2.0) -> Iterator[dict[str, Any]]:
        """A row per layer and logical expert whose layer has tokens: ``experts --window-steps N``."""
        steps = self.last_configuration()
        logical = np.array([self.logical(step) for step in steps])
        cuts = [slice(low, low + window) for low in range(0, len(steps), window)]
        if len(cuts) > 1 and len(steps[cuts[-1]]) < window / 2:
            cuts.pop()
        for index, number in enumerate(self.layers):
            slots = self.placement(number, steps[-1], self.load[steps[-1]].shape[1])
            tokens = np.nansum(logical[:, index], axis=0)
            if slots is None or not tokens.any():
                continue
            sums = [np.nansum(logical[cut, index], axis=0) for cut in cuts]
            times = np.array([own / own.mean() for own in sums if own.any()])
            since = [step for step in steps if step >= self.history[number][-1][0]]
            held = np.sum([self.load[step][index] for step in since], axis=0)
            for expert in range(self.experts):
                own = held[slots == expert]
                on_rank = np.flatnonzero(slots == expert) // (len(slots) // self.ep_size[steps[-1]])
                yield {
                    "layer": number,
                    "logical": expert,
                    "tokens": tokens[expert],
                    "share": tokens[expert] / tokens.sum(),
                    "times_mean": tokens[expert] / tokens.mean(),
                    "peak_times_mean": times[:, expert].max(),
                    "persistence": (times[:, expert] >= factor).mean(),
                    "burstiness": _ratio(times[:, expert].std(), times[:, expert].mean()),
                    "cold": tokens[expert] <= tokens.mean() / factor,
                    "dead": tokens[expert] == 0,
                    "replicas": len(own),
                    "worst_replica": own.max() / own.mean() if len(own) > 1 and own.any() else None,
                    "replicas_on_one_rank": len(set(on_rank.tolist())) < len(on_rank),
                }

    def rearrangements(self, most: int = 1000) -> list[dict[str, Any]]:
        """Those of an engine that changes all layers in one step: ``rearrangements``."""
        changed: dict[int, list[int]] = {}
        for index, number in enumerate(self.layers):
            for step, *_ in self.history[number][1:]:
                changed.setdefault(step, []).append(index)
        at = sorted(changed)
        balance = self.per_step("balancedness")
        found = []
        for i, step in enumerate(at):
            low = max(step - most, at[i - 1] if i else min(self.state))
            high = min(step + most, at[i + 1] if i + 1 < len(at) else max(self.state) + 1)
            before = [s for s in balance if low <= s < step]
            after = [s for s in balance if step <= s < high]
            row = {
                "first_step": step, "last_step": step, "layers": len(changed[step]),
                "before": {"steps": len(before), "balancedness": _mean([balance[s] for s in before])},
                "after": {"steps": len(after), "balancedness": _mean([balance[s] for s in after])},
                **self._moves(step, changed[step]),
            }  # fmt: skip
            if min(len(before), len(after)) < LEAST:
                row["predicted"] = None
            elif not row["elastic"]:
                row["predicted"] = _mean([self._predicted(s, step) for s in before])
            found.append(row)
        return found

    def _moves(self, step: int, changed: list[int]) -> dict[str, Any]:
        slots_moved, crossed, to_nodes = 0, 0, 0
        for index in changed:
            pair = [row for row in self.history[self.layers[index]] if row[0] <= step][-2:]
            (_, old_size, old), (_, size, new) = pair
            if (old_size, len(old)) != (size, len(new)):
                return {"elastic": True}
            slots_moved += int((old != new).sum())
            held, holds = (
                [set(row) - {EMPTY} for row in slots.reshape(size, -1).tolist()] for slots in (old, new)
            )
            for rank in range(size):
                on_node: set[int] = set()
                if self.ranks_per_node:
                    node = rank // self.ranks_per_node
                    own = range(node * self.ranks_per_node, min(size, (node + 1) * self.ranks_per_node))
                    on_node = set().union(*(held[other] for other in own))
                crossed += len(holds[rank] - held[rank])
                to_nodes += len(holds[rank] - held[rank] - on_node)
        known = self.ranks_per_node is not None
        return {
            "elastic": False, "slots_moved": slots_moved, "experts_crossed_ranks": crossed,
            "experts_crossed_nodes": to_nodes if known else None,
        }  # fmt: skip

    def _predicted(self, step: int, at: int) -> float:
        """Balancedness of a step's loads, split evenly over the replicas of the placement from ``at`` on."""
        logical, ratios = self.logical(step), []
        for index, number in enumerate(self.layers):
            slots = self.placement(number, at)
            T = np.zeros(self.ep_size[step])
            for expert in range(self.experts):
                where = np.flatnonzero(slots == expert)
                for slot in where:
                    T[slot // (len(slots) // len(T))] += logical[index, expert] / len(where)
            if T.max() > 0:
                ratios.append(T.mean() / T.max())
        return float(np.mean(ratios))


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None
