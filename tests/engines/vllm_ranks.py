"""Drive vLLM's real EplbState over gloo processes with known loads, and save what is true.

Runs in the engines' environment: ``python tests/engines/vllm_ranks.py --out FOLDER --world 4 …``. The wheel
is unmodified, plugins are loaded as vLLM loads them, ``step`` rearranges for real: weights move
between the ranks and are checked, requests are scheduled by vLLM's scheduler, and the model runner's
``execute_model`` is entered. Faked are only what a machine without a GPU lacks: the model, which runs in
place of the rest of ``execute_model``, the router's kernel (a torch twin) and three entry points of torch.
The truth of each rank stands in FOLDER/rank<n>.npz.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from ranks import await_closed, await_kill, run_ranks
from vllm_requests import Pass, Requests


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    for name, value in {
        "world": 2, "steps": 40, "layers": 4, "draft-layers": 0, "logical": 16, "redundant": 4, "topk": 2,
        "seed": 0, "window": 4, "interval": 10, "log-interval": 1, "kill-at": -1,
        "pipeline": 1,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--parallel", choices=("dp", "tp"), default="dp")
    parser.add_argument(
        "--dummies", type=float, default=0.0, help="chance that a rank has no tokens in a step"
    )
    parser.add_argument("--elastic", default="", help="EP sizes from steps on, as in 15:2,30:4")
    for name in ("async", "no-log", "profile-step", "v2", "without-plugin", "break-vllm", "break-config"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--schedule-ahead", action="store_true", help="asynchronous scheduling")
    parser.add_argument("--speculate", action="store_true", help="with drafts")
    parser.add_argument("--eplb-config", default="{}", help="as `vllm serve` takes it")
    parser.add_argument("--break-runner", choices=("", "output", "runner", "tokens"), default="")
    parser.add_argument("--split-tokens", action="store_true", help="sequence parallelism")
    parser.add_argument("--probe", action="store_true", help="measure as scripts/real_vllm_gpu.sh does")
    parser.add_argument("--stuck", action="store_true", help="killed while it shuts down")
    return parser.parse_args()


class CpuEvent:
    """For torch.Event, which cannot be recorded without an accelerator."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._time = 0.0

    def record(self, stream: Any = None) -> None:
        self._time = time.perf_counter()

    def synchronize(self) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: CpuEvent) -> float:
        return 1e3 * (end._time - self._time)


class CpuStream:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def synchronize(self) -> None: ...


def without_an_accelerator() -> None:
    import torch

    torch.Event = torch.cuda.Event = CpuEvent  # vLLM before 0.33 has CUDA's
    torch.Stream = torch.cuda.Stream = CpuStream
    torch.cuda.current_stream = lambda *_: CpuStream()
    torch.cuda.set_device = lambda _: None
    torch.accelerator.current_stream = lambda *_: CpuStream()
    torch.accelerator.set_stream = lambda _: None
    torch.accelerator.set_device_index = lambda _: None
    torch.accelerator.current_accelerator = lambda *_, **__: torch.device("cpu")


