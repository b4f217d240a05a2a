"""Options that several sub-commands share, and the checks on them that need no model."""

from __future__ import annotations

import sys
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from eagle.errors import InvalidInputError
from eagle.model.presets import DEFAULT_MODEL

if TYPE_CHECKING:
    from eagle.model.ops import Sampling


class Kernels(str, Enum):
    """Which implementation of the ops is asked for."""

    auto = "auto"
    torch = "torch"
    triton = "triton"


class Dtype(str, Enum):
    """The number format of target and head."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class WeightDtype(str, Enum):
    """The number format of weights where it is not the model's own."""

    same = "same"
    int8 = "int8"
    fp8 = "fp8"

    @property
    def setting(self) -> str | None:
        """As `EngineSettings` has it."""
        return None if self is WeightDtype.same else self.value


TREE_METAVAR = "TOTAL,DEPTH,TOPK"
TREE_WORDS = "EAGLE's total_token, depth and top_k"

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="A name from 'eagle models', a model folder, or a hub id.")
]
DraftOption = Annotated[
    str | None,
    typer.Option("--draft", "-d", help="The draft head: a folder, a hub id, or 'random'. Default: the model's own."),
]
NewTokensOption = Annotated[int, typer.Option("--max-new-tokens", "-n", help="The most tokens a reply may have.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
TopPOption = Annotated[float, typer.Option("--top-p", help="Nucleus sampling; 0 and 1 turn it off.")]
TopKOption = Annotated[int, typer.Option("--top-k", help="Sample from the k likeliest tokens; 0 turns it off.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")]
TreeOption = Annotated[
    str,
    typer.Option(
        "--tree",
        metavar=TREE_METAVAR,
        help=f"The draft tree: {TREE_WORDS}. auto: the fastest, on a GPU measured once and remembered.",
    ),
]
KernelsOption = Annotated[
    Kernels, typer.Option("--kernels", envvar="EAGLE_KERNELS", help="Which implementation serves the ops.")
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="auto: float32 on a CPU, the checkpoint's own on a GPU.")]
DraftDtypeOption = Annotated[
    WeightDtype,
    typer.Option(
        "--draft-dtype", help="Keep the head's weights in one byte a value; the output stays the same. Pays on a GPU."
    ),
]
TargetDtypeOption = Annotated[
    WeightDtype,
    typer.Option(
        "--target-dtype",
        help="Round the target's weights to one byte a value: another model, nearly twice as fast where memory is the "
        "limit. For Llama-like targets; pays on a GPU.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]

MODEL_DEFAULT = DEFAULT_MODEL
TREE_DEFAULT = "auto"
PAPER_TREE = "60,7,10"
GPU_TREE = (60, 7, 10)
"""The reference's tree, until `eagle.engine.tree_choice` has measured which is fastest."""
CPU_TREE = (8, 4, 2)
"""SmolLM2-135M in float32 on 2 cores, 4 prompts × 32 tokens: 27 tokens/s, against 25 with 8,5,2 or 10,5,2, 19 with 60,7,10
and 21 plain."""


def parse_tree(text: str) -> tuple[int, int, int]:
    """ "60,7,10" → (total_token, depth, top_k), of which total_token may be -1; "auto" → what suits the device. Raises
    InvalidInputError."""
    if text == TREE_DEFAULT:
        import torch

        return GPU_TREE if torch.cuda.is_available() else CPU_TREE
    try:
        total_token, depth, top_k = (int(part) for part in text.split(","))
    except ValueError:
        raise InvalidInputError(
            f"--tree is {text!r}; expected auto or {TREE_METAVAR}, whole numbers: {TREE_WORDS}, such as 60,7,10"
        ) from None
    return total_token, depth, top_k


def check_kernels(kernels: Kernels) -> None:
    """Refuse triton where no kernel can run, and variables EAGLE_KERNELS_<OP> that mean nothing. Raises
    InvalidInputError."""
    from eagle.model.triton_kernels.hardware import default_hardware
    from eagle.model.triton_kernels.selection import OPS, choose, from_environment

    _, overrides = from_environment()
    if kernels is Kernels.triton or "triton" in overrides.values():
        import torch

        for op in OPS:
            choose(op, torch.float32, {}, default_hardware(), kernels.value, overrides)


def check_flags(tree: str, kernels: Kernels, max_new_tokens: int) -> None:
    """Refuse what can be refused before a model is loaded. Raises InvalidInputError."""
    if max_new_tokens <= 0:
        raise InvalidInputError(f"max_new_tokens is {max_new_tokens}; expected a whole number of at least 1")
    check_kernels(kernels)
    total_token, depth, top_k = parse_tree(tree)
    from eagle.model.inputs import check_tree

    smallest = 2  # in place of -1, whose size is measured later
    check_tree(smallest if total_token == -1 else total_token, depth, top_k, draft_vocab_size=sys.maxsize)


def sampling_of(temperature: float, top_p: float, top_k: int) -> Sampling:
    """The sampling settings, filters in transformers' order. Raises InvalidInputError."""
    from eagle.model.inputs import check_sampling

    return check_sampling(temperature, top_p, top_k, top_k_first=True)
