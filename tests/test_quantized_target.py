"""A target whose linears are a quantiser's own modules runs on them; kernels serve the rest, and it is not fused."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from tiny import relative_error, tiny_draft, tiny_target

from eagle.engine.settings import EngineSettings
from eagle.errors import UnsupportedModelError
from eagle.model.ea_model import EaModel
from eagle.model.triton_kernels import optimize_eagle_with_triton, restore_eagle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class ByteLinear(nn.Module):
    """What bitsandbytes, GPTQ and their like put in a linear's place: packed values and a forward that unpacks them."""

    calls = 0

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        return nn.functional.linear(x, (self.weight * self.scale).to(x.dtype), self.bias)


class ByteTensor(torch.Tensor):
    """What torchao puts in a weight's place: another tensor in a plain ``nn.Linear``."""


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("EAGLE_KERNELS")]:
        monkeypatch.delenv(name)


def quantised(kind: str, head: bool) -> EaModel:
    layers = 3 if kind == "eagle3" else 1
    target = tiny_target(num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1).to(DEVICE)
    linears = [(name, module) for name, module in target.named_modules() if isinstance(module, nn.Linear)]
    for name, module in linears:
        if head or name != "lm_head":
            target.set_submodule(name, ByteLinear(module))
    return EaModel(target, tiny_draft(target, kind), total_token=5, depth=1, top_k=3)


@pytest.mark.parametrize(("kind", "head"), [("eagle3", False), ("eagle1", True)])
def test_it_runs_on_its_own_modules(kind: str, head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantised(kind, head)
    modules = [(name, id(module)) for name, module in model.base_model.named_modules()]
    ids = torch.randint(17, (1, 3), device=DEVICE)
    plain = model.generate(ids, max_new_tokens=5, speculative=False)
    assert torch.equal(model.base_model.generate(ids, max_new_tokens=5, do_sample=False), plain)
    assert torch.equal(model.generate(ids, max_new_tokens=5), plain)
    _, originals = optimize_eagle_with_triton(model, kernels="triton", engine="eager")
    model.configure_engine(EngineSettings(fused="auto"))  # which it is by itself on a GPU
    served: dict[str, int] = {}
    for op in ("attention", "kv_append", "kv_compact", "finish_tree", "evaluate_posterior"):
        count(getattr(model.ops, op), op, served)
    monkeypatch.setattr(ByteLinear, "calls", 0)
    assert torch.equal(model.generate(ids, max_new_tokens=5), plain)
    assert ByteLinear.calls >= 2 * 7 * len(model.base_model.model.layers), "prefill and a step, seven linears a layer"
    assert served["attention"] > 0
    assert served["finish_tree"] > 0
    assert served["evaluate_posterior"] > 0
    report = {choice.op: choice for choice in model.kernel_report()}
    assert report["attention"].implementation == "triton"
    assert report["target"].implementation == "modules"
    assert ("lm_head" if head else "layers.0.self_attn.q_proj") in report["target"].reason
    assert "ByteLinear" in report["target"].reason
    assert [(name, id(module)) for name, module in model.base_model.named_modules()] == modules
    restore_eagle(model, originals)
    assert torch.equal(model.generate(ids, max_new_tokens=5), plain)


def count(served, op: str, calls: dict[str, int]) -> None:
    function, calls[op] = served.kernel, 0

    def kernel(*args, **kwargs):
        calls[op] += 1
        return function(*args, **kwargs)

    served.kernel = kernel


def test_it_can_not_be_fused() -> None:
    model = quantised("eagle1", head=False)
    before = model.ops
    with pytest.raises(UnsupportedModelError, match=r"can't be fused: .*ByteLinear.*leave fused at 'auto'"):
        optimize_eagle_with_triton(model, kernels="triton", fused="on")
    assert model.ops is before
    assert model.target.fused is None


@pytest.mark.parametrize("how", ["tensor", "quantizer"])
def test_quantised_weights_in_plain_linears_are_seen(how: str) -> None:
    target = tiny_target(num_hidden_layers=1).to(DEVICE)
    if how == "tensor":
        linear = target.model.layers[0].mlp.down_proj
        linear.weight = nn.Parameter(linear.weight.detach().as_subclass(ByteTensor), requires_grad=False)
    else:
        target.hf_quantizer = object()  # what transformers leaves on a model it has quantised
    model = EaModel(target, tiny_draft(target, "eagle1"), total_token=4, depth=1, top_k=2)
    model.configure_engine(EngineSettings(fused="auto"))
    reason = {choice.op: choice.reason for choice in model.kernel_report()}["target"]
    assert ("ByteTensor" if how == "tensor" else "quantised") in reason


def test_the_stand_in_computes_nearly_what_it_stands_for() -> None:
    linear, x = nn.Linear(40, 9), torch.randn(5, 40)
    assert relative_error(ByteLinear(linear)(x), linear(x)) < 2e-2
