"""Kernels on and off in a whole model. Without a GPU, in Triton's interpreter, so the models are as small as can be."""

from __future__ import annotations

import os
from types import SimpleNamespace

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_draft, tiny_target

from eagle.engine.graphs import holds_sampling
from eagle.errors import InvalidInputError
from eagle.model.ea_model import EaModel
from eagle.model.ops import Ops
from eagle.model.torch_ops import TORCH_OPS
from eagle.model.triton_kernels import optimize_eagle_with_triton, restore_eagle
from eagle.model.triton_kernels.dispatch import Served
from eagle.model.triton_kernels.selection import OPS

pytest.importorskip("triton")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON = {"kernels": "triton", "exact": False}
"""Padded passes are tested with the engine; in the interpreter 64 rows take ten times as long as a tree's."""


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("EAGLE_KERNELS")]:
        monkeypatch.delenv(name)


@pytest.fixture
def model() -> EaModel:
    return small("eagle3")


def small(kind: str) -> EaModel:
    layers = 3 if kind == "eagle3" else 1
    target = tiny_target(num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1).to(DEVICE)
    return EaModel(target, tiny_draft(target, kind), total_token=5, depth=1, top_k=3)


def functions(ops: Ops) -> list:
    return [getattr(ops, op) for op in OPS]


def same(ops: Ops, others: list) -> bool:
    return all(one is other for one, other in zip(functions(ops), others, strict=True))


def ops_in(originals):
    """The ops among the original methods; on a GPU the engine's settings are there too."""
    return {op: function for op, function in originals.items() if op in OPS}


def report_of_ops(model):
    return [choice for choice in model.kernel_report() if choice.op in OPS]


def prompt(rows: int = 1) -> torch.Tensor:
    return torch.randint(17, (rows, 3), device=DEVICE)


@pytest.mark.parametrize(
    ("kind", "rows", "sampling"),
    [
        ("eagle3", 1, {}),
        ("eagle1", 2, {}),
        ("eagle1", 1, {"temperature": 0.9, "top_p": 0.9, "seed": 5}),
    ],
    ids=["EAGLE-3", "EAGLE-1-B2", "sampled"],
)
def test_same_tokens_with_kernels(kind, rows, sampling):
    model, ids = small(kind), prompt(rows)
    if rows == 2:
        sampling |= {"attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]], device=DEVICE)}
    before = model.generate(ids, max_new_tokens=4, **sampling)
    same_model, _ = optimize_eagle_with_triton(model, fused="off", **ON)
    assert same_model is model
    served = dict.fromkeys(OPS, 0)
    for op in OPS:
        kernel = getattr(model.ops, op)
        kernel.kernel = counted(kernel.kernel, op, served)
    assert torch.equal(model.generate(ids, max_new_tokens=4, **sampling), before)
    unused = {"kv_retrieve", "rms_norm", "cat_rms_norm", "draft_input", "gate_up_swiglu", "linear_add_rms_norm"}
    assert {op for op, calls in served.items() if calls == 0} <= unused
    if DEVICE == "cpu":
        assert torch.equal(model.base_model.generate(ids, max_new_tokens=2, do_sample=False)[:, :3], ids)


def test_a_captured_step_reads_the_numbers_of_its_sampling_on_the_device() -> None:
    model, _ = optimize_eagle_with_triton(small("eagle3"), fused="off", **ON)
    assert isinstance(model.ops.evaluate_posterior, Served)
    assert holds_sampling(SimpleNamespace(ops=model.ops))


def counted(function, op, calls):
    def call(*args, **kwargs):
        calls[op] += 1
        return function(*args, **kwargs)

    return call


def test_restore_gives_back_what_was_there(model):
    mine = model.ops.replaced(swiglu=lambda gate, up: TORCH_OPS.swiglu(gate, up))
    model.ops = mine
    before = functions(mine)
    modules = [(name, type(module)) for name, module in model.base_model.named_modules()]
    weights = {name: weight.clone() for name, weight in model.base_model.named_parameters()}
    attention = model.base_model.config._attn_implementation
    _, originals = optimize_eagle_with_triton(model, **ON)
    assert ops_in(originals) == dict(zip(OPS, before, strict=True))
    assert not any(one is other for one, other in zip(functions(model.ops), before, strict=True))
    assert model.target.ops is model.ops
    model.generate(prompt(), max_new_tokens=2)
    assert restore_eagle(model, originals) is model
    assert same(model.ops, before)
    restore_eagle(model, originals)
    assert same(model.ops, before)
    assert model.target.ops is model.ops
    assert [(name, type(module)) for name, module in model.base_model.named_modules()] == modules
    after = dict(model.base_model.named_parameters())
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())
    assert all(weight.is_contiguous() for weight in after.values())
    assert model.base_model.config._attn_implementation == attention


