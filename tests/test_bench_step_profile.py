"""A step's profile: names a reader can use, shares that add up, and figures of a real step on a GPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_draft, tiny_eagle, tiny_target

from eagle.bench.step_profile import (
    KernelTime,
    StepProfile,
    compared,
    device_spans,
    held_up,
    markdown,
    profile_step,
    short_name,
)
from eagle.errors import InvalidInputError
from eagle.model.ea_model import EaModel
from eagle.model.triton_kernels import optimize_eagle_with_triton

TABLE = tuple(KernelTime(f"k{index}", 2.0, 100.0 - index) for index in range(20))
PROFILE = StepProfile(True, 2.1, 2.0, TABLE)


@pytest.mark.parametrize(
    ("kernel", "short"),
    [
        ("_path_kernel", "_path_kernel"),
        (
            "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::(anonymous namespace)::Op<2u>, 1>(x)",
            "CatArrayBatchedCopy",
        ),
        (
            "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>, x>(int)",
            "vectorized_elementwise_kernel (CUDAFunctor_add)",
        ),
    ],
)
def test_names(kernel: str, short: str) -> None:
    assert short_name(kernel) == short or short in short_name(kernel)


def test_the_table_holds_every_microsecond() -> None:
    lines = markdown(PROFILE, rows=5)
    spent = [float(line.split("|")[4]) for line in lines if line.startswith("| ") and "kernel" not in line]
    assert sum(spent) == pytest.approx(1e3 * PROFILE.busy_ms, abs=3)
    assert "| 15 others |" in lines[-1]
    assert PROFILE.idle_share == pytest.approx(0.1 / 2.1)
    assert (PROFILE.kernels, PROFILE.busy_ms) == (40, pytest.approx(1.81))
    told = PROFILE.to_json()
    assert (told["engine"], told["kernels"], told["busy_ms"]) == ("captured", 40, PROFILE.busy_ms)
    assert told["idle_share"] == PROFILE.idle_share


def test_the_replies_are_compared() -> None:
    eagle = replace(PROFILE, reply=(3, 4, 5))
    assert compared(eagle, replace(eagle, speculative=False)) == "EAGLE's reply of 3 tokens is plain decoding's"
    for other in ((3, 9, 5), (3,)):
        assert "parts from plain decoding's at token 2" in compared(eagle, replace(eagle, reply=other))
    assert "reply" not in eagle.to_json()


def test_a_cpu_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="CUDA device"):
        profile_step(tiny_eagle(), [3, 4])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("speculative", [True, False], ids=["eagle", "plain"])
def test_a_real_step(speculative: bool) -> None:
    model = tiny_target().to("cuda")
    eagle = EaModel(model, tiny_draft(model), total_token=12, depth=2, top_k=3)
    eager = profile_step(eagle, [3, 4], 40, speculative=speculative)
    optimize_eagle_with_triton(eagle)
    captured = profile_step(eagle, [3, 4], 40, speculative=speculative)
    assert (eager.engine, captured.engine) == ("eager", "captured")
    assert eager.replay_ms is None
    for profile in (eager, captured):
        assert profile.busy_ms > 0
        assert not {"cudaLaunchKernel", "cudaGraphLaunch"} & {kernel.name for kernel in profile.table}
    assert "product_kernel" in {kernel.name.lstrip("_") for kernel in captured.table}
    assert captured.kernels < eager.kernels


@given(spans=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9), st.sampled_from("abc")), max_size=12))
def test_each_moment_goes_to_what_ends_first(spans: list[tuple[int, int, str]]) -> None:
    spans = [(start, start + length, name) for start, length, name in spans]
    expected: Counter[str] = Counter()
    for moment in range(50):
        running = [(end, name) for start, end, name in spans if start <= moment < end]
        if running:
            expected[min(running)[1]] += 1
    assert {name: time for name, time in held_up(spans).items() if time} == dict(expected)


def test_a_trace_gives_what_ran_on_the_device() -> None:
    """The profiler puts driver calls, their overhead and annotations beside the kernels."""
    event = {"ph": "X", "ts": 10.0, "dur": 2.5}
    trace = {
        "traceEvents": [
            event | {"cat": "kernel", "name": "void at::native::reduce_kernel<512, 1>(int)"},
            event | {"cat": "gpu_memset", "name": "Memset (Device)"},
            event | {"cat": "cuda_runtime", "name": "cudaLaunchKernel"},
            event | {"cat": "overhead", "name": "Activity Buffer Request"},
            event | {"cat": "gpu_user_annotation", "name": "step"},
            {"ph": "M", "name": "process_name"},
        ]
    }
    assert device_spans(trace) == [(10.0, 12.5, "reduce_kernel"), (10.0, 12.5, "Memset")]
