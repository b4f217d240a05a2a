"""Compiles the kernels for a GPU that need not be there: ``python compiled.py MAJOR MINOR SHARED_BYTES`` prints, as JSON,
the most shared memory that a launch of each takes. A process of its own: the tests' own has Triton's interpreter."""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction
from triton.runtime.driver import driver

from eagle.bench.kernel_cases import MODELS, PARTS, Case, ModelShape
from eagle.bench.kernel_ops.table import TRIALS
from eagle.model.triton_kernels import attention, cache_checks, linear, rows
from eagle.model.triton_kernels.linear_config import DeviceTraits
from eagle.model.triton_kernels.quantize import FP8_CAPABILITY

CPU = torch.device("cpu")
SMALL = next(model for model in MODELS if model.name == "SmolLM2-135M")
WIDE_HEADS = ModelShape("heads of 256", 96, 8, 4, 256, 112, 2, 700, 300)
LARGE_HEADS = ModelShape("heads of 128", 512, 32, 8, 128, 112, 2, 700, 300)


class Elsewhere:
    """A Triton driver for a GPU that can't be asked."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def cases(capability: tuple[int, int]) -> list[Case]:
    """Every op at SmolLM2-135M's sizes, attention also with larger heads; products and attention in float32 too."""
    found = [
        Case(op, SMALL, torch.bfloat16, parts[0] if parts else "")
        for op, parts in PARTS.items()
        if op != "linear_fp8" or capability >= FP8_CAPABILITY
    ]
    heavy = ["linear", "gate_up_swiglu", "linear_add_rms_norm", *(op for op in PARTS if op.startswith("attention"))]
    found += [Case(op, SMALL, torch.float32, PARTS[op][0] if PARTS[op] else "") for op in heavy]
    found += [Case(op, LARGE_HEADS, torch.float32, "qkv") for op in ("linear", "linear_int8")]  # float32's large tiles
    for op in ("attention_tree", "attention_prefill"):
        found += [
            Case(op, model, dtype) for model in (WIDE_HEADS, LARGE_HEADS) for dtype in (torch.bfloat16, torch.float32)
        ]
    return found


def main(major: int, minor: int, limit: int) -> None:
    capability, taken = (major, minor), {}
    traits = DeviceTraits("some GPU", capability, 108, limit)
    compiled = JITFunction.run

    def compile_only(kernel: Any, *args: Any, **options: Any) -> Any:
        found = compiled(kernel, *args, **{**options, "warmup": True})
        name = f"{kernel.__name__}, {case.label}, {case.dtype_name}"
        taken[name] = max(taken.get(name, 0), found.metadata.shared)
        return found

    driver.set_active(Elsewhere(capability))
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(rows, "INTERPRETED", True),  # tensors on the CPU are fine
        mock.patch.object(cache_checks, "INTERPRETED", True),  # its own name for the same
        mock.patch.dict(attention.__globals__, {"_capability": lambda _: capability}),
        mock.patch.dict(linear.__globals__, {"device_traits": lambda _: traits}),
    ):
        for case in cases(capability):
            TRIALS[case.op](case, CPU, poisoned=False).run()
    print(json.dumps(taken))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
