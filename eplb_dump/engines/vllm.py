"""The plugin for vLLM: wraps ``EplbState.step`` of unmodified vLLM.

vLLM counts each rank's routed tokens in ``expert_load_pass``, but only shortly before a rearrangement
or a log line. The plugin makes vLLM's router count in the steps between, too, and copies the tensor in
every step. It lets those counts add up, which costs nothing, and removes them before vLLM reads the tensor,
so that vLLM's window, placements and log lines are the same as without the plugin.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.abc
import importlib.util
import inspect
import itertools
import re
import sys
import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from eplb_dump.engines.common import START_KEY, Settings, agree_on_start, read_from_store, warn_once
from eplb_dump.engines.vllm_end import WORKER, watch_worker
from eplb_dump.engines.vllm_pass import RUNNERS, CurrentPass, logger, version, watch_runner

if TYPE_CHECKING:
    from eplb_dump.writer import ExpertLoadWriter

_MODULE = "vllm.distributed.eplb.eplb_state"
#: Sets the switch that makes the router count in the next step.
_SWITCH = "_update_layer_should_record"
#: Beside ``step``, what reads or changes ``expert_load_pass``: elastic EP does.
_READERS = ("reconfigure_physical_expert_slots", "update_mapping")
#: The plugin's counts add up over at most so many steps: vLLM counts in int32.
_STEPS_OF_TOTAL = 1024
#: What the plugin relies on; if any is missing, this vLLM version is not supported and recording is off.
_STEP_PARAMETERS = ["self", "is_dummy", "is_profile", "log_stats"]
_MODEL_STATE_FIELDS = {"expert_load_pass", "physical_to_logical_map", "model_name", "model"}


def register(expert_load_dump_dir: str | None = None) -> None:
    """vLLM's entry point, called in each of its processes. Does nothing without EXPERT_LOAD_DUMP_DIR.

    Args:
        expert_load_dump_dir: the field of EPLBConfig, from a vLLM that has it (docs/upstream-vllm.md).
    """
    try:
        settings = Settings.from_environment(expert_load_dump_dir)
        if settings is None or any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
            return
        hooks: dict[str, Callable[[Any], None]] = dict.fromkeys(RUNNERS, watch_runner)
        hooks[_MODULE] = lambda module: _install(module, settings)
        hooks[WORKER] = watch_worker
        # Do not import them here: processes without experts do not need them.
        sys.meta_path.insert(0, _AfterImport(hooks))
        for name in hooks.keys() & sys.modules.keys():
            hooks[name](sys.modules[name])
    except Exception as error:  # an exception from a plugin ends vLLM
        warn_once(logger, f"expert-load recording is off: {error}")


class _AfterImport(importlib.abc.MetaPathFinder):
    """Lets modules be imported as usual, and calls a hook right after that.

    It stays in ``sys.meta_path``: other threads may be iterating over that list, and a failed import
    may be tried again.
    """

    def __init__(self, hooks: dict[str, Callable[[Any], None]]) -> None:
        self._hooks = hooks
        self._searching: set[str] = set()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name not in self._hooks or name in self._searching:
            return None
        self._searching.add(name)  # safe, as the import system holds this module's lock
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching.discard(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_hook(module: ModuleType) -> None:
                execute(module)
                self._hooks[name](module)

            spec.loader.exec_module = execute_and_hook  # type: ignore[method-assign]
        return spec


def _install(module: Any, settings: Settings) -> None:
    """Wrap ``EplbState.step``, if this vLLM version is supported."""
    try:
        state = module.EplbState
        original = state.step
        if hasattr(original, "eplb_dump"):
            return
        fields = {field.name for field in dataclasses.fields(module.EplbModelState)}
        known = (
            list(inspect.signature(original).parameters) == _STEP_PARAMETERS
            and fields >= _MODEL_STATE_FIELDS
            and callable(state._should_record_current_step)
            and callable(module.get_ep_group)
            and callable(module.get_node_count)
        )
        if not known:
            raise AttributeError("its EPLB state has a different layout")
    except (AttributeError, TypeError, ValueError) as error:
        warn_once(logger, f"expert-load recording is off: vLLM {version()} is not supported ({error})")
        return

    def recorder_of(self: Any) -> _Recorder:
        found: _Recorder | None = self.__dict__.get("eplb_dump")
        if found is None:
            found = self.__dict__["eplb_dump"] = _Recorder(self, module, settings)
        return found

    @functools.wraps(original)
    def step(self: Any, is_dummy: bool = False, is_profile: bool = False, log_stats: bool = False) -> None:
        recorder = self.__dict__.get("eplb_dump") or recorder_of(self)
        recorder.before(is_dummy, is_profile, log_stats)
        original(self, is_dummy, is_profile, log_stats)
        recorder.after(is_dummy, is_profile, log_stats)

    step.eplb_dump = recorder_of  # type: ignore[attr-defined]
    state.step = step
    switch = getattr(state, _SWITCH, None)
    if switch is not None:

        @functools.wraps(switch)
        def set_switch(self: Any, *arguments: Any, **named: Any) -> None:
            recorder = self.__dict__.get("eplb_dump") or recorder_of(self)
            if not recorder.keeps_counting(*arguments, **named):
                switch(self, *arguments, **named)

        setattr(state, _SWITCH, set_switch)
    for name in _READERS:
        if hasattr(state, name):
            setattr(state, name, _restore_first(getattr(state, name)))
    prepare = getattr(state, "prepare_forward", None)
    if prepare is None:
        warn_once(logger, f"the tokens of steps are not recorded: vLLM {version()} is not supported")
        return

    @functools.wraps(prepare)
    def prepare_forward(
        self: Any, model_config: Any, num_unpadded_tokens: int, *more: Any, **named: Any
    ) -> None:
        recorder = self.__dict__.get("eplb_dump") or recorder_of(self)
        recorder.forward(model_config, num_unpadded_tokens)
        prepare(self, model_config, num_unpadded_tokens, *more, **named)

    state.prepare_forward = prepare_forward


def _restore_first(method: Any) -> Any:
    """A method of EplbState that finds ``expert_load_pass`` as it would be without the plugin."""

    @functools.wraps(method)
    def restored(self: Any, *arguments: Any, **named: Any) -> Any:
        recorder = self.__dict__.get("eplb_dump")
        if recorder is not None:
            recorder.vllm_reads()
        return method(self, *arguments, **named)

    return restored


@dataclasses.dataclass
class _Model:
    """One model's writer, and the counts in ``expert_load_pass`` that are vLLM's from earlier steps."""

    state: Any
    writer: ExpertLoadWriter
    #: Counts that vLLM left in ``expert_load_pass`` after an earlier step; None: it began at zero.
    carry: Any = None
    #: The tensor that holds them; elastic EP replaces it with one of another size.
    _carried_in: Any = None
    #: Whether ``carry`` is set aside, so that ``expert_load_pass`` holds the plugin's counts alone.
    aside: bool = False
    #: Whether ``expert_load_pass`` is not what it would be without the plugin.
    ours: bool = False
    #: What :meth:`ExpertLoadWriter.record` is told and returns, if the plugin's counts add up.
    since: int = 0

    def restore(self) -> None:
        """Leave ``expert_load_pass`` as it would be without the plugin."""
        if self.ours:
            carry = self.current_carry()
            if carry is None:
                self.state.expert_load_pass.zero_()
            else:
                self.state.expert_load_pass.copy_(carry)
        self.ours, self.aside, self.since = False, False, 0

    def start_over(self) -> None:
        """Let the plugin's counts begin at zero; :meth:`restore` puts back what vLLM left."""
        self.state.expert_load_pass.zero_()
        self.ours, self.aside, self.since = True, True, 0

    def forget(self) -> None:
        """vLLM has zeroed ``expert_load_pass``."""
        self.carry, self.ours, self.aside, self.since = None, False, False, 0

    def keep_counts(self, counts: Any) -> None:
        """vLLM left its counts in ``expert_load_pass``: later ones are added to them."""
        self.forget()
        self.carry, self._carried_in = counts.clone(), counts

    def current_carry(self) -> Any:
        """``carry`` in the tensor's current shape: vLLM keeps the counts of the slots that remain."""
        counts = self.state.expert_load_pass
        if self.carry is not None and counts is not self._carried_in:
            kept = min(counts.shape[1], self.carry.shape[1])
            resized = counts.new_zeros(counts.shape)
            resized[:, :kept] = self.carry[:, :kept]
            self.carry, self._carried_in = resized, counts
        return self.carry


