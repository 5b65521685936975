"""Runs real vLLM engines with and without the recorder, and prints what it cost and whether it was right.

Two parts, each a few minutes, whose raw results stay below --out:

cost:   three engines at once (off, on, off2) take turns, as in production. Then they are shut down.
check:  the same three with vLLM's iteration log and frequent rearrangements. All prompts of a round are
        admitted in one batch, so that all engines see the same sequence of batches. Then "on" is killed.
        With data parallelism only "on" runs, because vLLM admits requests as they arrive.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import entry_points
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
#: A Qwen3-MoE whose weights take 11 GB. They are random, but the same in every engine.
MODEL: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16",
    "num_hidden_layers": 24, "hidden_size": 2048, "head_dim": 128, "num_attention_heads": 16,
    "num_key_value_heads": 4, "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
    "intermediate_size": 6144, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "vocab_size": 32000,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PROMPT = 32
#: Tokens per request in a round: enough steps for a median, and no more than the engine's model length.
MIN_NEW, MAX_NEW = 50, 4000
#: Batch and new tokens of the rounds of "check": short ones between, so that ranks are idle under DP.
CHECKED = (64, 400), (1, 150), (31, 250), (64, 300)
KILLED_AFTER_S = 4.0
CLOSING_S = 90


class Shape(NamedTuple):
    """A round: how many requests, and how many tokens each of them gets."""

    batch: int
    new: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        batch, _, new = text.partition("x")
        return cls(int(batch), int(new))


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="real_vllm_gpu.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tp", type=int, help="tensor-parallel size; default: 2, or 1 with --dp")
    parser.add_argument("--dp", type=int, default=1, help="data-parallel size; default: 1")
    parser.add_argument(
        "--parts", default="cost,check", help="what to run, separated by commas; default: cost,check"
    )
    parser.add_argument("--rounds", type=int, default=8, help="rounds of each shape in cost; default: 8")
    parser.add_argument(
        "--shapes", default="128x300,16x300",
        help="requests x new tokens of a round in cost; default: 128x300,16x300",
    )  # fmt: skip
    parser.add_argument(
        "--model", type=Path, metavar="CONFIG",
        help="a model's config.json; default: a Qwen3-MoE of 24 layers x 64 experts. Weights are random",
    )  # fmt: skip
    parser.add_argument("--redundant", type=int, default=8, help="redundant experts; default: 8")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="an option of vLLM's engine, such as eplb_config.use_async=true; can be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float, default=60.0,
        help="end the rounds of a part after so many minutes since it began; default: 60",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="default: gpu-results")
    parser.add_argument("--table", type=Path, metavar="OUT", help="only print the table of stored results")
    options = parser.parse_args(given)
    options.parts = options.parts.split(",")
    if unknown := set(options.parts) - {"cost", "check"}:
        parser.error(f"--parts: {', '.join(sorted(unknown))} is no part; choose cost, check or both")
    try:
        options.shapes = [Shape.parse(text) for text in options.shapes.split(",")]
    except ValueError:
        parser.error(f"--shapes {options.shapes}: write requests x tokens, such as 128x300,16x300")
    if any(shape.batch < 1 or not MIN_NEW <= shape.new <= MAX_NEW for shape in options.shapes):
        parser.error(f"--shapes: a round has 1 request or more, and {MIN_NEW} to {MAX_NEW} tokens for each")
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    if any("=" not in text for text in options.set):
        parser.error("--set takes NAME=VALUE, such as eplb_config.use_async=true")
    if options.tp is None:
        options.tp = 2 if options.dp == 1 else 1
    if options.tp * options.dp < 2:
        parser.error("expert parallelism needs two GPUs or more: --tp times --dp is 1")
    return options


def engine_options(args: argparse.Namespace, part: str, model: Path) -> dict[str, Any]:
    """Keyword arguments of vLLM's engine."""
    batch = max(shape.batch for shape in [*args.shapes, *(Shape(*one) for one in CHECKED)])
    graphs = [2**i for i in range(batch.bit_length()) if 2**i <= batch]
    options: dict[str, Any] = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "tensor_parallel_size": args.tp,
        "enable_expert_parallel": True,
        "enable_eplb": True,
        "eplb_config": {
            "num_redundant_experts": args.redundant,
            "use_async": False,
            # Cost: vLLM counts in a third of the steps, as by default. Check: many rearrangements.
            **({"window_size": 1000, "step_interval": 3000} if part == "cost" else {}),
            **({"window_size": 20, "step_interval": 100} if part == "check" else {}),
        },
        "max_model_len": 4096,
        "max_num_seqs": batch,
        # A round's prompts fit into one pass.
        "max_num_batched_tokens": max(4096, batch * PROMPT),
        # Three engines share the GPUs.
        "gpu_memory_utilization": 0.25,
        "kv_cache_memory_bytes": 4 << 30,
        "enable_prefix_caching": False,
        "compilation_config": {"cudagraph_capture_sizes": sorted({*graphs, batch})},
        "seed": 0,
        "worker_extension_cls": "eplb_probe.Probe",
    }
    if args.dp > 1:
        options["data_parallel_size"] = args.dp
    if part == "check":
        options |= {"disable_log_stats": False, "enable_logging_iteration_details": True}
        if args.dp == 1:
            options["async_scheduling"] = False
    for text in args.set:
        name, _, value = text.partition("=")
        *path, last = name.split(".")
        where = options
        for key in path:
            where = where.setdefault(key, {})
        try:
            where[last] = json.loads(value)
        except ValueError:
            where[last] = value
    return options


