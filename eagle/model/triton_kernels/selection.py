"""Which implementation serves which op, dtype, size and device, and why. Rules and data; nothing here imports triton.

`choose` is a pure function. What it weighs, in this order: what was asked for, whether kernels can run here at all,
what a kernel takes (`LIMITS`), and, where nothing particular was asked for, what is fastest: a table of measured bounds
for GPUs that have one (`MEASURED`), else `UNMEASURED`. A reason always says which of these decided.

Asking for "triton" is asking for kernels wherever they can run: a dtype, size or old GPU that a kernel does not take
still gets the PyTorch op. Where no kernel can run at all, asking for them is an error. "flash" is for attention alone:
FlashAttention for prompts, the kernel for decoding and trees; where it can't serve, asking for it is an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch

from eagle.errors import InvalidInputError
from eagle.model.ops import Ops
from eagle.model.triton_kernels import flash
from eagle.model.triton_kernels.hardware import LEAST_TRITON, Hardware

OPS = tuple(entry.name for entry in fields(Ops))
REQUESTS = ("auto", "torch", "triton")
FLASH = "flash"
"""What may be asked for attention besides."""

VARIABLE = "EAGLE_KERNELS"

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LEAST_CAPABILITY = (8, 0)
"""bfloat16 and asynchronous copies begin here."""


@dataclass(frozen=True)
class Choice:
    """What serves an op. ``when`` names the calls that are meant, where an op's calls are served differently."""

    op: str
    implementation: str  # "triton", "torch", "sdpa", "flash", or "custom" for a function of the caller's own
    reason: str
    when: str = ""

    def __str__(self) -> str:
        name = f"{self.op} ({self.when})" if self.when else self.op
        return f"{name}: {self.implementation}, {self.reason}"


@dataclass(frozen=True)
class Bound:
    """The kernel serves calls whose ``size`` is at most ``most``, PyTorch those beyond."""

    size: str
    most: int
    reason: str  # why PyTorch serves those beyond


FEW_ROWS = Bound("rows", 64, "the kernel is made for up to 64 rows; the library is faster on more")
FEW_ONE_BYTE_ROWS = Bound("one_byte_rows", 512, "with one-byte weights the library is reckoned faster beyond 512 rows")
"""The library has to widen a one-byte weight first, at 9 bytes of traffic a value: reckoned as what eight tiles of 64 rows
cost. EAGLE-8B in fp8, prompts of about 100 tokens on an H100: first token after 10.2 ms, and 40.2 with the library."""

ROW_SIZES = (FEW_ROWS.size, FEW_ONE_BYTE_ROWS.size)
"""Of these bounds. `dispatch.decoding_ops` lifts them: the kernel is right for any number of rows."""

LIMITS: dict[str, tuple[Bound, ...]] = {
    "attention": (Bound("head_size", 256, "the kernel takes head sizes up to 256"),),
    "kv_compact": (Bound("path", 64, "the kernel takes paths of up to 64 nodes"),),
    "topk_log_softmax": (Bound("top_k", 64, "the kernel takes k up to 64"),),
    "grow_tree": (
        Bound("top_k", 64, "the kernel takes k up to 64"),
        Bound("candidates", 8192, "the kernel takes up to 8,192 candidates"),
    ),
    "finish_tree": (
        Bound("nodes", 256, "the kernel takes up to 256 nodes"),
        Bound("candidates", 8192, "the kernel takes up to 8,192 candidates"),
    ),
    "evaluate_posterior": (Bound("nodes", 256, "the kernel takes up to 256 nodes"),),
    "update_inputs": (Bound("path", 256, "the kernel takes paths of up to 256 nodes"),),
    "rms_norm": (Bound("width", 32768, "the kernel takes rows of up to 32,768 values"),),
    "add_rms_norm": (Bound("width", 32768, "the kernel takes rows of up to 32,768 values"),),
    "cat_rms_norm": (Bound("width", 32768, "the kernel takes rows of up to 32,768 values"),),
    "draft_input": (Bound("width", 32768, "the kernel takes rows of up to 32,768 values"),),
    "linear": (FEW_ROWS, FEW_ONE_BYTE_ROWS),
    "gate_up_swiglu": (FEW_ROWS, FEW_ONE_BYTE_ROWS),
    "linear_add_rms_norm": (
        FEW_ROWS,
        FEW_ONE_BYTE_ROWS,
        Bound("width", 32768, "the kernel takes rows of up to 32,768 values"),
    ),
}
"""What the kernels take. Sizes are those of `CASES` and `dispatch.SIZES`; the numbers are the kernels' own."""