def test_restore_after_an_exception(model):
    before = functions(model.ops)
    _, originals = optimize_eagle_with_triton(model, **ON)

    def broken(*args, **kwargs):
        raise ValueError("a broken kernel")

    model.ops.rms_norm.kernel = model.ops.topk_log_softmax.kernel = broken
    ids = prompt()
    with pytest.raises(ValueError, match="a broken kernel"):
        model.generate(ids, max_new_tokens=3)
    restore_eagle(model, originals)
    assert same(model.ops, before)
    assert model.generate(ids, max_new_tokens=3).shape == (1, 6)


@pytest.mark.parametrize("overrides", [["linear"], "linear", 3])
def test_overrides_that_are_no_mapping_are_named(model, overrides):
    with pytest.raises(InvalidInputError, match=r"overrides is .*; expected what serves each op named"):
        optimize_eagle_with_triton(model, overrides=overrides)


def test_a_failed_switch_changes_nothing(model, monkeypatch):
    before = functions(model.ops)
    with pytest.raises(InvalidInputError, match="linaer"):
        optimize_eagle_with_triton(model, kernels="triton", overrides={"linaer": "torch"})
    monkeypatch.setattr("eagle.model.triton_kernels.dispatch.kernel", lambda op: {}[op])
    with pytest.raises(KeyError):
        optimize_eagle_with_triton(model, **ON)
    assert same(model.ops, before)


SWITCHES = (
    {"kernels": "triton"},
    {"kernels": "torch"},
    {"kernels": "triton", "overrides": {"swiglu": "torch"}},
    {"kernels": "triton", "fused": "on"},
    {"kernels": "triton", "fused": "off", "target_dtype": None, "draft_dtype": "int8"},
    {"kernels": "torch", "target_dtype": "int8"},
)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_each_switch_leads_back_to_where_it_began(data):
    model = small("eagle3")

    def state():
        weights = [weight.stride() for weight in model.base_model.parameters()]
        values = [weight.clone() for weight in model.base_model.parameters()]
        return functions(model.ops), model.engine, model.kernel_plan, weights, values, model.target.fused is None

    def check(wanted):
        ops, engine, plan, weights, values, modules = state()
        assert all(one is other for one, other in zip(ops, wanted[0], strict=True))
        assert (engine, plan, weights, modules) == (wanted[1], wanted[2], wanted[3], wanted[5])
        assert all(torch.equal(one, other) for one, other in zip(values, wanted[4], strict=True))

    standing = []  # (mapping, the state before its call), in order
    for choice in data.draw(st.lists(st.sampled_from(SWITCHES), min_size=1, max_size=4)):
        before = state()
        standing.append((optimize_eagle_with_triton(model, **choice)[1], before))
    for mapping, before in data.draw(st.permutations(standing)):
        place = next((index for index, (other, _) in enumerate(standing) if other is mapping), None)
        if place is None or not mapping:
            now = state()
            restore_eagle(model, mapping)
            check(now)
            continue
        restore_eagle(model, dict(mapping))
        check(before)
        del standing[place:]


def test_another_models_methods_are_refused(model):
    _, originals = optimize_eagle_with_triton(model, kernels="triton")
    with pytest.raises(InvalidInputError, match="another model"):
        restore_eagle(small("eagle3"), originals)


def test_only_what_changes_is_returned(model):
    _, originals = optimize_eagle_with_triton(model, kernels="torch", overrides={"swiglu": "triton"})
    assert ops_in(originals) == {"swiglu": TORCH_OPS.swiglu}
    _, more = optimize_eagle_with_triton(model, kernels="torch")
    assert list(ops_in(more)) == ["swiglu"]
    assert same(model.ops, functions(TORCH_OPS))


def test_environment_asks_and_arguments_win(model, monkeypatch):
    monkeypatch.setenv("EAGLE_KERNELS", "triton")
    monkeypatch.setenv("EAGLE_KERNELS_LINEAR", "torch")
    _, originals = optimize_eagle_with_triton(model)
    assert set(ops_in(originals)) == set(OPS) - {"linear"}
    restore_eagle(model, originals)
    assert optimize_eagle_with_triton(model, kernels="torch")[1] == {}
    _, originals = optimize_eagle_with_triton(model, overrides={"linear": "triton", "swiglu": "torch"})
    assert set(ops_in(originals)) == set(OPS) - {"swiglu"}


def test_exact_is_auto_where_kernels_serve_and_as_loaded_elsewhere(model):
    optimize_eagle_with_triton(model, kernels="triton")
    assert model.engine.exact == "auto"
    for exact in (True, False):
        optimize_eagle_with_triton(model, kernels="triton", exact=exact)
        assert model.engine.exact is exact
    for others in ({"kernels": "torch"}, {"kernels": "triton", "overrides": {"attention": "torch"}}):
        optimize_eagle_with_triton(model, **others)
        assert model.engine.exact is False
        before = model.engine, model.ops
        with pytest.raises(InvalidInputError, match="exact is True, which needs the attention kernel"):
            optimize_eagle_with_triton(model, **others, exact=True)
        assert (model.engine, model.ops) == before
    advice = "let the kernels serve" if DEVICE == "cuda" else "use a GPU"
    advice = rf"\({DEVICE}, head size \d+\); leave it out, or {advice}"
    with pytest.raises(InvalidInputError, match=f"no kernel serves attention {advice}"):
        optimize_eagle_with_triton(model, kernels="torch", exact=True)
    with pytest.raises(InvalidInputError, match="exact is 'yes'; expected True, False or 'auto'"):
        optimize_eagle_with_triton(model, exact="yes")


