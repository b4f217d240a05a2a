"""FlashAttention for prompts, with loops in its place that compute what its documentation says: nobody has it here."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from tiny import relative_error, tiny_draft, tiny_target

from eagle.errors import InvalidInputError
from eagle.model import attention as torch_attention
from eagle.model.ea_model import EaModel
from eagle.model.torch_ops import TORCH_OPS
from eagle.model.triton_kernels import hardware as hardware_module
from eagle.model.triton_kernels import optimize_eagle_with_triton, selection
from eagle.model.triton_kernels.dispatch import choose_ops, report
from eagle.model.triton_kernels.flash import FlashPrompts
from eagle.model.triton_kernels.hardware import FlashAttention, Hardware, find_flash
from eagle.model.triton_kernels.selection import Plan, choose, from_environment

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKAGE = FlashAttention("flash_attn", "2.8.3")
GPU = Hardware("cuda", "NVIDIA L40S", (8, 9), flash=PACKAGE)
PROMPT, DECODE = {"causal_rows": 400, "head_size": 64}, {"causal_rows": 1}
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
ASKED = {"attention": "flash"}


def with_kvcache(
    q, k_cache, v_cache, *, cache_seqlens, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, num_splits=0
):
    """Its documentation in loops: [B, S, H, D] caches; the causal mask and the window, inclusive on both sides, are
    aligned to the bottom right of [T, cache_seqlens]; -1 is no bound."""
    assert cache_seqlens.dtype == torch.int32
    assert cache_seqlens.shape == (q.shape[0],)
    assert q.dtype in (FP16, BF16)
    assert q.dtype == k_cache.dtype == v_cache.dtype
    assert all(x.stride(-1) == 1 and x.shape[-1] % 8 == 0 for x in (q, k_cache, v_cache))
    assert causal
    assert num_splits == 1
    out = torch.zeros_like(q)
    for b, keys in enumerate(cache_seqlens.tolist()):
        for i in range(q.shape[1]):
            last = i + keys - q.shape[1]
            first = 0 if window_size[0] < 0 else max(0, last - window_size[0])
            assert window_size[1] in (-1, 0)
            for h in range(q.shape[2]):
                kv = h // (q.shape[2] // k_cache.shape[2])
                scores = k_cache[b, first : last + 1, kv].double() @ q[b, i, h].double() * softmax_scale
                scores = softcap * torch.tanh(scores / softcap) if softcap > 0 else scores
                out[b, i, h] = (scores.softmax(0) @ v_cache[b, first : last + 1, kv].double()).to(q.dtype)
    return out


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The package by loops, and the rows of each call it got. No figures of any GPU, no wishes of the environment."""
    rows: list[int] = []

    def counted(q, *args, **kwargs):
        rows.append(q.shape[1])
        return with_kvcache(q, *args, **kwargs)

    module = ModuleType("flash_attn")
    module.flash_attn_with_kvcache = counted
    module.__spec__ = ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(selection, "MEASURED", {})
    for name in [name for name in os.environ if name.startswith("EAGLE_KERNELS")]:
        monkeypatch.delenv(name)
    find_flash.cache_clear()
    yield rows
    find_flash.cache_clear()


def prompt_case(batch: int, rows: int, lengths: list[int], heads: int = 4, kv_heads: int = 2, size: int = 16):
    """q as a view of a packed projection, caches as slices of larger ones with NaN wherever nobody may look."""
    packed = torch.randn(batch, rows, heads + 3, size).half()
    slots = max(lengths) + rows + 5
    caches = torch.randn(2, batch, kv_heads, slots + 4, size).half()
    for b, length in enumerate(lengths):
        caches[:, b, :, length + rows :] = float("nan")
    return packed[:, :, :heads], caches[0, :, :, :slots], caches[1, :, :, :slots], torch.tensor(lengths)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("window", [None, 1, 6, 500])
def test_equals_the_pytorch_op(window: int | None, softcap: float | None) -> None:
    q, k, v, kv_len = prompt_case(3, 9, [0, 5, 22])
    out = FlashPrompts(PACKAGE)(q, k, v, kv_len, scale=0.3, window=window, softcap=softcap)
    clean = [x.nan_to_num(0.0) for x in (k, v)]
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    wanted = torch_attention.attention(q.double(), *(x.double() for x in clean), kv_len, **options)
    assert out.shape == q.shape
    assert relative_error(out, wanted) < 2e-3