class _Recorder:
    """Records the models of one EplbState, which the drafter and the main model share."""

    def __init__(self, state: Any, module: Any, settings: Settings) -> None:
        self.state = state
        self._module = module
        self._settings = settings
        self.current = CurrentPass()
        self._off = False
        self._models: dict[str, _Model] = {}
        #: EP rank and size that the writers were opened for; elastic EP changes both.
        self._position: tuple[int, int] | None = None
        self._number = next(_states)
        # A second engine in this process starts its own run; the writers of the first one are closed.
        weakref.finalize(state, _close_all, self._models).atexit = False
        self._ep_size = 0
        #: Whether the plugin's counts may add up: without steps between that are not recorded.
        self._adds_up = settings.interval == 1
        self._run_id: str | None = None
        self._start_id: str | None = None
        self._step = 0
        #: Whether vLLM makes the router count in the current step, and in the next one.
        self._vllm_counts = self._vllm_counts_next = True
        #: The ``log_stats`` for which vLLM was asked that.
        self._asked_for: bool | None = None
        #: EP rank and size change with elastic EP only; and whether vLLM splits padded tokens among ranks.
        #: Known once the writers are open: an error here would reach the engine.
        self._place_may_change, self._splits_tokens = True, False
        #: Whether the router counts in the current step, though vLLM does not make it.
        self._we_count = False
        #: Whether vLLM adds this step to its window, which zeroes ``expert_load_pass``.
        self._vllm_records = False
        #: vLLM's switch for the router, once it is known to be on.
        self._switched_on: Any = None
        #: Whether vLLM asks :meth:`keeps_counting` before it sets the switch.
        self._switch_is_ours = hasattr(getattr(module.EplbState, _SWITCH, None), "__wrapped__")

    def close(self) -> None:
        """Begin to close the recording; does not wait for it."""
        _close_all(self._models)

    # What follows is called in every step. Few calls of Python functions: after the engine has waited for the
    # step, the processor's caches are cold, and each takes 1 to 2 µs. An error in it ends the recording.

    def forward(self, model_config: Any, num_unpadded_tokens: int) -> None:
        """A model begins its forward pass. An error ends only the notes of passes."""
        try:
            name = self.current.begins(model_config, num_unpadded_tokens)
            if name in self._models and self._step % self._settings.interval == 0:
                self._models[name].writer.begin_step()
        except Exception as error:
            self.current.stop(f"{type(error).__name__}: {error}")

    def before(self, is_dummy: bool, is_profile: bool, log_stats: bool) -> None:
        """Record what this rank routed in the pass that ends here."""
        if self._off:
            return
        try:
            if is_profile:  # before the engine serves; not a step
                self._prepare()
                return
            state = self.state
            if self._place_may_change or len(self._models) != len(state.model_states):
                group = self._module.get_ep_group()
                place = (group.rank_in_group, group.world_size)
                if place != self._position or self._models.keys() != state.model_states.keys():
                    self._open_writers(group, place)
            if log_stats is self._asked_for and not self._place_may_change:
                self._vllm_records = self._vllm_counts
            else:
                self._vllm_records = state._should_record_current_step(log_stats=log_stats)
            if is_dummy:  # vLLM zeroes what padding may have counted in such a pass
                sampled = self._step % self._settings.interval == 0
                for model in self._models.values():
                    model.writer.skip("dummy" if sampled else "not_sampled", self._step)
            else:
                self._record()
        except Exception as error:
            self._end(error)

    def _record(self) -> None:
        current = self.current
        phase = current.phase()
        for name, model in self._models.items():
            state = model.state
            load = state.expert_load_pass
            mixed = model.carry is not None and not model.aside
            if mixed:
                load = load - model.current_carry()
            if self._we_count:
                model.ours = True
            since = model.writer.record(
                self._step,
                load,
                state.physical_to_logical_map,
                None if self._splits_tokens else current.tokens.get(name),
                phase,
                ep_size=self._ep_size,
                since=model.since,
            )
            if not model.ours:
                continue
            if self._vllm_records or not self._adds_up:
                model.restore()
            elif mixed or since < 0 or not self._step % _STEPS_OF_TOTAL:
                model.start_over()
            else:
                model.since = since

    def keeps_counting(self, log_stats: bool = False) -> bool:
        """Make the router count in the next step, if that is to be recorded; False: vLLM decides."""
        if self._off:
            return False
        try:
            state = self.state
            self._asked_for = log_stats
            self._vllm_counts_next = state._should_record_current_step(log_stats=log_stats)
            switch = state.should_record_tensor
            if switch is None or (self._step + 1) % self._settings.interval or not self._models:
                self._switched_on = None
                return False
            if switch is not self._switched_on:
                switch.fill_(True)
                self._switched_on = switch
        except Exception as error:
            self._end(error)
            return False
        return True

    def after(self, is_dummy: bool, is_profile: bool, log_stats: bool) -> None:
        """Take note of whether vLLM counts in the next step, which then has to find its own counts."""
        if self._off:
            return
        try:
            self.current.clear()
            if is_profile:
                return
            if is_dummy or self._vllm_records:  # vLLM has zeroed it
                for model in self._models.values():
                    model.forget()
            elif self._vllm_counts:
                # vLLM counted but did not add it to its window, so it stays there.
                for model in self._models.values():
                    model.keep_counts(model.state.expert_load_pass)
            if not self._switch_is_ours:
                self._switched_on = None
                self.keeps_counting(log_stats)
            self._step += 1
            self._vllm_counts = self._vllm_counts_next
            self._we_count = not self._vllm_counts and self._switched_on is not None
            if self._vllm_counts:
                self._restore_counts()
        except Exception as error:
            self._end(error)

    def vllm_reads(self) -> None:
        """vLLM is about to read or change ``expert_load_pass``."""
        if not self._off:
            try:
                self._restore_counts()
            except Exception as error:
                self._end(error)

    def _restore_counts(self) -> None:
        """Leave ``expert_load_pass`` as it would be without the plugin."""
        for model in self._models.values():
            model.restore()

    def _end(self, error: Exception) -> None:
        """End the recording, not vLLM."""
        self._off = True
        text = f"expert-load recording is off; vLLM {version()} continues: {type(error).__name__}: {error}"
        warn_once(logger, text)
        with contextlib.suppress(Exception):
            self._restore_counts()

    def _prepare(self) -> None:
        """While vLLM measures its memory: what would otherwise take the first step tens of ms."""
        if self._position is not None or getattr(self.state.parallel_config, "enable_elastic_ep", False):
            return  # a rank that joins a running engine learns of its run and its step later
        group = self._module.get_ep_group()
        self._open_writers(group, (group.rank_in_group, group.world_size))
        for model in self._models.values():
            model.writer.prepare(model.state.expert_load_pass, model.state.physical_to_logical_map)

    def _open_writers(self, group: Any, place: tuple[int, int]) -> None:
        """Open missing writers: at the first step, or when EP rank or size changed.

        All ranks take a step together, so a rank that joins a running engine (elastic EP) gets the run, the
        step and the id of the start from EP rank 0.
        """
        if self._position is not None and self._position[0] != place[0]:
            _close_all(self._models)
        new_position, self._position = place != self._position, place
        self._ep_size = place[1]
        config = self.state.parallel_config
        self._place_may_change = bool(getattr(config, "enable_elastic_ep", False))
        self._splits_tokens = bool(config.use_sequence_parallel_moe)
        stage, store = _pipeline_stage(self.state.parallel_config), _store_of(group)
        key, start_key = f"eplb_dump/run/{stage}/{place[1]}", START_KEY
        if getattr(group, "tcp_store_group", None) is None:  # otherwise the store belongs to this group
            key, start_key = f"{key}/{self._number}", f"{START_KEY}/{self._number}"
        if place[0] != 0 and self._run_id is None and store is not None:
            shared = (read_from_store(store, key, logger) or "").split(" ")
            if len(shared) >= 2:  # the run is missing if EP rank 0 does not record, or has no run yet
                self._run_id, self._step = shared[0] or None, int(shared[1])
                self._start_id = (shared[2] or None) if len(shared) > 2 else None
        if self._start_id is None and store is not None:
            self._start_id = agree_on_start(store, start_key)
        for name, state in self.state.model_states.items():
            if name not in self._models:
                writer = self._open(state, place, stage)
                self._run_id = writer.info.run_id or None
                self._models[name] = _Model(state, writer)
                if place[0] == 0 and writer.stats().off is None:
                    logger.info("Recording expert loads to %s", writer.folder)
        if place[0] == 0 and new_position and store is not None:
            store.set(key, f"{self._run_id or ''} {self._step} {self._start_id or ''}")

    def _open(self, state: Any, place: tuple[int, int], stage: int | None) -> ExpertLoadWriter:
        from eplb_dump.writer import ExpertLoadWriter

        config = self.state.parallel_config
        nodes = self._module.get_node_count()
        return ExpertLoadWriter(
            # The field wins over the variable, which may have registered the plugin earlier.
            getattr(config.eplb_config, "expert_load_dump_dir", None) or self._settings.folder,
            model=state.model_name if stage is None else f"{state.model_name} (pipeline stage {stage})",
            num_logical_experts=state.model.num_logical_experts,
            ep_size=place[1],
            ep_rank=place[0],
            scope="local",
            run_id=self._run_id,
            start_id=self._start_id,
            interval=self._settings.interval,
            moe_layers=_layer_numbers(state.model),
            ranks_per_node=place[1] // nodes if place[1] % nodes == 0 else None,
            engine="vllm",
            engine_version=version(),
            engine_config={
                "eplb_config": {
                    name: value
                    for name, value in vars(config.eplb_config).items()
                    if isinstance(value, bool | int | float | str | None)
                },
                # What the policy is given beside the loads.
                "num_expert_groups": getattr(state.model, "num_expert_groups", None),
                "num_nodes": nodes if place[1] % nodes == 0 else 1,
                **{name: getattr(config, name, None) for name in _PARALLEL_SIZES},
            },
            token_replication=_token_replication(config),
        )


