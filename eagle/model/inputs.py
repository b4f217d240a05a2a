"""What callers hand in, checked and brought into one form."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from eagle.errors import InvalidInputError
from eagle.model.ops import Sampling, TreeShape


def check_tree(total_token: int, depth: int, top_k: int, draft_vocab_size: int | None) -> TreeShape:
    """The tree's shape, or InvalidInputError naming the bound that was missed. draft_vocab_size: None if not yet known."""
    bounds = (("total_token", total_token, 2, 1024), ("depth", depth, 0, 64), ("top_k", top_k, 1, 128))
    for name, value, least, most in bounds:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            measured = ", or -1 to have the best size measured here" if name == "total_token" else ""
            raise InvalidInputError(f"{name} is {value!r}; expected a whole number from {least} to {most}{measured}")
    if draft_vocab_size is not None and top_k > draft_vocab_size:
        raise InvalidInputError(
            f"top_k is {top_k}, but the draft head knows only {draft_vocab_size} tokens; lower top_k to that or less"
        )
    shape = TreeShape(total_token, depth, top_k)
    if total_token - 1 > shape.candidates:
        raise InvalidInputError(
            f"total_token is {total_token}, but depth {depth} and top_k {top_k} give only {shape.candidates} candidates "
            f"and the root; lower total_token to {shape.candidates + 1} or raise depth or top_k"
        )
    return shape


def check_sampling(
    temperature: float | None, top_p: float | None, top_k: float | None, *, top_k_first: bool
) -> Sampling:
    """Sampling settings, or what `Sampling` raises. None means off; so do top_p 0 and 1, and top_k 0."""
    asked = Sampling(temperature or 0.0, top_p or 0.0, _whole(top_k or 0), top_k_first)
    # The reference treats temperatures up to 1e-5 as greedy.
    temperature = 0.0 if asked.temperature <= 1e-5 else float(asked.temperature)
    return Sampling(temperature, float(asked.top_p), asked.top_k, top_k_first)


def asked_sampling(
    do_sample: bool | None, temperature: float | None, top_p: float | None, top_k: float | None
) -> Sampling:
    """`check_sampling` by transformers' words: ``do_sample`` False is greedy whatever the temperature, True samples, at 1
    where no temperature is given. Raises InvalidInputError also for True at a greedy temperature."""
    asked = check_sampling(temperature, top_p, top_k, top_k_first=True)
    if do_sample is None:
        return asked
    if do_sample not in (True, False):
        raise InvalidInputError(f"do_sample is {do_sample!r}; expected True, False or None")
    if not do_sample:
        return replace(asked, temperature=0.0)
    if temperature is None:
        return replace(asked, temperature=1.0)
    if asked.greedy:
        raise InvalidInputError(
            f"do_sample is True, but temperature {temperature:g} is greedy; give a higher one, or leave it out"
        )
    return asked


def padding_mask(ids: torch.Tensor, pad: int | None, eos: set[int], bos: set[int]) -> torch.Tensor | None:
    """The mask of prompts [B, T] that came without one, by transformers' rule: 0 for the padding token at either end of a
    row, unless it is an end token too. There, rows that differ in how many they have give a warning.

    Beyond that rule: where it is a start token and every row begins with it, one of them is text; so is a row of
    nothing else. None where nothing is padding.
    """
    if pad is None or ids.dim() != 2 or ids.numel() == 0:
        return None
    other, width = torch.ne(ids, pad).long(), ids.shape[1]
    blank = ~other.any(1)
    before, after = ((side.cumsum(1) == 0).sum(1).masked_fill(blank, 0) for side in (other, other.flip(1)))
    if pad in eos:
        if bool((before != before[0]).any() | (after != after[0]).any()):
            warnings.warn(
                f"rows begin or end with token {pad}, which both pads and ends text here, and no attention_mask was given: "
                "it is taken for text; pass the tokenizer's attention_mask if it is padding",
                stacklevel=3,
            )
        return None
    if pad in bos and bool((blank | (before > 0)).all()):
        before = before - 1
    position = torch.arange(width, device=ids.device)
    inside = (position >= before[:, None]) & (position < width - after[:, None])
    return None if bool(inside.all()) else inside


def check_token(name: str, given: Any) -> int | None:
    """A token's id, of whatever kind of integer, or None for None. Raises InvalidInputError for anything else."""
    try:
        return None if given is None else operator.index(given)
    except TypeError as error:
        raise InvalidInputError(f"{name} is {given!r}; expected a token id or None") from error