def test_caches_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, kv_len = prompt_case(2, 5, [3, 1])
    seen = []
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_with_kvcache", lambda *args, **_: seen.append(args))
    FlashPrompts(PACKAGE)(q, k, v, kv_len, scale=0.3)
    assert [x.data_ptr() for x in seen[0]] == [x.data_ptr() for x in (q, k, v)]


def test_what_does_not_fit_is_named() -> None:
    q, k, v, kv_len = prompt_case(1, 5, [3])
    flash = FlashPrompts(PACKAGE)
    with pytest.raises(ValueError, match=r"tree_words is \(1, 5, 1\)"):
        flash(q, k, v, kv_len, torch.ones(1, 5, 1, dtype=torch.int64), scale=1.0)
    with pytest.raises(ValueError, match=r"float32.*expected float16 or bfloat16"):
        flash(q.float(), k.float(), v.float(), kv_len, scale=1.0)
    with pytest.raises(ValueError, match="head sizes are 16, 16 and 8"):
        flash(q, k, v[..., :8], kv_len, scale=1.0)
    with pytest.raises(ValueError, match="multiple of 8"):
        flash(q[..., :12], k[..., :12], v[..., :12], kv_len, scale=1.0)


def test_auto_takes_it_for_prompts_where_nobody_has_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = choose("attention", BF16, PROMPT, GPU)
    assert (found.implementation, "2.8.3" in found.reason, "by rule" in found.reason) == ("flash", True, True)
    assert choose("attention", BF16, DECODE, GPU).implementation == "triton"
    assert choose("attention", FP32, PROMPT, GPU).implementation == "sdpa"
    assert choose("attention", BF16, {**PROMPT, "head_size": 257}, GPU).implementation == "sdpa"
    for size, most in (("head_rest", 4), ("head_difference", 8), ("value_bytes", 4)):
        odd = choose("attention", BF16, {**PROMPT, size: most}, GPU)
        assert (odd.implementation, "FlashAttention takes" in odd.reason) == ("sdpa", True)
    for other in (
        {"flash": None},
        {"flash": replace(PACKAGE, problem="broken")},
        {"capability": (7, 5)},
        {"kind": "rocm"},
    ):
        assert choose("attention", BF16, PROMPT, replace(GPU, **other)).implementation == "sdpa"
    assert choose("attention", BF16, PROMPT, GPU, "triton").implementation == "triton"
    assert choose("attention", BF16, PROMPT, GPU, "torch").implementation == "sdpa"
    monkeypatch.setitem(selection.MEASURED, "L40S", {})
    assert choose("attention", BF16, PROMPT, GPU).implementation == "triton"
    assert choose("attention", BF16, PROMPT, GPU, "auto", ASKED).implementation == "flash"


@pytest.mark.parametrize(
    ("change", "dtype", "words", "others"),
    [
        ({"flash": None}, BF16, "is not installed", "auto, torch or triton"),
        (
            {"flash": replace(PACKAGE, problem="undefined symbol")},
            BF16,
            "can't be used: undefined symbol",
            "auto, torch or triton",
        ),
        ({"capability": (7, 5)}, FP16, "compute capability 7.5", "auto, torch or triton"),
        ({"kind": "cpu", "name": "cpu"}, FP16, "NVIDIA GPU, not cpu", "auto or torch"),
        ({"interpreted": True}, FP16, "TRITON_INTERPRET", "auto, torch or triton"),
        ({"triton": None}, FP16, "triton is not installed", "auto or torch"),
        ({}, FP32, "takes float16 and bfloat16, not float32", "auto, torch or triton"),
    ],
)
def test_asking_for_what_cannot_serve_is_an_error(change: dict, dtype: torch.dtype, words: str, others: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"asks for flash.*{words}.*use {others}$"):
        choose("attention", dtype, DECODE, replace(GPU, **change), "auto", ASKED)
    with pytest.raises(InvalidInputError, match="asks for flash"):
        choose_ops(Plan(replace(GPU, **change), dtype, "triton", ASKED))


def test_only_attention_can_be_asked_for() -> None:
    assert from_environment({"EAGLE_KERNELS_ATTENTION": "flash"}) == ("auto", ASKED)
    with pytest.raises(InvalidInputError, match=r"EAGLE_KERNELS_LINEAR\) is 'flash'; expected auto, torch or triton$"):
        from_environment({"EAGLE_KERNELS_LINEAR": "flash"})
    with pytest.raises(InvalidInputError, match=r"is 'flash'; expected auto, torch or triton$"):
        from_environment({"EAGLE_KERNELS": "flash"})
    with pytest.raises(InvalidInputError, match=r"ATTENTION\) is 'fast'; expected auto, torch, triton or flash"):
        from_environment({"EAGLE_KERNELS_ATTENTION": "fast"})


