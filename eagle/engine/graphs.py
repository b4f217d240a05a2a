"""A step at fixed addresses, captured as one CUDA graph and replayed.

Everything a step reads or writes lies in buffers that stay: caches, decode state, end tokens, uniform numbers. Lengths
are read on the device and the cache's full size bounds the grids, so one capture serves every length. What a call
brings (prompt state, end tokens, uniforms, sampling's numbers) is copied in before its first replay.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from eagle.engine.state import Run, StaticState, slots_beyond
from eagle.engine.step import step
from eagle.model.ops import DecodeState, Ops, Sampling, TreeShape
from eagle.model.row_local import NotRowLocal
from eagle.model.triton_kernels.dispatch import Served
from eagle.model.verify import evaluate_posterior

WARM_UPS = 2
"""Passes before the capture: the first compiles kernels and makes library handles, the second finds nothing left to
make."""

END_TOKENS = 16
"""Room for end tokens; the rest is -1, which no token is. More than these take their own capture."""


Result = TypeVar("Result")


def device_index(device: torch.device) -> int:
    """The number of a CUDA device, that of the current one where it names none."""
    return torch.cuda.current_device() if device.index is None else device.index


def captured(
    body: Callable[[], Result], device: torch.device, pool: tuple[int, int] | None, stream: torch.cuda.Stream | None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Run ``body`` for warming up, then capture it. Returns the graph and what it gives, which each replay renews."""
    stream, before = stream or torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            body()
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[device_index(device)]
    state = generator.get_state()
    try:
        # thread_local: what other threads do on the device meanwhile is their own affair
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            result = body()
    except (RuntimeError, NotRowLocal):
        # A capture that fails may leave this thread on its stream, and leaves the device's generator waiting for its end:
        # every later draw would raise.
        torch.cuda.set_stream(before)
        fresh = torch.Generator(device=device)
        fresh.set_state(state)
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
        raise
    return graph, result


RING = 2
"""Results the host may be behind by: the one it reads, and the one of the step under way."""


@dataclass(frozen=True)
class StepKey:
    """What a captured step is made for. Two calls with equal keys share one capture."""

    caches: int  # identity
    draft: int  # identity, 0 without
    ops: Ops
    sampling: Sampling | tuple[str, ...]  # its kind where `holds_sampling`
    shape: TreeShape | None  # None where a plain step does not depend on it
    pad_rows: bool
    row_local: bool
    end_tokens: int

    @classmethod
    def of(cls, run: Run) -> StepKey:
        """The key of a call's run."""
        return cls(
            caches=id(run.caches),
            draft=0 if run.draft is None else id(run.draft),
            ops=run.ops,
            sampling=run.sampling.kind(run.target.spec.vocab_size) if holds_sampling(run) else run.sampling,
            shape=None if run.draft is None and not run.pad_rows else run.shape,
            pad_rows=run.pad_rows,
            row_local=run.row_local,
            end_tokens=room_for_end_tokens(run.eos),
        )


def holds_sampling(run: Run) -> bool:
    """Whether a step reads the numbers of its sampling on the device. An op that a caller has put in the table may read
    those it was captured with."""
    draws = run.ops.evaluate_posterior
    return (draws.plain if isinstance(draws, Served) else draws) is evaluate_posterior


def room_for_end_tokens(eos: torch.Tensor) -> int:
    """Entries of the static buffer that takes ``eos``."""
    return max(END_TOKENS, eos.numel())


class StaticStep:
    """One step over static buffers. On a CUDA device with ``capture`` it is a graph; otherwise the same ops in turn."""

    @torch.no_grad()
    def __init__(
        self, run: Run, *, capture: bool, pool: tuple[int, int] | None = None, stream: torch.cuda.Stream | None = None
    ) -> None:
        started = time.perf_counter()
        device, batch = run.target.device, run.caches.target.batch
        self._graph: torch.cuda.CUDAGraph | None = None
        with torch.inference_mode(False):  # the buffers outlive a caller's inference mode, and are written after it
            eos = torch.full((room_for_end_tokens(run.eos),), -1, dtype=torch.int64, device=device)
            uniforms = None
            if run.uniforms is not None:
                uniforms = torch.zeros(batch, run.caches.slots + run.path, dtype=run.uniforms.dtype, device=device)
            drawn = not run.sampling.greedy and holds_sampling(run)
            sampling = run.sampling.on(device) if drawn else run.sampling
            self.run = replace(run, eos=eos, uniforms=uniforms, sampling=sampling)
            self.static = StaticState.like(self._idle_state())
            report = self.static.report
            self.ring = [torch.empty(report.shape, dtype=report.dtype, pin_memory=report.is_cuda) for _ in range(RING)]
            if capture:
                self._graph, _ = captured(self._body, device, pool, stream)
        self.seconds = time.perf_counter() - started

    @torch.no_grad()
    def prepare(self, run: Run) -> Run:
        """Take over a call's end tokens, uniforms and sampling. Returns the run to prefill with, at this step's
        addresses."""
        self.run.eos.fill_(-1)
        self.run.eos[: run.eos.numel()].copy_(run.eos)
        if self.run.uniforms is not None:
            rows = run.uniforms.shape[0]
            # a plain step draws fewer than a tree's path
            count = min(self.run.uniforms.shape[1], run.uniforms.shape[1])
            self.run.uniforms[:rows, :count].copy_(run.uniforms[:, :count])
        if self.run.sampling.held is not None:
            self.run.sampling.held.copy_(run.sampling.on(torch.device("cpu")).held)
        return replace(self.run, sampling=run.sampling)

    def replay(self) -> None:
        """Queue one step."""
        if self._graph is None:
            self._body()
        else:
            self._graph.replay()

    def _body(self) -> None:
        step(self.run, self.static.state, self.run.caches.slots, out=self.static.state)

    def _idle_state(self) -> DecodeState:
        """A state whose rows are all done, at the end of the caches: warming up there spoils no prefix."""
        run, device = self.run, self.run.target.device
        batch = run.caches.target.batch
        end = run.caches.slots - slots_beyond(run.shape, run.draft is not None, run.pad_rows)
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        features = None
        if run.draft is not None:
            config = run.draft.config
            dtype = run.target.feature_dtype
            features = torch.zeros(batch, run.path, config.feature_size, dtype=dtype, device=device)
        return DecodeState(
            kv_len=zeros + end,
            root=zeros.clone(),
            tokens=zeros[:, None].repeat(1, run.path),
            features=features,
            count=zeros.clone(),
            generated=zeros.clone(),
            budget=zeros.clone(),
            done=torch.ones(batch, dtype=torch.bool, device=device),
        )