PROMPTS = Bound("causal_rows", 32, "prompts fill a GPU by themselves, so SDPA serves them")

UNMEASURED: dict[str, tuple[Bound, ...]] = {"attention": (PROMPTS,)}
"""The rule for GPUs nobody has measured: kernels for decoding and trees, where few rows meet a long cache and launches
count; the library for prompts: FlashAttention where it is installed, else SDPA."""

FLASH_LIMITS = (
    Bound("tree", 0, "FlashAttention takes no tree"),
    Bound("value_bytes", 2, "FlashAttention takes float16 and bfloat16"),
    Bound("head_size", flash.MAX_SIZE, f"FlashAttention takes head sizes up to {flash.MAX_SIZE}"),
    Bound("head_rest", 0, f"FlashAttention takes head sizes that are multiples of {flash.SIZE_STEP}"),
    Bound("head_difference", 0, "FlashAttention takes keys and values of one head size"),
)
"""What FlashAttention takes, of the calls beyond `PROMPTS`."""

MEASURED: dict[str, dict[str, tuple[Bound, ...]]] = {"NVIDIA H100": {}, "NVIDIA H200": {}}
"""Bounds by measurement, in place of `UNMEASURED`: a part of the GPU's name → op → bounds. An op with no entry is
served by its kernel at every size; a bound of -1 gives every call to PyTorch. On an H100 and an H200 the kernels are the
faster ones within `LIMITS` but for a few products and short prompts (docs/benchmarks). Prompts' attention, 512 rows,
bfloat16: on the H100 181 µs (in tiles of 128) against SDPA's 217 after 8,192 positions of SmolLM2-135M, 556 against 744
for Llama-3.1-8B; on the H200 80 against 142 after 7,168 and 89 against 127 after 3,584, SDPA's mask not counted."""

PRODUCT_CASES = {
    "up to 64 rows": {"rows": 64},
    "more rows": {"rows": 512},
    "one-byte weights, up to 512 rows": {"one_byte_rows": 512},
}
CASES: dict[str, dict[str, dict[str, int]]] = {
    "attention": {"decoding and trees": {"causal_rows": 1}, "prompts": {"causal_rows": 512}},
    "linear": PRODUCT_CASES,
    "gate_up_swiglu": PRODUCT_CASES,
    "linear_add_rms_norm": PRODUCT_CASES,
}
"""Ops whose calls differ within a run, in words and by an example of the sizes."""


