"""Programmatic dependent launch: a kernel may be put in place while the one ahead of it still runs (Hopper and up).

Every kernel of this package that is launched with ``launch_pdl`` lets its successor start at once and waits, before it
reads or writes anything that another kernel may still use, for the whole grid ahead of it. That grid has waited for its
own predecessor in the same way, so the order of reads and writes is that of plain launches; what is saved is the time
between one kernel's end and the next one's start. A kernel launched plainly waits for everything before it anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from eagle.model.triton_kernels.linear_config import device_traits

LEAST_CAPABILITY = (9, 0)


def overlaps(x: torch.Tensor) -> bool:
    """Whether kernels on the device of x are launched so. Never in the interpreter, which lacks the instructions."""
    return x.is_cuda and device_traits(x.device).capability >= LEAST_CAPABILITY


@triton.jit
def await_earlier(PDL: tl.constexpr):
    """Let the next kernel be put in place, and wait for the one before. The first statement of a kernel."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
