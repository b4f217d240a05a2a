"""Passes through a model's own modules in which a row's bits depend neither on the other rows nor on how many there are.

A library orders the sums of a matrix product, and PyTorch those of a mean, by how many rows go together. For the length of
a pass `RowLocal` sees every ATen op that the modules come down to, and

- has the linear kernel, whose order of sums follows from the weight's shape alone, compute their products with weights;
- takes a row's mean from ``native_layer_norm``, which gives each row a block of threads of its own;
- lets through what adds nothing up across a row: pointwise ops, views, copies, integers, the norms that PyTorch itself
  computes a row a block;
- refuses everything else among PyTorch's ops.

It does not see kernels launched past PyTorch's dispatcher; `eagle.model.row_trial` compares bits. The mode is seen by
Python alone: replays cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from eagle.errors import EagleError, UnsupportedModelError

aten = torch.ops.aten

Result = TypeVar("Result")

UNMARKED = frozenset(
    (
        *("_to_copy", "_unsafe_view", "cat", "constant_pad_nd", "copy_", "embedding", "fill_", "gather", "index"),
        *("index_select", "lift_fresh_copy", "masked_fill_", "repeat", "repeat_interleave", "stack", "zero_"),
        *("empty_like", "full_like", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros"),
        *("ones_like", "zeros_like", "tril", "triu", "complex", "glu", "log_sigmoid_forward", "polar"),
    )
)
"""Ops that move or round numbers, make room for them or compute each by itself. Most pointwise ops, and views, carry a mark
of their own."""

ROW_A_BLOCK = frozenset(("native_layer_norm", "_fused_rms_norm"))
"""Sums in an order that follows from the row's width alone (ATen/native/cuda/layer_norm_kernel.cu), and from whether it may
be read in vectors; a test holds it."""

VECTOR_BYTES = 16

PLAIN = (torch.Tensor, nn.Parameter)
"""Classes of tensors that compute as ATen does; others, such as quantised weights, bring functions of their own."""


class NotRowLocal(UnsupportedModelError):
    """Something that a model's modules do is not known to give a row the same bits whatever the number of rows."""


class RowLocal(TorchDispatchMode):
    """Has each row of a pass through ``model`` keep its bits. linear: ``x [M, K], weight [N, K], bias [N] or None →
    [M, N]``, of any M.

    An op that may not keep a row's bits, or a product that ``linear`` doesn't take, raises `NotRowLocal`.
    """

    def __init__(self, linear: Callable[..., torch.Tensor], model: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self._weights = {_memory(tensor) for tensor in (*model.parameters(), *model.buffers()) if type(tensor) in PLAIN}
        self._apart = 0

    def apart(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """``function``, known to treat each row by itself: what it does is not looked at."""

        @wraps(function)
        def unwatched(*args: Any, **kwargs: Any) -> Result:
            self._apart += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._apart -= 1

        return unwatched

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._apart:
            return func(*args, **kwargs)
        tensors = list(_tensors((args, kwargs)))
        for tensor in tensors:
            if type(tensor) not in PLAIN:
                raise NotRowLocal(f"{func} is a {type(tensor).__name__}'s own, which may sum in any order")
        if func is aten.mm.default and self._weighs(args[1]):
            return self._product(args[0], args[1], None)
        if func is aten.addmm.default and not kwargs and args[0].dim() == 1 and self._weighs(args[0], args[2]):
            return self._product(args[1], args[2], args[0])
        if func is aten.mean.dim and _last_dimension(*args, **kwargs):
            return _mean(*args, **kwargs)
        if func is aten.bmm.default and args[0].shape[-1] == 1:  # an outer product: RoPE's angles
            return args[0] * args[1]
        if not _drawn(func):
            if _keeps_bits(func):
                return func(*args, **kwargs)
            if _named(func, ROW_A_BLOCK) and len(args[1]) == 1:
                return func(_aligned(args[0]), *args[1:], **kwargs)
            if not any(map(_rounds, tensors)):
                return _exactly(func, args, kwargs, bool(tensors))
        with self:  # in inference mode ops come whole that otherwise come in parts
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            raise _unknown(func)
        return result

    def _weighs(self, *tensors: torch.Tensor) -> bool:
        """Whether these lie in the memory of the model's weights."""
        return all(_memory(tensor) in self._weights for tensor in tensors)

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``x @ weight + bias`` by the kernel."""
        try:
            return self.linear(x, weight.t(), bias)
        except EagleError:
            raise
        except ValueError as error:
            raise NotRowLocal(f"a product the kernels don't take: {error}") from error


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _named(func: Any, names: frozenset[str]) -> bool:
    return func.namespace == "aten" and func.overloadpacket.__name__ in names


def _keeps_bits(func: Any) -> bool:
    """Whether an op gives a row the same bits in any company."""
    marked = func.namespace == "aten" and (func.is_view or torch.Tag.pointwise in func.tags)
    return marked or _named(func, UNMARKED)


def _drawn(func: Any) -> bool:
    """Whether an op may draw random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags


def _rounds(tensor: torch.Tensor) -> bool:
    """Whether what is computed with a tensor is rounded."""
    return tensor.is_floating_point() or tensor.is_complex()


def _exactly(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: bool) -> Any:
    """An op over no tensors, or over integers, whose order doesn't matter unless floating-point numbers come of them."""
    result = func(*args, **kwargs)
    if given and any(map(_rounds, _tensors(result))):
        raise _unknown(func)
    return result


def _unknown(func: Any) -> NotRowLocal:
    return NotRowLocal(f"{func} is not known to give a row the same bits whatever the number of rows")


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """``x``, copied where it doesn't begin where vectors may."""
    return x.clone() if x.data_ptr() % VECTOR_BYTES else x


def _last_dimension(x: torch.Tensor, dim: list[int] | None, keepdim: bool = False, *, dtype: Any = None) -> bool:
    return dim is not None and x.dim() > 0 and list(dim) in ([-1], [x.dim() - 1]) and dtype in (None, x.dtype)


def _mean(x: torch.Tensor, dim: list[int], keepdim: bool = False, **_: Any) -> torch.Tensor:
    _, mean, _ = aten.native_layer_norm(_aligned(x), x.shape[-1:], None, None, 0.0)
    return mean.to(x.dtype) if keepdim else mean.squeeze(-1).to(x.dtype)


def _tensors(part: Any) -> Iterator[torch.Tensor]:
    """All tensors among an op's arguments."""
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, list | tuple):
        for inner in part:
            yield from _tensors(inner)
    elif isinstance(part, dict):
        yield from _tensors(tuple(part.values()))
