"""The beginning of an EAGLE-3 layer in one launch: against float64 by loops, gathered rows, strides, rows by themselves."""

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

from eagle.model import layers
from eagle.model.triton_kernels import draft_input

DEVICE = "cuda" if CUDA else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]  # the interpreter is wrong in bfloat16


def norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean() + eps).sqrt() * gain.double()


def inputs(batch: int, sources: int, count: int, size: int, dtype: torch.dtype, vocab: int = 23):
    hidden = torch.randn(batch, sources, size, device=DEVICE).to(dtype)
    rows = torch.randint(sources, (batch, count), device=DEVICE)
    tokens = torch.randint(vocab, (batch, count), device=DEVICE)
    table = torch.randn(vocab, size, device=DEVICE).to(dtype)
    gains = [(torch.rand(size, device=DEVICE) + 0.5).to(dtype) for _ in range(2)]
    return hidden, rows, tokens, table, *gains, 1e-5, 0.1


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    sources=st.integers(1, 5),
    count=st.integers(1, 5),
    size=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
)
def test_random_shapes(batch: int, sources: int, count: int, size: int, dtype: torch.dtype) -> None:
    given_ = inputs(batch, sources, count, size, dtype)
    hidden, rows, tokens, table, first, second, *eps = given_
    both, total = draft_input(*given_)
    for b in range(batch):
        for t in range(count):
            source = hidden[b, rows[b, t]]
            left, right = norm(table[tokens[b, t]].double(), first, eps[0]), norm(source.double(), second, eps[1])
            assert relative_error(both[b, t], torch.cat((left, right))) < TOLERANCE[dtype]
            assert torch.equal(total[b, t], source)
    for got, plain in zip((both, total), layers.draft_input(*given_), strict=True):
        assert got.shape == plain.shape
        assert got.dtype == plain.dtype


def test_without_rows_all_go_on_in_turn() -> None:
    hidden, _, _, *rest = inputs(2, 4, 4, 33, torch.float32)
    tokens = torch.randint(23, (2, 4), device=DEVICE)
    both, total = draft_input(hidden, None, tokens, *rest)
    assert total is hidden
    assert relative_error(both, layers.draft_input(hidden, None, tokens, *rest)[0]) < 1e-5


def test_any_strides_but_the_last() -> None:
    hidden, rows, tokens, table, *rest = inputs(2, 5, 3, 40, torch.float32)
    wanted = draft_input(hidden, rows, tokens, table, *rest)
    wide = torch.full((2, 7, 50), float("nan"), device=DEVICE)
    wide[:, 1:6, :40] = hidden
    spread = torch.full((23, 64), float("nan"), device=DEVICE)
    spread[:, :40] = table
    turned = (part.t().contiguous().t() for part in (rows, tokens))
    found = draft_input(wide[:, 1:6, :40], *turned, spread[:, :40], *rest)
    assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))


def test_a_row_is_computed_by_itself() -> None:
    hidden, rows, tokens, *rest = inputs(3, 6, 4, 100, torch.float16)
    both, total = draft_input(hidden, rows, tokens, *rest)
    one, alone = draft_input(hidden[1:2], rows[1:2, 2:3], tokens[1:2, 2:3], *rest)
    assert torch.equal(one[0, 0], both[1, 2])
    assert torch.equal(alone[0, 0], total[1, 2])


def test_out_of_range_reads_nothing() -> None:
    hidden, rows, tokens, *rest = inputs(1, 3, 4, 16, torch.float32)
    rows[0, :2] = torch.tensor([-1, 3], device=DEVICE)
    tokens[0, 1:3] = torch.tensor([-1, 23], device=DEVICE)
    both, total = draft_input(hidden, rows, tokens, *rest)
    assert both[0, 1:3, :16].eq(0).all()
    assert both[0, :2, 16:].eq(0).all()
    assert total[0, :2].eq(0).all()
    assert torch.equal(total[0, 2], hidden[0, rows[0, 2]])


def test_refuses_what_does_not_fit() -> None:
    hidden, rows, tokens, table, *rest = inputs(2, 3, 4, 16, torch.float32)
    with pytest.raises(ValueError, match=r"hidden is \(2, 3, 16\)"):
        draft_input(hidden, None, tokens, table, *rest)
    with pytest.raises(ValueError, match="tokens is"):
        draft_input(hidden, rows, tokens.int(), table, *rest)
    with pytest.raises(ValueError, match="embedding is"):
        draft_input(hidden, rows, tokens, table.half(), *rest)
    with pytest.raises(ValueError, match="contiguous last dimension"):
        draft_input(hidden.transpose(1, 2).contiguous().transpose(1, 2), rows, tokens, table, *rest)
    with pytest.raises(ValueError, match="hidden_weight is"):
        draft_input(hidden, rows, tokens, table, rest[0], rest[1][:-1], *rest[2:])


def test_registered() -> None:
    hidden, rows, tokens, *rest = inputs(2, 4, 4, 24, torch.float32)
    for chosen in (rows, None):
        torch.library.opcheck(torch.ops.eagle.draft_input.default, (hidden, chosen, tokens, *rest))
