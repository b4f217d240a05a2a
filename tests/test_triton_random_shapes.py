"""Random shapes over all ops, each against its float64 reference with poison around the inputs: 1,000 on a GPU.

The inputs and references are those of `eagle bench kernels`. On a GPU what a kernel is compiled for (head sizes, groups,
trees, widths) comes from few values, so that most examples find their kernel compiled; rows and prefixes are free.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eagle.bench import kernels
from eagle.bench.kernel_cases import PARTS, WEIGHT_DTYPES, Case, ModelShape
from eagle.bench.kernel_ops.table import TRIALS
from eagle.bench.kernel_ops.trial import BOUNDS
from eagle.model.ops import TreeShape

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
TOTAL = 1000 if HAS_GPU else 100
EXAMPLES = -(-TOTAL // len(PARTS))
DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if HAS_GPU else [])]
GPU_HEADS = {
    torch.float32: [(1, 1, 64)],
    torch.float16: [(4, 2, 80)],
    torch.bfloat16: [(9, 3, 64), (8, 1, 128)],
}
"""Heads, kv heads and head size by dtype."""
TREES = [(8, 2, 3), (21, 4, 5), (60, 7, 10), (131, 6, 12)] if HAS_GPU else [(5, 2, 2), (8, 2, 3), (13, 3, 4)]


def few(low: int, high: int, *values: int) -> st.SearchStrategy[int]:
    """Any size in the interpreter, one of the values on a GPU."""
    return st.sampled_from(values) if HAS_GPU else st.integers(low, high)


def shapes(dtype: torch.dtype) -> st.SearchStrategy[ModelShape]:
    any_heads = st.builds(
        lambda kv, group, half: (kv * group, kv, 2 * half), st.integers(1, 2), st.integers(1, 3), st.integers(1, 20)
    )
    return st.builds(
        lambda hidden, sizes, mlp, layers, vocab, draft_vocab: ModelShape(
            "random", hidden, *sizes, mlp, layers, vocab, draft_vocab
        ),
        hidden=few(1, 90, 61, 256, 576, 1000),
        sizes=st.sampled_from(GPU_HEADS[dtype]) if HAS_GPU else any_heads,
        mlp=few(1, 70, 37, 200, 1536),
        layers=st.integers(1, 3),
        vocab=few(60, 400, 151, 1000, 5003),
        draft_vocab=few(60, 400, 97, 2048),
    )


@st.composite
def cases(draw: st.DrawFn, op: str) -> Case:
    dtype = draw(st.sampled_from([d for d in DTYPES if op not in WEIGHT_DTYPES or d != torch.float32]))
    prefix = draw(st.integers(20, 700 if HAS_GPU else 90))
    part, rows = draw(st.sampled_from(PARTS[op] or ("",))), draw(st.integers(1, 64 if HAS_GPU else 9))
    tree, prefill = TreeShape(*draw(st.sampled_from(TREES))), draw(st.integers(1, 150 if HAS_GPU else 40))
    return Case(op, draw(shapes(dtype)), dtype, part, prefix, rows, tree, prefill)


@pytest.mark.parametrize("op", PARTS)
def test_random_shapes(op: str) -> None:
    if op == "linear_fp8" and HAS_GPU and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 before compute capability 8.9")
    count = 0

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=cases(op), seed=st.integers(0, 2**31))
    def check(case: Case, seed: int) -> None:
        nonlocal count
        count += 1
        torch.manual_seed(seed)
        trial = TRIALS[op](case, DEVICE, poisoned=True)
        with kernels.poisoned_memory():
            out = trial.run()
        assert trial.check(out) < BOUNDS[case.dtype]

    check()
    assert count >= EXAMPLES, "hypothesis ran out of shapes: widen them"


def test_the_examples_are_as_many_as_promised() -> None:
    assert EXAMPLES * len(PARTS) >= TOTAL
    assert set(TRIALS) == set(PARTS)
