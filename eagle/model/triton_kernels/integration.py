"""Kernels on, kernels off: one call each. Target and draft read their ops from one table, which is what is swapped; on a
GPU the steps are captured too.

No module or attention setting of the target changes, and no weight's values; fusing packs the weights of a Llama-like
target and leaves its parameters as views of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from eagle.engine.settings import EngineSettings, Exact
from eagle.errors import InvalidInputError
from eagle.model.ea_model import EaModel
from eagle.model.ops import Ops
from eagle.model.switch import Switch
from eagle.model.triton_kernels.dispatch import Served, choose_ops, kernel_serves_attention, largest_heads
from eagle.model.triton_kernels.hardware import hardware
from eagle.model.triton_kernels.selection import CASES, DTYPES, FLASH, OPS, Plan, check_names, from_environment
from eagle.model.triton_kernels.tuned_table import tuned_linears

ENGINE = "engine"
"""The key of the `Switch` among the original methods: the engine's former settings, and the way back."""


def optimize_eagle_with_triton(
    model: EaModel,
    *,
    ops: Ops | None = None,
    kernels: str | None = None,
    overrides: Mapping[str, str] | None = None,
    engine: str = "auto",
    fused: str = "auto",
    exact: Exact = "auto",
    draft_dtype: str | None = None,
    target_dtype: str | None = None,
) -> tuple[EaModel, dict[str, Callable[..., Any]]]:
    """Have Triton kernels serve the ops of target and draft, where they can and should, and on a GPU replay each step as
    one CUDA graph; the next generation uses them.

    kernels: "auto" (what is fastest here; PyTorch where there is no GPU), "triton" or "torch", for all ops; overrides:
    the same for single ones, by name, and "flash" for attention (FlashAttention for prompts, the kernel for the rest).
    What is left out comes from EAGLE_KERNELS and EAGLE_KERNELS_<OP>. ops: a table of your own to serve instead. engine,
    fused, exact, draft_dtype, target_dtype: see `eagle.engine.settings.EngineSettings`; where all ops are PyTorch's,
    "auto" leaves engine and target as they are. Returns the model itself and, for each op that changed, the function
    that served before, with the engine's former settings, for `restore_eagle`. `EaModel.kernel_report` tells what
    serves now.

    Raises TypeError for something that is no EaModel, InvalidInputError for a name that does not exist, for "triton"
    where no kernel can run, for ``exact=True`` where none serves attention, for "flash" where FlashAttention can't serve
    and while a generation of this thread is open (another thread's is waited for), UnsupportedModelError for
    ``fused="on"`` or a target_dtype where the target can't be fused, and OutOfMemoryError where there is no room for
    packing. The model is then as it was.
    """
    _check_model(model, "optimize_eagle_with_triton")
    settings = EngineSettings(engine, fused, exact, draft_dtype, target_dtype)
    if ops is not None and not isinstance(ops, Ops):
        raise TypeError(f"ops is a {type(ops).__name__}; expected an eagle.model.ops.Ops table, or None")
    if ops is not None and (kernels is not None or overrides is not None):
        raise InvalidInputError("ops was given together with kernels or overrides; pass a table or a choice, not both")
    plan = model.kernel_plan
    if ops is None:
        plan = plan_for(model, kernels, overrides)
        _check_flash(plan, model)
        ops, _ = choose_ops(plan)
        if isinstance(ops.linear, Served) and plan.hardware.kind == "cuda":
            tuned_linears(plan.hardware.name)  # a table that can't be read is told now, not in the first generation
    settings = _settled(settings, model, ops)
    with model._session.exclusive():  # no generation sees the ops of one call with the engine of another
        functions = {op: getattr(model.ops, op) for op in OPS if getattr(ops, op) is not getattr(model.ops, op)}
        switch = Switch(model, functions)
        again = settings != model.engine or model.engine_trouble is not None
        if again:
            model.configure_engine(settings)
        model.ops, model.kernel_plan = ops, plan
        if not (again or functions):
            return model, {}
        model.switches.append(switch)
        return model, {ENGINE: switch, **functions}


