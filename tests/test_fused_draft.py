"""The fused head computes what `DraftModel` computes, with one-byte weights what it would with the rounded ones."""

from __future__ import annotations

import pytest
import torch
from test_no_host_reads import NoHostReads
from tiny import relative_error, tiny_draft, tiny_target

from eagle.engine.prefill import prefill
from eagle.engine.state import Caches, Run, slots_needed
from eagle.engine.step import step
from eagle.errors import InvalidInputError
from eagle.model.drafts import DraftCall, DraftModel
from eagle.model.fused_draft import FusedDraft
from eagle.model.fused_support import Unfusable
from eagle.model.fused_target import fuse_target
from eagle.model.fused_weights import WEIGHT_DTYPES
from eagle.model.ops import Sampling, TreeShape
from eagle.model.target import Target
from eagle.model.torch_ops import TORCH_OPS
from eagle.model.triton_kernels.quantize import dequantize_weight, quantize_weight

HEADS = {
    "eagle1": {"kind": "eagle1"},
    "eagle1-biased": {"kind": "eagle1", "fc_bias": True, "qkv_bias": True},
    "eagle2-deep": {"kind": "eagle1", "num_layers": 3},
    "eagle3": {},
    "eagle3-own-vocabulary": {"draft_vocab_size": 11},
    "eagle3-deep": {"num_layers": 2, "aux_layers": (0, 3)},
    "eagle3-residual-normed": {"norm_before_residual": True, "norm_before_fc": True},
    "eagle3.1": {"norm_output": True, "fc_norm": True},
    "eagle3.1-deep": {"norm_output": True, "num_layers": 2, "qkv_bias": True},
}


def attached(name: str, **target_options) -> tuple[Target, DraftModel]:
    """A random target and head in float64 (random layers magnify rounding); norms and biases are random too."""
    options = dict(HEADS[name])
    model = tiny_target(**target_options).double()
    draft = tiny_draft(model, options.pop("kind", "eagle3"), **options)
    target = Target(model, TORCH_OPS, draft.config.aux_layers)
    draft.attach(target)
    return target, draft


@torch.no_grad()
def walk(draft: DraftModel | FusedDraft, seed: int) -> list[torch.Tensor]:
    """What a head answers to an extend of two rows of different lengths and to two levels of a tree."""
    torch.manual_seed(seed)
    config = draft.config
    cache, start = draft.new_cache(2, 64), torch.tensor([0, 3])
    features, tokens = torch.randn(2, 6, config.feature_size).double(), torch.randint(17, (2, 6))
    positions = start[:, None] + torch.arange(6)
    call = DraftCall(TORCH_OPS, cache, start, start, None, positions, 64)
    hidden = draft(draft.fuse(features, TORCH_OPS), tokens, call)
    found = [hidden, draft.logits(hidden, TORCH_OPS)]
    kv_len, words = start + 6, torch.tensor([[[1], [2], [4]]]).expand(2, -1, -1)
    cos, sin = draft.rope(kv_len[:, None] + torch.arange(2))
    for level in range(2):
        rope = tuple(part[:, level : level + 1].expand(-1, 3, -1) for part in (cos, sin))
        at = (kv_len + level)[:, None].expand(-1, 3)
        call = DraftCall(TORCH_OPS, cache, kv_len + 3 * level, kv_len, words, at, 64, rope)
        rows = torch.randint(hidden.shape[1], (2, 3))
        hidden, logits = draft.expand(hidden, torch.randint(17, (2, 3)), call, rows)
        ids = torch.arange(logits.shape[-1]) if draft.target_ids is None else draft.target_ids
        found += [hidden, logits, ids]
        words = words | words << 3
    return found


