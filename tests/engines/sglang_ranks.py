"""Drives SGLang's own recorder on several ranks, with and without the plugin; run by test_sglang.py.

``python sglang_ranks.py OUT RANKS SCENARIO [cpu|cuda]`` in an environment that has SGLang. Real are the
plugins' loader, ServerArgs and the published context, ExpertLocationMetadata, the recorder, the process
group, and ModelRunner.forward of a ForwardBatch down to where it would run the model; the batches and the
routing are made up and saved as the truth.
Needs no weights, and on ``cpu`` no GPU, so what SGLang expects of those is stood in for below. On ``cuda``
the ranks share the GPUs that are there, and each pass keeps its stream busy, so that the processor is ahead.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers.utils
from ranks import await_closed, await_kill, run_ranks

# Imported for constants; torchvision's wheels do not load beside a torch without CUDA.
if not transformers.utils.is_torchvision_available():
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = mock.MagicMock()
for name in ("is_current_stream_capturing", "empty_cache"):
    setattr(torch.cpu, name, lambda: False)

LAYERS, DENSE, LOGICAL, REDUNDANT, TOP_K = 5, 2, 6, 2, 2
SLOTS = LOGICAL + REDUNDANT
MODEL = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_hidden_layers": LAYERS,
    "first_k_dense_replace": DENSE,
    "moe_layer_freq": 1,
    "n_routed_experts": LOGICAL,
    "num_experts_per_tok": TOP_K,
    "n_group": 1,
    "topk_group": 1,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}


#: With CUDA, what a pass takes at least: half a millisecond at 4 GHz, more than any GPU has.
PASS_CYCLES = 2_000_000
#: With CUDA graphs, the tokens of a pass are padded to so many.
GRAPH_TOKENS = 64


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


class Rank:
    """One rank of an engine: what a scheduler process holds around the recorder."""

    def __init__(
        self, out: Path, rank: int, ranks: int, messages: Messages, device: str, **arguments: Any
    ) -> None:
        from sglang.srt.eplb import expert_distribution, expert_location
        from sglang.srt.layers.moe import utils as moe
        from sglang.srt.model_executor.model_runner import ModelRunner
        from sglang.srt.plugins import load_plugins
        from sglang.srt.runtime_context import SpawnRanks, process_model_config, publish
        from sglang.srt.server_args import ServerArgs

        backend = "gloo"
        if device == "cpu":
            expert_distribution.get_device = lambda: "cpu"  # it looks for an accelerator
        else:
            gpus = torch.cuda.device_count()
            torch.cuda.set_device(rank % gpus)
            if ranks <= gpus:  # NCCL refuses two ranks on one GPU; gloo takes its tensors, too
                backend = "cpu:gloo,cuda:nccl"
        self.device = device
        self.graph: tuple[torch.cuda.CUDAGraph, torch.Tensor] | None = None
        self.out, self.rank, self.ranks = out, rank, ranks
        self.messages, self.top_k = messages, TOP_K
        load_plugins()
        os.environ["SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"] = str(out / f"own-{rank}")
        arguments = {
            "expert_distribution_recorder_mode": "stat",
            "expert_distribution_recorder_buffer_size": -1,
            **arguments,
        }
        server = ServerArgs(
            model_path=str(out / "model"),
            served_model_name="tiny/moe",
            device=device,
            tp_size=ranks,
            ep_size=ranks,
            ep_num_redundant_experts=REDUNDANT,
            **arguments,
        )
        publish(server, role="scheduler", ranks=SpawnRanks(world_rank=rank))
        moe.initialize_moe_config()
        torch.distributed.init_process_group(
            backend, init_method=f"file://{out}/meeting", rank=rank, world_size=ranks
        )
        self.config = process_model_config()
        first = torch.arange(SLOTS).repeat(LAYERS, 1) % LOGICAL
        self.metadata = self.located(first)
        expert_location.set_global_expert_location_metadata(self.metadata)
        self.recorder = expert_distribution.ExpertDistributionRecorder.init_new(self.metadata, rank=rank)
        expert_distribution.set_global_expert_distribution_recorder(self.recorder)
        self.scattered = getattr(moe, "is_moe_input_scattered_across_dp_ranks", bool)()
        # Ranks that count all tokens route them alike.
        self.random = np.random.default_rng([rank if self.scattered else 0, 7])
        self.batches = np.random.default_rng(8)  # the same on all ranks
        self.dp_ranks = arguments.get("dp_size", 1)
        self.phases: list[str] = []
        self.begins = 0
        self.began: list[int] = []
        self.note_begins()
        self.tokens: list[int] = []
        self.loads: list[np.ndarray] = []
        self.maps: list[torch.Tensor] = []
        self.switch: list[bool] = []
        self.stored: list[int] = []
        engine = self

        class Runner(ModelRunner):
            """ModelRunner.forward is SGLang's; no model is loaded."""

            def __init__(self, is_draft_worker: bool) -> None:
                self.is_draft_worker, self.forward_pass_id = is_draft_worker, 0
                self.enable_elastic_ep = False
                self.msprobe_debugger = self.canary_manager = self.eplb_manager = None
                self.decode_cuda_graph_runner = None

            def _forward_raw(self, *_: Any) -> Any:
                engine.route(is_draft=self.is_draft_worker)
                return mock.Mock()

        self.runner, self.draft_runner = Runner(False), Runner(True)

    def note_begins(self) -> None:
        """Count how often a writer is told, before each pass, that it begins."""
        from eplb_dump.writer import ExpertLoadWriter

        begin = ExpertLoadWriter.begin_step

        def begin_step(writer: ExpertLoadWriter) -> None:
            self.begins += 1
            begin(writer)

        ExpertLoadWriter.begin_step = begin_step  # type: ignore[method-assign]

    def located(self, placement: torch.Tensor) -> Any:
        from sglang.srt.eplb.expert_location import ExpertLocationMetadata

        return ExpertLocationMetadata.init_by_mapping(self.config, placement, moe_ep_rank=self.rank)

    def rearrange(self, layers: list[int]) -> None:
        """What a rebalance does to the placement: the same on all ranks."""
        seed = np.random.default_rng(len(self.loads))
        new = np.stack([seed.permutation(np.arange(SLOTS) % LOGICAL) for _ in range(LAYERS)])
        self.metadata.update(self.located(torch.from_numpy(new)), update_layer_ids=layers)

    def sent(self, array: np.ndarray) -> torch.Tensor:
        """The array where SGLang computes; the processor does not wait until it is there."""
        tensor = torch.from_numpy(array)
        return tensor if self.device == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def select(self, layer: int, topk_ids: torch.Tensor) -> None:
        with self.recorder.with_current_layer(layer):
            self.recorder.on_select_experts(topk_ids=topk_ids)

    def capture(self) -> None:
        """From now on, passes replay a CUDA graph, as SGLang's decodes do: it counts in every replay."""
        topk_ids = torch.full((LAYERS, GRAPH_TOKENS, self.top_k), -1, dtype=torch.int32, device=self.device)
        graph = torch.cuda.CUDAGraph()

        def select() -> None:
            with torch.inference_mode():
                for layer in range(DENSE, LAYERS):
                    self.select(layer, topk_ids[layer])

        self.recorder.start_record()
        select()  # a kernel may not be loaded while a graph is captured
        self.recorder.stop_record()
        with torch.cuda.graph(graph):
            select()
        self.graph = graph, topk_ids

    def route(self, is_draft: bool = False) -> None:
        """The part of a forward pass that the recorder sees."""
        self.began.append(self.begins)
        self.begins = 0
        loads = np.zeros((LAYERS, SLOTS), np.int64)
        routed = np.full((LAYERS, GRAPH_TOKENS if self.graph else self.routed + 3, self.top_k), -1, np.int32)
        for layer in range(DENSE, LAYERS):
            slots = self.random.integers(0, SLOTS, (self.routed, self.top_k))
            routed[layer, : self.routed] = slots  # the others are padded tokens
            loads[layer] = np.bincount(slots.reshape(-1), minlength=SLOTS)
        if self.device != "cpu":
            torch.cuda._sleep(PASS_CYCLES)
        if self.graph is None:
            for layer in range(DENSE, LAYERS):
                self.select(layer, self.sent(routed[layer]))
        else:
            graph, topk_ids = self.graph
            topk_ids.copy_(self.sent(routed))
            graph.replay()
        if not is_draft:
            self.loads.append(loads)
            self.maps.append(self.metadata.physical_to_logical_map.clone())

    def choose(self) -> str:
        """The next pass, as SGLang's scheduler describes it to a rank; its phase."""
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

        modes = ["EXTEND", "DECODE", "MIXED", "TARGET_VERIFY", "SPLIT_PREFILL"]
        chosen = [modes[self.batches.integers(len(modes))] for _ in range(self.dp_ranks)]
        counts = self.batches.integers(1, 20, self.dp_ranks)
        if self.dp_ranks > 1 and self.batches.random() < 0.3:
            chosen[0], counts[0] = "IDLE", 0
        own = self.rank * self.dp_ranks // self.ranks
        tokens, mode = int(counts[own]), chosen[own]
        self.routed = tokens if self.scattered else int(counts.sum())
        ids = torch.arange(tokens, device=self.device)
        self.batch = ForwardBatch(
            ForwardMode[mode], batch_size=tokens, input_ids=ids, positions=ids, req_pool_indices=ids,
            seq_lens=ids, out_cache_loc=ids, seq_lens_sum=tokens,
        )  # fmt: skip
        self.batch._init_num_token_non_padded(device=self.device, is_draft_worker=False)
        if self.dp_ranks > 1:
            everyone = mock.Mock(
                global_num_tokens=counts.tolist(), global_num_tokens_for_logprob=counts.tolist()
            )
            self.batch.init_mlp_sync_metadata(everyone, self.device)
        return {"SPLIT_PREFILL": "prefill", "EXTEND": "prefill", "MIXED": "mixed", "IDLE": ""}.get(
            mode, "decode"
        )

    def forward(self, passes: int = 1, *, draft: bool = False) -> None:
        for _ in range(passes):
            phase = self.choose()
            if not draft:
                self.phases.append(phase)
                self.tokens.append(self.routed)
            with torch.inference_mode():  # as the scheduler's event loop does
                (self.draft_runner if draft else self.runner).forward(self.batch)
            accumulator = getattr(self.recorder, "_accumulator", None)
            self.switch.append(self.recorder.recording)
            if hasattr(accumulator, "_records"):
                self.stored.append(len(accumulator._records))
            elif accumulator is not None:
                self.stored.append(accumulator._global_physical_count_of_buffered_step._size)

    def save(self) -> None:
        np.savez(
            self.out / f"truth-{self.rank}.npz",
            loads=self.loads,
            maps=[map_.cpu().numpy() for map_ in self.maps],
            phases=self.phases,
            tokens=self.tokens,
        )
        said = {
            "messages": self.messages.texts,
            "switch": self.switch,
            "stored": self.stored,
            "began": self.began,
        }
        (self.out / f"said-{self.rank}.json").write_text(json.dumps(said))
        for writer in open_writers():
            assert writer.flush()
        torch.distributed.barrier()


