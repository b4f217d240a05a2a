"""Row-local passes of a model's own modules: which models have them, that a row's bits are its own, and that an engine
with kernels takes them in place of padding."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from test_target import FAMILIES
from tiny import relative_error, tiny_draft, tiny_target

from eagle.engine.session import Session
from eagle.errors import UnsupportedModelError
from eagle.model.ea_model import EaModel
from eagle.model.row_local import NotRowLocal, RowLocal
from eagle.model.target import Target
from eagle.model.torch_ops import TORCH_OPS
from eagle.model.triton_kernels import linear, optimize_eagle_with_triton
from eagle.model.triton_kernels.attention import attention
from eagle.model.triton_kernels.dispatch import Served
from eagle.model.triton_kernels.integration import plan_for

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"


def plain_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **_) -> torch.Tensor:
    """PyTorch's product for the weights that the kernel takes: the interpreter's takes a second a pass."""
    return F.linear(x, weight, bias) if weight.stride(1) == 1 else linear(x, weight, bias)


OPS = TORCH_OPS.replaced(**({"linear": linear, "attention": attention} if HAS_GPU else {"linear": plain_linear}))
REFUSED = {"mixtral": "_softmax", "gpt2": "a product the kernels don't take: weight"}


def tree_pass(target: Target, tokens: list[int], *, row_local: bool) -> torch.Tensor:
    """Logits [N, V] of a chain of ``tokens`` after an empty prefix."""
    rows = torch.arange(len(tokens), device=DEVICE)
    words = torch.tensor([[[(2 << row) - 1] for row in range(len(tokens))]], device=DEVICE)
    kv_len = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    ids = torch.tensor([tokens], device=DEVICE)
    tree = {"depths": rows[None], "tree_words": words}
    return target.forward(ids, target.new_cache(1, 64), kv_len, **tree, ops=OPS, row_local=row_local)[0][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("family", FAMILIES)
def test_which_families_are_row_local(family: str, inference: bool, dtype: torch.dtype) -> None:
    target = Target(tiny_target(FAMILIES[family], spread=1.0).to(DEVICE, dtype), OPS)
    with torch.inference_mode(inference):
        if family in REFUSED:
            with pytest.raises(UnsupportedModelError, match=REFUSED[family]):
                target.check_row_local(OPS)
            return
        target.check_row_local(OPS)
        tokens = torch.randint(29, (5,)).tolist()
        own, found = (tree_pass(target, tokens, row_local=row_local) for row_local in (False, True))
    assert relative_error(found, own) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="a CPU's library and the interpreter's dots sum as they like")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in REFUSED])
def test_a_pass_gives_a_row_the_bits_of_any_other_pass(family: str, dtype: torch.dtype) -> None:
    target = Target(tiny_target(FAMILIES[family]).to(DEVICE, dtype), OPS)
    tokens = torch.randint(29, (60,)).tolist()
    wanted = tree_pass(target, tokens, row_local=True)
    for count in (1, 2, 3, 7, 16, 17, 33, 59):
        assert torch.equal(tree_pass(target, tokens[:count], row_local=True), wanted[:count]), count


def _mean(x: torch.Tensor) -> torch.Tensor:
    return x.pow(2).mean(-1, keepdim=True)


ROWWISE = {
    "mean": _mean,
    "mean of the last of two dimensions": lambda x: x.mean(x.dim() - 1),
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:], x[0], x[0]),
    "bare layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms norm": lambda x: F.rms_norm(x, x.shape[-1:], None, 1e-6),
}


@pytest.mark.parametrize("width", [16, 33, 128, 576, 4096, 5000])
@pytest.mark.parametrize("op", ROWWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_and_means_keep_a_rows_bits(op: str, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(200, width, device=DEVICE).to(dtype)
    with torch.no_grad(), RowLocal(linear):
        wanted = ROWWISE[op](x)
        for count in (1, 2, 3, 8, 15, 16, 31, 64, 65, 199):
            assert torch.equal(ROWWISE[op](x[:count]), wanted[:count]), count
    assert relative_error(wanted, ROWWISE[op](x.double())) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("bias", [False, True])
def test_products_with_weights_go_to_the_kernel(bias: bool, inference: bool) -> None:
    layer, x, seen = torch.nn.Linear(24, 40, bias=bias), torch.randn(2, 3, 24), []

    def counted(rows: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
        seen.append((tuple(rows.shape), weight.data_ptr(), None if shift is None else shift.data_ptr()))
        return F.linear(rows, weight, shift)

    with torch.inference_mode(inference), torch.no_grad(), RowLocal(counted):
        out = layer(x)
    assert seen == [((6, 24), layer.weight.data_ptr(), layer.bias.data_ptr() if bias else None)]
    assert relative_error(out, layer(x)) < 1e-6


@pytest.mark.parametrize(
    "op",
    [
        lambda x: x.sum(-1),
        lambda x: x.mean(0),
        lambda x: x.mean(),
        lambda x: x.mean(-1, dtype=torch.float64),
        lambda x: x.softmax(-1),
        lambda x: x.std(-1),
        lambda x: torch.bmm(x[None], x.t()[None]),
        lambda x: torch.addmm(x[:, :4], x, x.t()[:, :4]),
        lambda x: torch.addmm(x[0, :4], x, x.t()[:, :4], beta=2.0),
        lambda x: x.cumsum(0),
        lambda x: x.topk(2).values,
    ],
)
def test_what_may_sum_across_rows_or_in_any_order_is_refused(op) -> None:
    with torch.no_grad(), RowLocal(F.linear), pytest.raises(NotRowLocal, match=r"aten\.\w+"):
        op(torch.randn(4, 6))


class Scaled(torch.Tensor):
    """A weight with functions of its own."""


def test_a_weight_of_another_class_is_refused() -> None:
    weight = torch.randn(4, 6).as_subclass(Scaled)
    with torch.no_grad(), RowLocal(F.linear), pytest.raises(NotRowLocal, match=r"aten\.\w+\.\w+ is a Scaled's own"):
        torch.mm(torch.randn(2, 6), weight.t())


def test_integers_may_be_added_in_any_order() -> None:
    with RowLocal(F.linear):
        assert torch.arange(5).cumsum(0).sum() == 20


def engine(monkeypatch: pytest.MonkeyPatch, family: str, exact: bool | str, *, replays: bool) -> tuple[EaModel, list]:
    """A model under the kernels, and what each target pass of its steps is: rows, and whether row-local. replays: have it
    hold its steps captured, though here their ops run in turn."""
    model = tiny_target(FAMILIES[family]).to(DEVICE)
    eagle = EaModel(model, tiny_draft(model), total_token=12, depth=2, top_k=4)
    monkeypatch.setattr(Session, "replays", replays)
    kept = ("attention", "linear", "gate_up_swiglu", "linear_add_rms_norm")
    served = {op: Served(op, getattr(OPS, op), getattr(TORCH_OPS, op), (), plan_for(eagle)) for op in kept}
    optimize_eagle_with_triton(eagle, ops=OPS.replaced(**served), engine="eager", fused="off", exact=exact)
    forward, passes = eagle.target.forward, []

    def watched(tokens: torch.Tensor, *args, row_local: bool = False, **options):
        if options.get("depths") is not None:
            passes.append((tokens.shape[1], row_local))
        return forward(tokens, *args, row_local=row_local, **options)

    nothing = {"capture": False, "pool": None, "stream": None}
    monkeypatch.setattr(eagle._session.captures, "_place", lambda run: nothing)
    eagle._session._bits.refusal()
    monkeypatch.setattr(eagle.target, "forward", watched)
    return eagle, passes


@pytest.mark.parametrize(
    ("family", "exact", "replays", "rows", "row_local"),
    [
        ("llama", True, True, 12, True),
        ("llama", "auto", True, 12, True),
        ("llama", True, False, 64, False),
        ("llama", "auto", False, 12, False),
        ("llama", False, True, 12, False),
        ("gpt2", True, True, 64, False),
        ("gpt2", "auto", True, 12, False),  # 52 rows added to 12: too many
    ],
)
def test_which_passes_are_row_local(family, exact, replays, rows, row_local, monkeypatch) -> None:
    eagle, passes = engine(monkeypatch, family, exact, replays=replays)
    ids = torch.randint(29, (1, 5), device=DEVICE)
    tree = eagle.generate(ids, max_new_tokens=3)
    assert set(passes) == {(rows, row_local)}
    passes.clear()
    assert torch.equal(eagle.generate(ids, max_new_tokens=3, speculative=False), tree)
    assert set(passes) == {(64 if rows == 64 else 1, row_local)}


def test_the_report_tells_how_modules_are_exact(monkeypatch) -> None:
    def said(family: str, exact: bool | str, *, replays: bool = True) -> str:
        eagle, _ = engine(monkeypatch, family, exact, replays=replays)
        return {choice.op: choice.reason for choice in eagle.kernel_report()}["step"]

    for exact in (True, "auto"):
        assert said("llama", exact).endswith("; exact: the kernels compute the products of the target's own modules")
    assert "whole tiles of 64 rows (aten._softmax.default may sum in an order" in said("mixtral", True)
    assert "whole tiles of 64 rows where that takes at most a tenth longer (aten._softmax" in said("mixtral", "auto")
    assert said("llama", True, replays=False).endswith("; exact: every pass in whole tiles of 64 rows")
    assert "exact" not in said("llama", False)


def test_modules_are_looked_at_anew_when_they_change(monkeypatch) -> None:
    eagle, _ = engine(monkeypatch, "llama", True, replays=True)
    assert not eagle.library_products
    norm = eagle.base_model.model.norm
    norm.register_forward_hook(lambda module, args, out: out.softmax(-1))
    eagle.generate(torch.randint(29, (1, 5), device=DEVICE), max_new_tokens=2)
    assert eagle.library_products