def choose(
    op: str,
    dtype: torch.dtype,
    sizes: Mapping[str, int],
    hardware: Hardware,
    request: str = "auto",
    overrides: Mapping[str, str] | None = None,
) -> Choice:
    """What serves a call of ``op`` with the given sizes (names as in `LIMITS`; one left out counts as small).

    request: "auto", "torch" or "triton", for all ops; overrides: the same for single ones, and "flash" for attention.
    Raises InvalidInputError for an unknown name, for "triton" where no kernel can run, and for "flash" where
    FlashAttention can't.
    """
    overrides = overrides or {}
    check_names(request, overrides)
    if op not in OPS:
        raise InvalidInputError(f"no op is called {op!r}; expected one of {', '.join(OPS)}")
    wanted = overrides.get(op, request)
    plain = "sdpa" if op == "attention" else "torch"
    if wanted == "torch":
        return Choice(op, plain, f"as asked{' for this op' if op in overrides else ''}")
    if wanted == FLASH and (lacking := flash_lacks(dtype, hardware)) is not None:
        others = "auto, torch or triton" if unable(hardware) is None else "auto or torch"
        raise InvalidInputError(f"{VARIABLE}_ATTENTION or overrides asks for flash, but {lacking}; use {others}")
    missing = unable(hardware)
    if wanted == "triton" and missing is not None:
        asked = f"{VARIABLE}_{op.upper()} or overrides" if op in overrides else f"kernels (--kernels, {VARIABLE})"
        hint = " (for tests, TRITON_INTERPRET=1 runs kernels on a CPU)" if hardware.kind != "cuda" else ""
        raise InvalidInputError(f"{asked} asks for triton, but {missing}; use auto or torch{hint}")
    reason = missing or _unfit(dtype, hardware, wanted)
    if reason is not None:
        return Choice(op, plain, reason)
    table = measured_table(hardware.name)
    source = "no measurement for this GPU yet: by rule" if table is None else f"measured on {table}"
    for bound in bounds(op, hardware, wanted):
        if sizes.get(bound.size, 0) > bound.most:
            if bound is PROMPTS and flash_serves(dtype, hardware, wanted):
                beyond = next((limit.reason for limit in FLASH_LIMITS if sizes.get(limit.size, 0) > limit.most), None)
                reason = f"{'as asked' if wanted == FLASH else source}, {hardware.flash}"
                return Choice(op, FLASH, reason) if beyond is None else Choice(op, plain, beyond)
            return Choice(op, plain, bound.reason)
    if wanted == FLASH:
        return Choice(op, "triton", "FlashAttention, as asked, serves prompts alone")
    if wanted == "triton":
        return Choice(op, "triton", f"as asked{' for this op' if op in overrides else ''}")
    return Choice(op, "triton", source)


def bounds(op: str, hardware: Hardware, wanted: str) -> tuple[Bound, ...]:
    """Every bound that holds for the kernel of ``op``: what it takes and, in auto, where it is the faster one."""
    limits = LIMITS.get(op, ())
    if wanted == FLASH:
        return (*limits, PROMPTS)
    if wanted != "auto":
        return limits
    table = measured_table(hardware.name)
    return limits + (UNMEASURED if table is None else MEASURED[table]).get(op, ())


def measured_table(gpu: str) -> str | None:
    """The key of `MEASURED` for a GPU's name: the longest that is part of it, or None."""
    return max((key for key in MEASURED if key in gpu), key=len, default=None)


def unable(hardware: Hardware) -> str | None:
    """Why no kernel can run here, asked for or not, or None."""
    if hardware.triton is None:
        least = ".".join(map(str, LEAST_TRITON))
        return f"triton is not installed (pip install 'triton>={least}', on Linux)"
    if hardware.triton and hardware.triton < LEAST_TRITON:
        found, least = (".".join(map(str, version)) for version in (hardware.triton, LEAST_TRITON))
        return f"triton is {found} and the kernels need {least} (pip install --upgrade 'triton>={least}')"
    if hardware.interpreted:
        return None
    if hardware.kind != "cuda":
        return f"the kernels need an NVIDIA GPU, not {hardware.name}"
    if not hardware.compiler:
        return "Triton needs a C compiler (install gcc, or name one in CC)"
    return None


def flash_serves(dtype: torch.dtype, hardware: Hardware, wanted: str) -> bool:
    """Whether prompts that the kernel leaves to a library go to FlashAttention."""
    return wanted in ("auto", FLASH) and flash_lacks(dtype, hardware) is None