@pytest.mark.parametrize("request_", ["auto", "torch"])
def test_each_call_goes_where_it_is_said_to_go(request_: str, fake: list[int]) -> None:
    ops, choices = choose_ops(Plan(GPU, FP16, request_, ASKED), PROMPT)
    found = {choice.when: choice.implementation for choice in choices if choice.op == "attention"}
    assert found == {"decoding and trees": "triton", "prompts": "flash"}
    calls = [*report(ops, None, PROMPT)]
    assert "attention (prompts): flash" in " ".join(map(str, calls))
    ran = []
    ops.attention.kernel = lambda *_, **__: ran.append("triton")
    ops.attention.plain.plain = lambda *_, **__: ran.append("sdpa")
    for rows, options, dtype in (
        (1, {}, FP16),
        (32, {}, FP16),
        (33, {}, FP16),
        (40, {"tree_words": torch.ones(1, 40, 1, dtype=torch.int64)}, FP16),
        (40, {}, FP32),
    ):
        q, k, v, kv_len = prompt_case(1, rows, [3])
        ops.attention(q.to(dtype), k.to(dtype), v.to(dtype), kv_len, scale=0.2, **options)
    q, k, v, kv_len = prompt_case(1, 34, [3], size=12)
    ops.attention(q, k, v, kv_len, scale=0.2)
    assert ran == ["triton", "triton", "triton", "sdpa", "sdpa"]
    assert fake == [33]


def test_a_model_prefills_by_it(fake: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cuda":
        pytest.skip("the model is on the CPU, where the kernels need the interpreter")
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    target = tiny_target(**sizes).half()
    model = EaModel(target, tiny_draft(target, "eagle1").half(), total_token=4, depth=1, top_k=2)
    monkeypatch.setattr("eagle.model.triton_kernels.integration.hardware", lambda devices: GPU)
    asked = {name: "torch" for name in selection.OPS if name != "attention"} | ASKED
    ids = torch.randint(17, (1, 40))
    wanted = model.generate(ids, max_new_tokens=1)
    optimize_eagle_with_triton(model, overrides=asked)
    assert any(
        str(choice).startswith("attention (prompts): flash, as asked, FlashAttention 2.8.3")
        for choice in model.kernel_report()
    )
    out = model.generate(ids, max_new_tokens=2)
    assert torch.equal(out[:, :41], wanted)
    assert fake == [40, 39]


def test_a_model_it_does_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target(num_hidden_layers=1, head_dim=12).half()
    model = EaModel(target, tiny_draft(target, "eagle1").half(), total_token=4, depth=1, top_k=2)
    monkeypatch.setattr("eagle.model.triton_kernels.integration.hardware", lambda devices: GPU)
    with pytest.raises(InvalidInputError, match="multiples of 8; use auto, torch or triton"):
        optimize_eagle_with_triton(model, overrides=ASKED)
    assert model.ops is TORCH_OPS
    assert model.kernel_plan is None


def test_which_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"flash_attn": "2.8.3.post1", "flash_attn_3": "3.0.0b1"}
    monkeypatch.setattr(hardware_module, "version", lambda name: versions[name])
    assert str(find_flash((9, 0))) == "FlashAttention 2.8.3.post1"
    three = ModuleType("flash_attn_interface")
    three.__spec__ = ModuleSpec("flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", three)
    find_flash.cache_clear()
    assert find_flash((8, 0)).problem is None
    assert "no flash_attn_with_kvcache" in find_flash((9, 0)).problem
    three.flash_attn_with_kvcache = with_kvcache
    find_flash.cache_clear()
    assert find_flash((9, 0)) == FlashAttention("flash_attn_interface", "3.0.0b1")
    versions["flash_attn"] = "2.5.9"
    find_flash.cache_clear()
    assert find_flash((8, 0)).problem == "it is older than 2.6"

    def broken(name):
        raise ImportError("undefined symbol: _ZN3c10\nmore")

    monkeypatch.setattr(hardware_module.importlib, "import_module", broken)
    find_flash.cache_clear()
    assert find_flash((8, 0)).problem == "flash_attn does not import (undefined symbol: _ZN3c10)"
