"""The time of a kernel on a CUDA device: the median over replays of a CUDA graph, each of many calls.

Calls go round over input sets that together are ``BEYOND_L2`` times the L2 cache, or `MAX_SETS` of them where the
inputs are small (a few rows of activations come from the cache in a real step too); each figure says which. Time
between two kernels of a graph, about 1 µs, is part of a call. Nothing here asserts a time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

REPEATS = 30
WARM_UP = 5
BEYOND_L2 = 3
MAX_SETS = 48
GRAPH_MICROSECONDS = 400.0
"""Aimed-at length of one replay: the few microseconds that starting a graph takes then do not count."""
MAX_CALLS = 256
SLOW_ROUND = 50_000.0
"""Microseconds of one call on every set above which a replay is a single call: it dwarfs what the cache could spare."""
MAX_SECONDS = 1.5
"""For one median; slow calls are repeated less often, but at least three times."""


@dataclass(frozen=True)
class Timing:
    """Microseconds a call."""

    median: float
    best: float
    repeats: int
    calls: int
    """Calls in one replay, or in one repeat without a graph."""


def sets_beyond_cache(touched: int, held: int, device: torch.device) -> tuple[int, bool]:
    """How many input sets to rotate, and whether what they touch exceeds the L2 cache.

    touched: bytes one call reads or writes of its set; held: bytes of a set. The sets take at most a quarter of the free
    memory (what a rival needs beside them may be as large again).
    """
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    wanted = -(-BEYOND_L2 * cache // max(1, touched))
    room = torch.cuda.mem_get_info(device)[0] // (4 * max(1, held))
    count = max(1, min(MAX_SETS, wanted, room))
    return count, count * touched > 2 * cache


def time_graph(functions: Sequence[Callable[[], Any]]) -> Timing:
    """Median time of one call under graph replay; the functions are one call on each input set.

    They must have run before on this device (compiled, warmed up) and be safe under capture.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for function in functions[:2]:
            function()
        slow = _elapsed(functions[0]) * len(functions) > SLOW_ROUND
    torch.cuda.current_stream().wait_stream(side)
    calls = 1 if slow else len(functions)
    graph = _capture(functions, calls)
    more = int(GRAPH_MICROSECONDS / _elapsed(graph.replay))
    if more > 1 and 2 * calls <= MAX_CALLS:
        graph.reset()
        calls *= min(more, MAX_CALLS // calls)
        graph = _capture(functions, calls)
    timing = _repeat(graph.replay, calls)
    graph.reset()
    return timing


def time_eager(functions: Sequence[Callable[[], Any]]) -> Timing:
    """Median time of one call from Python, launches included, as a step without a graph would pay it."""
    calls = max(1, min(8, 2 * len(functions), int(SLOW_ROUND / _elapsed(functions[0]))))

    def several() -> None:
        for call in range(calls):
            functions[call % len(functions)]()

    return _repeat(several, calls)


def _capture(functions: Sequence[Callable[[], Any]], calls: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(calls):
            functions[call % len(functions)]()
    return graph


def _repeat(run: Callable[[], Any], calls: int) -> Timing:
    first = _elapsed(run)
    repeats = max(3, min(REPEATS, int(MAX_SECONDS * 1e6 / max(first, 1.0))))
    for _ in range(min(WARM_UP, repeats)):
        run()
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) * 1e3 / calls for start, end in zip(starts, ends, strict=True)]
    return Timing(statistics.median(times), min(times), repeats, calls)


def _elapsed(run: Callable[[], Any]) -> float:
    """Microseconds of one call after one more that warms up."""
    run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return max(start.elapsed_time(end) * 1e3, 0.1)
