"""The cases of `eagle bench kernels` as data: which op, at which model's sizes, in which dtype, over which prefix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from eagle.errors import InvalidInputError
from eagle.model.ops import TreeShape

TREE = TreeShape(total_token=60, depth=7, top_k=10)
"""The paper's tree, which every full-size case uses."""

SMALL_TREE = TreeShape(total_token=8, depth=2, top_k=3)
"""The tree of shrunken cases."""

LINEAR_ROWS = 64
"""Rows of the dense ops: what one tile holds; a tree of 60 nodes costs the same."""

PREFILL_ROWS = 2048
"""A prompt is prefilled in chunks of at most so many rows."""

PREFIXES = (128, 512, 2048, 8192, 32768)
QUICK_PREFIXES = (512, 8192)
INTERPRETED_PREFIXES = (8192,)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a target and its EAGLE-3 head."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    layers: int
    vocab: int
    draft_vocab: int

    def linear(self, part: str) -> tuple[int, int]:
        """(N, K) of one of its products."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "qkv": (q + 2 * kv, self.hidden),
            "o": (self.hidden, q),
            "gate_up": (2 * self.mlp, self.hidden),
            "down": (self.hidden, self.mlp),
            "lm_head": (self.vocab, self.hidden),
            "draft_lm_head": (self.draft_vocab, self.hidden),
        }[part]

    def shrunk(self) -> ModelShape:
        """The same group of query heads and odd sizes, small enough for the interpreter."""
        return ModelShape(
            name=self.name,
            hidden=self.hidden // 64 + 23,
            heads=2 * (self.heads // self.kv_heads),
            kv_heads=2,
            head_size=self.head_size // 4,
            mlp=self.mlp // 256 + 37,
            layers=2,
            vocab=self.vocab // 256 + 301,
            draft_vocab=self.draft_vocab // 128 + 51,
        )


MODELS = (
    ModelShape("Llama-3.1-8B", 4096, 32, 8, 128, 14336, 32, 128256, 32000),
    ModelShape("SmolLM2-135M", 576, 9, 3, 64, 1536, 30, 49152, 16384),
    ModelShape("Llama-3.2-1B", 2048, 32, 8, 64, 8192, 16, 128256, 32000),
    ModelShape("Llama-3.1-70B", 8192, 64, 8, 128, 28672, 80, 128256, 32000),
)
"""By importance, which is the order they run in."""

QUICK_MODELS = ("Llama-3.1-8B", "SmolLM2-135M")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

LINEAR_PARTS = ("gate_up", "lm_head", "qkv", "o", "down", "draft_lm_head")
PARTS: dict[str, tuple[str, ...]] = {
    "attention_tree": (),
    "linear": LINEAR_PARTS,
    "topk_log_softmax": ("lm_head", "draft_lm_head"),
    "kv_compact": (),
    "grow_tree": (),
    "finish_tree": (),
    "evaluate_posterior_greedy": (),
    "evaluate_posterior_sampled": (),
    "update_inputs": (),
    "draft_input": (),
    "draft_positions": (),
    "gate_up_swiglu": ("gate_up",),
    "linear_add_rms_norm": ("o", "down"),
    "linear_int8": ("gate_up", "qkv", "down"),
    "linear_fp8": ("gate_up", "qkv", "down"),
    "attention_decode": (),
    "attention_chain": (),
    "attention_prefill": (),
    "rope_append": (),
    "rms_norm": (),
    "add_rms_norm": (),
    "cat_rms_norm": (),
    "swiglu": (),
    "kv_append": (),
    "kv_retrieve": (),
}
"""Every op, by importance, with the parts of a model it is measured on."""

OVER_PREFIXES = ("attention_decode", "attention_tree", "attention_chain", "attention_prefill")
BASE_PREFIX = 512
"""Of the other ops that work on a cache."""

WEIGHT_DTYPES = {"linear_int8": torch.int8, "linear_fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Case:
    """One row of the report."""

    op: str
    model: ModelShape
    dtype: torch.dtype
    part: str = ""
    prefix: int = BASE_PREFIX
    rows: int = LINEAR_ROWS
    tree: TreeShape = TREE
    prefill_rows: int = PREFILL_ROWS
    quick: bool = False

    @property
    def dtype_name(self) -> str:
        return _name(self.dtype)

    @property
    def label(self) -> str:
        """What tells this case from the others of its op, dtype aside."""
        sizes = f" {self.prefix}" if self.op in OVER_PREFIXES else f" {self.part}" if self.part else ""
        return f"{self.model.name}{sizes}"

    def shrunk(self) -> Case:
        """The case with sizes for the interpreter."""
        prefix = self.prefix.bit_length() * 3 + self.prefix % 7 + 15  # above what a decoding kernel takes as rows
        return replace(self, model=self.model.shrunk(), prefix=prefix, rows=5, tree=SMALL_TREE, prefill_rows=33)


def all_cases() -> Iterator[Case]:
    """Every case, unordered."""
    for model in MODELS:
        for dtype in DTYPES:
            for op, parts in PARTS.items():
                if op in WEIGHT_DTYPES and dtype == torch.float32:
                    continue  # a one-byte weight beside float32 rows is served by nobody
                for prefix in PREFIXES if op in OVER_PREFIXES else (BASE_PREFIX,):
                    for part in parts or ("",):
                        common = model.name in QUICK_MODELS and dtype == torch.bfloat16
                        quick = common and (op not in OVER_PREFIXES or prefix in QUICK_PREFIXES)
                        yield Case(op, model, dtype, part, prefix, quick=quick)


def select_cases(
    ops: Iterable[str] = (),
    models: Iterable[str] = (),
    dtypes: Iterable[str] = (),
    *,
    quick: bool = False,
    interpreted: bool = False,
) -> list[Case]:
    """The cases asked for, the most important first: the quick ones, then by dtype, model and op.

    ops: names or beginnings of names; models and dtypes: names; empty: all. quick: with 8B and SmolLM2 in bfloat16 and
    two prefixes, unless ``models`` or ``dtypes`` ask for others. interpreted: fewer, for Triton's interpreter, which has
    no bfloat16: float16 stands in for it, and shrunken prefixes differ too little to run more than one. Raises
    InvalidInputError for a name that is none.
    """
    ops, models, dtypes = list(ops), list(models), list(dtypes)
    wanted_ops = _known(ops, list(PARTS), "--ops", prefix=True)
    names = [model.name for model in MODELS]
    wanted_models = [model.name for model in select_models(models)]
    dtype_names = [_name(dtype) for dtype in DTYPES]
    wanted_dtypes = [_name(dtype) for dtype in select_dtypes(dtypes)]
    if quick:
        wanted_models = wanted_models if models else list(QUICK_MODELS)
        wanted_dtypes = wanted_dtypes if dtypes else ["float16" if interpreted else "bfloat16"]
    elif interpreted and not dtypes:
        wanted_dtypes = ["float16", "float32"]
    prefixes = INTERPRETED_PREFIXES if interpreted else QUICK_PREFIXES if quick else PREFIXES
    found = [
        case
        for case in all_cases()
        if case.op in wanted_ops
        and case.model.name in wanted_models
        and case.dtype_name in wanted_dtypes
        and (case.op not in OVER_PREFIXES or case.prefix in prefixes)
    ]
    order = list(PARTS)
    found.sort(
        key=lambda case: (
            not case.quick,
            dtype_names.index(case.dtype_name),
            names.index(case.model.name),
            order.index(case.op),
        )
    )
    return found


def select_models(names: Iterable[str]) -> list[ModelShape]:
    """The shapes of those names, all where there is none. Raises InvalidInputError."""
    wanted = _known(names, [model.name for model in MODELS], "--model")
    return [model for model in MODELS if model.name in wanted]


def select_dtypes(names: Iterable[str]) -> list[torch.dtype]:
    """The dtypes of those names, all where there is none. Raises InvalidInputError."""
    wanted = _known(names, [_name(dtype) for dtype in DTYPES], "--dtype")
    return [dtype for dtype in DTYPES if _name(dtype) in wanted]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _known(given: Iterable[str], known: list[str], option: str, *, prefix: bool = False) -> list[str]:
    given = list(given)
    if not given:
        return known
    found: list[str] = []
    for name in given:
        hits = [k for k in known if k.lower() == name.lower() or (prefix and k.startswith(f"{name}_"))]
        if not hits:
            sizes = Counter(k.split("_")[0] for k in known) if prefix else {}
            groups = [group for group, size in sorted(sizes.items()) if size > 1 and group not in known]
            raise InvalidInputError(f"{option} is {name!r}; expected one of {', '.join([*groups, *known])}")
        found += hits
    return found
