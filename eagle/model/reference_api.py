"""The reference project's own methods, with its parameters and return values, for users who come from there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from eagle.engine.loop import GenerationStats
from eagle.errors import InvalidInputError
from eagle.model.inputs import as_batch, check_sampling


class ReferenceMethods:
    """``eagenerate`` and its kin (SafeAILab/EAGLE, ``eagle/model/ea_model.py``), on top of ``EaModel.stream``."""

    tokenizer: PreTrainedTokenizerBase | None
    stream: Callable[..., Generator[list[list[int]], None, None]]
    _eos_ids: Callable[[Any], set[int]]

    def eagenerate(
        self,
        input_ids: torch.Tensor,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: float = 0.0,
        max_new_tokens: int = 512,
        max_length: int = 2048,
        log: bool = False,
        is_llama3: bool = False,
    ) -> Any:
        """The reference's method: prompt and new tokens [1, T + new]; with ``log`` also the number of new tokens and the
        index of the last step. Sampling cuts by top_p before top_k, from torch's global generator."""
        steps, stats = self._reference_steps(
            input_ids, temperature, top_p, top_k, max_new_tokens, max_length, is_llama3, speculative=True
        )
        return _logged(deque(steps, maxlen=1).pop(), input_ids, stats, log)

    def naivegenerate(
        self,
        input_ids: torch.Tensor,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: float = 0.0,
        max_new_tokens: int = 512,
        max_length: int = 2048,
        log: bool = False,
        is_llama3: bool = False,
    ) -> Any:
        """Plain decoding with `eagenerate`'s parameters and return values."""
        steps, stats = self._reference_steps(
            input_ids, temperature, top_p, top_k, max_new_tokens, max_length, is_llama3, speculative=False
        )
        return _logged(deque(steps, maxlen=1).pop(), input_ids, stats, log, first_step=1)

    def ea_generate(
        self,
        input_ids: torch.Tensor,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: float = 0.0,
        max_new_tokens: int = 512,
        max_length: int = 2048,
        log: bool = False,
        is_llama3: bool = False,
    ) -> Iterator[torch.Tensor]:
        """The reference's streaming method: yields prompt and tokens so far [1, T + n] after every step."""
        steps, _ = self._reference_steps(
            input_ids, temperature, top_p, top_k, max_new_tokens, max_length, is_llama3, speculative=True
        )
        return steps

    def naive_generate(
        self,
        input_ids: torch.Tensor,
        temperature: float = 0.0,
        top_p: float = 0.0,
        top_k: float = 0.0,
        max_new_tokens: int = 512,
        max_length: int = 2048,
        log: bool = False,
        is_llama3: bool = False,
    ) -> Iterator[torch.Tensor]:
        """Plain decoding with `ea_generate`'s parameters and return values."""
        steps, _ = self._reference_steps(
            input_ids, temperature, top_p, top_k, max_new_tokens, max_length, is_llama3, speculative=False
        )
        return steps

    def _reference_steps(
        self,
        input_ids: torch.Tensor,
        temperature: float,
        top_p: float,
        top_k: float,
        max_new_tokens: int,
        max_length: int,
        is_llama3: bool,
        speculative: bool,
    ) -> tuple[Iterator[torch.Tensor], GenerationStats]:
        output = as_batch(input_ids)
        if output.shape[0] != 1:
            raise InvalidInputError(f"this method takes one sequence, got {output.shape[0]}; use generate for a batch")
        eos = self._eos_ids(None)
        if self.tokenizer is not None:
            extra = [self.tokenizer.eos_token_id]
            if is_llama3:
                extra.append(self.tokenizer.convert_tokens_to_ids("<|eot_id|>"))
            eos |= {token for token in extra if token is not None}
        stats = GenerationStats()
        steps = self.stream(
            input_ids,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            sampling=check_sampling(temperature, top_p, top_k, top_k_first=False),
            eos_token_id=eos,
            speculative=speculative,
            stats=stats,
        )

        def outputs() -> Iterator[torch.Tensor]:
            so_far = output
            with closing(steps):
                for new in steps:
                    so_far = torch.cat((so_far, torch.tensor([new[0]], device=so_far.device)), dim=1)
                    yield so_far

        return outputs(), stats


def _logged(
    output: torch.Tensor, input_ids: torch.Tensor, stats: GenerationStats, log: bool, first_step: int = 0
) -> Any:
    """The reference counts steps from 0, and plain decoding's first token as a step of its own."""
    new_tokens = output.shape[1] - as_batch(input_ids).shape[1]
    return (output, new_tokens, max(0, stats.steps - 1 + first_step)) if log else output