class EngineError(Exception):
    """An engine did not do what it should; the text ends with its log."""


class Engine:
    """A process of ``engine.py`` and all that it started."""

    def __init__(self, name: str, folder: Path, options: dict[str, Any], check: bool) -> None:
        self.name, self.folder = name, folder
        file = folder / f"{name}.json"
        file.write_text(json.dumps(options, indent=1))
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "PYTHONUNBUFFERED": "1",
        }
        environment.pop("EXPERT_LOAD_DUMP_DIR", None)
        if name == "on":
            environment["EXPERT_LOAD_DUMP_DIR"] = str(folder / "dump")
        if check:
            # The scheduler in this process takes no step before all requests of a round are there.
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            environment["EPLB_PROBE_PLACEMENTS"] = str(int(name != "on"))
        ours, its = socket.socketpair()
        with (folder / f"{name}.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "engine.py"), str(its.fileno()), str(file)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=environment, pass_fds=[its.fileno()], start_new_session=True,
            )  # fmt: skip
        its.close()
        self._connection: Connection[Any, Any] = Connection(ours.detach())

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def send(self, command: dict[str, Any] | None) -> None:
        self._connection.send(command)

    def answer(self, timeout_s: float) -> Any:
        end = time.monotonic() + timeout_s
        while not self._connection.poll(1):
            if self._process.poll() is not None or time.monotonic() > end:
                why = (
                    "has ended"
                    if self._process.poll() is not None
                    else f"did not answer in {timeout_s:.0f} s"
                )
                raise EngineError(f"{self.name} {why}\n{self._errors()}")
        try:
            return self._connection.recv()
        except EOFError:
            raise EngineError(f"{self.name} has ended\n{self._errors()}") from None

    def _errors(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        wrong = [line for line in lines if "rror" in line][:12]
        return "\n".join(line[:300] for line in [f"--- {self.log}", *wrong, "...", *lines[-15:]])

    def ask(self, timeout_s: float, **command: Any) -> Any:
        self.send(command)
        return self.answer(timeout_s)

    def wait(self, timeout_s: float) -> int | None:
        """The exit status; None if the process does not end."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """Its whole process group at once."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._process.wait()


class Part:
    """One part's engines and results."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.args = name, args
        self.end = time.monotonic() + 60 * args.minutes
        self.folder = args.out / name
        (self.folder / "probe").mkdir(parents=True)
        (self.folder / "tokens").mkdir()
        self._number = 0
        model = self.folder / "model"
        model.mkdir()
        config = MODEL if args.model is None else json.loads(args.model.read_text())
        (model / "config.json").write_text(json.dumps(config, indent=1))
        options = engine_options(args, name, model)
        names = ["on"] if name == "check" and args.dp > 1 else ["off", "on", "off2"]
        check = name == "check" and args.dp == 1
        self.note(event="part", tp=args.tp, dp=args.dp, layers=config.get("num_hidden_layers"),
                  experts=config.get("num_experts"), redundant=args.redundant, set=args.set,
                  use_async=options["eplb_config"]["use_async"])  # fmt: skip
        self.engines = {one: Engine(one, self.folder, options, check) for one in names}

    def note(self, **what: Any) -> None:
        line = json.dumps(what)
        print(f"{self.name}: {line}", file=sys.stderr, flush=True)
        with (self.folder / "results.jsonl").open("a") as file:
            file.write(line + "\n")

    def start(self) -> None:
        for engine in self.engines.values():
            ready = engine.answer(max(60.0, self.end - time.monotonic()))
            self.note(event="ready", engine=engine.name, **ready["ready"])

    def round(self, shape: Shape) -> None:
        """Each engine takes its turn, in an order that changes from round to round."""
        names = list(self.engines)
        shift = self._number % len(names)
        for name in names[shift:] + names[:shift]:
            engine = self.engines[name]
            command = {"seed": self._number, "batch": shape.batch, "prompt": PROMPT, "new": shape.new}
            tokens = engine.ask(300, **command)
            np.save(self.folder / "tokens" / f"{name}-{self._number}.npy", tokens)
            engine.ask(60, probe=str(self.folder / "probe" / f"{name}-{self._number}"))
        self.note(event="round", number=self._number, batch=shape.batch, new=shape.new)
        self._number += 1

    @property
    def late(self) -> bool:
        return time.monotonic() > self.end

    def close(self) -> None:
        """Shut all engines down as vLLM does it."""
        began = time.monotonic()
        for engine in self.engines.values():
            engine.send(None)
        for engine in self.engines.values():
            status = engine.wait(CLOSING_S)
            self.note(event="closed", engine=engine.name, status=status, seconds=time.monotonic() - began)

    def kill_one_that_works(self) -> None:
        engine = self.engines["on"]
        time.sleep(1)  # its log is written
        self.note(event="before the kill", log_bytes=engine.log.stat().st_size)
        engine.send({"seed": self._number, "batch": 64, "prompt": PROMPT, "new": 3500})
        time.sleep(KILLED_AFTER_S)
        now = time.time_ns()
        engine.kill()
        self.note(event="killed", time_ns=now)
        del self.engines["on"]

    def end_all(self) -> None:
        for engine in self.engines.values():
            engine.kill()


def run_part(name: str, args: argparse.Namespace) -> None:
    part = Part(name, args)
    try:
        part.start()
        if name == "cost":
            part.round(Shape(max(shape.batch for shape in args.shapes), 60))  # warm-up
            for _ in range(args.rounds):
                for shape in args.shapes:
                    if not part.late:
                        part.round(shape)
        else:
            for batch, new in CHECKED:
                part.round(Shape(batch, new))
            part.kill_one_that_works()
        part.close()
    finally:
        part.end_all()


def main() -> None:
    args = arguments()
    if args.table is not None:
        sys.exit(print_table(args.table))
    args.out = args.out.resolve()
    # Also then, no engine stays behind on the GPUs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("real_vllm_gpu.sh: error: terminated"))
    failed = False
    try:
        check_environment(args)
        for name in args.parts:
            run_part(name, args)
    except EngineError as error:
        print(f"real_vllm_gpu.sh: error: {error}", file=sys.stderr)
        failed = True
    if any((args.out / name).exists() for name in ("cost", "check")):
        print_table(args.out)  # of the parts that ran, now or before
    sys.exit(int(failed))


def print_table(out: Path) -> int:
    return subprocess.run([sys.executable, HERE / "table.py", out], check=False).returncode


def check_environment(args: argparse.Namespace) -> None:
    """Raises EngineError."""
    if not any(point.name == "eplb_dump" for point in entry_points(group="vllm.general_plugins")):
        raise EngineError("vLLM does not find the plugin: install eplb-dump into this Python environment")
    needed, found = args.tp * args.dp, gpus()
    if found < needed:
        raise EngineError(f"--tp {args.tp} --dp {args.dp} needs {needed} GPUs, and torch finds {found}")
    for name in args.parts:
        if (args.out / name).exists():
            raise EngineError(f"{args.out / name} exists: choose another --out, or remove it")


def gpus() -> int:
    try:
        import torch
    except ImportError:
        raise EngineError("torch is not installed: use the Python environment of vLLM") from None
    return torch.cuda.device_count()


if __name__ == "__main__":
    main()