def open_writers() -> list[Any]:
    plugin = sys.modules.get("eplb_dump.engines.sglang")
    return list(plugin._writers.values()) if plugin is not None else []


def own_and_ours(engine: Rank) -> None:
    """We alone, then SGLang too, then we alone, with rearrangements everywhere."""
    for _ in range(2):
        engine.forward(3)
        with torch.inference_mode():
            engine.rearrange([2, 4])
        engine.forward(2)
        engine.recorder.start_record()
        engine.forward(4)
        with torch.inference_mode():
            engine.rearrange(list(range(LAYERS)))
        engine.forward(2)
        if hasattr(engine.recorder._accumulator, "_records"):
            engine.recorder.dump_record()
        else:
            own = engine.recorder.dump_record(output_mode="object")
            with open(engine.out / f"own-{engine.rank}.npz", "wb") as file:
                np.savez(file, logical_count=own["logical_count"].cpu().numpy())
        engine.forward(1)
        engine.recorder.stop_record()
        engine.rearrange([3])
        engine.forward(3)


def simple(engine: Rank) -> None:
    engine.forward(4)


def own_only(engine: Rank) -> None:
    """SGLang's own recorder writes its file, and nothing moves."""
    engine.recorder.start_record()
    engine.forward(6)
    engine.recorder.dump_record()


