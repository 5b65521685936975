"""The command line: options, training, then serving."""

from __future__ import annotations

import argparse
import importlib.util
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from .config import EngineConfig
from .errors import EngineError
from .launcher import launch
from .model import ModelConfig
from .text import read_corpora
from .training import train


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line is enough."""
        self.exit(2, f"moe_engine: {message}\n")


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    try:
        _run(options)
    except EngineError as error:
        print(f"moe_engine: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("moe_engine: interrupted", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    model = ModelConfig()
    config = EngineConfig(
        model=model,
        steps=options.steps,
        ep_size=options.ranks,
        num_redundant_experts=options.redundant_experts,
        rearrange_every=options.rearrange_every,
        window=options.window,
        seed=options.seed,
        device=options.device,
        run_id=options.run_id or f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(2)}",
        dump=options.dump,
        truth=options.truth,
        kill_at=options.kill_rank_at,
    )
    corpora = read_corpora()
    trained = train(
        model,
        corpora,
        steps=options.train_steps,
        seed=options.seed,
        device=torch.device(options.device),
        max_seconds=options.train_seconds,
    )
    print(
        f"trained {trained.steps} steps in {trained.seconds:.1f} s on Python's standard library: "
        f"{trained.bits_per_byte:.2f} bits per byte; {len(model.moe_layers)} MoE layers, "
        f"{model.num_logical_experts} experts, top-{model.top_k}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="moe_engine-") as folder:
        checkpoint = Path(folder, "checkpoint.pt")
        trained.checkpoint.save(checkpoint)
        launch(config, checkpoint, corpora, Path(folder, "store"))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="moe_engine",
        description="Train a small mixture-of-experts model and serve it with expert parallelism, recorded.",
    )
    parser.add_argument("--dump", type=Path, metavar="DIR", help="record with eplb_dump under DIR")
    parser.add_argument("--run-id", metavar="ID", help="the recording's run id (default: made from the time)")
    parser.add_argument(
        "--truth", type=Path, metavar="DIR", help="save each rank's exact loads as DIR/rank-NNNNN.npz"
    )
    parser.add_argument(
        "--steps", type=_at_least(1), default=300, metavar="N", help="forward passes (%(default)s)"
    )
    parser.add_argument("--ranks", type=_at_least(1), default=4, metavar="N", help="EP ranks (%(default)s)")
    parser.add_argument(
        "--redundant-experts",
        type=_at_least(0),
        default=4,
        metavar="N",
        help="redundant slots a layer (%(default)s)",
    )
    parser.add_argument(
        "--rearrange-every", type=_at_least(0), default=60, metavar="N", help="steps; 0 = never (%(default)s)"
    )
    parser.add_argument(
        "--window",
        type=_at_least(1),
        default=40,
        metavar="N",
        help="steps a rearrangement looks back on (%(default)s)",
    )
    parser.add_argument("--train-steps", type=_at_least(1), default=200, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--train-seconds",
        type=float,
        metavar="S",
        help="end training early: results then depend on the machine",
    )
    parser.add_argument("--seed", type=_at_least(0), default=0, metavar="N", help="(%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    parser.add_argument(
        "--kill-rank-at",
        type=_at_least(0),
        metavar="STEP",
        help="rank 0 kills itself (SIGKILL) at the start of this step",
    )
    options = parser.parse_args(argv)
    slots = ModelConfig().num_logical_experts + options.redundant_experts
    if slots % options.ranks:
        parser.error(
            f"{slots} expert slots (with --redundant-experts) do not divide evenly by {options.ranks} ranks"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no CUDA device")
    if options.dump and importlib.util.find_spec("eplb_dump") is None:
        parser.error("--dump: the package eplb_dump is not installed")
    if options.truth:
        try:
            options.truth.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--truth: {error}")
    return options


def _at_least(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{number} is less than {least}")
        return number

    convert.__name__ = "whole number"  # argparse names it in its error
    return convert
