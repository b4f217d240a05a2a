"""A fused target over one-byte weights: the rounded model, run exactly, and the loaded one untouched beside it."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import relative_error, tiny_draft, tiny_target
from torch import nn
from transformers import GemmaConfig

from eagle.errors import InvalidInputError, OutOfMemoryError, UnsupportedModelError
from eagle.model.ea_model import EaModel
from eagle.model.target import Target
from eagle.model.torch_ops import TORCH_OPS
from eagle.model.triton_kernels import optimize_eagle_with_triton, restore_eagle

DTYPES = {"int8": (torch.int8, 127), "fp8": (torch.float8_e4m3fn, 448)}


def rounded(model: nn.Module, name: str) -> nn.Module:
    """A copy whose linears hold what one byte a value leaves of them, row by row."""
    model, (dtype, largest) = copy.deepcopy(model), DTYPES[name]
    for linear in (module for module in model.modules() if isinstance(module, nn.Linear)):
        for row in linear.weight.data:
            scale = row.abs().max() / largest
            row.copy_(((row / scale).round() if name == "int8" else row / scale).to(dtype).float() * scale)
    return model


@pytest.mark.parametrize("name", DTYPES)
def test_the_rounded_models_tokens_and_logits(name: str) -> None:
    model = tiny_target(spread=3.0)
    wanted = Target(rounded(model, name), TORCH_OPS)
    eagle = EaModel(model, tiny_draft(model), total_token=12, depth=2, top_k=4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ids = torch.randint(1, 17, (1, 21))
    plain = eagle.generate(ids, max_new_tokens=40, speculative=False)
    _, originals = optimize_eagle_with_triton(eagle, kernels="torch", target_dtype=name)
    assert str(eagle.kernel_report()[-1]).endswith(f"its weights as {name}")
    zero = torch.zeros(1, dtype=torch.int64)
    found, want = (
        target.forward(ids, target.new_cache(1, 32), zero)[0] for target in (eagle.target, wanted)
    )  # fmt: skip
    assert relative_error(found, want) < 1e-5
    tokens = eagle.generate(ids, max_new_tokens=40)
    assert torch.equal(tokens, eagle.generate(ids, max_new_tokens=40, speculative=False))
    restore_eagle(eagle, originals)
    assert eagle.target.fused is None
    assert torch.equal(eagle.generate(ids, max_new_tokens=40), plain)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_moved_weights_are_rounded_anew() -> None:
    model = tiny_target(spread=3.0)
    eagle = EaModel(model, tiny_draft(model), total_token=12, depth=2, top_k=4)
    optimize_eagle_with_triton(eagle, kernels="torch", target_dtype="int8")
    ids = torch.randint(1, 17, (1, 9))
    eagle.generate(ids, max_new_tokens=4)
    first = eagle.target.fused
    other = tiny_target(spread=3.0)
    model.load_state_dict(other.state_dict(), assign=True)
    tokens = eagle.generate(ids, max_new_tokens=30)
    assert eagle.target.fused is not first
    fresh = EaModel(other, tiny_draft(other), total_token=12, depth=2, top_k=4)
    optimize_eagle_with_triton(fresh, kernels="torch", target_dtype="int8")
    assert torch.equal(tokens, fresh.generate(ids, max_new_tokens=30))


def test_what_can_not_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_target()
    eagle = EaModel(model, tiny_draft(model), total_token=12, depth=2, top_k=4)
    with pytest.raises(InvalidInputError, match="need the fused target"):
        optimize_eagle_with_triton(eagle, kernels="torch", fused="off", target_dtype="int8")
    with pytest.raises(InvalidInputError, match="target_dtype is 'int4'; expected None or one of int8, fp8"):
        optimize_eagle_with_triton(eagle, target_dtype="int4")
    with monkeypatch.context() as little:
        little.setattr("eagle.engine.memory.free_bytes", lambda device: 1000)
        with pytest.raises(OutOfMemoryError, match=r"target_dtype fp8 needs .* GiB beside the model's own weights"):
            optimize_eagle_with_triton(eagle, kernels="torch", target_dtype="fp8")
    assert eagle.target.fused is None
    sizes = {"vocab_size": 17, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "head_dim": 8}
    gemma = tiny_target(GemmaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0))
    other = EaModel(gemma, tiny_draft(gemma), total_token=12, depth=2, top_k=4)
    with pytest.raises(
        UnsupportedModelError, match=r"target_dtype is 'int8', and the target can't be fused: .*leave it out"
    ):
        optimize_eagle_with_triton(other, kernels="torch", target_dtype="int8")
    assert other.generate(torch.randint(1, 17, (1, 5)), max_new_tokens=4).shape == (1, 9)