@pytest.mark.parametrize("name", HEADS)
def test_fused_head_is_the_head(name: str) -> None:
    _, draft = attached(name)
    wanted = walk(draft, 1)
    fused = FusedDraft(draft)
    for got, want in zip(walk(fused, 1), wanted, strict=True):
        assert got.shape == want.shape
        assert relative_error(got, want) < 1e-12
    for got, want in zip(walk(draft, 1), wanted, strict=True):
        assert relative_error(got, want) < 1e-6, "the head itself must work as before"


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("name", HEADS)
def test_one_byte_weights_are_the_rounded_weights(name: str, dtype: str) -> None:
    target, draft = attached(name)
    before = {key: (p.data_ptr(), p.stride()) for key, p in draft.named_parameters()}
    fused = FusedDraft(draft, dtype)
    assert {key: (p.data_ptr(), p.stride()) for key, p in draft.named_parameters()} == before
    exact, got = walk(draft, 2), walk(fused, 2)
    weights = [module.weight for module in draft.modules() if isinstance(module, torch.nn.Linear)]
    if draft.lm_head is None:
        weights.append(target.model.lm_head.weight if draft.d2t is None else draft._shared_rows)
    for weight in weights:
        weight.data.copy_(dequantize_weight(quantize_weight(weight.data, WEIGHT_DTYPES[dtype]), torch.float32))
    for one, rounded, plain in zip(got, walk(draft, 2), exact, strict=True):
        assert relative_error(one, rounded) < 1e-5
        assert one.dtype == torch.int64 or relative_error(one, plain) > 1e-4, "nothing was rounded"


def test_packing_takes_no_memory_and_is_undone() -> None:
    _, draft = attached("eagle3.1-deep")

    def size() -> int:
        held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in draft.parameters()}
        return sum(held.values())

    before, values = size(), {key: p.clone() for key, p in draft.named_parameters()}
    fused = FusedDraft(draft)
    assert (size(), set(draft.state_dict())) == (before, {*values, *dict(draft.named_buffers())} - {"inv_freq"})
    assert fused.intact()
    fused.release()
    fused.release()
    assert size() == before
    assert all(p.is_contiguous() and torch.equal(p, values[key]) for key, p in draft.named_parameters())
    fused = FusedDraft(draft)
    draft.float()
    assert not fused.intact()


@pytest.mark.parametrize("dtype", [None, "int8", "fp8"])
@pytest.mark.parametrize("name", ["eagle1", "eagle3-own-vocabulary", "eagle3.1"])
def test_steps_commit_the_same_tokens(name: str, dtype: str | None) -> None:
    target, draft = attached(name)
    shape, found = TreeShape(30, 2, 5), []
    for head in (draft, FusedDraft(draft, dtype)):
        slots = slots_needed(80, shape, speculative=True)
        caches = Caches(target.new_cache(2, slots), head.new_cache(2, slots))
        eos = torch.empty(0, dtype=torch.int64)
        run = Run(target, head, TORCH_OPS, shape, Sampling(), caches, eos, None)
        state = prefill(run, [[3, 4, 5], [7, 8, 9, 10, 11]], budgets=[60, 60])
        rows: list[list[int]] = [[], []]
        counts = []
        for _ in range(12):
            state = step(run, state, 80)
            counts.append(state.count.tolist())
            for row, tokens, count in zip(rows, state.tokens.tolist(), counts[-1], strict=True):
                row += tokens[:count]
        found.append((rows, counts))
    (wanted, wanted_counts), (got, counts) = found
    least = [min(len(one), len(two)) for one, two in zip(wanted, got, strict=True)]
    assert [row[:n] for row, n in zip(got, least, strict=True)] == [
        row[:n] for row, n in zip(wanted, least, strict=True)
    ]
    if dtype is None:
        assert counts == wanted_counts


@pytest.mark.parametrize("name", ["eagle1", "eagle3-own-vocabulary"])
def test_fused_steps_read_nothing_on_the_host(name: str) -> None:
    target, draft = attached(name)
    fuse_target(target)
    head, shape, slots = FusedDraft(draft), TreeShape(12, 1, 4), 64
    caches = Caches(target.new_cache(2, slots), head.new_cache(2, slots))
    run = Run(target, head, TORCH_OPS, shape, Sampling(), caches, torch.tensor([16]), None)
    state = prefill(run, [[3, 4, 5], [6]], budgets=[30] * 2)
    with NoHostReads():
        step(run, step(run, state, 10), 20)


def test_what_is_refused() -> None:
    _, draft = attached("eagle3")
    with pytest.raises(InvalidInputError, match="int4"):
        FusedDraft(draft, "int4")
    model = tiny_target()
    other = tiny_draft(model, hidden_act="gelu")
    other.attach(Target(model, TORCH_OPS, other.config.aux_layers))
    with pytest.raises(Unfusable, match="gelu"):
        FusedDraft(other)
