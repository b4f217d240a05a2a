"""Prefill: run the prompts through the target and the draft in chunks, and choose the first token.

Host reads are free here: prompt lengths are known to the host. Rows shorter than the longest run along padded; what they
write beyond their own length is overwritten before anything can see it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from eagle.engine.prefill_graph import BUCKETS, StaticPrefill, chunk_rows
from eagle.engine.state import Run, bounded, initial_state
from eagle.model.drafts import DraftCall
from eagle.model.ops import DecodeState
from eagle.model.verify import draw, next_token_probs

CHUNK = BUCKETS[-1]
"""Rows of a prefill pass: bounds activation memory. On an H100 the passes of an 8B model are compute-bound from about
300 rows on (989 TFLOP/s over 3.35 TB/s)."""


Chunks = Callable[[int], StaticPrefill | None]
"""From the rows a chunk needs to a captured one that has them, or None."""


@torch.no_grad()
def prefill(
    run: Run, prompts: list[list[int]], budgets: list[int], reused: int = 0, chunks: Chunks | None = None
) -> DecodeState:
    """Process the prompts from position ``reused`` on and return the state that holds each row's first new token.

    budgets: new tokens allowed each row, the first included. reused: positions already valid in both caches (one row
    only). chunks: captured chunks, in which the rows take turns.
    """
    device, lengths = run.target.device, [len(prompt) for prompt in prompts]
    # Before any pass is queued: a copy from the host's pageable memory waits for what the stream holds.
    committed, left = torch.tensor(lengths, device=device), torch.tensor(budgets, device=device) - 1
    if chunks is not None:
        found = [_captured(run, row, prompt, reused, chunks) for row, prompt in enumerate(prompts)]
        if all(pair is not None for pair in found):
            logits, features = (torch.cat(parts) for parts in zip(*found, strict=True))
            return _first_token(run, committed, left, logits, features)
    run = replace(run, caches=run.caches.first_rows(len(prompts)))
    longest = max(lengths)
    tokens = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    last_logits: list[torch.Tensor | None] = [None] * len(prompts)
    last_features: list[torch.Tensor | None] = [None] * len(prompts)
    for begin in range(reused, longest, CHUNK):
        end = min(begin + CHUNK, longest)
        ending = {row: length - 1 - begin for row, length in enumerate(lengths) if begin < length <= end}
        columns = sorted(set(ending.values()))
        kv_len = torch.full((len(prompts),), begin, dtype=torch.int64, device=device)
        logits, features = run.target.forward(
            tokens[:, begin:end],
            run.caches.target,
            kv_len,
            slots=bounded(end, run.caches.slots),
            logits_to_keep=torch.tensor(columns, device=device) if columns else 1,
        )
        for row, column in ending.items():
            last_logits[row] = logits[row, columns.index(column)]
            last_features[row] = features[row, column]
        if run.draft is not None:
            _draft_chunk(run, features, tokens, begin, end)
    logits = torch.stack([row for row in last_logits if row is not None])
    return _first_token(run, committed, left, logits, torch.stack([row for row in last_features if row is not None]))


def _first_token(
    run: Run, lengths: torch.Tensor, left: torch.Tensor, logits: torch.Tensor, features: torch.Tensor
) -> DecodeState:
    """The state after the prompts. lengths, left: [B] positions committed and tokens still allowed after the first; logits,
    features: [B, V] and [B, F] at each prompt's last position."""
    if run.sampling.greedy:
        first = logits.argmax(-1)
    else:
        first = draw(next_token_probs(logits, run.sampling), run.uniforms[: len(lengths), 0])
    return initial_state(lengths, first, features if run.draft is not None else None, left, run.path, run.eos)


def _captured(
    run: Run, row: int, prompt: list[int], reused: int, chunks: Chunks
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The last position's logits [1, V] and features [1, F] of one row, by captured chunks; None if one is missing."""
    plan, begin = [], reused
    for rows in chunk_rows(len(prompt) - reused):
        chunk = chunks(rows)
        if chunk is None or begin + chunk.rows > chunk.run.caches.slots:
            return None
        plan.append((chunk, begin))
        begin += chunk.rows
    logits = features = None
    for chunk, begin in plan:
        logits, features = chunk(prompt[begin : begin + chunk.rows + 1], begin)
    made = chunk.run.caches
    if made is not run.caches:
        made.prefix = None
        run.caches.target.take_row(row, made.target, len(prompt))
        run.caches.draft.take_row(row, made.draft, len(prompt))
    return logits[None].clone(), features[None].clone()


def _draft_chunk(run: Run, features: torch.Tensor, tokens: torch.Tensor, begin: int, end: int) -> None:
    """Fill the draft's cache for the pairs (feature t, token t + 1) of one chunk.

    The pair of a prompt's last position has no token yet: the first step's extend writes it.
    """
    rows = min(end, tokens.shape[1] - 1) - begin
    if rows <= 0:
        return
    start = torch.full((tokens.shape[0],), begin, dtype=torch.int64, device=tokens.device)
    cache, ops = run.caches.draft, run.target.ops  # of the model: many rows are better served by a library
    positions = start[:, None] + torch.arange(rows, device=tokens.device)
    call = DraftCall(ops, cache, start, start, None, positions, bounded(end, cache.slots))
    run.draft(run.draft.fuse(features[:, :rows], ops), tokens[:, begin + 1 : begin + 1 + rows], call)