def flash_lacks(dtype: torch.dtype, hardware: Hardware) -> str | None:
    """Why FlashAttention can't serve prompts beside the kernels here, asked for or not, or None."""
    if (missing := unable(hardware)) is not None:
        return missing
    if hardware.kind != "cuda" or hardware.interpreted:
        return "FlashAttention needs an NVIDIA GPU, and no TRITON_INTERPRET"
    if hardware.capability is not None and hardware.capability < LEAST_CAPABILITY:
        found = ".".join(map(str, hardware.capability))
        return f"{hardware.name} has compute capability {found}; FlashAttention needs 8.0"
    if hardware.flash is None:
        return "FlashAttention is not installed (pip install flash-attn)"
    if hardware.flash.problem is not None:
        return f"{hardware.flash} can't be used: {hardware.flash.problem}"
    if dtype not in flash.DTYPES:
        return f"FlashAttention takes float16 and bfloat16, not {_name(dtype)}"
    return None


def _unfit(dtype: torch.dtype, hardware: Hardware, wanted: str) -> str | None:
    """Why the PyTorch op serves although kernels run here, or None."""
    if dtype not in DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {_name(dtype)}"
    if hardware.interpreted:
        if wanted == "auto":
            return "TRITON_INTERPRET=1 is for tests, and slow; ask for triton to use it"
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly"
        return None
    if hardware.capability is not None and hardware.capability < LEAST_CAPABILITY:
        found = ".".join(map(str, hardware.capability))
        return f"{hardware.name} has compute capability {found}; the kernels need 8.0"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_names(request: str, overrides: Mapping[str, str]) -> None:
    """Raise InvalidInputError for a request or an op that does not exist."""
    for op, wanted in {"": request, **overrides}.items():
        variable = f"{VARIABLE}_{str(op).upper()}"
        if wanted not in REQUESTS and (op, wanted) != ("attention", FLASH):
            what = f"kernels for {op} (overrides, {variable})" if op else f"kernels (--kernels, {VARIABLE})"
            expected = "auto, torch, triton or flash" if op == "attention" else "auto, torch or triton"
            raise InvalidInputError(f"{what} is {wanted!r}; expected {expected}")
        if op and op not in OPS:
            raise InvalidInputError(f"no op is called {op!r} (overrides, {variable}); expected one of {', '.join(OPS)}")


def from_environment(environment: Mapping[str, str] | None = None) -> tuple[str, dict[str, str]]:
    """The request and the overrides that EAGLE_KERNELS and EAGLE_KERNELS_<OP> hold. Raises InvalidInputError."""
    environment = os.environ if environment is None else environment
    prefix = VARIABLE + "_"
    found = {name: value for name, value in environment.items() if name.startswith(prefix) and value}
    overrides = {name.removeprefix(prefix).lower(): value.lower() for name, value in found.items()}
    request = environment.get(VARIABLE, "").lower() or "auto"
    check_names(request, overrides)
    return request, overrides


@dataclass(frozen=True)
class Plan:
    """What was asked for, and where it runs: all that a choice depends on but an op and its sizes."""

    hardware: Hardware
    dtype: torch.dtype
    request: str = "auto"
    overrides: Mapping[str, str] = field(default_factory=dict)

    def wanted(self, op: str) -> str:
        return self.overrides.get(op, self.request)

    def choose(self, op: str, sizes: Mapping[str, int]) -> Choice:
        """`choose` under this plan."""
        return choose(op, self.dtype, sizes, self.hardware, self.request, self.overrides)

    def choices(self, op: str, sizes: Mapping[str, int]) -> list[Choice]:
        """What serves ``op`` in a run of these sizes: one choice, or one for each of its `CASES` where they differ.
        ``one_byte`` among the sizes: whether the run has weights of one byte a value."""
        cases = CASES.get(op, {"": {}})
        if not sizes.get("one_byte"):
            cases = {when: more for when, more in cases.items() if FEW_ONE_BYTE_ROWS.size not in more}
        found = {when: self.choose(op, {**sizes, **more}) for when, more in cases.items()}
        first, *others = found.values()
        if all(other.implementation == first.implementation for other in others):
            return [first]
        return [Choice(op, one.implementation, one.reason, when) for when, one in found.items()]