def restore_eagle(model: EaModel, original_methods: Mapping[str, Callable[..., Any]]) -> EaModel:
    """Put back what `optimize_eagle_with_triton` replaced, from what it returned. Doing so twice does no harm.

    After several calls, each mapping leads back to where the model stood before its call: the later calls are undone with
    it, and their mappings have nothing left to do. A mapping of your own, op names to functions, is put in as it is.
    Raises TypeError for something that is no EaModel or no mapping of functions, and InvalidInputError for an op that
    does not exist, for what another model's call returned and while a generation is open.
    """
    _check_model(model, "restore_eagle")
    if not isinstance(original_methods, Mapping) or not all(map(callable, original_methods.values())):
        raise TypeError(
            f"original_methods is a {type(original_methods).__name__}; expected the mapping of op names to functions "
            "that optimize_eagle_with_triton returned"
        )
    switch = original_methods.get(ENGINE)
    if switch is not None and not isinstance(switch, Switch):
        raise TypeError(
            f"original_methods[{ENGINE!r}] is a {type(switch).__name__}; expected what optimize_eagle_with_triton returned"
        )
    functions = {op: function for op, function in original_methods.items() if op != ENGINE}
    check_names("auto", dict.fromkeys(functions, "auto"))
    if switch is not None:
        switch(model)
    elif functions:
        with model._session.exclusive():
            model.ops = model.ops.replaced(**functions)
            left = [
                function.plan for function in (getattr(model.ops, op) for op in OPS) if isinstance(function, Served)
            ]
            model.kernel_plan = left[0] if left else None
    return model


def plan_for(model: EaModel, kernels: str | None = None, overrides: Mapping[str, str] | None = None) -> Plan:
    """What is asked for, by arguments and then by the environment, on the devices and in the dtypes of ``model``."""
    layers = [*model.target.layer_shapes, *model.ea_layer.layer_shapes]
    dtypes = [layer.dtype for layer in layers]
    dtype = next((dtype for dtype in dtypes if dtype not in DTYPES), dtypes[0])
    request, single = from_environment()
    request = request if kernels is None else kernels
    if not isinstance(overrides, Mapping | None):
        raise InvalidInputError(
            f"overrides is {overrides!r}; expected what serves each op named, such as {{'linear': 'torch'}}"
        )
    single |= overrides or {}
    check_names(request, single)
    return Plan(hardware({layer.device for layer in layers} | {model.device}), dtype, request, single)


def _settled(settings: EngineSettings, model: EaModel, ops: Ops) -> EngineSettings:
    """The settings in force: on a CPU, and where no kernel serves, "auto" means as the model was loaded."""
    triton = any(isinstance(getattr(ops, op), Served) for op in OPS)
    if not kernel_serves_attention(ops, model.target.layer_shapes):
        if settings.exact is True:
            size, device = largest_heads(model.target.layer_shapes)["head_size"], model.device.type
            mend = ", or let the kernels serve" if device == "cuda" else ", or use a GPU"
            raise InvalidInputError(
                f"exact is True, which needs the attention kernel, but no kernel serves attention ({device}, head size "
                f"{size}); leave it out{'' if isinstance(ops.attention, Served) else mend}"
            )
        settings = replace(settings, exact=False)
    if triton and model.device.type == "cuda":
        return settings
    plain = EngineSettings()
    if settings.engine == "captured" and model.device.type != "cuda":
        raise InvalidInputError(f"engine is 'captured', which needs a CUDA device, not {model.device.type}; use 'auto'")
    engine = plain.engine if settings.engine == "auto" else settings.engine
    fused = plain.fused if settings.fused == "auto" and settings.target_dtype is None else settings.fused
    return replace(settings, engine=engine, fused=fused)


def _check_flash(plan: Plan, model: EaModel) -> None:
    """Where FlashAttention was asked for, refuse a model whose layers it does not take."""
    if plan.wanted("attention") == FLASH:
        layers = [*model.target.layer_shapes, *model.ea_layer.layer_shapes]
        choice = plan.choose("attention", {**CASES["attention"]["prompts"], **largest_heads(layers)})
        if choice.implementation != FLASH:
            raise InvalidInputError(f"attention is to be flash, but {choice.reason}; use auto, torch or triton")


def _check_model(model: Any, caller: str) -> None:
    if not isinstance(model, EaModel):
        raise TypeError(f"{caller} takes an EaModel (EaModel.from_pretrained(...)), got a {type(model).__name__}")
