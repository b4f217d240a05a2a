"""Where a step's time goes on a GPU: its kernels by name, the gaps between them, and the time between steps."""

from __future__ import annotations

import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from heapq import heappop, heappush
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from eagle.bench.runs import parting
from eagle.errors import InvalidInputError

if TYPE_CHECKING:
    from eagle.model.ea_model import EaModel

REPLAYS = 30
"""Of a captured step: back to back for the wall time, and profiled."""

EAGER_STEPS = 6
"""Profiled of a generation whose steps are not captured: each has thousands of kernels, which the profiler takes a second
to sort."""

NAME_LENGTH = 64

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of the profiler's trace that occupy the device; the others are the host's calls, and marks."""

Span = tuple[float, float, str]
"""Start and end in microseconds, and a kernel's name."""


@dataclass(frozen=True)
class KernelTime:
    """One kernel's share of a step: the time in which the others wait for it (`held_up`)."""

    name: str
    calls: float
    microseconds: float  # of a step


@dataclass(frozen=True)
class StepProfile:
    """Milliseconds of a step. ``loop_ms``: in a generation, from result to result; ``replay_ms``: captured steps back to
    back, None without a capture."""

    speculative: bool
    loop_ms: float
    replay_ms: float | None
    table: tuple[KernelTime, ...]
    reply: tuple[int, ...] = ()
    """The tokens of the reply, to be compared with the other way's; in no figure."""

    @property
    def engine(self) -> str:
        return "eager" if self.replay_ms is None else "captured"

    @property
    def busy_ms(self) -> float:
        """In which at least one kernel runs."""
        return sum(kernel.microseconds for kernel in self.table) / 1e3

    @property
    def kernels(self) -> float:
        """How many run."""
        return sum(kernel.calls for kernel in self.table)

    @property
    def idle_share(self) -> float:
        """The share of a generation's step in which the GPU waits for the next step, or for anything if not captured."""
        return max(0.0, 1.0 - (self.busy_ms if self.replay_ms is None else self.replay_ms) / self.loop_ms)

    def to_json(self) -> dict[str, Any]:
        derived = ("engine", "busy_ms", "kernels", "idle_share")
        found = asdict(self) | {name: getattr(self, name) for name in derived}
        del found["reply"]
        return found


def profile_step(model: EaModel, prompt: list[int], new_tokens: int = 128, *, speculative: bool = True) -> StepProfile:
    """Profile the steps of one greedy reply. Raises InvalidInputError without a CUDA device."""
    if model.device.type != "cuda":
        raise InvalidInputError(f"a step is profiled on a CUDA device, and the model is on {model.device}")
    reply: tuple[int, ...] = ()
    for _ in range(2):  # captures and library handles come with the first
        reply = _run(model, prompt, new_tokens, speculative)
    stats = model.last_stats
    assert stats is not None
    loop_ms = 1e3 * stats.decode_seconds / max(1, stats.steps)
    steps = [step for step in model._session.captures.steps() if (step.run.draft is not None) == speculative]
    if not steps:
        with closing(_stream(model, prompt, new_tokens, speculative)) as running:
            next(running)  # prefill
            spans = _profiled(model, lambda: list(islice(running, EAGER_STEPS)))
        return StepProfile(speculative, loop_ms, None, _table(spans, min(EAGER_STEPS, stats.steps)), reply)
    step = steps[-1]
    torch.cuda.synchronize(model.device)
    started = time.perf_counter()
    for _ in range(REPLAYS):
        step.replay()
    torch.cuda.synchronize(model.device)
    replay_ms = 1e3 * (time.perf_counter() - started) / REPLAYS
    spans = _profiled(model, lambda: [step.replay() for _ in range(REPLAYS)])
    return StepProfile(speculative, loop_ms, replay_ms, _table(spans, REPLAYS), reply)


def compared(eagle: StepProfile, plain: StepProfile) -> str:
    """Whether the two profiled replies are equal, in one line."""
    where = parting(eagle.reply, plain.reply)
    told = "is plain decoding's" if where is None else f"parts from plain decoding's at token {where + 1}"
    return f"EAGLE's reply of {len(eagle.reply)} tokens {told}"


