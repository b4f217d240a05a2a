"""Row-local passes of a model's own modules: which models have them, that a row's bits are its own, what is refused."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from test_target import FAMILIES
from tiny import relative_error, tiny_target

from eagle.errors import InvalidInputError
from eagle.model.row_local import NotRowLocal, RowLocal
from eagle.model.row_trial import lone_rows
from eagle.model.target import Target
from eagle.model.torch_ops import TORCH_OPS
from eagle.model.triton_kernels import linear
from eagle.model.triton_kernels.attention import attention

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"


def plain_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **_) -> torch.Tensor:
    """PyTorch's product for the weights that the kernel takes: the interpreter's takes a second a pass."""
    return F.linear(x, weight, bias) if weight.stride(1) == 1 else linear(x, weight, bias)


OPS = TORCH_OPS.replaced(**({"linear": linear, "attention": attention} if HAS_GPU else {"linear": plain_linear}))
REFUSED = {"mixtral": "_softmax", "gpt2": "a product the kernels don't take: weight"}
BARE = torch.nn.Module()  # without weights


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
            with pytest.raises(NotRowLocal, match=REFUSED[family]):
                lone_rows(target, OPS, torch.arange(2)[None])
            return
        lone_rows(target, OPS, torch.arange(6).view(2, 3) % 3)
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
    with torch.no_grad(), RowLocal(linear, BARE):
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

    with torch.inference_mode(inference), torch.no_grad(), RowLocal(counted, layer):
        out = layer(x)
    assert seen == [((6, 24), layer.weight.data_ptr(), layer.bias.data_ptr() if bias else None)]
    assert relative_error(out, layer(x)) < 1e-6


SUMS = {
    "sum.dim_IntList": lambda x: x.sum(-1),
    "mean.dim": lambda x: x.mean(0),
    "mean.dim of the middle": lambda x: x[None].mean(1),
    "mean.default": lambda x: x.mean(),
    "mean.dim to float64": lambda x: x.mean(-1, dtype=torch.float64),
    "_softmax": lambda x: x.softmax(-1),
    "std.correction": lambda x: x.std(-1),
    "var_mean": lambda x: torch.var_mean(x, -1),
    "amax": lambda x: x.amax(-1),
    "linalg_vector_norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "native_group_norm": lambda x: F.group_norm(x, 2),
    "convolution": lambda x: F.conv1d(x[None], x[:2, :4, None]),
    "bmm": lambda x: torch.bmm(x[None], x.t()[None]),
    "baddbmm": lambda x: torch.baddbmm(x[None, :, :4], x[None], x.t()[None]),
    "mm": lambda x: x @ x.t(),
    "addmm": lambda x: torch.addmm(x[:, :4], x, x.t()),
    "addmm of a vector": lambda x: torch.addmm(x[0, :4], x, x.t()),
    "addmm with beta": lambda x: torch.addmm(x[0, :4], x, x.t(), beta=2.0),
    "(scaled_dot_product|bmm) of attention": lambda x: F.scaled_dot_product_attention(*(x[None, None],) * 3),
    "cumsum": lambda x: x.cumsum(0),
    "topk": lambda x: x.topk(2).values,
    "index_put": lambda x: x.index_put_((torch.tensor([0, 0], device=x.device),), x[:2].clone(), accumulate=True),
    "index_add": lambda x: x.index_add(0, torch.tensor([0, 0], device=x.device), x[:2]),
    "scatter_add": lambda x: x.scatter_add_(0, torch.zeros(2, 6, dtype=torch.int64, device=x.device), x[:2].clone()),
    "sum of complex numbers": lambda x: torch.complex(x, x).sum(-1),
    "sum of integers as": lambda x: (x > 0).sum(-1, dtype=torch.float32),
    "_?softmax of integers as": lambda x: (x > 0).long().softmax(-1, dtype=torch.float32),
    "rand": lambda x: x + torch.rand(6, device=x.device),
    "bernoulli": lambda x: torch.bernoulli(x.abs().clamp(max=1)),
    "(bernoulli_|native_dropout)": lambda x: F.dropout(x, 0.5),
    "native_layer_norm over rows": lambda x: F.layer_norm(x, x.shape),
    "flip": lambda x: x.flip(0),
    "roll": lambda x: x.roll(1, 0),
}
"""What may sum across rows, in any order, or draw; the key begins with the op's name, or that of what it comes down to."""


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("op", SUMS)
def test_what_may_sum_across_rows_or_in_any_order_is_refused(op: str, inference: bool) -> None:
    x = torch.randn(4, 6, device=DEVICE)
    said = rf"^aten\.(_native_|_)?{op.split()[0]}.* is not known to give a row the same bits"
    with torch.inference_mode(inference), RowLocal(F.linear, BARE), pytest.raises(NotRowLocal, match=said):
        SUMS[op](x)


