"""Print after which of 40 passes SGLang's own EPLBManager rebalances; run by test_engine_settings.py."""

from __future__ import annotations

from collections.abc import Iterator

import sglang_ranks  # noqa: F401 (lets SGLang be imported without a GPU)
from sglang.srt.eplb.eplb_manager import EPLBManager


class Manager(EPLBManager):
    def __init__(self) -> None:
        self._rebalance_num_iterations, self.passes = 7, 0
        self.at: list[int] = []
        self._main_generator = self._entrypoint()

    def rebalance(self) -> Iterator[None]:
        self.at.append(self.passes + 1)
        yield from ()


manager = Manager()
for manager.passes in range(40):
    manager.on_forward_pass_end()
print(manager.at)