def _whole(value: float) -> Any:
    """An integer for a float such as 50.0; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def token_rows(input_ids: Any, attention_mask: Any, vocab_size: int) -> list[list[int]]:
    """Prompts as lists of token ids, padding removed.

    input_ids: [T] or [B, T] integers, or a list of rows of unequal length; attention_mask: the shape of input_ids, 0
    for padding on either side, or None. Raises InvalidInputError for an empty prompt, an id outside the vocabulary, or
    a mask that does not fit.
    """
    if isinstance(input_ids, Sequence) and input_ids and isinstance(input_ids[0], Sequence):
        try:
            rows = [[operator.index(token) for token in row] for row in input_ids]
        except TypeError as error:
            raise InvalidInputError(f"input_ids holds something else than whole numbers ({error})") from error
        if attention_mask is not None:
            raise InvalidInputError("attention_mask was given with a list of rows; pass input_ids as a tensor with it")
    else:
        ids = torch.as_tensor(input_ids)
        if ids.numel() == 0:
            raise InvalidInputError("the prompt is empty; expected at least one token")
        if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() not in (1, 2):
            raise InvalidInputError(
                f"input_ids has dtype {ids.dtype} and shape {list(ids.shape)}; expected integers of shape [T] or [B, T]"
            )
        ids = ids[None] if ids.dim() == 1 else ids
        mask = torch.ones_like(ids) if attention_mask is None else as_batch(attention_mask, "attention_mask")
        mask = mask[None] if mask.dim() == 1 else mask
        if mask.shape != ids.shape:
            raise InvalidInputError(
                f"attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}; expected equal shapes"
            )
        rows = []
        for row, keep in zip(ids.tolist(), mask.bool().tolist(), strict=True):
            kept = [index for index, flag in enumerate(keep) if flag]
            if kept and kept != list(range(kept[0], kept[-1] + 1)):
                raise InvalidInputError("attention_mask has a gap inside a prompt; padding may only lead or trail")
            rows.append([row[index] for index in kept])
    if not rows or any(not row for row in rows):
        raise InvalidInputError("the prompt is empty; expected at least one token")
    worst = max(max(row) for row in rows), min(min(row) for row in rows)
    if worst[0] >= vocab_size or worst[1] < 0:
        bad = worst[0] if worst[0] >= vocab_size else worst[1]
        raise InvalidInputError(f"input_ids holds the id {bad}; expected ids from 0 to {vocab_size - 1}")
    return rows


def token_budgets(
    lengths: list[int],
    context: int,
    max_new_tokens: int | None,
    max_length: int | None,
    default_new_tokens: int,
    width: int | None = None,
) -> list[int]:
    """How many tokens each row may add, given the rows' ``lengths`` and the context (positions).

    ``max_length`` counts the prompt and, as in transformers, its padding up to ``width`` columns. Where both limits are
    given, both hold. With neither, ``default_new_tokens``.

    Raises InvalidInputError for limits that allow nothing and prompts that do not fit the context.
    """
    longest, width = max(lengths), max(lengths) if width is None else width
    for name, value in (("max_new_tokens", max_new_tokens), ("max_length", max_length)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value <= 0):
            raise InvalidInputError(f"{name} is {value!r}; expected a whole number of at least 1")
    if longest >= context:
        raise InvalidInputError(
            f"the prompt has {longest} tokens, but the model's context holds {context}, new tokens included; shorten it"
        )
    if max_length is not None and max_length <= width:
        raise InvalidInputError(
            f"max_length is {max_length}, but the prompt alone has {width} tokens, a chat template's included; raise it"
        )
    limits = [default_new_tokens] if max_new_tokens is None and max_length is None else []
    limits += [] if max_new_tokens is None else [max_new_tokens]
    limits += [] if max_length is None else [max_length - width]
    return [min(*limits, context - length) for length in lengths]


def as_batch(given: Any, name: str = "input_ids") -> torch.Tensor:
    """Token ids, or what else has one number for each, as a tensor [B, T]. Raises InvalidInputError for what is no
    rectangular batch."""
    if isinstance(given, Mapping):  # what transformers 5's apply_chat_template and tokenizers return
        raise InvalidInputError(
            f"{name} is a {type(given).__name__}; pass its 'input_ids' and, where rows are padded, its 'attention_mask'"
        )
    if isinstance(given, str) or (isinstance(given, Sequence) and any(isinstance(entry, str) for entry in given)):
        raise InvalidInputError(f"{name} is text; expected numbers, as tokenizer(text, return_tensors='pt') gives")
    try:
        ids = torch.as_tensor(given)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InvalidInputError(
            f"{name} is no rectangular batch of numbers ({error}); pad the rows and pass an attention_mask"
        ) from error
    return ids[None] if ids.dim() == 1 else ids
