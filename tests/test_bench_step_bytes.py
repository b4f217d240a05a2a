"""The bytes of a step, against sums written out by hand."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_draft, tiny_eagle, tiny_target

from eagle.bench.step_bytes import step_bytes, tensor_bytes
from eagle.model.ea_model import EaModel
from eagle.model.triton_kernels import optimize_eagle_with_triton

H, MLP, V, LAYERS, Q, KV = 16, 24, 17, 4, 16, 8  # tiny_target's sizes
LAYER = 2 * H + 2 * H * Q + 2 * H * KV + 3 * H * MLP
CACHE = LAYERS * 2 * KV  # values a position


@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_step_reads_layers_norm_and_head(tied):
    model = tiny_eagle(tie_word_embeddings=tied)
    found = step_bytes(model, speculative=False, positions=10, batch=3)
    assert found.target_weights == 4 * (LAYERS * LAYER + H + V * H)
    assert found.target_kv == 4 * 3 * 10 * CACHE
    assert found.draft_weights == found.draft_kv == found.draft_passes == 0
    assert found.total == found.target_weights + found.target_kv


def draft_layer(inner: int, wide: int) -> int:
    """Values of one draft layer without norms: 2 heads of 8, one of keys and values, MLP of 20."""
    return wide * (16 + 8 + 8) + 16 * inner + 3 * inner * 20


def test_eagle3_fuses_once_and_runs_its_layer_in_each_pass():
    model = tiny_eagle(total_token=20, depth=3, top_k=4)
    found = step_bytes(model, positions=7)
    assert found.draft_passes == 4
    assert found.draft_weights_once == 4 * 3 * H * H
    shared_head = V * H
    norms = 3 * H + H  # of its layer, and its last
    assert found.draft_weights_pass == 4 * (draft_layer(H, 2 * H) + norms + shared_head)
    assert found.draft_kv == 4 * 4 * 7 * 2 * 8
    assert found.total == found.target_weights + found.draft_weights + found.target_kv + found.draft_kv
    model.set_tree(20, 5, 4)
    assert step_bytes(model, positions=7).draft_weights == found.draft_weights + 2 * found.draft_weights_pass


def test_eagle1_joins_in_each_pass():
    target = tiny_target()
    found = step_bytes(EaModel(target, tiny_draft(target, "eagle1"), total_token=8, depth=2, top_k=3))
    assert found.draft_weights_once == 0
    assert found.draft_weights_pass >= 4 * (2 * H * H + draft_layer(H, H) + V * H)


def test_a_smaller_draft_vocabulary_reads_fewer_rows():
    target = tiny_target(vocab_size=40)
    sizes = {}
    for vocab in (10, 40):
        draft = tiny_draft(target, draft_vocab_size=vocab)
        sizes[vocab] = step_bytes(EaModel(target, draft, total_token=8, depth=2, top_k=3)).draft_weights_pass
    assert sizes[40] - sizes[10] == 4 * 30 * H


def test_half_the_width_half_the_bytes():
    target = tiny_target()
    wide = step_bytes(EaModel(target, tiny_draft(target), total_token=8, depth=2, top_k=3), positions=5)
    target = tiny_target().to(torch.bfloat16)
    narrow = step_bytes(EaModel(target, tiny_draft(target), total_token=8, depth=2, top_k=3), positions=5)
    assert narrow.total * 2 == wide.total


@pytest.mark.parametrize("tied", [False, True])
def test_one_byte_copies_count_with_their_scales(tied):
    model = tiny_eagle(total_token=20, depth=3, top_k=4, tie_word_embeddings=tied)
    optimize_eagle_with_triton(model, fused="on", target_dtype="int8", draft_dtype="int8")
    found = step_bytes(model, positions=7)
    norms, values = 4 * 2 * H, LAYER - 2 * H
    scales = 4 * (Q + 2 * KV + H + 2 * MLP + H)  # a float32 for each row of qkv, o, gate and up, down
    assert found.target_weights == LAYERS * (norms + values + scales) + 4 * H + V * H + 4 * V
    assert found.draft_weights_once == 3 * H * H + 4 * H
    scales = 4 * (16 + 8 + 8 + H + 2 * 20 + H)
    assert found.draft_weights_pass == draft_layer(H, 2 * H) + scales + 4 * (3 * H + H) + V * H + 4 * V
    restored = step_bytes(tiny_eagle(total_token=20, depth=3, top_k=4, tie_word_embeddings=tied), positions=7)
    assert (found.target_kv, found.draft_kv) == (restored.target_kv, restored.draft_kv)


def test_packed_weights_count_as_their_parts():
    model = tiny_eagle()
    before = step_bytes(model, positions=7)
    optimize_eagle_with_triton(model, fused="on")
    assert model.target.fused is not None
    assert step_bytes(model, positions=7) == before


def test_shared_memory_counts_once():
    tensor = torch.zeros(5, 3)
    assert tensor_bytes([tensor, tensor, tensor.view(15)]) == 60
    assert tensor_bytes([tensor, torch.zeros(2, dtype=torch.int8)]) == 62
