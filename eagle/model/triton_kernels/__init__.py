"""Triton kernels for every op of an EAGLE step, and the switch that puts them into an `EaModel`.

    from eagle.model.triton_kernels import optimize_eagle_with_triton, restore_eagle

Each kernel is also a function of its own: ``from eagle.model.triton_kernels import attention``. Names resolve when they
are asked for, so this package imports where triton is not installed; only a kernel then raises ImportError.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_SWITCHES = {"optimize_eagle_with_triton": "integration", "restore_eagle": "integration"}
_KERNELS = {
    "add_rms_norm": "norm",
    "attention": "attention",
    "cat_rms_norm": "norm",
    "draft_input": "draft_input",
    "draft_positions": "draft_positions",
    "evaluate_posterior": "posterior",
    "evaluate_posterior_seeded": "posterior",
    "finish_tree": "tree_decoding",
    "gate_up_swiglu": "linear",
    "grow_tree": "tree_decoding",
    "kv_append": "kv_cache",
    "kv_compact": "kv_cache",
    "kv_retrieve": "kv_cache",
    "linear": "linear",
    "linear_add_rms_norm": "linear",
    "pack_gate_up": "quantize",
    "quantize_weight": "quantize",
    "rms_norm": "norm",
    "rope_": "rope",
    "rope_append": "rope",
    "swiglu": "mlp",
    "swiglu_packed": "mlp",
    "topk_log_softmax": "topk",
    "update_inputs": "update_inputs",
}

__all__ = [*_SWITCHES, *_KERNELS]


def __getattr__(name: str) -> Any:
    module = _SWITCHES.get(name) or _KERNELS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{module}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "triton":
            raise
        raise ImportError(f"{__name__}.{name} needs triton, which is not here: pip install 'triton>=3.6'") from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Some functions share the name of their module. Importing a module sets it on its package; the function wins."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _KERNELS.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
