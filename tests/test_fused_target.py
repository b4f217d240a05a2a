"""The fused route computes what the general one computes, in the memory of the model's own weights."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import relative_error, tiny_draft, tiny_target
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from eagle.model.ea_model import EaModel
from eagle.model.fused_support import Unfusable
from eagle.model.fused_target import FusedTarget, fuse_target
from eagle.model.target import Target
from eagle.model.torch_ops import TORCH_OPS

IDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": None}
SIZES = {"vocab_size": 29, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 4, **IDS}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied-biased": LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-llama3-rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama-yarn": LlamaConfig(**SIZES, rope_parameters=YARN),
    "mistral-sliding": MistralConfig(**SIZES, sliding_window=11, head_dim=16),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-half-sliding": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=11, max_window_layers=2),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
}
STREAMS = [(), (0, 2, 4), (3,)]


def random_model(name: str) -> PreTrainedModel:
    """Every parameter random, so that a forgotten bias or norm shows."""
    model = tiny_target(copy.deepcopy(MODELS[name]), spread=3.0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.copy_(0.5 + torch.rand(parameter.shape))
    return model


def random_tree(batch: int, nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Depths [B, N] and words [B, N, 2] of random trees."""
    depths = torch.zeros(batch, nodes, dtype=torch.int64)
    words = torch.zeros(batch, nodes, 2, dtype=torch.int64)
    words[:, 0, 0] = 1
    for row in range(batch):
        for node in range(1, nodes):
            parent = int(torch.randint(node, ()))
            depths[row, node] = depths[row, parent] + 1
            words[row, node] = words[row, parent]
            words[row, node, node // 64] |= 1 << (node % 64)
    return depths, words


def passes(target: Target, seed: int) -> list[torch.Tensor]:
    """Logits and features of a prefill of two rows, a tree each, and a causal chunk that follows."""
    torch.manual_seed(seed)
    cache = target.new_cache(2, 192)
    zero, lengths = torch.zeros(2, dtype=torch.int64), torch.tensor([23, 9])
    found = [*target.forward(torch.randint(29, (2, 23)), cache, zero, slots=64, logits_to_keep=torch.tensor([8, 22]))]
    depths, words = random_tree(2, 70)
    found += target.forward(torch.randint(29, (2, 70)), cache, lengths, depths=depths, tree_words=words, slots=128)
    found += target.forward(torch.randint(29, (2, 5)), cache, lengths, logits_to_keep=1)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_features_are_the_general_routes(name: str) -> None:
    model = random_model(name)
    for seed, streams in enumerate(STREAMS):
        target = Target(model, TORCH_OPS, streams)
        wanted = passes(target, seed)
        target.fused = FusedTarget(target)
        for got, want in zip(passes(target, seed), wanted, strict=True):
            assert got.shape == want.shape
            assert relative_error(got, want) < 1e-5
        target.unfuse()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_the_models_own(name: str) -> None:
    model = random_model(name)
    eagle = EaModel(model, tiny_draft(model), total_token=40, depth=2, top_k=8)
    ids = torch.randint(29, (1, 21))
    mask = torch.ones_like(ids)
    wanted = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=40, pad_token_id=0)
    fuse_target(eagle.target)
    assert torch.equal(eagle.generate(ids, max_new_tokens=40), wanted)
    assert torch.equal(eagle.generate(ids, max_new_tokens=40, speculative=False), wanted)
    again = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=40, pad_token_id=0)
    assert torch.equal(again, wanted), "the model's own generate must work as before"


def test_nodes_beyond_the_context_are_harmless() -> None:
    model = tiny_target(max_position_embeddings=48)
    target = Target(model, TORCH_OPS)
    prompt, (depths, words) = torch.randint(17, (1, 40)), random_tree(1, 60)
    nodes = torch.randint(17, (1, 60))
    found = []
    for _ in range(2):
        cache, length = target.new_cache(1, 128), torch.tensor([40])
        target.forward(prompt, cache, torch.tensor([0]))
        found.append(target.forward(nodes, cache, length, depths=depths, tree_words=words)[0])
        fuse_target(target)
    assert relative_error(found[1], found[0]) < 1e-5


def storages(model: nn.Module) -> dict[int, int]:
    """Bytes of every distinct storage behind the parameters."""
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_packing_takes_no_memory_and_is_undone(name: str) -> None:
    model, ids = random_model(name), torch.randint(29, (2, 7))
    before, size = {key: p.clone() for key, p in model.named_parameters()}, sum(storages(model).values())
    parameters = {key: id(p) for key, p in model.named_parameters()}
    logits = model(ids).logits
    target = Target(model, TORCH_OPS)
    fused = fuse_target(target)
    assert fuse_target(target) is fused
    assert sum(storages(model).values()) == size
    assert len(storages(model)) < len(before)
    assert relative_error(model(ids).logits, logits) < 1e-6
    target.unfuse()
    target.unfuse()
    assert sum(storages(model).values()) == size
    assert {key: id(p) for key, p in model.named_parameters()} == parameters
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key])
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4
    assert torch.equal(model(ids).logits, logits)


