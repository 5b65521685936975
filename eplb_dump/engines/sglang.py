"""The plugin for SGLang: records the counts of its expert distribution recorder in each forward pass.

SGLang counts only with ``--expert-distribution-recorder-mode stat``, which ``--enable-eplb`` sets.
Every EP rank then writes its own contribution; nothing is sent between ranks.

SGLang's recorder gathers counts only between its own start_record and stop_record, and stores them: its
buffers grow with every pass. So the plugin switches it on only during a pass. If SGLang itself is not
recording, the counts go to the dump and are not stored. Between passes, when SGLang reads and sets that
switch, it is as SGLang left it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from eplb_dump.engines.common import Settings, open_in_one_run, warn_once

if TYPE_CHECKING:
    from eplb_dump.writer import ExpertLoadWriter

logger = logging.getLogger("eplb_dump")

_RECORDER = "sglang.srt.eplb.expert_distribution.ExpertDistributionRecorder"
_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
_SCHEDULER = "sglang.srt.managers.scheduler"
_MOE_ARGUMENTS = (
    "enable_eplb",
    "eplb_algorithm",
    "eplb_rebalance_num_iterations",
    "eplb_rebalance_layers_per_chunk",
    "eplb_min_rebalancing_utilization_threshold",
    "ep_num_redundant_experts",
    "ep_dispatch_algorithm",
    "expert_distribution_recorder_mode",
    "expert_distribution_recorder_buffer_size",
    "init_expert_location",
    "moe_a2a_backend",
    "deepep_mode",
    "elastic_ep_backend",
)
_PARALLEL_ARGUMENTS = (
    "tp_size",
    "dp_size",
    "ep_size",
    "pp_size",
    "moe_dp_size",
    "attn_cp_size",
    "enable_dp_attention",
    "nnodes",
)

#: SGLang's forward modes in the words that all engines share; others as SGLang calls them. With speculative
#: decoding, the target model's decodes verify drafts. An idle rank takes part in the phase of the others.
_PHASES = {
    "EXTEND": "prefill",
    "SPLIT_PREFILL": "prefill",
    "DECODE": "decode",
    "TARGET_VERIFY": "decode",
    "MIXED": "mixed",
    "IDLE": None,
}

#: By model. SGLang creates a new recorder when elastic EP changes the ranks; the writer stays.
_writers: dict[str, ExpertLoadWriter] = {}
#: Whether the current pass is a draft model's, which uses the same recorder.
_drafting = False


def register() -> None:
    """SGLang's entry point ``sglang.srt.plugins``: called once in each of its processes."""
    try:
        settings = Settings.from_environment()
        if settings is None:
            return
        from sglang.srt.eplb import expert_distribution
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        expert_distribution.ExpertDistributionRecorder.init_new  # noqa: B018 - SGLang would log a traceback
    except Exception as error:
        _off(error)
        return

    def init_new(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        recorder = original(*args, **kwargs)
        try:
            if isinstance(recorder, expert_distribution._ExpertDistributionRecorderNoop):
                warn_once(
                    logger,
                    "expert-load recording is off: SGLang counts tokens per expert only with "
                    "--expert-distribution-recorder-mode stat",
                )
            else:
                _attach(recorder, settings)
        except Exception as error:
            _off(error)
        return recorder

    HookRegistry.register(f"{_RECORDER}.init_new", init_new, HookType.AROUND)


def _off(error: Exception) -> None:
    from importlib import metadata

    try:
        version = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        version = "of unknown version"
    warn_once(
        logger, f"expert-load recording is off; SGLang {version} continues: {type(error).__name__}: {error}"
    )


def _attach(recorder: Any, settings: Settings) -> None:
    from sglang.srt import runtime_context as context
    from sglang.srt.layers.moe.utils import is_moe_input_scattered_across_dp_ranks

    parallel = context.get_parallel()
    # If the MoE input is scattered, each token is routed on one rank. Otherwise all ranks of the MoE's TP
    # group have gathered all tokens and each rank counts all of them. SGLang's own layers
    # (layers/layer_boundary) use the same predicate.
    scattered = is_moe_input_scattered_across_dp_ranks()
    if parallel.moe_dp_size > 1 or (scattered and parallel.moe_tp_size > 1):
        raise NotImplementedError("several processes of one EP rank count different tokens")
    if parallel.moe_tp_rank > 0:
        return  # the same tokens as on moe_tp_rank 0
    recording = _Recording(recorder, _token_counter(scattered))
    recording.attach(_open_writer(recorder, settings, recording.layers, scattered))
    if context.get_spec().speculative_algorithm is not None:
        _watch_for_drafts()
    _watch_for_end()


def _token_counter(scattered: bool) -> Callable[[Any], int | None]:
    """What tells from a ForwardBatch how many tokens this rank counts, without padding; None: not known."""
    from sglang.srt import runtime_context as context

    parallel = context.get_parallel()
    if parallel.attn_cp_size > 1 or (scattered and parallel.attn_tp_size > 1):
        return lambda batch: None  # split into parts of the padded tokens
    if scattered or parallel.attn_dp_size == 1:
        return lambda batch: batch.global_num_token_non_padded_cpu

    def gathered(batch: Any) -> int | None:
        of_ranks = batch.global_num_tokens_cpu
        return sum(of_ranks) if of_ranks is not None and len(of_ranks) == parallel.attn_dp_size else None

    return gathered


def _open_writer(
    recorder: Any, settings: Settings, layers: list[int] | None, scattered: bool
) -> ExpertLoadWriter:
    from sglang.srt import runtime_context as context
    from sglang.version import __version__
    from torch.distributed import distributed_c10d

    from eplb_dump.writer import ExpertLoadWriter

    model = context.get_serving().served_model_name or context.get_model().model_path
    parallel, moe = context.get_parallel(), context.get_exec().moe
    if parallel.pp_size > 1:  # each stage has its own EP ranks and layers
        model = f"{model} (pipeline stage {parallel.pp_rank})"
    if model in _writers:
        return _writers[model]
    metadata, rank = recorder._expert_location_metadata, recorder._accumulator._rank
    ep_size = metadata.ep_size
    config = {name: _plain(getattr(moe, name, None)) for name in _MOE_ARGUMENTS}
    config |= {name: _plain(getattr(parallel, name, None)) for name in _PARALLEL_ARGUMENTS}
    config["num_expert_groups"] = _expert_groups()
    replication = 1 if scattered else ep_size
    if not scattered and parallel.attn_cp_size > 1:
        # Whether the tokens of a prefill are gathered before the MoE depends on the batch.
        replication, config["token_replication"] = 1, "unknown"

    def make(run_id: str | None, start_id: str | None) -> ExpertLoadWriter:
        return ExpertLoadWriter(
            settings.folder,
            model=model,
            num_logical_experts=metadata.num_logical_experts,
            ep_size=ep_size,
            ep_rank=rank,
            run_id=run_id,
            start_id=start_id,
            interval=settings.interval,
            moe_layers=layers,
            # The TP group of a stage, and so the EP group, is spread evenly over the stage's nodes.
            ranks_per_node=max(1, ep_size // max(1, parallel.nnodes // parallel.pp_size)),
            engine="sglang",
            engine_version=__version__,
            engine_config=config,
            token_replication=replication,
        )

    try:
        store = distributed_c10d._get_default_store()
    except Exception:  # no process group, or a torch that keeps it elsewhere
        store = None
    key = f"eplb_dump/{model}"
    _writers[model] = open_in_one_run(make, rank=rank, store=store, key=key, logger=logger)
    return _writers[model]


def _expert_groups() -> int | None:
    """The number of expert groups that SGLang's policy is given; None if this version does not say."""
    from sglang.srt import runtime_context as context

    try:
        from sglang.srt.eplb.expert_location import ModelConfigForExpertLocation

        found = ModelConfigForExpertLocation.from_model_config(context.process_model_config())
        # SGLang balances a model without groups as one group.
        return int(found.num_groups or 1)
    except Exception:  # recording goes on without it
        return None


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _watch_for_drafts() -> None:
    """Detect a draft model's passes: its layers are not the target model's, and usually not counted."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def forward(runner: Any, *args: Any, **kwargs: Any) -> None:
        global _drafting  # noqa: PLW0603 - one per process, like SGLang's recorder
        _drafting = bool(getattr(runner, "is_draft_worker", False))

    # Not earlier: the hook imports the module, also in processes that have no model.
    HookRegistry.register(f"{_RUNNER}.forward", forward, HookType.BEFORE)
    HookRegistry.apply_hooks()


def _watch_for_end() -> None:
    """Begin to close when the scheduler has left its loop: SGLang kills it if its release takes long."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    scheduler = getattr(sys.modules.get(_SCHEDULER), "Scheduler", None)
    if not hasattr(scheduler, "release_host_resources"):
        return  # without a scheduler, or in another version, the exit of the process closes

    def release_host_resources(*_: Any, **__: Any) -> None:
        for writer in _writers.values():
            writer.close(timeout=0)

    HookRegistry.register(
        f"{_SCHEDULER}.Scheduler.release_host_resources", release_host_resources, HookType.BEFORE
    )
    HookRegistry.apply_hooks()


class _Recording:
    """Connects one of SGLang's recorders to a writer."""

    def __init__(self, recorder: Any, count_tokens: Callable[[Any], int | None]) -> None:
        self._recorder, self._count_tokens = recorder, count_tokens
        #: Of the pass that runs, where known.
        self._phase: str | None = None
        self._tokens: int | None = None
        self._accumulator = recorder._accumulator
        # Read here, so that a missing attribute is found before anything is changed.
        self._start = recorder._on_forward_pass_start
        self._end = recorder._on_forward_pass_end
        self._append = self._accumulator.append
        self._writer: ExpertLoadWriter | None = None
        self._drafting = False
        #: Whether SGLang itself was recording when the pass began; between passes, True.
        self._sglang_records = True
        _ = recorder._recording, recorder._record_current_pass
        shape = recorder._expert_location_metadata.physical_to_logical_map.shape
        self._rows, self.layers = _moe_rows(shape[0])

    def attach(self, writer: ExpertLoadWriter) -> None:
        self._writer = writer
        self._recorder._on_forward_pass_start = self._on_start
        self._recorder._on_forward_pass_end = self._on_end
        self._accumulator.append = self._on_append
        for gatherer in self._recorder._single_pass_gatherers.values():
            if hasattr(gatherer, "_topk_ids_of_layer"):  # per_token, which fails above 8 experts a token
                gatherer.on_select_experts = self._guarded(gatherer.on_select_experts)
        # SGLang code that runs only because we record must not fail its pass.
        self._start, self._end = self._guarded(self._start), self._guarded(self._end)

    def _on_start(self, *args: Any, **kwargs: Any) -> None:
        self._sglang_records = self._recorder._recording
        self._drafting = _drafting
        if self._writer is not None and not self._drafting:
            self._recorder._recording = True
            self._describe(*args, **kwargs)
        self._start(*args, **kwargs)
        if self._writer is not None and not self._drafting:
            self._writer.begin_step()

    def _describe(self, forward_batch: Any) -> None:
        self._phase = self._tokens = None
        try:
            mode = forward_batch.forward_mode.name
            self._phase = _PHASES.get(mode, mode.lower())
            self._tokens = self._count_tokens(forward_batch)
        except Exception as error:
            warn_once(logger, f"phases or tokens of steps are not recorded: {type(error).__name__}: {error}")

    def _on_end(self, *args: Any, **kwargs: Any) -> None:
        try:
            self._end(*args, **kwargs)
            if self._writer is not None and not self._drafting and not self._recorder._record_current_pass:
                self._writer.skip(
                    "not_sampled"
                )  # this rank did not record the pass; step numbers stay the same on all ranks
        finally:
            self._recorder._recording = self._sglang_records
            self._sglang_records = True

    def _on_append(self, *args: Any, **kwargs: Any) -> Any:
        if self._writer is not None and not self._drafting:
            try:
                self._record(*args, **kwargs)
            except Exception as error:
                self._stop(error)
        return self._append(*args, **kwargs) if self._sglang_records else None

    def _record(
        self, forward_pass_id: int, gatherer_key: str, single_pass_data: dict[str, Any], outputs: Any
    ) -> None:
        assert self._writer is not None
        metadata = self._recorder._expert_location_metadata
        # A rebalance comes after the pass, so this is the map that routed the pass. Slices are views:
        # they launch no kernel and share the version counter that shows whether the map changed. SGLang's
        # own pass number restarts when elastic EP changes the ranks, so the writer counts.
        self._writer.record(
            None,
            single_pass_data["global_physical_count"][self._rows],
            metadata.physical_to_logical_map[self._rows],
            self._tokens,
            self._phase,
            ep_size=metadata.ep_size,
        )

    def _guarded(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except Exception as error:
                if self._sglang_records:
                    raise
                self._stop(error)
                return None

        return guarded

    def _stop(self, error: Exception) -> None:
        self._writer = None
        _off(error)
        if not self._sglang_records:
            self._recorder._recording = self._recorder._record_current_pass = False


def _moe_rows(num_layers: int) -> tuple[slice, list[int] | None]:
    """Which of the recorder's rows, one per layer, are MoE layers; all of them if unknown."""
    from sglang.srt import runtime_context as context

    config = context.process_model_config().hf_text_config
    first = getattr(config, "first_k_dense_replace", None)
    every = getattr(config, "moe_layer_freq", 1)
    if isinstance(every, list | tuple):  # MiniMax M3, MiMo V2
        layers = [n for n in range(min(num_layers, len(every))) if every[n]]
    elif first is None or (every != 1 and not str(config.model_type).startswith(("deepseek", "kimi"))):
        # Models differ in what they count moe_layer_freq from. SGLang's Qwen models have no dense layers,
        # whatever mlp_only_layers and decoder_sparse_step say.
        layers = []
    else:
        layers = [n for n in range(num_layers) if n >= first and n % every == 0]
    if not layers or len(layers) == num_layers:
        return slice(None), None
    stride = layers[1] - layers[0] if len(layers) > 1 else 1
    rows = slice(layers[0], layers[-1] + 1, stride)
    if list(range(num_layers))[rows] != layers:
        return slice(None), None  # a copy for each pass is not worth it
    return rows, layers