def test_heads_that_the_attention_kernel_does_not_take_are_not_exact():
    target = tiny_target(head_dim=512, num_hidden_layers=3).to(DEVICE)
    model = EaModel(target, tiny_draft(target))
    optimize_eagle_with_triton(model, kernels="triton")
    assert model.engine.exact is False
    with pytest.raises(InvalidInputError, match="head size 512"):
        optimize_eagle_with_triton(model, kernels="triton", exact=True)


def test_a_table_of_ones_own(model):
    mine = TORCH_OPS.replaced(linear=lambda x, weight, bias=None: TORCH_OPS.linear(x, weight, bias))
    _, originals = optimize_eagle_with_triton(model, ops=mine)
    assert ops_in(originals) == {"linear": TORCH_OPS.linear}
    assert model.ops is mine
    assert next(c for c in model.kernel_report() if c.op == "linear").implementation == "custom"
    other = small("eagle1")
    restore_eagle(other, optimize_eagle_with_triton(other, **ON)[1])
    _, originals = optimize_eagle_with_triton(other, **ON)
    optimize_eagle_with_triton(model, ops=other.ops)
    restore_eagle(other, originals)
    assert same(other.ops, functions(TORCH_OPS))
    assert {choice.implementation for choice in report_of_ops(model)} == {"triton", "torch"}
    with pytest.raises(InvalidInputError, match="not both"):
        optimize_eagle_with_triton(model, ops=mine, kernels="triton")
    with pytest.raises(TypeError, match="Ops"):
        optimize_eagle_with_triton(model, ops={"linear": mine.linear})


def test_what_is_no_ea_model(model):
    for other in (model.base_model, None, "SmolLM2-135M"):
        with pytest.raises(TypeError, match="takes an EaModel"):
            optimize_eagle_with_triton(other)
        with pytest.raises(TypeError, match="takes an EaModel"):
            restore_eagle(other, {})
    with pytest.raises(TypeError, match="original_methods"):
        restore_eagle(model, (model, {}))
    with pytest.raises(InvalidInputError, match="conv"):
        restore_eagle(model, {"conv": print})


def test_without_a_gpu_auto_is_pytorch_and_triton_an_error(model, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if DEVICE == "cuda":
        pytest.skip("there is a GPU")
    assert optimize_eagle_with_triton(model)[1] == {}
    assert all("NVIDIA GPU" in choice.reason for choice in report_of_ops(model))
    with pytest.raises(InvalidInputError, match="use auto or torch"):
        optimize_eagle_with_triton(model, kernels="triton")
    with pytest.raises(InvalidInputError, match="expected auto, torch or triton"):
        optimize_eagle_with_triton(model, kernels="fast")


def test_report(model):
    off = model.kernel_report()
    assert [choice.op for choice in off] == [*OPS, "step", "target"]
    assert str(off[0]).startswith("attention: sdpa, kernels are off; optimize_eagle_with_triton")
    _, originals = optimize_eagle_with_triton(model, kernels="triton", overrides={"swiglu": "torch"})
    lines = [str(choice) for choice in model.kernel_report()]
    assert "attention: triton, as asked" in lines
    assert any(line.startswith("swiglu: torch, as asked for this op") for line in lines)
    assert any(line.startswith("linear (more rows): torch") for line in lines)
    restore_eagle(model, originals)
    assert model.kernel_report() == off


def test_report_follows_the_tree():
    target = tiny_target(vocab_size=100).to(DEVICE)
    wide = EaModel(target, tiny_draft(target), total_token=5, depth=1, top_k=3)
    optimize_eagle_with_triton(wide, **ON)
    wide.set_tree(70, 1, 66)
    found = {choice.op: choice for choice in wide.kernel_report()}
    assert found["topk_log_softmax"].implementation == found["grow_tree"].implementation == "torch"
    assert "up to 64" in found["topk_log_softmax"].reason
    assert found["finish_tree"].implementation == "triton"


def test_debug_mode_finds_nothing_in_a_whole_generation(model, monkeypatch):
    ids = prompt(2)
    before = model.generate(ids, max_new_tokens=4)
    optimize_eagle_with_triton(model, engine="eager", **ON)  # a capture can't read values on the host
    monkeypatch.setenv("EAGLE_DEBUG", "1")
    assert torch.equal(model.generate(ids, max_new_tokens=4), before)


def test_too_few_dimensions_are_refused_by_the_kernel(model):
    optimize_eagle_with_triton(model, **ON)
    flat, cache = torch.randn(8, device=DEVICE), torch.randn(1, 2, 16, 8, device=DEVICE)
    length = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="q "):
        model.ops.attention(flat, cache, cache, length, scale=1.0)
    with pytest.raises(ValueError, match="weight"):
        model.ops.linear(flat[None], flat)
