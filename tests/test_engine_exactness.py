"""Where exactness is on by default: held against every measured price in docs/benchmarks, and the rule's own edges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eagle.engine.exactness import SMALL, keeps_kernels, pads

BENCHMARKS = Path(__file__).parents[1] / "docs" / "benchmarks"
PAIRS = sorted(path for path in BENCHMARKS.glob("*/exactness/*-exact.json") if "-not-" not in path.name)
WIDTHS = {"SmolLM2-135M": 576, "EAGLE-3B": 3072, "EAGLE-8B": 4096}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def results(path: Path) -> dict[tuple[str, int], dict]:
    """A run's results by tree and batch."""
    return {(row["name"], row["batch"]): row for row in json.loads(path.read_text(encoding="utf-8"))["results"]}


def prices(path: Path) -> dict[tuple[str, int], tuple[dict, float]]:
    """Of a run with exactness and its pair without, by tree and batch: the result, and the price in % of a step."""
    exact, free = results(path), results(path.with_name(path.name.replace("-exact", "-not-exact")))
    return {key: (exact[key], 100 * (exact[key]["step_ms"] / free[key]["step_ms"] - 1)) for key in exact}


@pytest.mark.parametrize("path", PAIRS, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_it_is_on_where_it_cost_less_than_a_tenth(path) -> None:
    for (name, batch), (run, price) in prices(path).items():
        nodes = 1 if name == "plain" else int(name.split(",")[0])
        by_kernels = run.get("fused", "fused" in path.name) or "row-local" in path.name
        rule = keeps_kernels if by_kernels else pads
        on = rule(nodes, batch, WIDTHS[run["model"]], getattr(torch, run["dtype"]))
        if on:
            assert price < 10, f"{name}, batch {batch}: {price:.1f} %"
        elif (name, batch) != ("5,3,1", 1):  # see test_chains_are_left_alone
            assert price > 9.5, f"{name}, batch {batch}: {price:.1f} %"


def test_chains_are_left_alone() -> None:
    """One costs a small target 8 to 9 % and, padded, equals plain decoding, which is not, less often."""
    folder, chain = BENCHMARKS / "h200" / "exactness", ("5,3,1", 1)
    _, price = prices(folder / "modules-exact.json")[chain]
    assert 8 < price < 10
    assert results(folder / "modules-not-exact.json")[chain]["equal"] == 8
    assert results(folder / "modules-padded-chain.json")[chain]["equal"] == 5
    assert not pads(5, 1, 576, BF16)


@pytest.mark.parametrize(
    ("nodes", "trees", "width", "dtype", "on"),
    [
        (60, 100, 4096, FP32, True),  # 4 for 60
        (58, 9, 4096, BF16, False),  # 6 for 58, 54 in all
        (58, 8, 4096, BF16, True),
        (16, 1, 4096, FP32, True),
        (15, 1, 4096, BF16, False),
        (16, 2, 4096, BF16, False),
        (16, 4, SMALL, BF16, True),
        (16, 4, SMALL, FP16, True),
        (16, 4, SMALL, FP32, False),
        (16, 4, SMALL + 1, BF16, False),
        (16, 5, SMALL, BF16, False),
        (15, 2, SMALL, BF16, False),
        (1, 1, SMALL, BF16, False),
    ],
)
def test_padding_at_the_edges(nodes, trees, width, dtype, on) -> None:
    assert pads(nodes, trees, width, dtype) == on


@pytest.mark.parametrize(
    ("nodes", "trees", "width", "dtype", "on"),
    [
        (64, 4, 4096, BF16, True),
        (65, 4, 4096, BF16, False),
        (65, 4, 4096, FP32, True),
        (65, 4, SMALL, FP16, True),
        (65, 4, SMALL + 1, FP16, False),
    ],
)
def test_products_at_the_edges(nodes, trees, width, dtype, on) -> None:
    assert keeps_kernels(nodes, trees, width, dtype) == on


@given(st.integers(1, 8), st.integers(1, 64), st.integers(1, 20_000), st.sampled_from([BF16, FP16, FP32]))
def test_full_tiles_are_always_exact(tiles, trees, width, dtype) -> None:
    assert pads(64 * tiles, trees, width, dtype)


@given(st.integers(1, 130), st.integers(1, 63), st.integers(1, 20_000), st.sampled_from([BF16, FP16, FP32]))
def test_more_trees_never_turn_it_on(nodes, trees, width, dtype) -> None:
    for rule in (pads, keeps_kernels):
        assert rule(nodes, trees, width, dtype) or not rule(nodes, trees + 1, width, dtype)