def graphs(engine: Rank) -> None:
    engine.capture()
    own_and_ours(engine)


def unsynchronized(engine: Rank) -> None:
    """No pass waits for the GPU: torch raises an error where one would."""
    for _ in range(6):
        engine.phases.append(engine.choose())
        engine.tokens.append(engine.routed)
        torch.cuda.set_sync_debug_mode("error")
        with torch.inference_mode():
            engine.runner.forward(engine.batch)
        torch.cuda.set_sync_debug_mode("default")


def wide(engine: Rank) -> None:
    """per_token, which cannot take more than 8 experts a token: SGLang's pass must not fail for us."""
    engine.forward(2)
    engine.top_k = 9
    engine.forward(2)


def with_drafts(engine: Rank) -> None:
    for _ in range(3):
        engine.forward(2)
        engine.forward(3, draft=True)


def renamed(engine: Rank) -> None:
    """After two passes, what a pass gathers has another name than the plugin knows."""
    engine.recorder.start_record()
    engine.forward(2)
    for gatherer in engine.recorder._single_pass_gatherers.values():
        collect = gatherer.collect
        gatherer.collect = lambda collect=collect: {"renamed": collect()["global_physical_count"]}
    engine.forward(2)
    engine.recorder.stop_record()
    engine.forward(2)


