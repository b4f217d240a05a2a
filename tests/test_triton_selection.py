"""The rules that choose an implementation: pure functions of op, dtype, sizes, hardware and request."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from eagle.errors import InvalidInputError
from eagle.model.torch_ops import TORCH_OPS
from eagle.model.triton_kernels import hardware as hardware_module
from eagle.model.triton_kernels import selection
from eagle.model.triton_kernels.dispatch import SIZES, Served, choose_ops, decoding_ops, kernel, report
from eagle.model.triton_kernels.hardware import Hardware, hardware
from eagle.model.triton_kernels.selection import CASES, LIMITS, OPS, Bound, Plan, choose, from_environment

H100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", (9, 0))
T4 = Hardware("cuda", "Tesla T4", (7, 5))
CPU = Hardware("cpu", "cpu")
INTERPRETER = replace(CPU, interpreted=True)
BF16, FP32 = torch.bfloat16, torch.float32

NO_KERNELS = {
    "no GPU": CPU,
    "no triton": replace(H100, triton=None),
    "old triton": replace(H100, triton=(3, 5)),
    "no compiler": replace(H100, compiler=False),
    "AMD": replace(H100, kind="rocm"),
    "no triton, interpreted": replace(INTERPRETER, triton=None),
}


SHIPPED = dict(selection.MEASURED)


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch):
    """The rules are tested without the figures that are shipped."""
    monkeypatch.setattr(selection, "MEASURED", {})


@pytest.mark.parametrize("table", ["NVIDIA H100", "NVIDIA H200"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_measured_gpu_takes_every_kernel(op, dtype, table, monkeypatch):
    monkeypatch.setattr(selection, "MEASURED", SHIPPED)
    hardware = replace(H100, name=f"{table} NVL")
    assert choose(op, dtype, {"causal_rows": 512}, hardware).implementation == "triton"
    assert choose(op, dtype, {}, hardware).reason == f"measured on {table}"


def test_a_name_that_only_resembles_a_measured_one_is_not_it(monkeypatch):
    monkeypatch.setattr(selection, "MEASURED", SHIPPED)
    assert "no measurement" in choose("linear", BF16, {}, replace(H100, name="NVIDIA GH200 480GB")).reason


@pytest.mark.parametrize("op", OPS)
def test_auto_on_a_gpu_takes_kernels_and_says_they_are_unmeasured(op):
    choice = choose(op, BF16, {}, H100)
    assert choice.implementation == "triton"
    assert "no measurement" in choice.reason


@pytest.mark.parametrize("where", NO_KERNELS)
@pytest.mark.parametrize("op", OPS)
def test_where_no_kernel_runs_auto_is_pytorch_and_triton_an_error(op, where):
    found = NO_KERNELS[where]
    assert choose(op, FP32, {}, found).implementation == ("sdpa" if op == "attention" else "torch")
    with pytest.raises(InvalidInputError, match=r"triton.*use auto or torch"):
        choose(op, FP32, {}, found, "triton")


def test_triton_without_a_gpu_names_the_interpreter():
    with pytest.raises(InvalidInputError, match="TRITON_INTERPRET=1"):
        choose("linear", FP32, {}, CPU, "triton")
    assert choose("linear", FP32, {}, INTERPRETER, "triton").implementation == "triton"


def test_the_interpreter_serves_only_what_asks_for_it_and_never_bfloat16():
    assert "tests" in choose("linear", FP32, {}, INTERPRETER).reason
    assert choose("linear", FP32, {}, INTERPRETER).implementation == "torch"
    assert choose("linear", FP32, {}, replace(H100, interpreted=True)).implementation == "torch"
    assert choose("linear", BF16, {}, INTERPRETER, "triton").implementation == "torch"


@pytest.mark.parametrize("request_", ["auto", "triton"])
def test_an_old_gpu_and_a_dtype_without_kernels_get_pytorch(request_):
    old = choose("linear", torch.float16, {}, T4, request_)
    assert (old.implementation, "7.5" in old.reason) == ("torch", True)
    wide = choose("attention", torch.float64, {}, H100, request_)
    assert (wide.implementation, "float64" in wide.reason) == ("sdpa", True)


@pytest.mark.parametrize(("op", "bound"), [(op, bound) for op, found in LIMITS.items() for bound in found], ids=str)
@pytest.mark.parametrize("request_", ["auto", "triton"])
def test_limits(op, bound, request_):
    assert choose(op, BF16, {bound.size: bound.most}, H100, request_).implementation == "triton"
    beyond = choose(op, BF16, {bound.size: bound.most + 1}, H100, request_)
    assert beyond.implementation in ("torch", "sdpa")
    assert beyond.reason == bound.reason


@pytest.mark.parametrize(
    ("op", "size", "module", "constant"),
    [
        ("attention", "head_size", "attention", "MAX_SIZE"),
        ("kv_compact", "path", "kv_cache", "MAX_PATH"),
        ("topk_log_softmax", "top_k", "topk", "MAX_K"),
        ("grow_tree", "top_k", "tree_decoding", "MAX_TOP_K"),
        ("grow_tree", "candidates", "tree_decoding", "MAX_CANDIDATES"),
        ("finish_tree", "nodes", "tree_decoding", "MAX_NODES"),
        ("finish_tree", "candidates", "tree_decoding", "MAX_CANDIDATES"),
        ("evaluate_posterior", "nodes", "posterior", "MAX_NODES"),
        ("update_inputs", "path", "update_inputs", "MAX_PATH"),
        ("rms_norm", "width", "norm", "MAX_SIZE"),
        ("add_rms_norm", "width", "norm", "MAX_SIZE"),
        ("cat_rms_norm", "width", "norm", "MAX_SIZE"),
        ("draft_input", "width", "norm", "MAX_SIZE"),
        ("linear", "rows", "linear_config", "BLOCK_M"),
        ("gate_up_swiglu", "rows", "linear_config", "BLOCK_M"),
        ("linear_add_rms_norm", "rows", "linear_config", "BLOCK_M"),
        ("linear_add_rms_norm", "width", "norm", "MAX_SIZE"),
    ],
)
def test_limits_are_the_kernels_own(op, size, module, constant):
    pytest.importorskip("triton")
    most = {bound.size: bound.most for bound in LIMITS[op]}
    assert most[size] == getattr(importlib.import_module(f"eagle.model.triton_kernels.{module}"), constant)


def test_prompts_go_to_sdpa_in_auto_alone():
    prompt = {"causal_rows": 300, "head_size": 64}
    assert choose("attention", BF16, prompt, H100).implementation == "sdpa"
    assert choose("attention", BF16, prompt, H100, "triton").implementation == "triton"
    assert [choice.when for choice in Plan(H100, BF16).choices("attention", {})] == list(CASES["attention"])
    assert len(Plan(H100, BF16, "triton").choices("attention", {})) == 1


def test_one_byte_weights_are_reported_where_there_are_some():
    found = Plan(H100, BF16).choices("linear", {"one_byte": 1})
    assert [choice.implementation for choice in found] == ["triton", "torch", "triton"]
    assert [choice.when for choice in Plan(H100, BF16).choices("linear", {"one_byte": 0})] == [
        choice.when for choice in found[:2]
    ]


def test_a_measured_table_replaces_the_rule(monkeypatch):
    monkeypatch.setitem(selection.MEASURED, "H100", {"swiglu": (Bound("rows", -1, "slower here"),)})
    monkeypatch.setitem(selection.MEASURED, "H100 PCIe", {})
    assert choose("attention", BF16, {"causal_rows": 300}, H100).implementation == "triton"
    assert choose("linear", BF16, {}, H100).reason == "measured on H100"
    assert choose("linear", BF16, {"rows": 65}, H100).implementation == "torch"
    assert choose("swiglu", BF16, {}, H100).reason == "slower here"
    assert choose("swiglu", BF16, {}, H100, "triton").implementation == "triton"
    assert choose("linear", BF16, {}, replace(H100, name="NVIDIA H100 PCIe")).reason == "measured on H100 PCIe"
    assert "no measurement" in choose("linear", BF16, {}, replace(H100, name="NVIDIA L40S")).reason


def test_overrides_win_over_the_request():
    overrides = {"linear": "torch", "swiglu": "triton"}
    assert choose("linear", BF16, {}, H100, "triton", overrides).implementation == "torch"
    assert choose("swiglu", BF16, {}, H100, "torch", overrides).implementation == "triton"
    assert choose("rms_norm", BF16, {}, H100, "torch", overrides).implementation == "torch"
    with pytest.raises(InvalidInputError, match="EAGLE_KERNELS_SWIGLU"):
        choose("swiglu", FP32, {}, CPU, "auto", overrides)


def test_environment():
    assert from_environment({}) == ("auto", {})
    assert from_environment({"EAGLE_KERNELS": ""}) == ("auto", {})
    found = from_environment({"EAGLE_KERNELS": "Triton", "EAGLE_KERNELS_RMS_NORM": "torch", "OTHER": "x"})
    assert found == ("triton", {"rms_norm": "torch"})
    for wrong, words in (
        ({"EAGLE_KERNELS": "fast"}, "fast"),
        ({"EAGLE_KERNELS_LINEAR": "cuda"}, r"EAGLE_KERNELS_LINEAR\) is 'cuda'"),
        ({"EAGLE_KERNELS_LINAER": "torch"}, r"linaer.*linear"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            from_environment(wrong)


def test_unknown_names():
    with pytest.raises(InvalidInputError, match="conv"):
        choose("conv", FP32, {}, CPU)
    with pytest.raises(InvalidInputError, match="expected auto, torch or triton"):
        choose("linear", FP32, {}, CPU, "cuda")


def test_hardware_of_this_machine(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert (hardware(torch.device("cpu")).kind, hardware(torch.device("cpu")).interpreted) == ("cpu", False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert hardware(torch.device("cpu")).interpreted
    monkeypatch.setenv("CC", "/a/compiler")
    assert hardware(torch.device("cpu")).compiler
    assert "part of the model" in hardware([torch.device("cpu"), torch.device("cuda:0")]).name
    monkeypatch.setattr(hardware_module.importlib.util, "find_spec", lambda name: None)
    assert hardware(torch.device("cpu")).triton is None


def test_the_weakest_gpu_counts(monkeypatch):
    names = {torch.device("cuda:0"): ("new", (9, 0)), torch.device("cuda:1"): ("old", (7, 0))}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: names[device][1])
    found = hardware(names)
    assert (found.name, found.capability) == ("old", (7, 0))


def test_choose_ops_without_kernels_is_the_torch_table():
    for plan in (Plan(CPU, FP32), Plan(H100, FP32, "torch"), Plan(T4, FP32, "triton")):
        ops, choices = choose_ops(plan)
        assert all(getattr(ops, op) is getattr(TORCH_OPS, op) for op in OPS)
        assert [choice.op for choice in choices] == list(OPS)
        assert "triton" not in {choice.implementation for choice in choices}


def test_every_bound_is_a_size_of_the_call():
    bounded = {*LIMITS, *selection.UNMEASURED}
    assert bounded <= set(SIZES)
    q, cache = torch.zeros(1, 5, 2, 16), torch.zeros(1, 1, 64, 16)
    heads = {"head_size": 16, "head_rest": 0, "head_difference": 0, "value_bytes": 4}
    assert SIZES["attention"](q, cache, cache, None, scale=1.0) == {"causal_rows": 5, "tree": 0, **heads}
    tree = SIZES["attention"](q, cache, cache, None, torch.zeros(1, 5, 1), scale=1.0)
    assert (tree["causal_rows"], tree["tree"]) == (0, 5)
    assert {bound.size for bound in (*selection.FLASH_LIMITS, selection.PROMPTS)} <= set(tree)
    x, weight = torch.zeros(2, 3, 7), torch.zeros(6, 7)
    rows = {"rows": 6, "one_byte_rows": 0}
    assert SIZES["linear"](x, weight, norm_weight=x[0, 0]) == SIZES["gate_up_swiglu"](x, weight) == rows
    sizes = SIZES["linear_add_rms_norm"](x, weight, torch.zeros(2, 3, 6), weight[:, 0], 1e-5)
    assert sizes == {**rows, "width": 6}
    assert SIZES["linear"](x, weight.to(torch.int8)) == {"rows": 0, "one_byte_rows": 6}


def test_calls_beyond_a_bound_go_to_pytorch():
    ran = []
    plan = Plan(H100, FP32)
    served = Served("linear", lambda *_: ran.append("triton"), lambda *_: ran.append("torch"), LIMITS["linear"], plan)
    for rows in (64, 65, 1):
        served(torch.zeros(rows, 3), torch.zeros(4, 3))
    for rows in (512, 513):
        served(torch.zeros(rows, 3), torch.zeros(4, 3, dtype=torch.int8))
    assert ran == ["triton", "torch", "triton", "triton", "torch"]


def test_decoding_ops_lift_the_bound_on_rows_alone():
    assert decoding_ops(TORCH_OPS) == TORCH_OPS
    ran, plan = [], Plan(H100, FP32)

    def served(op):
        return Served(op, lambda *_: ran.append("triton"), lambda *_: ran.append("torch"), LIMITS[op], plan)

    matrix = ("linear", "gate_up_swiglu", "linear_add_rms_norm")
    ops = TORCH_OPS.replaced(**{op: served(op) for op in (*matrix, "rms_norm")})
    lifted = decoding_ops(ops)
    assert decoding_ops(ops) is lifted
    assert lifted.rms_norm is ops.rms_norm
    for table in (ops, lifted):
        for op in matrix:
            getattr(table, op)(torch.zeros(65, 3), torch.zeros(4, 3))
        table.linear_add_rms_norm(torch.zeros(65, 1), torch.zeros(40000, 1))
        table.rms_norm(torch.zeros(1, 40000))
    assert ran == ["torch"] * 5 + ["triton"] * 3 + ["torch"] * 2


def test_kernels_and_pytorch_agree_in_their_parameters():
    pytest.importorskip("triton")
    import inspect

    for op in OPS:
        plain = inspect.signature(getattr(TORCH_OPS, op)).parameters
        ours = inspect.signature(kernel(op)).parameters
        assert list(ours)[: len(plain)] == list(plain), op
        assert all(entry.default is not entry.empty for entry in list(ours.values())[len(plain) :]), op


def test_report_names_custom_functions():
    def mine(x, weight, bias=None):
        return x

    entry = next(choice for choice in report(TORCH_OPS.replaced(linear=mine), None, {}) if choice.op == "linear")
    assert entry.implementation == "custom"
    assert "mine" in entry.reason


def test_the_package_imports_without_triton():
    code = """
import sys
sys.modules["triton"] = None
from eagle.model.triton_kernels import optimize_eagle_with_triton, restore_eagle
from eagle.model.triton_kernels.hardware import triton_version
assert triton_version() is None
for name in ("attention", "rms_norm"):
    try:
        exec(f"from eagle.model.triton_kernels import {name}")
    except ImportError as error:
        assert "pip install 'triton" in str(error), error
    else:
        raise AssertionError(name)
try:
    from eagle.model.triton_kernels import nothing
except ImportError as error:
    assert "cannot import name" in str(error), error
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_functions_win_over_modules_of_their_name():
    pytest.importorskip("triton")
    code = """
import eagle.model.triton_kernels.attention
from eagle.model.triton_kernels.linear import gate_up_swiglu
import eagle.model.triton_kernels as kernels
for name in kernels._KERNELS:
    function = getattr(kernels, name)
    assert callable(function) and function.__name__ == name, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
