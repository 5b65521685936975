"""ExpertLoadCounter counts like bincount; the transformers example records its routers' choices."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers import ROOT, open_writer
from hypothesis import given
from hypothesis import strategies as st

from eplb_analyze import open_run

torch = pytest.importorskip("torch")
from eplb_dump import ExpertLoadCounter  # noqa: E402 - needs torch

sys.path.append(str(ROOT))  # examples and benchmarks are not installed
from benchmarks import counter_cuda_check  # noqa: E402

Array = npt.NDArray[np.int64]
DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
LAYERS, EXPERTS, TOP_K = 2, 8, 2


def bincount(ids: Array, experts: int, mask: Array | None = None) -> list[int]:
    """The expected counts, computed on the host with bincount."""
    real = ids if mask is None else ids[mask]
    real = real[(real >= 0) & (real < experts)]
    counts: list[int] = torch.bincount(torch.from_numpy(real).flatten(), minlength=experts).tolist()
    return counts


def recorded_loads(root: Path, layers: int = LAYERS) -> dict[int, list[list[int]]]:
    """step -> load [layers, experts], as the library reads it."""
    rows = open_run(root).loads().to_dicts()
    loads: dict[int, list[list[int]]] = {}
    for row in rows:
        loads.setdefault(row["step"], []).append(row["load"])
    assert all(len(load) == layers for load in loads.values())
    return loads


@st.composite
def routings(draw: st.DrawFn) -> tuple[str, int, Array, Array | None]:
    """A dtype, a number of experts, ids of it with padding among them, and perhaps a mask of its tokens."""
    dtype, experts = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 200))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    bounds = np.iinfo(dtype)
    # Padding: below 0, and just and far above the experts, as far as the type goes.
    special = [n for n in (-1, experts, int(bounds.min), 2**63 - 1) if bounds.min <= n <= bounds.max]
    one = st.integers(0, min(experts - 1, int(bounds.max))) | st.sampled_from([0, *special])
    count = int(np.prod(shape))
    flat = draw(st.lists(one, min_size=count, max_size=count))
    ids = np.array(flat, np.int64).reshape(shape)
    mask = None
    if shape and draw(st.booleans()):
        tokens = int(np.prod(shape[:-1]))
        bits = draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
        mask = np.array(bits, bool).reshape(shape[:-1])
    return dtype, experts, ids, mask


class TestCounting:
    @given(routings())
    def test_counts_equal_bincount_of_valid_ids(self, routing: tuple[str, int, Array, Any]) -> None:
        dtype, experts, ids, mask = routing
        counter = ExpertLoadCounter(2, experts)
        counter.count(
            1,
            torch.from_numpy(ids).to(getattr(torch, dtype)),
            None if mask is None else torch.from_numpy(mask),
        )
        assert counter.load.tolist() == [[0] * experts, bincount(ids, experts, mask)]

    def test_id_above_int64_is_padding(self) -> None:
        counter = ExpertLoadCounter(1, EXPERTS)
        counter.count(0, torch.tensor([2**64 - 1, 2**63, 3], dtype=torch.uint64))
        assert counter.load.tolist() == [bincount(np.array([3]), EXPERTS)]

    def test_calls_add_up_for_any_strides(self) -> None:
        generator = np.random.default_rng(0)
        ids = generator.integers(-1, EXPERTS + 1, (64, 6))
        counter = ExpertLoadCounter(1, EXPERTS)
        for _ in range(3):
            counter.count(0, torch.from_numpy(ids)[::2, 1:5:2])
        assert counter.load.tolist() == [[3 * n for n in bincount(ids[::2, 1:5:2].copy(), EXPERTS)]]

    @pytest.mark.parametrize("made_inside", [True, False])
    @pytest.mark.parametrize("counted_inside", [True, False])
    def test_inference_mode_may_change_between_calls(
        self, tmp_path: Path, made_inside: bool, counted_inside: bool
    ) -> None:
        with torch.inference_mode(made_inside):
            counter, ids = ExpertLoadCounter(LAYERS, EXPERTS), torch.tensor([[1, 2], [2, 3]])
        writer = open_writer(tmp_path, num_logical_experts=EXPERTS, scope="global")
        for inside in (counted_inside, not counted_inside):
            with torch.inference_mode(inside):
                counter.count(0, ids)
                counter.record(writer)
        assert writer.close()
        expected = [[0, 1, 2, 1, 0, 0, 0, 0], [0] * EXPERTS]
        assert recorded_loads(tmp_path) == {0: expected, 1: expected}

    def test_count_compiles_without_graph_break(self) -> None:
        counter = ExpertLoadCounter(LAYERS, EXPERTS)

        @torch.compile(fullgraph=True, backend="aot_eager")  # type: ignore[untyped-decorator]
        def forward(ids: Any, mask: Any) -> Any:
            counter.count(1, ids, mask)
            return ids + 1

        ids = np.array([[1, 2], [-1, 2], [5, 8]])
        mask = np.array([True, True, False])
        for _ in range(2):
            forward(torch.from_numpy(ids), torch.from_numpy(mask))
        assert counter.load.tolist() == [[0] * EXPERTS, [2 * n for n in bincount(ids, EXPERTS, mask)]]


class TestRecording:
    def test_each_step_holds_only_its_own_counts(self, tmp_path: Path) -> None:
        generator = np.random.default_rng(0)
        counter, truth = ExpertLoadCounter(LAYERS, EXPERTS), {}
        buffer = counter.load
        placement = np.arange(EXPERTS) + np.zeros((LAYERS, 1), np.int64)
        writer = open_writer(tmp_path, num_logical_experts=EXPERTS, scope="global", moe_layers=[3, 5])
        for step in range(0, 40, 2):
            tokens = step % 7
            ids = generator.integers(-1, EXPERTS, (LAYERS, tokens, TOP_K))
            for layer in range(LAYERS):
                counter.count(layer, torch.from_numpy(ids[layer]).int())
            truth[step] = [bincount(layer, EXPERTS) for layer in ids]
            counter.record(
                writer, torch.from_numpy(placement), step=step, num_tokens=tokens, phase=f"p{tokens}"
            )
            assert not counter.load.any()
        assert counter.load is buffer
        assert writer.close()
        run = open_run(tmp_path)
        assert not run.findings
        assert recorded_loads(tmp_path) == truth
        assert run.info.layers == (3, 5)
        assert run.placements()["physical_to_logical"].to_list() == placement.tolist()
        steps = run.steps().to_dict(as_series=False)
        assert steps["num_tokens"] == [step % 7 for step in truth]
        assert steps["phase"] == [f"p{step % 7}" for step in truth]

    def test_counts_of_unrecorded_step_are_discarded(self, tmp_path: Path) -> None:
        counter, ids = ExpertLoadCounter(LAYERS, EXPERTS), torch.tensor([[0, 1]])
        writer = open_writer(tmp_path, num_logical_experts=EXPERTS, scope="global", interval=2)
        for step in (0, 1, 2, 2):  # not sampled, and repeated
            counter.count(0, ids)
            counter.record(writer, step=step)
        counter.count(0, ids)
        counter.reset()  # a dummy pass
        writer.skip("dummy")
        counter.count(0, ids)
        counter.record(writer)
        assert writer.close()
        stats = writer.stats()
        assert (stats.recorded, stats.not_sampled, stats.rejected, stats.dummy) == (3, 1, 1, 1)
        once = [bincount(np.array([0, 1]), EXPERTS), [0] * EXPERTS]
        assert recorded_loads(tmp_path) == {0: once, 2: once, 4: once}


class TestErrors:
    @pytest.mark.parametrize("shape", [(0, 4), (4, 0), (-1, 4)])
    def test_counter_without_layers_or_experts_is_rejected(self, shape: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match=f"at least 1, not {shape[0]} and {shape[1]}"):
            ExpertLoadCounter(*shape)

    @pytest.mark.parametrize("layer_index", [-1, LAYERS])
    def test_unknown_layer_is_rejected(self, layer_index: int) -> None:
        with pytest.raises(IndexError, match=f"layer_index is {layer_index}, but there are {LAYERS}"):
            ExpertLoadCounter(LAYERS, EXPERTS).count(layer_index, torch.zeros(1, 2, dtype=torch.int32))

    @pytest.mark.parametrize("dtype", ["float32", "bool", "complex64"])
    def test_ids_that_are_not_integers_are_rejected(self, dtype: str) -> None:
        with pytest.raises(TypeError, match=f"integer type, not torch.{dtype}"):
            ExpertLoadCounter(LAYERS, EXPERTS).count(0, torch.zeros(1, 2, dtype=getattr(torch, dtype)))

    @pytest.mark.parametrize(
        ("shape", "dtype", "error", "text"),
        [
            ((4,), "int64", TypeError, r"torch.bool, not torch.int64"),
            ((3,), "bool", ValueError, r"it is \[3\], but topk_ids \[4, 2\]"),
            ((1,), "bool", ValueError, r"it is \[1\]"),
            ((4, 2), "bool", ValueError, r"it is \[4, 2\]"),
        ],
    )
    def test_mask_of_wrong_shape_or_type_is_rejected(
        self, shape: tuple[int, ...], dtype: str, error: type[Exception], text: str
    ) -> None:
        counter = ExpertLoadCounter(LAYERS, EXPERTS)
        ids = torch.zeros(4, 2, dtype=torch.int32)
        with pytest.raises(error, match=text):
            counter.count(0, ids, torch.ones(shape, dtype=getattr(torch, dtype)))
        assert not counter.load.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("check", counter_cuda_check.CHECKS)
def test_counter_never_waits_for_cuda_device(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


class TestTransformersExample:
    NEW_TOKENS = 4

    def test_example_records_the_routers_choices(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers")
        from examples.transformers_moe import generate, moe_layers, record_expert_load, tiny_qwen3_moe

        torch.manual_seed(1)
        model = tiny_qwen3_moe()
        experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
        layers = list(moe_layers(model))
        assert layers == [1, 2, 3, 4]
        writer = open_writer(
            tmp_path, num_logical_experts=experts, ep_size=4, scope="global", moe_layers=layers
        )
        record_expert_load(model, writer)

        # The truth: the logits of each router, and the mask that the model was called with.
        logits: list[Any] = []
        truth: dict[int, list[list[int]]] = {}
        lengths = []

        def step(_: Any, args: Any, inputs: Any, output: Any) -> None:
            width = inputs["input_ids"].shape[1]
            mask = inputs["attention_mask"][:, -width:].flatten().bool().numpy()
            chosen = [layer.softmax(-1).topk(top_k).indices.numpy() for layer in logits]
            truth[len(truth)] = [bincount(layer, experts, mask) for layer in chosen]
            lengths.append((width, int(mask.sum())))
            logits.clear()

        for layer in layers:
            gate = model.model.layers[layer].mlp.gate
            gate.register_forward_hook(lambda _, args, output: logits.append(output[0]))
        model.register_forward_hook(step, with_kwargs=True)
        generate(model, batches=2, new_tokens=self.NEW_TOKENS)
        assert writer.close()

        assert recorded_loads(tmp_path, len(layers)) == truth
        run = open_run(tmp_path)
        steps = run.steps().to_dict(as_series=False)
        assert steps["num_tokens"] == [tokens for _, tokens in lengths]
        assert steps["phase"] == ["prefill" if width > 1 else "decode" for width, _ in lengths]
        assert any(tokens < 6 * width for width, tokens in lengths)  # there was padding
        assert run.loads()["layer"].to_list() == layers * len(truth)
        assert run.placements()["physical_to_logical"].to_list() == [list(range(experts))] * len(layers)
