"""The fused routes with Triton's ops, in its interpreter where there is no GPU: tiny sizes, float32."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from tiny import relative_error, tiny_draft, tiny_target
from transformers import Qwen3Config

from eagle.model.drafts import DraftCall
from eagle.model.fused_draft import FusedDraft
from eagle.model.fused_target import FusedTarget
from eagle.model.ops import Ops
from eagle.model.target import Target
from eagle.model.torch_ops import TORCH_OPS
from eagle.model.triton_kernels.dispatch import choose_ops, decoding_ops
from eagle.model.triton_kernels.hardware import hardware
from eagle.model.triton_kernels.selection import Plan

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {"vocab_size": 17, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 16}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
WORDS = [[1], [3], [5], [11], [21]]
DEPTHS = [0, 1, 1, 2, 2]


@pytest.fixture
def kernels(monkeypatch) -> Ops:
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    ops, _ = choose_ops(Plan(hardware(DEVICE), torch.float32, "triton"))
    return decoding_ops(ops)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_target_with_kernels(family: str, kernels: Ops) -> None:
    config = None if family == "llama" else Qwen3Config(**SIZES, bos_token_id=1, eos_token_id=None, pad_token_id=None)
    model = tiny_target(config, **({} if config else SIZES)).to(DEVICE)
    target = Target(model, TORCH_OPS, (0, 2))
    tokens, lengths = torch.randint(17, (2, 7), device=DEVICE), torch.tensor([7, 4], device=DEVICE)
    tree = {"depths": torch.tensor([DEPTHS] * 2, device=DEVICE), "tree_words": torch.tensor([WORDS] * 2, device=DEVICE)}
    nodes, found = torch.randint(17, (2, 5), device=DEVICE), []
    for ops, fused in ((TORCH_OPS, None), (kernels, FusedTarget(target))):
        target.fused, cache = fused, target.new_cache(2, 16)
        found.append([*target.forward(tokens, cache, lengths * 0, logits_to_keep=1, ops=ops)])
        found[-1] += target.forward(nodes, cache, lengths, **tree, ops=ops)
    for got, want in zip(found[1], found[0], strict=True):
        assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize(
    "options", [{"kind": "eagle1"}, {"draft_vocab_size": 11, "norm_before_residual": True}], ids=str
)
def test_draft_with_kernels(options: dict, dtype: str | None, kernels: Ops) -> None:
    options = dict(options)
    model = tiny_target(**SIZES).to(DEVICE)
    draft = tiny_draft(model, options.pop("kind", "eagle3"), head_dim=16, **options)
    draft.attach(Target(model, TORCH_OPS, draft.config.aux_layers))
    tokens, start = torch.randint(17, (2, 4), device=DEVICE), torch.tensor([0, 2], device=DEVICE)
    features, found = torch.randn(2, 4, draft.config.feature_size, device=DEVICE), []
    fused = FusedDraft(draft, dtype)
    for ops, head in ((TORCH_OPS, draft if dtype is None else fused), (kernels, fused)):
        cache = head.new_cache(2, 16)
        rope = tuple(part[:, :1].expand(-1, 4, -1) for part in head.rope(start[:, None]))
        call = DraftCall(ops, cache, start, start, None, start[:, None].expand(-1, 4), 16, rope)
        hidden = head(head.fuse(features, ops), tokens, call)
        found.append((hidden, head.logits(hidden, ops)))
    for got, want in zip(found[1], found[0], strict=True):
        assert relative_error(got, want) < 1e-5
