"""Checks of a whole model on one machine: kernels on and off, streaming, batches, seeds, memory.

Every check compares token ids that come from real generations. Two ways that compute in a different order need equal
outputs only in float32: in 16 bits a near-tie between two tokens may fall either way, so such a check is then skipped
with the place where the outputs part, and never counted as passed when they do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from eagle.bench.memory import held_bytes
from eagle.bench.runs import parting
from eagle.model.ops import Sampling
from eagle.model.triton_kernels import optimize_eagle_with_triton, restore_eagle
from eagle.model.triton_kernels.selection import OPS

if TYPE_CHECKING:
    from eagle.model.ea_model import EaModel

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"
SEEDS = (11, 12, 13, 14)
MEMORY_TOKENS = 12
MEMORY_SLACK = 1 << 20
"""Bytes that may stay: libraries keep small buffers of their own."""


@dataclass(frozen=True)
class Difference:
    """Two outputs that should have been equal: their names and their new tokens."""

    names: tuple[str, str]
    outputs: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def where(self) -> int | None:
        return parting(*self.outputs)


@dataclass(frozen=True)
class Check:
    """One check's outcome. ``reason`` says what was compared, or what went wrong."""

    name: str
    state: str
    reason: str
    differences: tuple[Difference, ...] = ()


@dataclass
class Bench:
    """The model under test, the prompts, and what has been generated so far."""

    model: EaModel
    prompt: list[int]
    others: list[list[int]]
    """More rows for a batch, of other lengths."""
    new_tokens: int
    runs: int
    original: list[int] = field(default_factory=list)
    optimised: list[int] = field(default_factory=list)

    def generate(self, prompt: list[int] | None = None, *, speculative: bool = True) -> list[int]:
        """New tokens of one greedy generation."""
        prompt = self.prompt if prompt is None else prompt
        output = self.model.generate([prompt], max_new_tokens=self.new_tokens, speculative=speculative)
        return output[0, len(prompt) :].tolist()

    def stream(self, prompts: list[list[int]], seed: int | None = None) -> list[list[int]]:
        """New tokens of each row, put together from what each step yields; sampled at temperature 1 with a seed."""
        rows: list[list[int]] = [[] for _ in prompts]
        sampling = Sampling(0.0 if seed is None else 1.0)
        for new in self.model.stream(prompts, max_new_tokens=self.new_tokens, sampling=sampling, seed=seed):
            for row, tokens in zip(rows, new, strict=True):
                row += tokens
        return rows

    @property
    def exact(self) -> bool:
        """Whether ways that differ in the order of their sums must agree."""
        return self.model.base_model.dtype == torch.float32


@dataclass
class Collector:
    """A streamer in transformers' sense that keeps what it gets."""

    pieces: list[list[int]] = field(default_factory=list)
    ended: bool = False

    def put(self, tokens: torch.Tensor) -> None:
        self.pieces.append(tokens.tolist())

    def end(self) -> None:
        self.ended = True


def run_checks(bench: Bench, told: Callable[[str, int, int], None] = lambda name, done, total: None) -> Iterator[Check]:
    """Yield each check's outcome as it comes. The model leaves as it came.

    told: (what runs now, checks done, checks in all). Raises what a generation raises.
    """
    stages: list[tuple[str, Callable[[Bench], Check]]] = [
        ("original output", _original),
        ("EAGLE equals plain, original", _plain),
        ("optimised equals original", _optimised),
        ("EAGLE equals plain, optimised", _plain),
        ("streaming equals non-streaming", _streaming),
        ("a batch equals its rows", _batch),
        ("sampling is seeded", _seeded),
        ("restore gives the original back", _restored),
        ("memory returns to where it was", _memory),
    ]
    model = bench.model
    before = {"engine": model.engine, "kernel_plan": model.kernel_plan, "ops": model.ops}
    originals: dict[str, Callable[..., Any]] = {}
    try:
        for done, (name, stage) in enumerate(stages):
            told(name, done, len(stages))
            if stage is _optimised:
                _, originals = optimize_eagle_with_triton(model)
            if stage is _restored:
                if not originals:  # there is nothing to undo, and the plan says why
                    before["kernel_plan"] = model.kernel_plan
                restore_eagle(model, originals)
                check = stage(bench, before)
            else:
                check = stage(bench)
            yield Check(name, check.state, check.reason, check.differences)
    finally:
        restore_eagle(model, originals)


def kernels_in_use(model: EaModel) -> tuple[list[str], str]:
    """The ops that Triton kernels serve after optimising, and why none does, or an empty text. The model is unchanged."""
    _, originals = optimize_eagle_with_triton(model)
    choices = model.kernel_report()
    restore_eagle(model, originals)
    served = list(dict.fromkeys(choice.op for choice in choices if choice.implementation == "triton"))
    return served, "" if served else choices[0].reason


def _original(bench: Bench) -> Check:
    outputs = [bench.generate() for _ in range(bench.runs)]
    bench.original = outputs[0]
    if not bench.original:
        return Check("", FAIL, "generate gave no token")
    return _equal("run 1", outputs[0], [(f"run {n}", other) for n, other in enumerate(outputs[1:], start=2)])


