"""Mean accept length of a model and its head, with the proof that the output is plain decoding's.

τ = new tokens / target forward passes, over the passes that verify a draft: prefill's pass and the one token it yields
are left out, so that plain decoding has τ = 1 exactly. A pass whose tokens are cut by an end token or by the limit
counts with the tokens that were kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eagle.bench.prompts import Prompt
from eagle.bench.runs import check_prompts
from eagle.errors import InvalidInputError

if TYPE_CHECKING:
    from eagle.model.ea_model import EaModel


@dataclass
class PromptResult:
    """One prompt, run both ways."""

    category: str
    tokens: list[int] = field(default_factory=list)
    accept_lengths: list[int] = field(default_factory=list)  # tokens of each pass after prefill
    plain_tokens: list[int] = field(default_factory=list)

    @property
    def identical(self) -> bool:
        return self.tokens == self.plain_tokens


@dataclass
class AcceptReport:
    """What a run over prompts found."""

    results: list[PromptResult]
    levels: int  # draft levels of a tree: depth + 1
    seconds: float = 0.0
    plain_seconds: float = 0.0

    def accept_length(self, category: str | None = None) -> float:
        """τ over all passes of all prompts, or of one category's; 1.0 where there were none."""
        lengths = [n for result in self._of(category) for n in result.accept_lengths]
        return sum(lengths) / len(lengths) if lengths else 1.0

    def identical(self, category: str | None = None) -> tuple[int, int]:
        """How many outputs equal plain decoding's, of how many."""
        results = self._of(category)
        return sum(result.identical for result in results), len(results)

    def histogram(self) -> dict[int, int]:
        """Passes by the tokens they committed, from 1 to levels + 1."""
        counts = Counter(n for result in self.results for n in result.accept_lengths)
        return {length: counts[length] for length in range(1, self.levels + 2)}

    def acceptance_by_position(self) -> list[float]:
        """For each draft level, the share of passes in which a token of that level was accepted."""
        histogram = self.histogram()
        passes = sum(histogram.values()) or 1
        return [
            sum(count for length, count in histogram.items() if length - 1 >= level) / passes
            for level in range(1, self.levels + 1)
        ]

    def categories(self) -> list[str]:
        """Categories in the order of their first prompt."""
        return list(dict.fromkeys(result.category for result in self.results))

    def as_dict(self) -> dict[str, Any]:
        """Plain data. Seconds include prefill."""
        equal, compared = self.identical()
        tokens = sum(len(result.tokens) for result in self.results)
        plain_tokens = sum(len(result.plain_tokens) for result in self.results)
        rate = tokens / self.seconds if self.seconds else 0.0
        plain_rate = plain_tokens / self.plain_seconds if self.plain_seconds else 0.0
        return {
            "accept_length": self.accept_length(),
            "prompts": compared,
            "identical": equal,
            "new_tokens": tokens,
            "steps": sum(len(result.accept_lengths) for result in self.results),
            "acceptance_by_position": self.acceptance_by_position(),
            "histogram": {str(length): count for length, count in self.histogram().items()},
            "categories": {
                name: {
                    "accept_length": self.accept_length(name),
                    "prompts": self.identical(name)[1],
                    "identical": self.identical(name)[0],
                }
                for name in self.categories()
            },
            "different": [index for index, result in enumerate(self.results, start=1) if not result.identical],
            "tokens_per_second": rate,
            "plain_tokens_per_second": plain_rate,
            "speedup": rate / plain_rate if plain_rate else 0.0,
        }

    def _of(self, category: str | None) -> list[PromptResult]:
        return [result for result in self.results if category is None or result.category == category]


def measure_acceptance(
    model: EaModel,
    prompts: list[Prompt],
    encode: Callable[[str], list[int]],
    *,
    max_new_tokens: int = 256,
    batch: int = 1,
    advance: Callable[[int], None] = lambda prompts: None,
) -> AcceptReport:
    """Run every prompt greedily with EAGLE and plainly, in batches of ``batch``.

    encode: a prompt's token ids. advance: told how many prompts are done after each batch. Raises InvalidInputError,
    naming the prompt where one does not fit the model's context.
    """
    if batch <= 0:
        raise InvalidInputError(f"the batch is {batch}; expected at least 1")
    rows = [encode(prompt.text) for prompt in prompts]
    check_prompts(model, rows, [prompt.place for prompt in prompts])
    report = AcceptReport([PromptResult(prompt.category) for prompt in prompts], model.tree_shape.depth + 1)
    for begin in range(0, len(rows), batch):
        results, ids = report.results[begin : begin + batch], rows[begin : begin + batch]
        steps = model.stream(ids, max_new_tokens=max_new_tokens)
        for index, new in enumerate(steps):
            for result, tokens in zip(results, new, strict=True):
                result.tokens += tokens
                if tokens and index > 0:  # the first is prefill's
                    result.accept_lengths.append(len(tokens))
        report.seconds += model.last_stats.seconds
        for result, tokens in zip(results, _plain(model, ids, max_new_tokens), strict=True):
            result.plain_tokens = tokens
        report.plain_seconds += model.last_stats.seconds
        advance(len(ids))
    return report


def _plain(model: EaModel, ids: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    outputs: list[list[int]] = [[] for _ in ids]
    for new in model.stream(ids, max_new_tokens=max_new_tokens, speculative=False):
        for row, tokens in zip(outputs, new, strict=True):
            row += tokens
    return outputs


def lines(report: AcceptReport) -> Iterable[str]:
    """The report for people, line by line."""
    equal, compared = report.identical()
    yield f"accept length {report.accept_length():.3f}, outputs identical to plain decoding: {equal} of {compared}"
    yield ""
    names = report.categories()
    if len(names) > 1:
        width = max(map(len, names))
        for name in names:
            equal, compared = report.identical(name)
            yield f"  {name:<{width}}  {report.accept_length(name):.3f}  identical {equal} of {compared}"
        yield ""
    yield "acceptance by position"
    for level, share in enumerate(report.acceptance_by_position(), start=1):
        yield f"  {level:>2}  {100 * share:5.1f} %"
    yield ""
    yield "passes by tokens committed"
    histogram = report.histogram()
    most = max(histogram.values()) or 1
    for length, count in histogram.items():
        yield f"  {length:>2}  {count:>6}  {'█' * round(40 * count / most)}".rstrip()
    yield ""
    values = report.as_dict()
    yield (
        f"{values['new_tokens']} new tokens, {values['tokens_per_second']:.1f} tokens/s, "
        f"plain {values['plain_tokens_per_second']:.1f} tokens/s, speed-up {values['speedup']:.2f}x"
    )
    if values["different"]:
        yield f"prompts whose outputs differ: {', '.join(map(str, values['different']))}"
