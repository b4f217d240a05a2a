"""Batched sampling with rows that refill: one captured decode step over a fixed number of rows.

A row that has finished is given the next request every few steps, so no row waits for the longest. All state lives on
the device; sampling draws one uniform number a token from a counter-based hash of the request's seed and the position,
so what a request gives does not depend on the row it runs in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eagle.train.attention import Packing
from eagle.train.target import Plan, Target

PREFILL_ROWS = 512
_MASK32 = 0xFFFFFFFF


@dataclass
class Request:
    """One continuation to sample: ``temperature`` 0 is greedy; ``min_p`` drops tokens below that share of the best."""

    prompt: list[int]
    max_new: int
    seed: int
    temperature: float = 0.0
    min_p: float = 0.05
    tag: Any = None


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """One number in (0, 1) for each pair, fp32, by a 32-bit integer hash (the "lowbias32" finaliser)."""
    x = (seed * 0x9E3779B1 + position * 0x85EBCA77) & _MASK32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    x = x ^ (x >> 16)
    return ((x.double() + 0.5) / 2.0**32).float()


def sample(logits: Tensor, temperature: Tensor, min_p: Tensor, uniforms: Tensor) -> Tensor:
    """Next tokens, int64 [B], from logits [B, V]: greedy where temperature is 0, else by the inverse of the CDF."""
    wide = logits.float()
    top, greedy = wide.max(-1)
    scaled = (wide - top[:, None]) / temperature.clamp_min(1e-4)[:, None]
    weights = scaled.exp()
    cumulative = (weights * (weights >= min_p[:, None])).cumsum(-1)
    # Scaled a little down, so that rounding cannot push the target past the last kept token.
    target = uniforms[:, None] * cumulative[:, -1:] * (1 - 1e-6)
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_max(logits.shape[1] - 1)
    return torch.where(temperature > 0, drawn, greedy)


class Sampler:
    """Runs requests through a target.

    Args:
        target: the model.
        rows: sequences decoded together.
        slots: the longest sequence, prompt included.
        stop: tokens that end a sequence.
        refill_every: decode steps between refills.
        capture: replay a CUDA graph for the decode step.
    """

    def __init__(
        self, target: Target, *, rows: int, slots: int, stop: Iterable[int], refill_every: int = 24, capture: bool
    ) -> None:
        self.target, self.rows, self.slots, self.refill_every = target, rows, slots, refill_every
        device = target.device
        self.cache = target.new_cache(rows, slots)
        self.all_rows = torch.arange(rows, device=device)
        self.offsets_q = torch.arange(rows + 1, device=device, dtype=torch.int32)
        self.offsets_k = self.offsets_q * slots
        config = target.config
        self.offsets_q = self.offsets_q * (config.num_attention_heads // config.num_key_value_heads)
        self.stop = torch.zeros(target.head.shape[0], dtype=torch.bool, device=device)
        self.stop[list(stop)] = True

        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(rows, dtype=dtype, device=device)

        self.token, self.position, self.limit, self.seed = (zeros(torch.int64) for _ in range(4))
        self.temperature, self.min_p = zeros(torch.float32), zeros(torch.float32)
        self.active = zeros(torch.bool)
        self.written = torch.zeros(rows, slots, dtype=torch.int64, device=device)
        self.requests: list[Request | None] = [None] * rows
        self.decoded = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        if capture:
            self._capture()

    @torch.no_grad()
    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step()

    def _step(self) -> None:
        """Decode one token in every active row; idle rows write their last token's key again, which nobody reads."""
        lengths = (self.position + 1).int()
        plan = Plan(
            "decode",
            self.target.backend,
            cache=self.cache,
            rows=self.all_rows,
            slots=self.position,
            lengths=lengths,
            offsets_q=self.offsets_q,
            offsets_k=self.offsets_k,
        )
        if plan.backend != "flash":
            hidden_slots = torch.arange(self.slots, device=lengths.device) >= lengths[:, None]
            bias = torch.zeros(self.rows, self.slots, device=lengths.device, dtype=self.target.dtype)
            plan.bias = bias.masked_fill(hidden_slots, float("-inf"))[:, None, None]
        hidden = self.target.hidden(self.token[:, None], self.position[:, None], plan)[:, 0]
        chosen = sample(hidden @ self.target.head.t(), self.temperature, self.min_p, uniform(self.seed, self.position))
        position = torch.where(self.active, self.position + 1, self.position)
        chosen = torch.where(self.active, chosen, self.token)
        self.written.scatter_(1, position[:, None], chosen[:, None])
        self.active.logical_and_(~(self.stop[chosen] | (position >= self.limit)))
        self.position.copy_(position)
        self.token.copy_(chosen)

    def _prefill(self, rows: list[int], requests: list[Request]) -> None:
        device = self.target.device
        lengths = [len(request.prompt) for request in requests]
        flat = torch.tensor([t for request in requests for t in request.prompt], device=device)
        steps = torch.cat([torch.arange(n) for n in lengths]).to(device)
        row = torch.tensor(rows, device=device)
        length = torch.tensor(lengths, device=device)
        packing = Packing.of(lengths, device)
        slots = torch.stack([row.repeat_interleave(length), steps])
        plan = Plan("prefill", self.target.backend, packing=packing, cache=self.cache, slots=slots)
        hidden = self.target.hidden(flat[None], steps[None], plan)[0][packing.offsets[1:].long() - 1]
        seed = torch.tensor([request.seed for request in requests], device=device)
        temperature = torch.tensor([request.temperature for request in requests], device=device)
        min_p = torch.tensor([request.min_p for request in requests], device=device)
        limit = torch.tensor(
            [min(n + request.max_new, self.slots) - 1 for n, request in zip(lengths, requests, strict=True)],
            device=device,
        )
        chosen = sample(hidden @ self.target.head.t(), temperature, min_p, uniform(seed, length - 1))
        self.written[row, length] = chosen
        for state, value in (
            (self.token, chosen),
            (self.position, length),
            (self.limit, limit),
            (self.seed, seed),
            (self.temperature, temperature),
            (self.min_p, min_p),
            (self.active, ~(self.stop[chosen] | (length >= limit))),
        ):
            state[row] = value

    @torch.no_grad()
    def run(
        self, requests: Iterator[Request], on_finish: Callable[[list[tuple[Request, list[int]]]], list[Request]]
    ) -> None:
        """Run requests until there are none left.

        Args:
            requests: drawn from lazily; prompts shorter than ``slots``.
            on_finish: gets finished requests with their new tokens (the stop token included) and returns requests that
                follow from them, which go first.
        """
        ready: deque[Request] = deque()
        exhausted = False

        def top_up(count: int) -> None:
            nonlocal exhausted
            while len(ready) < count and not exhausted:
                request = next(requests, None)
                if request is None:
                    exhausted = True
                else:
                    ready.append(request)

        top_up(self.rows)
        while True:
            finished = self._collect()
            self._admit(ready)
            if any(request is not None for request in self.requests):
                for _ in range(self.refill_every):
                    if self._graph is not None:
                        self._graph.replay()
                    else:
                        self._step()
            elif not finished and exhausted:
                return
            # The host prepares what comes next while the device decodes.
            if finished:
                ready.extendleft(reversed(on_finish(finished)))
            top_up(self.rows // 2)

    def _admit(self, ready: deque[Request]) -> None:
        """Move requests from the queue into free rows."""
        free = [row for row, request in enumerate(self.requests) if request is None][: len(ready)]
        for start in range(0, len(free), PREFILL_ROWS):
            rows = free[start : start + PREFILL_ROWS]
            requests = [ready.popleft() for _ in rows]
            self._prefill(rows, requests)
            for row, request in zip(rows, requests, strict=True):
                self.requests[row] = request

    def _collect(self) -> list[tuple[Request, list[int]]]:
        """Take finished requests from their rows."""
        active = self.active.tolist()
        rows = [row for row, request in enumerate(self.requests) if request is not None and not active[row]]
        if not rows:
            return []
        index = torch.tensor(rows, device=self.target.device)
        written, ends = self.written[index].cpu().numpy(), self.position[index].tolist()
        finished = []
        for i, row in enumerate(rows):
            request = self.requests[row]
            tokens = written[i, len(request.prompt) : ends[i] + 1].tolist()
            self.decoded += len(tokens)
            finished.append((request, tokens))
            self.requests[row] = None
        return finished
