"""A random pair, as folders, that is small enough to be widened in a test, and a shape for it."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import tiny_draft_config, tiny_target
from tiny_folder import byte_tokenizer

from eagle.model.checkpoints import random_draft, save_draft
from eagle.model.embedded import MANIFEST
from eagle.model.widened import SmallPair

NAME = "EAGLE-3B"
"""The preset whose sizes the tests replace."""
WIDE_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_heads": 12,
    "num_kv_heads": 3,
    "head_dim": 16,
    "num_layers": 8,
    "vocab_size": 300,
    "draft_intermediate_size": 44,
    "draft_vocab_size": 80,
    "aux_layers": (2, 4, 5),
}


def save_small_pair(folder: Path, context: int = 512) -> SmallPair:
    """Write ``folder/target``, in bfloat16 and tied, and ``folder/head`` without an lm_head, as the real pair is."""
    words = byte_tokenizer()
    target = tiny_target(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=6,
        head_dim=8,
        eos_token_id=words.eos_token_id,
        bos_token_id=0,
        rms_norm_eps=1e-5,
        max_position_embeddings=context,
        tie_word_embeddings=True,
    ).to(torch.bfloat16)
    target.save_pretrained(folder / "target")
    words.save_pretrained(folder / "target")
    (folder / "target" / MANIFEST).write_text("{}")
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    state = random_draft(tiny_draft_config(target, draft_vocab_size=60, rms_norm_eps=1e-5, **heads), seed=1)
    del state.tensors["lm_head.weight"]
    state.tensors = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in state.tensors.items()
    }
    save_draft(state, folder / "head")
    return SmallPair(folder / "target", folder / "head")
