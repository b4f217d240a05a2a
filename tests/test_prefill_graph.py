"""The sizes of captured prompt chunks."""

from __future__ import annotations

import pytest
import torch

from eagle.engine.prefill_graph import BUCKETS, chunk_rows


@pytest.mark.parametrize(
    ("length", "rows"),
    [
        (0, ()),
        (1, (32,)),
        (32, (32,)),
        (33, (64,)),
        (512, (512,)),
        (540, (512, 32)),
        (700, (512, 256)),
        (1000, (512, 512)),
    ],
)
def test_the_largest_then_what_the_rest_fits(length, rows):
    assert chunk_rows(length) == rows


def test_chunks_cover_any_length_without_waste():
    for length in torch.randint(1, 5000, (50,)).tolist():
        rows = chunk_rows(length)
        assert set(rows) <= set(BUCKETS)
        assert sum(rows[:-1]) < length <= sum(rows)
        smaller = [bucket for bucket in BUCKETS if bucket < rows[-1]]
        assert not smaller or sum(rows[:-1]) + smaller[-1] < length
