"""A segment's loads in some of its steps are those among the loads of all."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import LAYERS, load_of, map_of, open_writer
from thinning import thin_to

from eplb_analyze import open_run
from eplb_analyze.sessions.segments import Segment
from eplb_dump.format.schema import MANIFEST_FILE, Tier

STEPS = 5
KINDS = "journal", "sealed", "thinned"


@pytest.fixture(scope="module")
def segments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Segment]]:
    """Segments with the same steps: a journal, a sealed one, and one with sums per rank only."""
    with contextlib.ExitStack() as opened:
        found = {}
        for kind in KINDS:
            root = tmp_path_factory.mktemp(kind)
            writer = opened.enter_context(open_writer(root, scope="global"))
            for step in range(STEPS):
                writer.record(step, load_of(step), map_of())
            assert writer.flush(60) if kind == "journal" else writer.close(60)
            if kind == "thinned":
                thin_to(next(root.rglob(MANIFEST_FILE)).parent, {Tier.RANKS: [0]})
            ((found[kind],),) = (session.segments for session in open_run(root).sessions)
        yield found


Reads = Callable[..., Iterator[tuple[int, npt.NDArray[Any]]]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", range(LAYERS))
def test_they_are_those_among_the_loads_of_all(segments: dict[str, Segment], kind: str, first: int) -> None:
    segment = segments[kind]
    reads: list[Reads] = [segment.rank_loads, *([segment.loads] if segment.has_loads else [])]
    n = len(segment.load_steps())
    for read, last, (low, high) in itertools.product(
        reads, range(first + 1, LAYERS + 1), itertools.combinations(range(n + 1), 2)
    ):
        expected = np.concatenate([load for _, load in read(first, last)])
        assert expected.shape[:2] == (last - first, n)
        found = [*read(first, last, slice(low, high))]
        assert found[0][0] == first
        assert np.array_equal(np.concatenate([load for _, load in found]), expected[:, low:high])