def killed(engine: Rank) -> None:
    engine.forward(20)
    await_kill(engine.rank, 20)


def stuck(engine: Rank) -> None:
    """The scheduler was asked to end, and does not get done with releasing what it holds: SGLang kills it."""
    engine.forward(20)
    engine.save()
    scheduler = mock.Mock(hisparse_coordinator=None)
    scheduler.tree_cache.release_host_resources = lambda: await_closed(engine.rank, 1)
    sys.modules["sglang.srt.managers.scheduler"].Scheduler.release_host_resources(scheduler)
    os._exit(0)  # like a kill


def rows(engine: Rank) -> None:
    """What the plugin makes of configurations of models as SGLang has them."""
    from eplb_dump.engines.sglang import _moe_rows

    found = []
    for values in json.loads((engine.out / "configs.json").read_text()):
        with mock.patch("sglang.srt.runtime_context.process_model_config") as config:
            config.return_value.hf_text_config = mock.Mock(spec=list(values), **values)
            found.append(_moe_rows(6)[1])
    (engine.out / "rows.json").write_text(json.dumps(found))


#: Name: what happens, and SGLang's arguments.
SCENARIOS: dict[str, tuple[Any, dict[str, Any]]] = {
    "stat": (own_and_ours, {}),
    "per_pass": (own_and_ours, {"expert_distribution_recorder_mode": "per_pass"}),
    "per_token": (wide, {"expert_distribution_recorder_mode": "per_token", "chunked_prefill_size": 64}),
    "own_per_token": (
        own_only,
        {
            "expert_distribution_recorder_mode": "per_token",
            "chunked_prefill_size": 64,
            "moe_a2a_backend": "mooncake",
            "enable_dp_attention": True,
            "dp_size": 2,
        },
    ),
    "off": (simple, {"expert_distribution_recorder_mode": None}),
    "simple": (simple, {}),
    "graphs": (graphs, {}),
    "graphs_per_pass": (graphs, {"expert_distribution_recorder_mode": "per_pass"}),
    "unsynchronized": (unsynchronized, {}),
    "scattered": (simple, {"moe_a2a_backend": "mooncake"}),
    "scattered_dp": (simple, {"moe_a2a_backend": "mooncake", "enable_dp_attention": True, "dp_size": 2}),
    "dp_attention": (simple, {"enable_dp_attention": True, "dp_size": 2}),
    "drafts": (with_drafts, {"speculative_algorithm": "NGRAM"}),
    "renamed": (renamed, {"expert_distribution_recorder_mode": "per_pass"}),
    "no_predicate": (simple, {}),
    "no_entry": (simple, {}),
    "killed": (killed, {}),
    "stuck": (stuck, {}),
    "rows": (rows, {}),
}


def run(rank: int, out: str, ranks: int, scenario: str, device: str) -> None:
    os.chdir(tempfile.mkdtemp(dir=out))
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    messages = Messages()
    for logged in ("eplb_dump", "sglang"):
        logging.getLogger(logged).addHandler(messages)
    happens, arguments = SCENARIOS[scenario]
    if scenario == "no_predicate":
        import sglang.srt.layers.moe.utils as inside

        del inside.is_moe_input_scattered_across_dp_ranks
    if scenario == "no_entry":
        import sglang.srt.eplb.expert_distribution as distribution

        kept = distribution.ExpertDistributionRecorder
        distribution.ExpertDistributionRecorder = object()
        from sglang.srt.plugins import load_plugins

        load_plugins()
        distribution.ExpertDistributionRecorder = kept
    if scenario == "stuck":
        sys.modules.setdefault("setproctitle", mock.MagicMock())
        import sglang.srt.managers.scheduler  # noqa: F401 - as in a scheduler's process
    engine = Rank(Path(out), rank, ranks, messages, device, **arguments)
    happens(engine)
    engine.save()
    atexit._run_exitfuncs()  # a process that multiprocessing forked skips them


def main() -> None:
    out, ranks, scenario, device = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], (*sys.argv, "cpu")[4]
    (out / "model").mkdir(parents=True, exist_ok=True)
    (out / "model/config.json").write_text(json.dumps(MODEL))
    fork, kill = device == "cpu", scenario == "killed"
    run_ranks(ranks, run, str(out), ranks, scenario, device, fork=fork, kill=kill)


if __name__ == "__main__":
    main()
