"""The ops table that a plan leads to: kernels where they serve, with the PyTorch op for the calls they do not take.

Which of the two serves a call follows from shapes alone, so nothing is read on the host and a captured call always
takes the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

from eagle.model.kv_cache import LayerShape
from eagle.model.ops import Ops
from eagle.model.torch_ops import TORCH_OPS
from eagle.model.triton_kernels.flash import SIZE_STEP, FlashPrompts
from eagle.model.triton_kernels.selection import (
    FLASH_LIMITS,
    OPS,
    PROMPTS,
    ROW_SIZES,
    Bound,
    Choice,
    Plan,
    bounds,
    flash_serves,
)

MODULES = {
    "attention": "attention",
    "kv_append": "kv_cache",
    "kv_retrieve": "kv_cache",
    "kv_compact": "kv_cache",
    "rope_append": "rope",
    "draft_positions": "draft_positions",
    "topk_log_softmax": "topk",
    "grow_tree": "tree_decoding",
    "finish_tree": "tree_decoding",
    "evaluate_posterior": "posterior",
    "update_inputs": "update_inputs",
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "cat_rms_norm": "norm",
    "draft_input": "draft_input",
    "swiglu": "mlp",
    "linear": "linear",
    "gate_up_swiglu": "linear",
    "linear_add_rms_norm": "linear",
}
"""The module of this package that holds each op's kernel, under the op's name."""


def _attention(q, k_cache, v_cache, kv_len, tree_words=None, **_):
    rows, size, v_size = q.shape[1], q.shape[-1], v_cache.shape[-1]
    tree = 0 if tree_words is None else rows
    return {"causal_rows": rows - tree, "tree": tree, **head_sizes(size, v_size, q.dtype)}


def head_sizes(size: int, v_size: int, dtype: torch.dtype) -> dict[str, int]:
    """The sizes of attention that follow from what a layer stores: head sizes of keys and values, and their dtype."""
    return {
        "head_size": max(size, v_size),
        "head_rest": size % SIZE_STEP,
        "head_difference": abs(size - v_size),
        "value_bytes": dtype.itemsize,
    }


def largest_heads(layers: Iterable[LayerShape]) -> dict[str, int]:
    """The largest of each of the layers' `head_sizes`, which is what a bound has to take."""
    found = [head_sizes(layer.k_size, layer.v_size, layer.dtype) for layer in layers]
    return {name: max(sizes[name] for sizes in found) for name in found[0]}


def _kv_compact(k, v, nodes, *_, **__):
    return {"path": nodes.shape[1]}


def _topk_log_softmax(logits, k):
    return {"top_k": k}


def _grow_tree(candidates, *_, **__):
    return {"top_k": candidates.frontier_index.shape[2], "candidates": candidates.scores.shape[1]}


def _finish_tree(candidates, root, total_token):
    return {"nodes": total_token, "candidates": candidates.scores.shape[1]}


def _evaluate_posterior(logits, *_, **__):
    return {"nodes": logits.shape[1]}


def _update_inputs(state, accepted, *_, **__):
    return {"path": accepted.nodes.shape[1]}


def _norm(x, *_, **__):
    return {"width": x.shape[-1]}


def _linear(x, weight, *_, **__):
    rows = x.numel() // weight.shape[1]
    return {"rows": 0, "one_byte_rows": rows} if weight.itemsize == 1 else {"rows": rows, "one_byte_rows": 0}


def _linear_add_rms_norm(x, weight, *_, **__):
    return {**_linear(x, weight), "width": weight.shape[0]}


SIZES: dict[str, Callable[..., dict[str, int]]] = {
    "attention": _attention,
    "kv_compact": _kv_compact,
    "topk_log_softmax": _topk_log_softmax,
    "grow_tree": _grow_tree,
    "finish_tree": _finish_tree,
    "evaluate_posterior": _evaluate_posterior,
    "update_inputs": _update_inputs,
    "rms_norm": _norm,
    "add_rms_norm": _norm,
    "cat_rms_norm": _norm,
    "draft_input": _norm,
    "linear": _linear,
    "gate_up_swiglu": _linear,
    "linear_add_rms_norm": _linear_add_rms_norm,
}
"""The sizes of a call that a bound may name. Ops without an entry have no bounds."""