def markdown(profile: StepProfile, rows: int = 16) -> list[str]:
    """The profile as a Markdown table under one line of totals."""
    kind = "EAGLE" if profile.speculative else "plain"
    replay = "" if profile.replay_ms is None else f"{profile.replay_ms:.3f} ms back to back, "
    total = 1e3 * profile.busy_ms
    lines = [
        f"{kind}, {profile.engine}: {profile.loop_ms:.3f} ms a step in a generation, {replay}"
        f"{profile.kernels:.0f} kernels keep the GPU busy for {profile.busy_ms:.3f} ms; "
        f"idle {'between steps' if profile.replay_ms is not None else 'of a step'} {profile.idle_share:.1%}",
        "",
        "| kernel | calls | µs a call | µs a step | share |",
        "|---|---|---|---|---|",
    ]
    for kernel in profile.table[:rows]:
        each = kernel.microseconds / kernel.calls
        share = kernel.microseconds / total
        lines.append(f"| {kernel.name} | {kernel.calls:.0f} | {each:.1f} | {kernel.microseconds:.0f} | {share:.1%} |")
    rest = profile.table[rows:]
    if rest:
        calls, spent = sum(kernel.calls for kernel in rest), sum(kernel.microseconds for kernel in rest)
        lines.append(f"| {len(rest)} others | {calls:.0f} | | {spent:.0f} | {spent / total:.1%} |")
    return lines


def _stream(
    model: EaModel, prompt: list[int], new_tokens: int, speculative: bool
) -> Generator[list[list[int]], None, None]:
    return model.stream([prompt], max_new_tokens=new_tokens, eos_token_id=(), speculative=speculative)


def _run(model: EaModel, prompt: list[int], new_tokens: int, speculative: bool) -> tuple[int, ...]:
    return tuple(token for [new] in _stream(model, prompt, new_tokens, speculative) for token in new)


def _profiled(model: EaModel, work: Callable[[], object]) -> list[Span]:
    """What the device ran during ``work``, from the profiler's trace, which tells it from the driver's calls."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize(model.device)
    with TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        found.export_chrome_trace(str(path))
        return device_spans(json.loads(path.read_text(encoding="utf-8")))


def device_spans(trace: dict[str, Any]) -> list[Span]:
    """Kernels, copies and fills of a trace in Chrome's format (times in microseconds)."""
    ran = (event for event in trace["traceEvents"] if event.get("cat") in ON_DEVICE and event.get("dur", 0) > 0)
    return [(event["ts"], event["ts"] + event["dur"], short_name(event["name"])) for event in ran]


def _table(spans: list[Span], steps: int) -> tuple[KernelTime, ...]:
    calls, spent = Counter(name for _, _, name in spans), held_up(spans)
    names = sorted(calls, key=lambda name: -spent[name])
    return tuple(KernelTime(name, calls[name] / steps, spent[name] / steps) for name in names)


def held_up(spans: list[Span]) -> dict[str, float]:
    """The time in which anything runs, shared out by name: each moment goes to the running span that ends first.

    Where a kernel is put in place while its predecessor runs, and waits for its end, the moment is the predecessor's.
    """
    waiting = sorted(spans)
    running: list[tuple[float, str]] = []
    spent: dict[str, float] = defaultdict(float)
    now, index = float("-inf"), 0
    while running or index < len(waiting):
        if not running:
            now = max(now, waiting[index][0])
        while index < len(waiting) and waiting[index][0] <= now:
            heappush(running, waiting[index][1:])
            index += 1
        end, name = running[0]
        until = end if index == len(waiting) else min(end, waiting[index][0])
        spent[name] += until - now
        now = until
        while running and running[0][0] <= now:
            heappop(running)
    return spent


def short_name(kernel: str) -> str:
    """A kernel's name without return type, namespaces, template and function arguments, the innermost functor kept."""
    functor = re.findall(r"(\w+(?:_kernel_cuda|Functor\w*|Ops?))\b", kernel)
    plain = re.sub(r"^void ", "", kernel).replace("(anonymous namespace)::", "")
    name = re.split(r"[<(]", plain)[0].split("::")[-1].strip()
    name = f"{name} ({functor[-1]})" if functor and functor[-1] not in name else name
    return name[:NAME_LENGTH]
