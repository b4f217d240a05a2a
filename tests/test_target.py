"""Any Hugging Face causal LM as the target: EAGLE's greedy output is the model's own, the features are the right ones,
and what cannot be driven is refused."""

from __future__ import annotations

import threading

import pytest
import torch
from tiny import tiny_draft, tiny_target
from torch import nn
from transformers import (
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from eagle.errors import UnsupportedModelError
from eagle.model.ea_model import EaModel
from eagle.model.target import Target
from eagle.model.target_support import cache_argument, check_config
from eagle.model.torch_ops import TORCH_OPS

IDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": None}
SIZES = {"vocab_size": 29, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, **IDS}
SIZES |= {"max_position_embeddings": 256}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
SLIDING = {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 2}
FAMILIES = {
    "llama": LlamaConfig(**GATED),
    "llama3-rope": LlamaConfig(
        **GATED,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": MistralConfig(**GATED, sliding_window=11, head_dim=8),
    "qwen2": Qwen2Config(**GATED, **SLIDING),
    "qwen3": Qwen3Config(**GATED, head_dim=16),
    "gemma": GemmaConfig(**GATED, head_dim=16),
    "gemma2": Gemma2Config(**GATED, head_dim=16, sliding_window=11),
    "gemma3": Gemma3TextConfig(**GATED, head_dim=16, sliding_window=11),
    "mixtral": MixtralConfig(**GATED, num_local_experts=4),
    "phi": PhiConfig(**SIZES, intermediate_size=48),
    "phi3": Phi3Config(**GATED, sliding_window=11),
    "gpt-neox": GPTNeoXConfig(**SIZES, intermediate_size=48),
    "gpt2": GPT2Config(vocab_size=29, n_embd=32, n_head=4, n_layer=4, n_positions=256, **IDS),
}


def own_greedy(model, ids: torch.Tensor, new: int) -> torch.Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, pad_token_id=0)


@pytest.mark.parametrize("kind", ["eagle3", "eagle1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_is_the_models_own(family: str, kind: str) -> None:
    model = tiny_target(FAMILIES[family], spread=3.0)
    eagle = EaModel(model, tiny_draft(model, kind), total_token=40, depth=2, top_k=8)
    ids = torch.randint(29, (1, 21))
    wanted = own_greedy(model, ids, 40)
    assert torch.equal(eagle.generate(ids, max_new_tokens=40), wanted)
    assert torch.equal(eagle.generate(ids, max_new_tokens=40, speculative=False), wanted)
    assert torch.equal(own_greedy(model, ids, 40), wanted), "the model's own generate must work as before"


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_features_are_the_residual_streams_before_the_chosen_layers() -> None:
    model = tiny_target()
    target = Target(model, TORCH_OPS, (0, 2, 4))
    tokens = torch.randint(17, (2, 9))
    with torch.no_grad():
        streams = model(tokens, output_hidden_states=True).hidden_states
    cache = target.new_cache(2, 256)
    hooks = count_hooks(model)
    logits, features = target.forward(tokens, cache, torch.zeros(2, dtype=torch.int64))
    low, mid, high = features.split(16, -1)
    torch.testing.assert_close(low, streams[0])
    torch.testing.assert_close(mid, streams[2])
    torch.testing.assert_close(model.model.norm(high), streams[4])  # before the final norm, which transformers applied
    torch.testing.assert_close(logits, model(tokens).logits)
    assert count_hooks(model) == hooks


def test_last_hidden_state_is_after_the_final_norm() -> None:
    model = tiny_target()
    target = Target(model, TORCH_OPS)
    tokens = torch.randint(17, (1, 5))
    _, features = target.forward(tokens, target.new_cache(1, 256), torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(features, model.model(tokens).last_hidden_state)


def test_attention_setting_is_put_back_after_an_error() -> None:
    model = tiny_target()
    target = Target(model, TORCH_OPS)
    before = model.config._attn_implementation

    def fail(*_: object) -> None:
        raise KeyError("planted")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="planted"):
        target.forward(torch.tensor([[1, 2]]), target.new_cache(1, 256), torch.zeros(1, dtype=torch.int64))
    handle.remove()
    assert model.config._attn_implementation == before


def test_state_space_models_are_refused() -> None:
    config = MambaConfig(vocab_size=29, hidden_size=16, num_hidden_layers=2, state_size=4)
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM"):
        Target(tiny_target(config), TORCH_OPS)


def test_a_layer_that_does_not_attend_through_the_interface_is_refused() -> None:
    model = tiny_target()

    class Skip(nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
            return hidden_states

    model.model.layers[2] = Skip()
    with pytest.raises(UnsupportedModelError, match="3 times in a pass of 4 layers"):
        Target(model, TORCH_OPS)


def test_a_model_that_needs_a_mask_of_its_own_is_refused() -> None:
    config = FalconConfig(vocab_size=29, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(UnsupportedModelError, match="FalconForCausalLM"):
        Target(tiny_target(config), TORCH_OPS)


def test_forwards_of_one_model_from_two_threads_take_turns() -> None:
    model = tiny_target()
    eagles = [EaModel(model, tiny_draft(model), total_token=20, depth=2, top_k=4) for _ in range(2)]
    prompts = [torch.randint(1, 17, (1, n)) for n in (5, 9)]
    wanted = [own_greedy(model, ids, 30) for ids in prompts]
    got: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def work(index: int) -> None:
        for _ in range(5):
            got[index].append(eagles[index].generate(prompts[index], max_new_tokens=30))

    before = model.config._attn_implementation
    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for index in (0, 1):
        assert len(got[index]) == 5
        assert all(torch.equal(out, wanted[index]) for out in got[index])
    assert model.config._attn_implementation == before


def test_longrope_is_used_up_to_its_original_context() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32, **factors}
    config = Phi3Config(**{**GATED, "max_position_embeddings": 128}, rope_parameters=rope)
    config.original_max_position_embeddings = 32
    model = tiny_target(config)
    eagle = EaModel(model, tiny_draft(model), total_token=20, depth=2, top_k=4)
    assert eagle.target.context_length == 32
    ids = torch.randint(29, (1, 20))
    assert torch.equal(eagle.generate(ids, max_new_tokens=40), own_greedy(model, ids, 12))


class TakesCache:
    def forward(self, input_ids=None, position_ids=None, cache=None, logits_to_keep=0): ...


class TakesPastKeyValues:
    def forward(self, input_ids=None, position_ids=None, past_key_values=None, logits_to_keep=0): ...


class TakesNone:
    def forward(self, input_ids=None, position_ids=None, logits_to_keep=0): ...


def test_a_forward_may_take_its_cache_by_either_name() -> None:
    config = PretrainedConfig()
    for model, name in [(TakesCache(), "cache"), (TakesPastKeyValues(), "past_key_values")]:
        check_config(model, config)
        assert cache_argument(model) == name
    with pytest.raises(UnsupportedModelError, match=r"TakesNone.forward takes no 'cache' or 'past_key_values'"):
        check_config(TakesNone(), config)
