"""`eagle bench kernels`: every Triton kernel's correctness, and on a GPU its time against PyTorch's and the ceiling.

A case that is wrong or fails is red and gets no time; the others go on. Without a CUDA device the cases shrink and run
in Triton's interpreter, for correctness alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from triton.errors import TritonError

from eagle.bench.bandwidth import Ceilings, measure_ceilings
from eagle.bench.kernel_cases import Case
from eagle.bench.kernel_ops.table import TRIALS
from eagle.bench.kernel_ops.trial import BOUNDS, TORCH, Trial
from eagle.bench.timing import sets_beyond_cache, time_eager, time_graph
from eagle.model.triton_kernels.quantize import FP8_CAPABILITY

FAILURES = (
    TritonError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    OSError,
)
"""What a compiler, a launch or a library may raise: one case's trouble, not the run's."""

GREEN, RED, SKIPPED, NOT_REACHED = "green", "red", "skipped", "not reached"
AHEAD = 24
"""Cases compiled together: a few seconds' work for eight threads, so that a budget is not overrun by much."""
NO_DEVICE = "skipped: no CUDA device"


@dataclass
class Row:
    """One case's outcome. Times are microseconds a call."""

    op: str
    model: str
    label: str
    dtype: str
    prefix: int | None = None
    state: str = NOT_REACHED
    reason: str = ""
    error: float | None = None
    bound: float | None = None
    us: float | None = None
    rivals: dict[str, float | str] = field(default_factory=dict)
    """Under graph replay too; a text says why there is no time."""
    torch_eager_us: float | None = None
    floor_us: float | None = None
    gb_s: float | None = None
    tflop_s: float | None = None
    sets: int | None = None
    beyond_l2: bool | None = None
    repeats: int | None = None

    @property
    def speedup(self) -> float | None:
        """PyTorch's time over the kernel's, both under graph replay."""
        other = self.rivals.get(TORCH)
        return other / self.us if self.us and isinstance(other, float) else None

    @property
    def share(self) -> float | None:
        """Part of the measured ceiling reached: the floor over the time."""
        return self.floor_us / self.us if self.us and self.floor_us else None

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"speedup": self.speedup, "share": self.share}


@dataclass
class KernelReport:
    """What a run found."""

    rows: list[Row]
    ceilings: Ceilings | None
    seconds: float
    stopped: str = ""
    """Why some cases were not reached."""

    def count(self, state: str) -> int:
        return sum(row.state == state for row in self.rows)


def run_cases(
    cases: Sequence[Case],
    device: torch.device,
    *,
    seconds: float | None = None,
    jobs: int = 1,
    told: Callable[[int, Row], None] = lambda _index, _row: None,
) -> KernelReport:
    """Run the cases in order until they or the ``seconds`` are over. told: called with the index and row of each.

    jobs: threads that compile the next cases' kernels ahead, by launching each once; nothing is timed meanwhile.
    """
    began = time.monotonic()
    rows = [new_row(case) for case in cases]
    ceilings, stopped = None, ""
    if device.type == "cuda":
        ceilings = measure_ceilings(device, {case.dtype for case in cases})
    for index, (case, row) in enumerate(zip(cases, rows, strict=True)):
        if seconds is not None and time.monotonic() - began > seconds:
            stopped = f"{seconds:g} seconds were over"
            break
        if jobs > 1 and device.type == "cuda" and index % AHEAD == 0:
            _launch_ahead(cases[index : index + AHEAD], device, jobs)
            if not _device_lives():
                stopped = "the device failed while kernels were compiled ahead; --jobs 1 tells which"
                break
        _run_case(case, row, device, ceilings)
        told(index, row)
        if row.state == RED and device.type == "cuda" and not _device_lives():
            stopped = f"the device failed in {row.op}, {row.label}, {row.dtype}"
            break
    return KernelReport(rows, ceilings, time.monotonic() - began, stopped)


def new_row(case: Case) -> Row:
    """A row for a case that has not run."""
    prefix = case.prefix if case.op.startswith("attention") else None
    return Row(case.op, case.model.name, case.label, case.dtype_name, prefix)


def _run_case(case: Case, row: Row, device: torch.device, ceilings: Ceilings | None) -> None:
    if ceilings is None and case.dtype == torch.bfloat16:
        row.state, row.reason = SKIPPED, "the interpreter has no bfloat16"
        return
    if case.op == "linear_fp8" and ceilings is not None and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        row.state, row.reason = SKIPPED, "the device has no float8"
        return
    concrete = case if ceilings is not None else case.shrunk()
    try:
        _check(concrete, row, device)
        if row.state == GREEN and ceilings is not None:
            _time(concrete, row, device, ceilings)
        elif row.state == GREEN:
            row.reason = NO_DEVICE
    except FAILURES as error:
        row.state, row.reason = RED, first_line(error)
        row.us, row.rivals = None, {}


def _launch_ahead(cases: Sequence[Case], device: torch.device, jobs: int) -> None:
    def launch(case: Case) -> None:
        # What fails here fails again, and is reported, when its turn comes.
        with torch.cuda.device(device), contextlib.suppress(*FAILURES):
            TRIALS[case.op](case, device, poisoned=False).run()

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(launch, cases))


def _check(case: Case, row: Row, device: torch.device) -> None:
    trial = TRIALS[case.op](case, device, poisoned=True)
    with poisoned_memory():
        out = trial.run()
    row.error, row.bound = trial.check(out), BOUNDS[case.dtype]
    row.state = GREEN if row.error < row.bound else RED
    if row.state == RED:
        row.reason = f"relative error {row.error:.2e}, allowed {row.bound:.0e}"


def _time(case: Case, row: Row, device: torch.device, ceilings: Ceilings) -> None:
    make = TRIALS[case.op]
    trials = [make(case, device, poisoned=False)]
    row.sets, row.beyond_l2 = sets_beyond_cache(min(trials[0].size, trials[0].traffic), trials[0].size, device)
    trials += [make(case, device, poisoned=False) for _ in range(row.sets - 1)]
    timing = time_graph([trial.run for trial in trials])
    row.us, row.repeats = timing.median, timing.repeats
    row.floor_us = ceilings.floor(trials[0].traffic, trials[0].flops, row.dtype)
    row.gb_s = trials[0].traffic / row.us * 1e-3
    row.tflop_s = trials[0].flops / row.us * 1e-6 if trials[0].flops else None
    for name in trials[0].rivals:
        row.rivals[name] = _rival_time(trials, name)
    if isinstance(row.rivals[TORCH], float):
        row.torch_eager_us = time_eager([trial.rivals[TORCH] for trial in trials]).median


def _rival_time(trials: list[Trial], name: str) -> float | str:
    try:
        return time_graph([trial.rivals[name] for trial in trials]).median
    except FAILURES as error:
        return first_line(error)


def _device_lives() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN (integers: their largest value), so that a place a kernel leaves unwritten shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


def first_line(error: BaseException) -> str:
    """The error's class and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