def _optimised(bench: Bench) -> Check:
    outputs = [bench.generate() for _ in range(bench.runs)]
    bench.optimised = outputs[0]
    steady = _equal(
        "optimised, run 1", outputs[0], [(f"optimised, run {n}", other) for n, other in enumerate(outputs[1:], start=2)]
    )
    if steady.state == FAIL:
        return steady
    return _equal("original", bench.original, [("optimised", outputs[0])], same_arithmetic=False, exact=bench.exact)


def _plain(bench: Bench) -> Check:
    expected = bench.optimised or bench.original
    plain = bench.generate(speculative=False)
    return _equal("EAGLE", expected, [("plain", plain)], same_arithmetic=False, exact=bench.exact)


def _streaming(bench: Bench) -> Check:
    steps = bench.stream([bench.prompt])[0]
    collector = Collector()
    bench.model.generate([bench.prompt], max_new_tokens=bench.new_tokens, streamer=collector)
    first, *pieces = collector.pieces
    if first != bench.prompt or not collector.ended:
        return Check("", FAIL, "the streamer did not get the prompt first and an end last")
    streamed = [token for piece in pieces for token in piece]
    return _equal("generate", bench.optimised, [("stream", steps), ("streamer", streamed)])


def _batch(bench: Bench) -> Check:
    prompts = [bench.prompt, *bench.others]
    together = bench.stream(prompts)
    alone = [bench.optimised, *(bench.generate(prompt) for prompt in bench.others)]
    checks = [
        _equal(f"row {n} alone", one, [(f"row {n} in the batch", row)], same_arithmetic=False, exact=bench.exact)
        for n, (one, row) in enumerate(zip(alone, together, strict=True), start=1)
    ]
    worst = next((check for state in (FAIL, SKIP) for check in checks if check.state == state), None)
    differences = tuple(difference for check in checks for difference in check.differences)
    if worst is not None:
        return Check("", worst.state, worst.reason, differences)
    return Check(
        "", PASS, f"{len(prompts)} rows, prompts of {', '.join(str(len(prompt)) for prompt in prompts)} tokens"
    )


def _seeded(bench: Bench) -> Check:
    first, again = (bench.stream([bench.prompt], SEEDS[0])[0] for _ in range(2))
    same = _equal(f"seed {SEEDS[0]}", first, [(f"seed {SEEDS[0]} again", again)])
    if same.state == FAIL:
        return same
    # A model may be so sure of a short text that two seeds agree; hardly so that all do.
    for seed in SEEDS[1:]:
        if (other := bench.stream([bench.prompt], seed)[0]) != first:
            where = parting(first, other)
            return Check(
                "", PASS, f"seed {SEEDS[0]} twice the same; seed {seed} parts from it at new token {where + 1}"
            )
    return Check("", FAIL, f"seeds {', '.join(map(str, SEEDS))} all give the same text at temperature 1")


def _restored(bench: Bench, before: dict[str, Any]) -> Check:
    model = bench.model
    changed = [op for op in OPS if getattr(model.ops, op) is not getattr(before["ops"], op)]
    changed += [name for name in ("engine", "kernel_plan") if getattr(model, name) != before[name]]
    if changed:
        return Check("", FAIL, f"not as they were: {', '.join(changed)}")
    return _equal("original", bench.original, [("restored", bench.generate())])


def _memory(bench: Bench) -> Check:
    """Everything has run by now, so what is made once is there; a whole round more must leave nothing behind."""
    model = bench.model

    def few(prompts: list[list[int]], count: int = MEMORY_TOKENS) -> None:
        for _ in model.stream(prompts, max_new_tokens=min(count, bench.new_tokens)):
            pass

    def held() -> int:
        few([bench.prompt] * 2, 1)
        few([bench.prompt])  # another batch size: the caches are new, and of this call's size
        return held_bytes(model.device)

    before = held()
    _, originals = optimize_eagle_with_triton(model)
    try:
        few([bench.prompt])
        few([bench.prompt, *bench.others])
    finally:
        restore_eagle(model, originals)
    after = held()
    words = f"{before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after optimising, a batch and restoring"
    return Check("", PASS if after - before <= MEMORY_SLACK else FAIL, words)


def _equal(
    name: str,
    expected: list[int],
    others: list[tuple[str, list[int]]],
    *,
    same_arithmetic: bool = True,
    exact: bool = True,
) -> Check:
    """A check that ``others`` equal ``expected``; where the arithmetic differs, only if ``exact``."""
    differences = tuple(
        Difference((name, label), (tuple(expected), tuple(tokens))) for label, tokens in others if tokens != expected
    )
    if not differences:
        labels = ", ".join([name, *(label for label, _ in others)])
        return Check("", PASS, f"{len(expected)} new tokens the same: {labels}")
    worst = min(differences, key=lambda difference: difference.where)
    words = f"{worst.names[0]} and {worst.names[1]} part at new token {worst.where + 1} of {len(expected)}"
    if same_arithmetic or exact:
        return Check("", FAIL, words, differences)
    return Check("", SKIP, f"{words}; in 16 bits a near-tie may fall either way, float32 decides", differences)
