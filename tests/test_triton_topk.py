"""Log-softmax and top-k in one pass: against sorted float64, its order of ties, and rows by themselves."""

from __future__ import annotations

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import relative_error

from eagle.model import tree
from eagle.model.triton_kernels.topk import TopKConfig, topk_config, topk_log_softmax, topk_log_softmax_op

DEVICE = "cuda" if CUDA else "cpu"
SMALL = TopKConfig(16, 64, 1, 1)
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


def reference(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """By sorting (-value, id), in float64."""
    values, ids = [], []
    for row in logits.double().cpu():
        order = sorted(range(len(row)), key=lambda i, row=row: (-row[i].item(), i))[:k]
        values.append(row[order] - row.logsumexp(0))
        ids.append(torch.tensor(order))
    return torch.stack(values), torch.stack(ids)


def check(logits: torch.Tensor, k: int, config: TopKConfig | None = None) -> None:
    values, ids = topk_log_softmax(logits, k, config=config)
    wanted_values, wanted_ids = reference(logits, k)
    assert values.dtype == torch.float32
    assert ids.dtype == torch.int64
    assert torch.equal(ids.cpu(), wanted_ids)
    assert (values.cpu() - wanted_values).norm() <= 1e-5 * max(1.0, wanted_values.norm().item())  # V = 1: all are 0


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(1, 400),
    k=st.integers(1, 64),
    half=st.booleans(),
    tied=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_random_shapes(rows: int, vocab: int, k: int, half: bool, tied: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    logits = (logits.round() if tied else logits).to(torch.float16 if half else torch.float32)
    check(logits.to(DEVICE), min(k, vocab), SMALL)


@pytest.mark.parametrize("vocab", [49152, 128256 // 4 + 1])
def test_the_configuration_in_use(vocab: int) -> None:
    check(torch.randn(2, vocab, device=DEVICE), 10)


def test_negative_zero_ties_with_zero() -> None:
    logits = torch.full((1, 130), -1.0, device=DEVICE)
    logits[0, [3, 70, 128]] = torch.tensor([-0.0, 0.0, -0.0], device=DEVICE)
    assert topk_log_softmax(logits, 3, config=SMALL)[1].tolist() == [[3, 70, 128]]


@pytest.mark.parametrize("value", [1.5, float("nan"), float("-inf")])
def test_of_many_equal_logits_the_lowest_ids_are_taken(value: float) -> None:
    logits = torch.full((2, 1000), value, device=DEVICE)
    logits[1, 700:] = 2.0
    assert topk_log_softmax(logits, 3, config=SMALL)[1][0].tolist() == [0, 1, 2]
    if value == value:  # NaN counts as the largest value
        assert topk_log_softmax(logits, 3, config=SMALL)[1][1].tolist() == [700, 701, 702]


def test_infinities_never_give_nan() -> None:
    logits = torch.full((2, 200), float("-inf"), device=DEVICE)
    logits[0, [5, 150]] = torch.tensor([1.0, 2.0], device=DEVICE)
    values, ids = topk_log_softmax(logits, 4, config=SMALL)
    assert ids.tolist() == [[150, 5, 0, 1], [0, 1, 2, 3]]
    assert torch.isfinite(values[0, :2]).all()
    assert values[0, 2:].tolist() == [float("-inf")] * 2
    assert values[1].tolist() == [float("-inf")] * 4


def test_ids_stay_in_range_with_nan() -> None:
    logits = torch.randn(1, 150, device=DEVICE)
    logits[0, [20, 99]] = float("nan")
    ids = topk_log_softmax(logits, 5, config=SMALL)[1][0].tolist()
    assert ids[:2] == [20, 99]
    assert all(0 <= i < 150 for i in ids)


def test_a_row_does_not_depend_on_the_others() -> None:
    logits = torch.randn(7, 300, device=DEVICE)
    values, ids = topk_log_softmax(logits, 9, config=SMALL)
    for row in range(7):
        alone = topk_log_softmax(logits[row : row + 1], 9, config=SMALL)
        assert torch.equal(alone[0][0], values[row])
        assert torch.equal(alone[1][0], ids[row])


def test_rows_of_a_wider_tensor_are_read_within_their_vocabulary() -> None:
    wide = torch.full((3, 200), float("nan"), device=DEVICE)
    wide[:, :131] = torch.randn(3, 131, device=DEVICE)
    check(wide[:, :131], 8, SMALL)


def test_the_configuration_depends_on_no_rows() -> None:
    assert topk_config(100, 10) == TopKConfig(16, 128, 1, 1)
    assert topk_config(16384, 10) == TopKConfig(32, 512, 1, 1)
    assert topk_config(262144, 10) == TopKConfig(128, 4096, 8, 4)


@pytest.mark.parametrize(
    ("logits", "k", "message"),
    [
        (torch.zeros(2, 8), 9, r"k is 9 for logits \(2, 8\); expected 1 to 8"),
        (torch.zeros(2, 80), 65, r"k is 65 .* expected 1 to 64"),
        (torch.zeros(2, 8, dtype=torch.int32), 2, r"int32"),
        (torch.zeros(2, 3, 8), 2, r"\(2, 3, 8\); expected \[R, V\]"),
        (torch.zeros(8, 2).t(), 2, r"strides"),
    ],
)
def test_bad_input(logits: torch.Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topk_log_softmax(logits.to(DEVICE), k)


@pytest.mark.parametrize("k", [0, -1, 50, 70])
def test_the_pytorch_op_refuses_as_much(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k is {k} for logits \(2, 49\); expected 1 to 49"):
        tree.topk_log_softmax(torch.randn(2, 49, device=DEVICE), k)
    with pytest.raises(ValueError, match=r"logits is \(49,\); expected \[R, V\]"):
        tree.topk_log_softmax(torch.randn(49, device=DEVICE), 3)


def test_registered_operator() -> None:
    torch.library.opcheck(topk_log_softmax_op, (torch.randn(2, 70, device=DEVICE), 3))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "vocab", "k"), [(10, 128256, 10), (3, 262144, 64), (1, 151936, 33), (64, 32000, 8)])
def test_large(rows: int, vocab: int, k: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(rows, vocab, device="cuda") * 4).to(dtype)
    values, ids = topk_log_softmax(logits, k)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(ids, order[:, :k])
    wanted = ordered[:, :k].double() - logits.double().logsumexp(-1, keepdim=True)
    assert relative_error(values, wanted) < 1e-5


@pytest.mark.gpu
@needs_gpu
def test_captured() -> None:
    logits = torch.randn(10, 32000, device="cuda")
    topk_log_softmax(logits, 10)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values, ids = topk_log_softmax(logits, 10)
    for _ in range(2):
        logits.normal_()
        graph.replay()
        assert torch.equal(ids, logits.topk(10).indices)
        assert torch.allclose(values, logits.log_softmax(-1).gather(1, ids), atol=1e-4)
