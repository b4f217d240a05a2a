"""Weights as the fused layers take them: products that share an input packed into one, without holding anything twice.

Packing replaces the memory behind the modules' parameters and nothing else: each becomes a view of the packed tensor, so
the modules run as before, and a weight edited in place is edited for both. `PackedWeights.restore` undoes it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from eagle.errors import InvalidInputError
from eagle.model.ops import Ops
from eagle.model.triton_kernels.quantize import FP8_CAPABILITY, pack_gate_up, pack_rows, quantize_weight


class NormWeight(NamedTuple):
    """An RMSNorm's weight [K] and its epsilon."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Product:
    """One matrix product's weight: [N, K], bias [N] or None, scale [N] float32 with a one-byte weight."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None

    def __call__(
        self, ops: Ops, x: torch.Tensor, *, norm: NormWeight | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``product(norm(x)) + residual``."""
        more = {} if residual is None else {"residual": residual}
        return ops.linear(x, self.weight, self.bias, **more, **self._options(norm))

    def swiglu(self, ops: Ops, x: torch.Tensor, norm: NormWeight | None = None) -> torch.Tensor:
        """``silu(gate) · up`` for a weight from `pack_gate_up`."""
        return ops.gate_up_swiglu(x, self.weight, self.bias, **self._options(norm))

    def add_norm(
        self, ops: Ops, x: torch.Tensor, residual: torch.Tensor, norm: NormWeight
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``(norm(total), total)`` with ``total = product(x) + residual``."""
        return ops.linear_add_rms_norm(
            x, self.weight, residual, norm.weight, norm.eps, self.bias, **self._options(None)
        )

    def _options(self, norm: NormWeight | None) -> dict[str, Any]:
        options: dict[str, Any] = {} if self.scale is None else {"scale": self.scale}
        return options if norm is None else options | {"norm_weight": norm.weight, "eps": norm.eps}


@dataclass
class _Group:
    """Linears whose parameters are views of one packed weight and bias."""

    linears: tuple[nn.Linear, ...]
    product: Product
    places: list[tuple[nn.Linear, str, torch.Tensor]] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)

    def intact(self) -> bool:
        return all(_same_memory(getattr(linear, name), view) for linear, name, view in self.places)

    def restore(self) -> None:
        for handle in self.handles:
            handle.remove()
        for linear, name, view in self.places:
            parameter = getattr(linear, name)
            if _same_memory(parameter, view):
                parameter.data = view.clone(memory_format=torch.contiguous_format)


class PackedWeights:
    """The packed products of one model, in the memory of its own parameters. Several users share them."""

    def __init__(self) -> None:
        self.users = 0
        self._groups: dict[tuple[int, ...], _Group] = {}
        self._single: dict[int, tuple[nn.Linear, Product]] = {}

    def stacked(self, *linears: nn.Linear) -> Product:
        """Products of one input, their rows one below the other."""
        return self._packed(linears, pack_rows, lambda whole: whole.split([len(linear.weight) for linear in linears]))

    def interleaved(self, gate: nn.Linear, up: nn.Linear) -> Product:
        """Two products of one input, rows in turn (`pack_gate_up`)."""
        return self._packed((gate, up), pack_gate_up, lambda whole: (whole[0::2], whole[1::2]))

    def single(self, linear: nn.Linear) -> Product:
        """A product as it is."""
        product = Product(linear.weight, linear.bias)
        self._single[id(linear)] = (linear, product)
        return product

    def rows(self, weight: torch.Tensor) -> Product:
        """A product of bare rows [N, K]."""
        return Product(weight)

    def intact(self) -> bool:
        """Whether the modules' parameters still are what the products read; ``.to`` and loading by assignment end it."""
        single = all(one.weight is linear.weight and one.bias is linear.bias for linear, one in self._single.values())
        return single and all(group.intact() for group in self._groups.values())

    def restore(self) -> None:
        """Give every parameter memory of its own again."""
        self._single.clear()
        with torch.inference_mode(False), torch.no_grad():
            while self._groups:
                self._groups.popitem()[1].restore()

    def _packed(self, linears: tuple[nn.Linear, ...], pack: Any, unpack: Any) -> Product:
        key = tuple(map(id, linears))
        known = self._groups.get(key)
        if known is not None and known.intact():
            return known.product
        if known is not None:
            known.restore()
        with torch.inference_mode(False), torch.no_grad():
            weight = pack(*(linear.weight.data for linear in linears))
            biases = [linear.bias for linear in linears]
            bias = None if biases[0] is None else pack(*(part.data for part in biases))
            group = _Group(linears, Product(weight, bias))
            for name, whole in [("weight", weight)] + ([] if bias is None else [("bias", bias)]):
                for linear, view in zip(linears, unpack(whole), strict=True):
                    getattr(linear, name).data = view
                    group.places.append((linear, name, view))
        group.handles = [linear.register_state_dict_post_hook(_save_contiguous) for linear in linears]
        self._groups[key] = group
        return group.product


WEIGHT_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def one_byte_dtype(setting: str, name: str, device: torch.device) -> torch.dtype:
    """The dtype ``name`` means. Raises InvalidInputError, naming the ``setting``, for another one or a GPU without it."""
    if name not in WEIGHT_DTYPES:
        raise InvalidInputError(f"{setting} is {name!r}; expected None, {' or '.join(map(repr, WEIGHT_DTYPES))}")
    if name == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        found = torch.cuda.get_device_name(device)
        raise InvalidInputError(f"{setting} is 'fp8', which needs compute capability 8.9; {found} has less: use int8")
    return WEIGHT_DTYPES[name]


class QuantizedWeights:
    """The same products as one-byte copies; the modules stay as they are."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._sources: list[tuple[nn.Linear, torch.Tensor]] = []

    def stacked(self, *linears: nn.Linear) -> Product:
        """See `PackedWeights`."""
        return self._quantized(linears, pack_rows)

    def interleaved(self, gate: nn.Linear, up: nn.Linear) -> Product:
        """See `PackedWeights`."""
        return self._quantized((gate, up), pack_gate_up)

    def single(self, linear: nn.Linear) -> Product:
        """See `PackedWeights`."""
        self._sources.append((linear, linear.weight.detach()))
        return replace(self.rows(linear.weight.data), bias=linear.bias)

    def rows(self, weight: torch.Tensor) -> Product:
        """See `PackedWeights`."""
        with torch.inference_mode(False), torch.no_grad():
            values, scale = quantize_weight(weight, self.dtype)
        return Product(values, None, scale)

    def intact(self) -> bool:
        """Whether the copies are of the modules' present parameters; edits in place go unseen."""
        return all(_same_memory(linear.weight, source) for linear, source in self._sources)

    def _quantized(self, linears: Sequence[nn.Linear], pack: Any) -> Product:
        self._sources += [(linear, linear.weight.detach()) for linear in linears]
        product = self.rows(pack(*(linear.weight.data for linear in linears)))
        biases = [linear.bias for linear in linears]
        return product if biases[0] is None else replace(product, bias=pack(*(part.data for part in biases)))


_packed: WeakKeyDictionary[nn.Module, PackedWeights] = WeakKeyDictionary()
_packed_guard = threading.Lock()


@contextmanager
def packing(model: nn.Module) -> Iterator[PackedWeights]:
    """The packed weights of ``model`` for one more user, who gives them back by `release`. Others wait meanwhile."""
    with _packed_guard:
        weights = _packed.setdefault(model, PackedWeights())
        weights.users += 1
        try:
            yield weights
        except BaseException:
            _release(model, weights)
            raise


def release(model: nn.Module, weights: PackedWeights) -> None:
    """One user less; after the last one the parameters have memory of their own again."""
    with _packed_guard:
        _release(model, weights)


def _release(model: nn.Module, weights: PackedWeights) -> None:
    weights.users -= 1
    if weights.users == 0:
        weights.restore()
        _packed.pop(model, None)


def _same_memory(tensor: torch.Tensor, view: torch.Tensor) -> bool:
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) == (
        view.data_ptr(),
        view.shape,
        view.stride(),
        view.dtype,
    )


def _save_contiguous(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Interleaved parameters overlap in memory, which safetensors refuses: save copies of them."""
    for name in ("weight", "bias"):
        tensor = state_dict.get(prefix + name)
        if tensor is not None and not isinstance(tensor, nn.Parameter):  # a parameter: keep_vars asks for itself
            state_dict[prefix + name] = tensor.contiguous()