def route(topk_ids: Any, layer_state: Any, tokens: int) -> Any:
    """A twin of vLLM's router kernel: spreads over replicas, counts where vLLM has counting on.

    Returns the load per slot, whether it was counted or not.
    """
    import torch

    flat, topk = topk_ids.reshape(-1).long(), topk_ids.shape[-1]
    position = torch.arange(flat.numel())
    replicas = layer_state.logical_replica_count[flat].clamp(min=1)
    slot = layer_state.logical_to_physical_map[
        flat, (((position // topk) * 2654435769) & 0xFFFFFFFF) % replicas
    ]
    slots = layer_state.expert_load_view.shape[0]
    real = (position < tokens * topk) & (slot >= 0) & (slot < slots)
    load = torch.bincount(slot[real], minlength=slots).to(torch.int32)
    if bool(layer_state.should_record_tensor):
        layer_state.expert_load_view += load
    return load


def parsed(eplb_config: str) -> Any:
    """What `vllm serve --eplb-config` makes of this text."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    return EngineArgs.from_cli_args(parser.parse_args(["--eplb-config", eplb_config])).eplb_config


class Ran(Exception):
    """vLLM's execute_model ends here, as the stand-in for its model has run."""


def runner(rank: Rank, v2: bool) -> Any:
    """vLLM's model runner, whose ``execute_model`` calls ``rank.run_models`` before anything else."""
    from vllm.v1.worker import gpu_model_runner

    if not v2:

        class V1(gpu_model_runner.GPUModelRunner):
            def __init__(self) -> None: ...

            @property
            def execute_model_state(self) -> None:
                rank.run_models()
                raise Ran

            eplb_state = property(lambda self: rank.state)

        return V1()
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    class V2(GPUModelRunner):
        def __init__(self) -> None: ...

        def update_pp_decode_requests(self) -> None:
            rank.run_models()
            raise Ran

        eplb = property(lambda self: rank.controller)

    return V2()


class Rank:
    """One process of the engine."""

    def __init__(self, rank: int, args: argparse.Namespace) -> None:
        import torch

        self.rank, self.args = rank, args
        self.began: dict[str, list[int]] = {}
        torch.set_num_threads(1)
        without_an_accelerator()
        from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
        from vllm.config.parallel import EPLBConfig
        from vllm.distributed import parallel_state

        eplb = EPLBConfig(
            window_size=args.window, step_interval=args.interval, use_async=getattr(args, "async"),
            log_balancedness=not args.no_log, log_balancedness_interval=args.log_interval,
            communicator="torch_gloo",
        )  # fmt: skip
        #: Each pipeline stage has an EP group of its own.
        self.ep_rank, self.stage = divmod(rank, args.pipeline)
        ep_size = args.world // args.pipeline
        size = {"data_parallel_size" if args.parallel == "dp" else "tensor_parallel_size": ep_size}
        self.config = ParallelConfig(
            enable_expert_parallel=True, eplb_config=eplb, disable_custom_all_reduce=True,
            distributed_executor_backend="external_launcher",
            pipeline_parallel_size=args.pipeline, **size,
        )  # fmt: skip
        whole = VllmConfig(parallel_config=self.config)
        # vLLM refuses to balance on a CPU, so this is set after its checks.
        self.config.enable_eplb, eplb.num_redundant_experts = True, args.redundant
        if args.eplb_config != "{}":
            eplb.expert_load_dump_dir = parsed(args.eplb_config).expert_load_dump_dir
        with set_current_vllm_config(whole):
            parallel_state.init_distributed_environment(
                args.world, rank, f"file://{args.out.absolute()}/store", rank, backend="gloo"
            )
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=self.config.tensor_parallel_size,
                pipeline_model_parallel_size=args.pipeline,
            )
        self.parallel_state = parallel_state
        self.sizes = dict(tuple(map(int, part.split(":"))) for part in args.elastic.split(",") if part)
        self.active = True
        if self.sizes:  # only now, as its groups need a coordinator of vLLM's front end
            self.config.enable_elastic_ep, self.config.elastic_ep_max_dp_size = True, args.world
        if args.split_tokens:
            ParallelConfig.use_sequence_parallel_moe = property(lambda _: True)
        from vllm.distributed.eplb.eplb_state import EplbState

        # vLLM before 0.26 has no such call, so that tokens are not known.
        self.prepare_forward = getattr(EplbState, "prepare_forward", lambda *_: None)
        if args.break_runner == "tokens":
            del EplbState.prepare_forward
        if args.break_vllm:
            import vllm.distributed.eplb.eplb_state as broken

            broken.EplbState._should_record_current_step_ = broken.EplbState._should_record_current_step
            broken.EplbState.step = lambda self, is_dummy=False, is_profile=False, *, stats=False, **_: None
        if args.break_config:  # of another version of vLLM
            ParallelConfig.use_sequence_parallel_moe = None
            del ParallelConfig.use_sequence_parallel_moe
        if not args.without_plugin:
            from vllm.plugins import load_general_plugins

            load_general_plugins()
            self.note_begins()
        if args.probe:
            sys.path.append(str(Path(__file__).parents[2] / "scripts/real_vllm_gpu"))
            import eplb_probe

            self.probe = eplb_probe.Probe()
        from vllm.distributed.eplb import eplb_state

        self.eplb = eplb_state
        self.slots = args.logical + args.redundant
        self.local = self.slots // ep_size
        self.step_number = -1
        self.running: Pass | None = None
        self.saved: dict[str, Any] = {}
        self.logged: list[tuple[Any, ...]] = []
        handler = logging.Handler()
        handler.emit = self._caught  # type: ignore[method-assign]
        eplb_state.logger.addHandler(handler)
        eplb_state.logger.setLevel(logging.INFO)
        self.controller: Any = None
        #: vLLM adds the drafter first.
        self.models = [self._model("draft", args.draft_layers, "org/draft")] if args.draft_layers else []
        self.models.append(self._model("model", args.layers, "org/main"))
        self.build_state()
        # The ranks of one tensor-parallel group share their requests.
        seed = [args.seed, 0 if args.parallel == "tp" else rank + 1]
        self.own = np.random.default_rng(seed)
        self.popularity = 1.0 / np.arange(1, args.logical + 1) ** 1.2
        self.order: dict[str, Any] = {}
        self.requests = Requests(seed, v2=args.v2, ahead=args.schedule_ahead, drafts=args.speculate)
        self.runner = runner(self, args.v2)

    def note_begins(self) -> None:
        """Note the steps in which a writer is told that a forward pass begins."""
        from eplb_dump.writer import ExpertLoadWriter

        begin = ExpertLoadWriter.begin_step

        def begin_step(writer: ExpertLoadWriter) -> None:
            self.began.setdefault(writer.info.model, []).append(self.step_number)
            begin(writer)

        ExpertLoadWriter.begin_step = begin_step  # type: ignore[method-assign]

    def build_state(self) -> None:
        import torch

        if self.args.v2:
            from vllm.v1.worker.gpu.eplb_utils import EPLBController

            self.controller = EPLBController(self.config, torch.device("cpu"))
            self.controller.prepare_load()
            self.state = self.controller.state
        else:
            self.state = self.eplb.EplbState(self.config, torch.device("cpu"))
        if getattr(self.args, "async"):
            self.state.device_index = 0
        for name, model, config in self.models:
            if self.controller is not None:
                assert self.controller.maybe_register_model(model, config)
            else:
                # Only vLLM 0.33 can be told of a name.
                shown = {"model_name": "org/draft (draft)"} if name == "draft" else {}
                self.state.add_model(model, config, **shown)
        if self.controller is not None:
            self.controller.maybe_start_async_loop(True)
        elif getattr(self.args, "async"):
            self.state.start_async_loop()

    def _caught(self, record: logging.LogRecord) -> None:
        """Keep what vLLM logs, unrounded."""
        if str(record.msg).startswith("EPLB step: %d"):
            self.logged.append((self.step_number, *record.args))  # type: ignore[misc]

    def _model(self, name: str, layers: int, path: str) -> tuple[str, Any, Any]:
        import torch
        from vllm.model_executor.models.interfaces import MixtureOfExperts

        owner, args, eplb = self, self.args, self.eplb

        class Layer:
            def __init__(self, index: int) -> None:
                # The first layers of the model are dense.
                self.layer_name = f"{name}.layers.{index + 3 + layers * owner.stage}.mlp.experts"
                self.eplb_state = eplb.EplbLayerState()
                first = eplb.EplbState.build_initial_global_physical_to_logical_map(
                    args.logical, args.redundant
                )
                own = torch.tensor(first)[owner.ep_rank * owner.local : (owner.ep_rank + 1) * owner.local]
                mark = own.float() + 1000 * index
                self.weights = [mark[:, None].repeat(1, 8), -mark[:, None].repeat(1, 4)]

            def get_expert_weights(self) -> Any:
                return self.weights

            def set_eplb_state(self, index: int, load: Any, to_physical: Any, replicas: Any) -> None:
                self.eplb_state.set_layer_state(index, load, to_physical, replicas)

        class Model(MixtureOfExperts):  # whose own set_eplb_state is used
            def __init__(self) -> None:
                self.moe_layers, self.num_moe_layers = [Layer(i) for i in range(layers)], layers
                self.num_expert_groups, self.num_shared_experts = 1, 0
                self.num_logical_experts = self.num_routed_experts = args.logical
                self.num_physical_experts, self.num_local_physical_experts = owner.slots, owner.local
                self.num_redundant_experts = args.redundant

            def set_eplb_state(self, load: Any, to_physical: Any, replicas: Any) -> None:
                self.expert_weights = []
                for index, layer in enumerate(self.moe_layers):
                    self.expert_weights.append(layer.get_expert_weights())
                    layer.set_eplb_state(index, load, to_physical, replicas)

        class Config:
            model = path

            def compute_hash(self) -> str:
                return f"hash of {path}"

        return name, Model(), Config()

    def model_state(self, config: Any) -> Any:
        return self.state.model_states[config.compute_hash()]

    def resize(self, size: int, step: int) -> None:
        """As elastic EP does: ranks from ``size`` on leave with their slots, or come as new ones."""
        import torch

        world = self.args.world
        groups = [list(range(size)), list(range(size, world))] if size < world else [list(range(world))]
        group = self.parallel_state.init_model_parallel_group(groups, self.rank, "gloo", group_name="ep")
        self.parallel_state._EP = group
        if self.rank < size:
            # What elastic EP's coordinator has: a store of these ranks' own.
            from vllm.distributed.utils import StatelessProcessGroup

            store = torch.distributed.FileStore(str(self.args.out / f"store-{step}"), size)
            group.tcp_store_group = StatelessProcessGroup(self.rank, size, store)
        self.slots, self.config.data_parallel_size = self.local * size, size
        was_active, self.active = self.active, self.rank < size
        if not self.active:
            return
        for _, model, config in self.models:
            if was_active:
                self.state.reconfigure_physical_expert_slots(config, self.slots)
            model.num_physical_experts = self.slots
            model.num_redundant_experts = self.slots - self.args.logical
        if not was_active:
            self.build_state()
        for _, _, config in self.models:
            state = self.model_state(config)
            slots = torch.arange(self.slots).repeat(len(state.physical_to_logical_map), 1) % self.args.logical
            if was_active:
                self.eplb._commit_eplb_maps(state, new_physical_to_logical_map=slots)
            else:
                whole = torch.full_like(state.physical_to_logical_map_buffer, -1)
                whole[:, : self.slots] = slots
                self.state.update_mapping(config, whole)
            self.state.update_communicator(config, self.state.create_communicator(config, group))
        self.state.expert_rearrangement_step = 0

    def serve(self) -> dict[str, Any]:
        import torch

        args, saved = self.args, self.saved
        # The same on every rank: who is hot, who is idle.
        shared = np.random.default_rng(args.seed)
        idle = shared.random((args.steps, args.world)) < (args.dummies if args.parallel == "dp" else 0)
        with torch.inference_mode():  # as vLLM's worker
            if args.profile_step:
                self.state.step(True, True, log_stats=False)
            for step in range(args.steps):
                self.step_number = step
                if step == args.kill_at:
                    await_kill(self.rank, step)
                if step in self.sizes:
                    self.resize(self.sizes[step], step)
                if step % (args.steps // 2) == 0:
                    for name, model, _ in self.models:
                        self.order[name] = [shared.permutation(args.logical) for _ in model.moe_layers]
                if not self.active:
                    continue
                dummy = bool(idle[step, self.rank])
                saved[f"{step}/dummy"] = np.array(dummy)
                self.running = None if dummy else self.requests.next()
                if self.running is None or args.break_runner == "runner":
                    self.run_models()
                else:
                    with contextlib.suppress(Ran):
                        broken = args.break_runner == "output"
                        self.runner.execute_model(object() if broken else self.running.output)
                    saved[f"{step}/phase"] = np.array(self.running.phase)
                    saved[f"{step}/tokens"] = np.array(self.running.tokens)
                if self.controller is not None:
                    self.controller.step(is_dummy=dummy)
                else:
                    self.state.step(dummy, False, log_stats=self.config.eplb_config.log_balancedness)
                assert self.sizes or self._weights_moved(), "the weights are not where the placement says"
                if self.running is not None:
                    self.requests.ran(self.running)
                torch.distributed.barrier(group=self.parallel_state.get_ep_group().cpu_group)
        if args.probe:  # vLLM adds the probe's methods to its worker, which has a model runner
            self.probe.model_runner = self.runner
            self.probe.eplb_probe_write(str(args.out / "probe"))
        saved["began"] = np.array(json.dumps(self.began))
        saved["logged"] = np.array([json.dumps(line) for line in self.logged])
        return saved

    def run_models(self) -> None:
        """The forward passes of the main model, then of the drafter."""
        import torch

        args, step, dummy = self.args, self.step_number, self.running is None
        tokens = 1 if self.running is None else self.running.tokens
        for name, model, config in reversed(self.models):
            if not dummy:
                getattr(type(self.state), "prepare_forward", self.prepare_forward)(self.state, config, tokens)
            load = np.zeros((model.num_moe_layers, self.slots), np.int32)
            for index, layer in enumerate(model.moe_layers):
                padded = -(-tokens // 64) * 64
                keys = np.log(self.popularity) + self.own.gumbel(size=(padded, args.logical))
                ids = self.order[name][index][np.argsort(-keys, axis=1)[:, : args.topk]]
                state = layer.eplb_state
                real = tokens  # vLLM before 0.26 does not tell the router, which counts all of a pass
                if hasattr(state, "num_unpadded_tokens_tensors"):
                    real = int(state.num_unpadded_tokens_tensors[0])
                counted = route(torch.from_numpy(ids), state, real)
                if not dummy:
                    load[index] = counted[: self.slots]
            self.saved[f"{step}/{name}/load"] = load
            placement = self.model_state(config).physical_to_logical_map
            self.saved[f"{step}/{name}/placement"] = placement.numpy().astype(np.int32)

    def _weights_moved(self) -> bool:
        """Whether this rank holds the weights of the experts that the placement says."""
        good = True
        for _, model, config in self.models:
            slots = self.model_state(config).physical_to_logical_map.numpy()
            for index, layer in enumerate(model.moe_layers):
                want = (
                    slots[index, self.ep_rank * self.local : (self.ep_rank + 1) * self.local] + 1000 * index
                )
                good &= bool((layer.weights[0][:, 0].numpy() == want).all())
                good &= bool((layer.weights[1][:, 0].numpy() == -want).all())
        return good


def shut_down_stuck(rank: Rank) -> None:
    """vLLM's executor shuts down a worker that is not done with it before its sessions are closed."""
    from vllm.v1.executor.uniproc_executor import UniProcExecutor
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    class Stuck:
        model_runner = rank.runner

        def shutdown(self) -> None:
            dump = getattr(rank.config.eplb_config, "expert_load_dump_dir", None)
            await_closed(rank.rank, len(rank.models), dump)

    executor = UniProcExecutor.__new__(UniProcExecutor)
    executor.driver_worker = WorkerWrapperBase()
    executor.driver_worker.worker = Stuck()
    executor.shutdown()


def run(rank: int, args: argparse.Namespace) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(args.world),
        "VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(args.v2)),
    }  # fmt: skip
    try:
        served = Rank(rank, args)
        np.savez_compressed(args.out / f"rank{rank}.npz", **served.serve())
        if args.stuck:
            shut_down_stuck(served)
            os._exit(0)  # like a kill
        import torch

        torch.distributed.barrier()
        import atexit

        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # vLLM's async worker thread never ends


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    run_ranks(args.world, run, args, kill=args.kill_at >= 0)


if __name__ == "__main__":
    main()