def test_weights_edited_in_place_count() -> None:
    model = tiny_target()
    target = Target(model, TORCH_OPS)
    fused = fuse_target(target)
    tokens, zero = torch.randint(17, (1, 9)), torch.zeros(1, dtype=torch.int64)
    other = tiny_target()
    model.load_state_dict(other.state_dict())
    assert fused.intact()
    logits, _ = target.forward(tokens, target.new_cache(1, 64), zero)
    assert relative_error(logits, other(tokens).logits) < 1e-5


@pytest.mark.parametrize("change", ["cast", "assign"])
def test_weights_put_elsewhere_are_noticed(change: str) -> None:
    model = tiny_target()
    target = Target(model, TORCH_OPS)
    fused = fuse_target(target)
    assert fused.intact()
    if change == "cast":
        model.double()
    else:
        model.load_state_dict({key: t.clone() for key, t in model.state_dict().items()}, assign=True)
    assert not fused.intact()
    wanted = {key: p.clone() for key, p in model.named_parameters()}
    if change == "assign":
        again = fuse_target(target)
        assert again is not fused
        assert again.intact()
    target.unfuse()
    assert all(torch.equal(p, wanted[key]) for key, p in model.named_parameters())


def test_two_targets_share_one_packing() -> None:
    model, ids = tiny_target(), torch.randint(17, (1, 5))
    logits = model(ids).logits
    first, second = (Target(model, TORCH_OPS, streams) for streams in ((), (1, 2)))
    packed = [fuse_target(target).layers[0].qkv.weight.data_ptr() for target in (first, second)]
    assert packed[0] == packed[1]
    first.unfuse()
    assert second.fused is not None
    assert second.fused.intact()
    zero = torch.zeros(1, dtype=torch.int64)
    assert relative_error(second.forward(ids, second.new_cache(1, 64), zero)[0], logits) < 1e-5
    second.unfuse()
    assert model.model.layers[0].mlp.gate_proj.weight.is_contiguous()


def test_a_fused_model_can_be_saved_and_copied(tmp_path) -> None:
    model = random_model("llama-tied-biased")
    fuse_target(Target(model, TORCH_OPS))
    model.save_pretrained(tmp_path)
    for other in (AutoModelForCausalLM.from_pretrained(tmp_path), copy.deepcopy(model)):
        for (key, one), (_, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(one, two), key
    assert set(model.state_dict()) == set(random_model("llama-tied-biased").state_dict())


class OtherLinear(nn.Linear):
    """A subclass, as adapters and quantisers put in a linear's place."""


def change_linear(model: PreTrainedModel) -> None:
    old = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = OtherLinear(old.in_features, old.out_features, bias=False)


def change_norm(model: PreTrainedModel) -> None:
    model.model.layers[0].input_layernorm = nn.RMSNorm(model.config.hidden_size)


def change_forward(model: PreTrainedModel) -> None:
    mlp = model.model.layers[2].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x)


def add_hook(model: PreTrainedModel) -> None:
    model.model.layers[2].mlp.register_forward_hook(lambda *_: None)


def mix_dtypes(model: PreTrainedModel) -> None:
    model.model.norm.double()


def drop_a_bias(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.k_proj.bias = None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_linear, r"layers\.1\.mlp\.up_proj is a .*OtherLinear"),
        (change_norm, r"layers\.0\.input_layernorm is a torch"),
        (change_forward, r"layers\.2\.mlp has a forward of its own"),
        (add_hook, r"layers\.2\.mlp has a forward hook"),
        (mix_dtypes, "one dtype"),
        (drop_a_bias, "some have none"),
    ],
)
def test_a_changed_model_is_refused_and_left_alone(change, words: str) -> None:
    model = random_model("llama-tied-biased")
    target = Target(model, TORCH_OPS)
    change(model)
    before = {key: p.data_ptr() for key, p in model.named_parameters()}
    with pytest.raises(Unfusable, match=words):
        fuse_target(target)
    assert target.fused is None
    assert {key: p.data_ptr() for key, p in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GemmaConfig(**SIZES, head_dim=16), "GemmaForCausalLM"),
        (Phi3Config(**SIZES), "Phi3ForCausalLM"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "gelu"),
        (LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "dynamic"),
    ],
)
def test_other_models_are_refused(config, words: str) -> None:
    with pytest.raises(Unfusable, match=words):
        fuse_target(Target(tiny_target(config), TORCH_OPS))


def test_transformers_own_recording_hooks_are_no_obstacle() -> None:
    model, ids = tiny_target(), torch.randint(17, (1, 5))
    model(ids, output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules()), "transformers leaves none: drop the exception"
    fuse_target(Target(model, TORCH_OPS))
