"""EaModel: the public class. It composes target, draft, ops and engine, and holds no maths."""

from __future__ import annotations

import inspect
import operator
import time
import warnings
from collections.abc import Generator, Iterable
from contextlib import closing
from numbers import Integral
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eagle.engine.loop import GenerationStats
from eagle.engine.session import Call, Session
from eagle.engine.stop import StopStrings, until_stopped
from eagle.errors import InvalidInputError
from eagle.model.drafts import DraftModel
from eagle.model.engine_control import EngineControl
from eagle.model.fingerprint import Fingerprint
from eagle.model.inputs import (
    as_batch,
    asked_sampling,
    check_token,
    check_tree,
    padding_mask,
    token_budgets,
    token_rows,
)
from eagle.model.loading import check_settings, check_widened, ignored_settings, load_pair, load_tokenizer
from eagle.model.locate import locate, no_head
from eagle.model.ops import Ops, Sampling
from eagle.model.reference_api import ReferenceMethods
from eagle.model.switch import Switch
from eagle.model.target import Target
from eagle.model.torch_ops import TORCH_OPS
from eagle.model.triton_kernels.dispatch import largest_heads, report
from eagle.model.triton_kernels.selection import Choice, Plan

DEFAULT_NEW_TOKENS = 512


class EaModel(EngineControl, ReferenceMethods):
    """A Hugging Face causal LM that generates by EAGLE speculative decoding, with its own output unchanged.

    Build it with `from_pretrained`, or from parts: ``EaModel(base_model, draft, tokenizer)``.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        draft: DraftModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        total_token: int = 60,
        depth: int = 7,
        top_k: int = 10,
        threshold: float = 1.0,
        ops: Ops = TORCH_OPS,
    ) -> None:
        if not 0.0 < threshold <= 1.0:
            raise InvalidInputError(f"threshold is {threshold}; expected a number above 0 and at most 1")
        self.base_model = base_model.eval()
        self.tokenizer = tokenizer
        self.target = Target(base_model, ops, draft.config.aux_layers)
        self.ea_layer = draft.eval()
        self.ea_layer.attach(self.target)
        self.threshold = threshold
        self.draft_notes: list[str] = []
        self.kernel_plan: Plan | None = None
        self.last_stats: GenerationStats | None = None
        """The figures of the call made last, by whichever thread, also where it waits for its turn; complete when its
        iterator has ended."""
        self._session = Session(self.target, self.ea_layer)
        self._unfusable: str | None = None
        self._seen: Fingerprint | None = None
        self.switches: list[Switch] = []
        self.set_tree(2 if total_token == -1 else total_token, depth, top_k)
        if total_token == -1:
            self.set_tree(self._fastest_total_token(), depth, top_k)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | None = None,
        *,
        base_model_path: str | None = None,
        ea_model_path: str | None = None,
        use_eagle3: bool | None = None,
        total_token: int = 60,
        depth: int = 7,
        top_k: int = 10,
        threshold: float = 1.0,
        in_memory: bool = False,
        **hf_kwargs: Any,
    ) -> EaModel:
        """Load a target and its head.

        name_or_path: a name from the registry (`eagle.model.presets`), a folder or a hub id; ``base_model_path`` is the
        reference's name for the last two. ea_model_path: the head's folder or hub id, "random" for an untrained one, or
        None for the registry's. use_eagle3: which kind the head must be, or None to accept what it is. total_token: -1
        measures which size is fastest here. threshold: the reference takes and never reads it; it is checked and kept.
        in_memory: build EAGLE-3B or EAGLE-8B in (GPU) memory instead of in the cache folder first.
        hf_kwargs go to transformers' ``from_pretrained``; dtype defaults to float32 on a CPU and to the checkpoint's
        own on a GPU, where the model is put if there is one.

        Raises ModelNotFoundError, DownloadError, CheckpointError, UnsupportedModelError, InvalidInputError or, before
        weights are read that can't fit, OutOfMemoryError.
        """
        check_settings(hf_kwargs, inspect.signature(cls.from_pretrained).parameters.values())
        check_tree(2 if total_token == -1 else total_token, depth, top_k, None)
        location = locate(
            name_or_path,
            ea_model_path,
            base_model_path=base_model_path,
            revision=hf_kwargs.get("revision"),
            in_memory=in_memory,
            before_build=lambda name, small: check_widened(name, small, hf_kwargs),
        )
        if location.draft is None:
            raise no_head(location.base)
        base_model, draft, notes = load_pair(location, use_eagle3, hf_kwargs)
        tree = {"total_token": total_token, "depth": depth, "top_k": top_k, "threshold": threshold}
        model = cls(base_model, draft, load_tokenizer(location.base, hf_kwargs), **tree)
        model.draft_notes = notes
        if ignored := ignored_settings(base_model):
            warnings.warn(
                f"the model's generation config asks for {', '.join(ignored)}, which is not applied here", stacklevel=2
            )
        return model

    def get_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The target's tokenizer."""
        return self.tokenizer

    def eval(self) -> EaModel:
        """Does nothing, as both parts always are in evaluation mode; the reference's users call it."""
        return self

    @property
    def config(self) -> Any:
        return self.base_model.config

    @property
    def device(self) -> torch.device:
        return self.target.device

    @property
    def ops(self) -> Ops:
        """The table of functions that serves target and draft. Set it between generations."""
        return self.target.ops

    @ops.setter
    def ops(self, ops: Ops) -> None:
        self.target.ops = ops

    def kernel_report(self) -> list[Choice]:
        """Which implementation serves each op with the present tree, and why, and how a step runs. ``str`` of an entry is
        a line of text."""
        draft, tree = self.ea_layer.config, self.tree_shape
        layers = [*self.target.layer_shapes, *self.ea_layer.layer_shapes]
        sizes = {
            **largest_heads(layers),
            "width": max(draft.hidden_size, draft.feature_size),
            "top_k": tree.top_k,
            "candidates": tree.candidates,
            "nodes": tree.total_token,
            "path": tree.path,
            "one_byte": int(self.engine.draft_dtype is not None or self.engine.target_dtype is not None),
        }
        steps, fused = Choice("step", *self._session.engine_choice()), self.target.fused
        route = (
            ("fused", "a Llama-like target" + (f", its weights as {fused.dtype}" if fused.dtype else ""))
            if fused is not None
            else ("modules", self._unfusable or "as loaded")
        )
        target = Choice("target", *route)
        return [*report(self.ops, self.kernel_plan, sizes), steps, target]

    def set_tree(self, total_token: int, depth: int, top_k: int) -> None:
        """Change the draft tree's shape for later calls. Raises InvalidInputError for one that can't be built."""
        self.tree_shape = check_tree(total_token, depth, top_k, self.ea_layer.config.draft_vocab_size)

    def stream(
        self,
        input_ids: Any,
        *,
        attention_mask: Any = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        sampling: Sampling | None = None,
        eos_token_id: int | Iterable[int] | None = None,
        stop_strings: str | Iterable[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        speculative: bool = True,
        reuse_prefix: bool = False,
        stats: GenerationStats | None = None,
    ) -> Generator[list[list[int]], None, None]:
        """Generate, yielding each step's new tokens as one list for each row.

        Arguments are checked at the call, before the first step. `last_stats` are this call's figures until another call
        is made, and complete when the iterator ends. stop_strings: a row ends with the token that completes one of them, as
        ``tokenizer`` reads it, the model's own unless given.
        reuse_prefix: keep what the caches already hold of this prompt (one sequence; a growing chat). stats: takes this
        call's figures, where another thread's call may be the one that `last_stats` tells of. Closing the iterator early
        leaves the model usable.
        """
        sampling = sampling or Sampling()
        prompts = token_rows(input_ids, attention_mask, self.target.spec.vocab_size)
        lengths, context = [len(prompt) for prompt in prompts], self.target.context_length
        width = None if attention_mask is None else torch.as_tensor(attention_mask).shape[-1]
        budgets = token_budgets(lengths, context, max_new_tokens, max_length, DEFAULT_NEW_TOKENS, width)
        eos = torch.tensor(sorted(self._eos_ids(eos_token_id)), dtype=torch.int64, device=self.device)
        uniforms = None
        if not sampling.greedy:
            uniforms = _uniforms(len(prompts), max(budgets) + self.tree_shape.path, generator, seed).to(self.device)
        stats = GenerationStats() if stats is None else stats
        self.last_stats = stats
        reads = self.tokenizer if tokenizer is None else tokenizer
        stops = None if stop_strings is None else StopStrings(reads, stop_strings)
        call = Call(prompts, budgets, self.tree_shape, sampling, eos, uniforms, speculative, reuse_prefix)
        steps = self._session.run(call, stats, self._refresh)
        return steps if stops is None else until_stopped(steps, stops, len(prompts), stats)

    def generate(
        self,
        input_ids: Any,
        *,
        attention_mask: Any = None,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
        eos_token_id: int | Iterable[int] | None = None,
        pad_token_id: int | None = None,
        stop_strings: str | Iterable[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        streamer: Any = None,
        speculative: bool = True,
    ) -> torch.Tensor:
        """Generate as transformers' ``generate`` does: prompt and new tokens, [B, T + new], int64.

        input_ids: [B, T] or [T], with ``attention_mask`` if rows are padded, on either side; without it, padding is found
        where the padding token ends no text. Rows that end early are filled with ``pad_token_id``. A
        temperature above 0 samples, no temperature and do_sample=False are greedy, do_sample=True without a temperature
        samples at 1; top_k cuts before top_p. Output ends at an end token (the generation config's unless given) and never
        exceeds max_new_tokens, max_length (prompt included) or the model's context; with neither limit, at most 512 new
        tokens. A row also ends with the token that completes one of stop_strings, read by ``tokenizer``, the model's own
        unless given. streamer: an object with ``put`` and ``end``, one sequence. speculative=False is plain decoding on the
        same path. Raises InvalidInputError.
        """
        prompt = as_batch(input_ids)
        sampling = asked_sampling(do_sample, temperature, top_p, top_k)
        eos = self._eos_ids(eos_token_id)
        pad = check_token("pad_token_id", pad_token_id)
        if attention_mask is None:
            known = self._known_pad_id() if pad is None else pad
            attention_mask = padding_mask(prompt, known, eos, self._bos_ids())
        steps = self.stream(
            prompt,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            sampling=sampling,
            eos_token_id=eos,
            stop_strings=stop_strings,
            generator=generator,
            seed=seed,
            tokenizer=tokenizer,
            speculative=speculative,
        )
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise InvalidInputError(f"streamer is {streamer!r}; expected an object with 'put' and 'end', or None")
        if streamer is not None and prompt.shape[0] != 1:
            raise InvalidInputError(f"a streamer takes one sequence, got a batch of {prompt.shape[0]}; leave it out")
        if streamer is not None:
            streamer.put(prompt[0].cpu())
        rows: list[list[int]] = [[] for _ in range(prompt.shape[0])]
        with closing(steps):  # a streamer's exception must not leave the generation open
            for new in steps:
                for row, tokens in zip(rows, new, strict=True):
                    row += tokens
                if streamer is not None and new[0]:
                    streamer.put(torch.tensor(new[0]))
        if streamer is not None:
            streamer.end()
        pad = self._pad_id(eos) if pad is None else pad
        longest = max(map(len, rows))
        added = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=prompt.device)
        return torch.cat((prompt, added), dim=1)

    def _fastest_total_token(self) -> int:
        """The reference's choice for total_token=-1: the tree whose target pass is cheapest for what it yields.

        The gains are the reference's estimates of the relative accept length at each size.
        """
        gains = {40: 1.0, 48: 1.05, 50: 1.07, 56: 1.1, 60: 1.13}
        allowed = {size: gain for size, gain in gains.items() if size - 1 <= self.tree_shape.candidates}
        if not allowed:
            return self.tree_shape.candidates + 1
        cache = self.target.new_cache(1, 256)
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        cost = {}
        for size, gain in allowed.items():
            tokens = torch.randint(self.target.spec.vocab_size, (1, size), device=self.device)
            times = []
            for _ in range(6):  # the first is a warm-up
                started = time.perf_counter()
                self.target.forward(tokens, cache, zero)[0][0, 0, 0].item()
                times.append(time.perf_counter() - started)
            cost[size] = sorted(times[1:])[2] / gain
        return min(cost, key=cost.__getitem__)

    def _eos_ids(self, given: int | Iterable[int] | None) -> set[int]:
        if given is None:
            given = next((found for found in self._configured("eos_token_id") if found is not None), ())
        if isinstance(given, torch.Tensor):
            given = given.flatten().tolist()
        try:
            return {operator.index(token) for token in ([given] if isinstance(given, int) else given)}
        except TypeError as error:
            raise InvalidInputError(f"eos_token_id is {given!r}; expected a token id or several") from error

    def _bos_ids(self) -> set[int]:
        return {token for token in self._configured("bos_token_id") if isinstance(token, int)}

    def _known_pad_id(self) -> int | None:
        return next((pad for pad in self._configured("pad_token_id") if isinstance(pad, int) and pad >= 0), None)

    def _configured(self, name: str) -> list[Any]:
        return [getattr(owner, name, None) for owner in (self.base_model.generation_config, self.target.config)]

    def _pad_id(self, eos: set[int]) -> int:
        known = self._known_pad_id()
        return min(eos, default=0) if known is None else known


def _uniforms(batch: int, count: int, generator: torch.Generator | None, seed: int | None) -> torch.Tensor:
    """Uniform numbers [B, count], one for each output position. Drawn on the generator's device, a CPU unless the caller
    brings another, so that one seed gives one text wherever the model runs."""
    if generator is not None and seed is not None:
        raise InvalidInputError("both generator and seed were given; pass one of them")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InvalidInputError(f"generator is {generator!r}; expected a torch.Generator or None")
    if seed is not None:
        if not isinstance(seed, Integral) or not -(1 << 63) <= seed < 1 << 64:
            raise InvalidInputError(f"seed is {seed!r}; expected a whole number of at most 64 bits")
        generator = torch.Generator().manual_seed(int(seed))
    device = generator.device if generator is not None else torch.device("cpu")
    # Position by position, so that a longer limit or another tree leaves the numbers before it as they were.
    return torch.rand(count, batch, generator=generator, dtype=torch.float32, device=device).T.contiguous()