_PARALLEL_SIZES = (
    "data_parallel_size",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "prefill_context_parallel_size",
    "all2all_backend",
    "enable_elastic_ep",
)


#: Numbers the EplbStates of this process; the same on all ranks.
_states = itertools.count()


def _close_all(models: dict[str, _Model]) -> None:
    for model in models.values():
        model.writer.close(timeout=0)  # sealing takes time, which the engine's thread does not have
    models.clear()


def _pipeline_stage(config: Any) -> int | None:
    """The pipeline stage of this rank; each stage has its own EP ranks and layers. None: only one stage."""
    if config.pipeline_parallel_size == 1:
        return None
    from vllm.distributed.parallel_state import get_pp_group

    return int(get_pp_group().rank_in_group)


def _store_of(group: Any) -> Any:
    """The key-value store that the ranks of this EP group share."""
    stateless = getattr(group, "tcp_store_group", None)  # with elastic EP
    if stateless is not None:
        return stateless.store
    import torch

    try:
        return torch.distributed.distributed_c10d._get_default_store()
    except (AttributeError, ValueError, RuntimeError):
        return None


def _layer_numbers(model: Any) -> list[int] | None:
    """The model's own numbers of its MoE layers, from names like ``model.layers.3.mlp.experts``."""
    numbers = []
    for layer in model.moe_layers:
        found = re.findall(r"\.(\d+)(?:\.|$)", str(getattr(layer, "layer_name", "")))
        if len(found) != 1:
            return None
        numbers.append(int(found[0]))
    return numbers if numbers == sorted(set(numbers)) else None


def _token_replication(config: Any) -> int:
    """How many times the sum over ranks counts each token.

    The ranks of one tensor-parallel group route the same tokens, unless sequence parallelism splits
    them. If a rank gathers the tokens of others before it routes, vLLM still counts only its own share.
    """
    return 1 if config.use_sequence_parallel_moe else int(config.tensor_parallel_size)
