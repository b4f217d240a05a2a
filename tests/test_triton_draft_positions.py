"""Slots and positions of a step's draft passes: the kernel and the PyTorch op against loops."""

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

from eagle.model import tree
from eagle.model.ops import TreeShape
from eagle.model.triton_kernels import draft_positions

DEVICE = "cuda" if CUDA else "cpu"


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 12)), min_size=1, max_size=4),
    depth=st.integers(0, 10),
    top_k=st.integers(1, 12),
)
def test_random_lengths(rows: list[tuple[int, int]], depth: int, top_k: int) -> None:
    shape = TreeShape(2, depth, top_k)
    kv_len, count = torch.tensor(rows, device=DEVICE).T.contiguous()
    for op in (draft_positions, tree.draft_positions):
        at = op(kv_len, count, shape)
        assert all(part.dtype == torch.int64 and part.is_contiguous() for part in at)
        assert at.slots.shape == (depth, len(rows))
        for b, (length, new) in enumerate(rows):
            assert at.start[b] == length - new
            assert at.last[b] == b * shape.path + max(0, new - 1)
            assert at.slots[:, b].tolist() == [length + level * top_k for level in range(depth)]
            extend = [length - new + i for i in range(depth + 2)]
            assert at.rope[b].tolist() == extend + [length + level for level in range(depth)]


def test_refuses_what_does_not_fit() -> None:
    kv_len = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"must both be \[B\]"):
        draft_positions(kv_len, kv_len[:2], TreeShape(2, 1, 1))
    with pytest.raises(ValueError, match="int64"):
        draft_positions(kv_len, kv_len.int(), TreeShape(2, 1, 1))


@pytest.mark.parametrize(("length", "new"), [(1, 9), (9, 5), (9, -1), (-5, -2), (3, 4)])
def test_debug_mode_reads_the_lengths(length: int, new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, kv_len, count = TreeShape(8, 2, 3), *torch.tensor([[4, length, 0], [4, new, 0]], device=DEVICE)
    draft_positions(kv_len, count, shape)
    monkeypatch.setenv("EAGLE_DEBUG", "1")
    with pytest.raises(ValueError, match=rf"0 to the path's 4 rows and to kv_len; got kv_len \[4, {length}, 0\]"):
        draft_positions(kv_len, count, shape)
    draft_positions(kv_len[::2].contiguous(), count[::2].contiguous(), shape)


def test_registered() -> None:
    kv_len, count = torch.tensor([[9, 20], [3, 0]], device=DEVICE)
    torch.library.opcheck(torch.ops.eagle.draft_positions.default, (kv_len, count, 3, 4))