@dataclass(eq=False)
class Served:
    """An op as a kernel and the PyTorch op (or FlashAttention and it) serve it between them."""

    op: str
    kernel: Callable[..., Any]
    plain: Callable[..., Any]
    bounds: tuple[Bound, ...]
    plan: Plan

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.bounds:
            try:
                sizes = SIZES[self.op](*args, **kwargs)
            except (IndexError, ZeroDivisionError):  # too few dimensions, or an empty weight: the kernel tells which
                return self.kernel(*args, **kwargs)
            for bound in self.bounds:
                if sizes[bound.size] > bound.most:
                    return self.plain(*args, **kwargs)
        return self.kernel(*args, **kwargs)


def kernel(op: str) -> Callable[..., Any]:
    """The Triton function of an op. Imports triton; raises ImportError where it can't be."""
    return getattr(import_module(f"eagle.model.triton_kernels.{MODULES[op]}"), op)


def choose_ops(plan: Plan, sizes: Mapping[str, int] | None = None) -> tuple[Ops, list[Choice]]:
    """The table for a plan, and what serves each op in a run of these sizes (see `selection.choose`), and why.

    Kernels are imported only where one serves. Raises InvalidInputError for "triton" where no kernel can run.
    """
    served = {}
    for op in OPS:
        if plan.choose(op, {}).implementation == "triton":
            plain = getattr(TORCH_OPS, op)
            if op == "linear_add_rms_norm" and plan.choose("add_rms_norm", {}).implementation == "triton":
                plain = _library_product_kernel_norm
            limits, flash = bounds(op, plan.hardware, plan.wanted(op)), plan.hardware.flash
            if PROMPTS in limits and flash and flash_serves(plan.dtype, plan.hardware, plan.wanted(op)):
                plain = Served(op, FlashPrompts(flash), plain, FLASH_LIMITS, plan)
            served[op] = Served(op, kernel(op), plain, limits, plan)
    return TORCH_OPS.replaced(**served), [choice for op in OPS for choice in plan.choices(op, sizes or {})]


def _library_product_kernel_norm(x, weight, residual, norm_weight, eps, bias=None, *, scale=None):
    """`linear_add_rms_norm` for prompts: the library's product, and one launch in place of eight for what follows."""
    return kernel("add_rms_norm")(TORCH_OPS.linear(x, weight, bias, scale=scale), residual, norm_weight, eps)


@lru_cache(maxsize=32)
def decoding_ops(ops: Ops) -> Ops:
    """A table for decoding steps: the matrix products' kernels serve any number of rows, not only their best 64.

    The library's result for a row depends on how many rows there are; the kernels' does not. So a batch of trees gets
    the bits of plain decoding although the library would be faster. Entries that are no `Served` stay as they are, and
    the same table comes back for the same ``ops``.
    """
    found = {}
    for op in OPS:
        served = getattr(ops, op)
        if isinstance(served, Served) and any(bound.size in ROW_SIZES for bound in served.bounds):
            found[op] = replace(served, bounds=tuple(bound for bound in served.bounds if bound.size not in ROW_SIZES))
    return ops.replaced(**found) if found else ops


def products_by_kernel(ops: Ops) -> bool:
    """Whether kernels compute all matrix products of a fused model, so that a row's bits don't depend on the others."""
    return all(isinstance(getattr(ops, op), Served) for op in ("linear", "gate_up_swiglu", "linear_add_rms_norm"))


def kernel_serves_attention(ops: Ops, layers: Iterable[LayerShape]) -> bool:
    """Whether a kernel computes attention over layers of these shapes, so that a row's bits don't depend on where its keys
    lie. Its bounds on rows don't count: they divide prompts."""
    served, sizes = ops.attention, largest_heads(layers)
    return isinstance(served, Served) and all(sizes.get(bound.size, 0) <= bound.most for bound in served.bounds)


def report(ops: Ops, plan: Plan | None, sizes: Mapping[str, int]) -> list[Choice]:
    """What serves each entry of a table in a run of these sizes, and why. plan: the one in force, if any."""
    found: list[Choice] = []
    for op in OPS:
        function = getattr(ops, op)
        if isinstance(function, Served):
            found += function.plan.choices(op, sizes)
        elif function is not getattr(TORCH_OPS, op):
            name = getattr(function, "__qualname__", type(function).__qualname__)
            found.append(Choice(op, "custom", f"given by the caller: {getattr(function, '__module__', '?')}.{name}"))
        elif plan is not None and plan.choose(op, {}).implementation != "triton":
            found += plan.choices(op, sizes)
        else:
            plain = "sdpa" if op == "attention" else "torch"
            found.append(Choice(op, plain, "kernels are off; optimize_eagle_with_triton turns them on"))
    return found
