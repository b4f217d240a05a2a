"""Where exactness is on by default: at most a tenth of a step, in the cases that were measured and in all others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eagle.engine.exactness import keeps_kernels, pads

SMALL, LARGE, LARGEST = 576, 3072, 4096
HALF, FULL = torch.bfloat16, torch.float32

# nodes, trees, hidden size, dtype, what padding costs in % of a step (one H200, docs/benchmarks/h200; means of all runs)
PADDING = [
    (60, 1, SMALL, HALF, -0.6),
    (60, 2, SMALL, HALF, -0.2),
    (60, 4, SMALL, HALF, 0.8),
    (60, 8, SMALL, HALF, 1.2),
    (60, 16, SMALL, HALF, 3.2),
    (16, 1, SMALL, HALF, 6.2),
    (16, 2, SMALL, HALF, 5.7),
    (16, 4, SMALL, HALF, 7.7),
    (16, 8, SMALL, HALF, 12.9),
    (5, 1, SMALL, HALF, 8.7),
    (5, 2, SMALL, HALF, 10.2),
    (5, 4, SMALL, HALF, 11.9),
    (5, 8, SMALL, HALF, 16.8),
    (1, 1, SMALL, HALF, 18.4),
    (1, 2, SMALL, HALF, 16.7),
    (1, 4, SMALL, HALF, 24),
    (60, 1, SMALL, FULL, 0.2),
    (60, 4, SMALL, FULL, 1.2),
    (16, 1, SMALL, FULL, -35),
    (16, 4, SMALL, FULL, 26),
    (5, 1, SMALL, FULL, 29),
    (5, 4, SMALL, FULL, 40),
    (1, 1, SMALL, FULL, 84),
    (60, 1, LARGE, HALF, 0.1),
    (60, 4, LARGE, HALF, 1.0),
    (16, 1, LARGE, HALF, 4.4),
    (16, 2, LARGE, HALF, 9.8),
    (16, 4, LARGE, HALF, 24.7),
    (5, 1, LARGE, HALF, 12.4),
    (5, 2, LARGE, HALF, 16.0),
    (1, 1, LARGE, HALF, 17.3),
    (60, 1, LARGE, FULL, 0.0),
    (16, 1, LARGE, FULL, -3.9),
    (5, 1, LARGE, FULL, 51),
    (1, 1, LARGE, FULL, 130),
    (60, 1, LARGEST, HALF, 1.8),
    (60, 2, LARGEST, HALF, 0.1),
    (60, 4, LARGEST, HALF, 0.9),
    (16, 1, LARGEST, HALF, 5.8),
    (16, 2, LARGEST, HALF, 9.99),
    (16, 4, LARGEST, HALF, 28.5),
    (5, 1, LARGEST, HALF, 12.5),
    (5, 2, LARGEST, HALF, 15.7),
    (1, 1, LARGEST, HALF, 16.8),
    (1, 4, LARGEST, HALF, 56),
]


@pytest.mark.parametrize(("nodes", "trees", "width", "dtype", "price"), PADDING)
def test_padding_is_on_where_it_cost_at_most_a_tenth(nodes, trees, width, dtype, price) -> None:
    assert pads(nodes, trees, width, dtype) == (price <= 10)


@pytest.mark.parametrize(
    ("nodes", "trees", "width", "dtype", "price"),
    [
        (60, 4, LARGEST, HALF, 2.3),
        (60, 8, LARGEST, HALF, 13.5),
        (16, 8, LARGEST, HALF, 1.4),
        (60, 8, SMALL, HALF, -11),
        (60, 8, SMALL, FULL, -24),
        (60, 8, LARGE, FULL, -35),
    ],
)
def test_the_kernels_keep_products_where_that_cost_at_most_a_tenth(nodes, trees, width, dtype, price) -> None:
    assert keeps_kernels(nodes, trees, width, dtype) == (price <= 10)


@given(st.integers(1, 8), st.integers(1, 64), st.integers(1, 20_000), st.sampled_from([torch.float16, HALF, FULL]))
def test_full_tiles_are_always_exact_and_float16_is_as_bfloat16(tiles, trees, width, dtype) -> None:
    assert pads(64 * tiles, trees, width, dtype)
    assert pads(64 * tiles - tiles, trees, width, dtype)
    assert pads(16 * tiles, trees, width, torch.float16) == pads(16 * tiles, trees, width, HALF)


@given(st.integers(1, 130), st.integers(1, 63), st.integers(1, 20_000), st.sampled_from([HALF, FULL]))
def test_more_trees_never_turn_it_on(nodes, trees, width, dtype) -> None:
    for choice in (pads, keeps_kernels):
        assert choice(nodes, trees, width, dtype) or not choice(nodes, trees + 1, width, dtype)
