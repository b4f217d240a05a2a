"""Stop strings: end a row at the token that completes one of them."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing
from typing import TYPE_CHECKING

from eagle.engine.loop import GenerationStats
from eagle.errors import InvalidInputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MORE_TOKENS = 4
"""Tokens decoded before those a stop string may need at least: a character may take several tokens."""


class StopStrings:
    """Finds the first token with which a row's text holds one of ``strings``. Raises InvalidInputError for bad ones."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, strings: Iterable[str]) -> None:
        if not isinstance(strings, Iterable):
            raise InvalidInputError(f"stop_strings is {strings!r}; expected a string or several")
        given = [strings] if isinstance(strings, str) else list(strings)
        if tokenizer is None:
            raise InvalidInputError(
                "stop_strings were given, and the model has no tokenizer to find them with; pass one as tokenizer, or leave "
                "them out"
            )
        if not callable(getattr(tokenizer, "decode", None)):
            raise InvalidInputError(f"tokenizer is {tokenizer!r}; stop_strings need one that decodes token ids")
        if not given or not all(isinstance(text, str) and text for text in given):
            raise InvalidInputError(f"stop_strings is {given!r}; expected strings that are not empty")
        self.tokenizer, self.strings = tokenizer, given
        self._window = MORE_TOKENS * max(map(len, given)) + MORE_TOKENS

    def cut(self, before: list[int], new: list[int]) -> int | None:
        """How many of the ``new`` tokens to keep, the completing one included; None if no string is complete."""
        tail = before[-self._window :]
        if not self._found(tail + new):
            return None
        return next((count for count in range(1, len(new)) if self._found(tail + new[:count])), len(new))

    def _found(self, tokens: list[int]) -> bool:
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        return any(stop in text for stop in self.strings)


def until_stopped(
    steps: Generator[list[list[int]], None, None], stops: StopStrings, batch: int, stats: GenerationStats
) -> Generator[list[list[int]], None, None]:
    """``steps`` with each row cut at its first stop string; ends when all rows are."""
    rows: list[list[int]] = [[] for _ in range(batch)]
    over = [False] * batch
    with closing(steps):
        for new in steps:
            for row, tokens in enumerate(new):
                kept = 0 if over[row] else stops.cut(rows[row], tokens) if tokens else None
                if kept is not None:
                    stats.new_tokens -= len(tokens) - kept
                    new[row], over[row] = tokens[:kept], True
                rows[row] += new[row]
            yield new
            if all(over):
                return