EACH_BY_ITSELF = {
    "gated": lambda x: F.glu(x) + F.logsigmoid(x[:, :3]),
    "complex angles": lambda x: torch.view_as_real(torch.polar(x.abs(), x) * torch.complex(x, x)),
    "copies": lambda x: torch.cat([x, x]).repeat(2, 1)[:, [0, 2]].tril(),
    "dropout that does nothing": lambda x: F.dropout(x, 0.5, training=False),
    "integers": lambda x: x + (x > 0).cumsum(-1),
    "an outer product": lambda x: x[None, :, :1] @ x[None, :1],
}


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("op", EACH_BY_ITSELF)
def test_what_computes_each_number_by_itself_passes(op: str, inference: bool) -> None:
    x = torch.randn(4, 6, device=DEVICE)
    with torch.inference_mode(inference), torch.no_grad(), RowLocal(F.linear, BARE):
        found = EACH_BY_ITSELF[op](x)
    assert relative_error(torch.view_as_real(found) if found.is_complex() else found, EACH_BY_ITSELF[op](x)) < 1e-6


def test_a_slice_is_summed_as_a_copy_of_it() -> None:
    x = torch.randn(5000, device=DEVICE)
    with torch.no_grad(), RowLocal(F.linear, BARE):
        for start in range(1, 5):
            part = x[start : start + 4001]
            assert torch.equal(_mean(part), _mean(part.clone()))


class Scaled(torch.Tensor):
    """A weight with functions of its own."""


def test_a_weight_of_another_class_is_refused() -> None:
    x, weight = torch.randn(2, 6), torch.randn(4, 6).as_subclass(Scaled)
    with (
        torch.no_grad(),
        RowLocal(F.linear, BARE),
        pytest.raises(NotRowLocal, match=r"aten\.\w+\.\w+ is a Scaled's own"),
    ):
        torch.mm(x, weight.t())


def test_a_bias_that_is_no_weight_is_refused() -> None:
    layer, x = torch.nn.Linear(6, 6), torch.randn(6, 6)
    with torch.no_grad(), RowLocal(F.linear, layer):
        with pytest.raises(NotRowLocal, match=r"aten\.addmm"):
            F.linear(x, layer.weight, x[0])
        with pytest.raises(NotRowLocal, match=r"aten\.addmm"):
            torch.addmm(layer.bias, x, layer.weight.t(), beta=2.0)


@pytest.mark.parametrize(
    ("error", "wanted", "said"),
    [
        (ValueError("rows of 3"), NotRowLocal, "a product the kernels don't take: rows of 3"),
        (InvalidInputError("another thread"), InvalidInputError, "another thread"),
        (RuntimeError("no room"), RuntimeError, "no room"),
    ],
)
def test_what_the_product_raises(error: Exception, wanted: type[Exception], said: str) -> None:
    def failing(*_):
        raise error

    layer, x = torch.nn.Linear(6, 4), torch.randn(2, 6)
    with torch.no_grad(), RowLocal(failing, layer), pytest.raises(wanted, match=said) as raised:
        layer(x)
    assert type(raised.value) is wanted


def test_a_modules_own_error_stays_its_own() -> None:
    def refuse(module, args):
        raise ValueError("too wide")

    layer, x = torch.nn.Linear(6, 4), torch.randn(2, 6)
    layer.register_forward_pre_hook(refuse)
    with torch.no_grad(), RowLocal(F.linear, layer), pytest.raises(ValueError, match=r"^too wide$") as raised:
        layer(x)
    assert type(raised.value) is ValueError
