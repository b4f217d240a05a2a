"""What every launcher refuses, besides what the test of its own module asks: another device, too large a size."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from eagle.model import triton_kernels
from eagle.model.ops import Acceptance, Candidates, DecodeState, DraftTree, Frontier, Sampling, TreeShape, mask_words
from eagle.model.tree import empty_candidates

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_KERNELS = {"pack_gate_up", "quantize_weight"}
"""PyTorch functions that make the weights which kernels read."""

SHAPE = TreeShape(8, 2, 3)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def whole(*shape: int, below: int = 2) -> torch.Tensor:
    return torch.randint(below, shape, device=DEVICE)


def frontier() -> Frontier:
    words = whole(1, 3, mask_words(SHAPE.draft_slots))
    return Frontier(scores=-numbers(1, 3).abs(), tokens=whole(1, 3), rows=whole(1, 3), words=words)


def tree(nodes: int = 4) -> DraftTree:
    parents = torch.arange(-1, nodes - 1, device=DEVICE)[None]
    return DraftTree(whole(1, nodes), parents, parents + 1, whole(1, nodes, mask_words(nodes)))


def candidates() -> Candidates:
    """One sequence's, the first of a level being the best."""
    found = empty_candidates(SHAPE, 1, torch.device(DEVICE))
    scores = -torch.arange(SHAPE.candidates, device=DEVICE).float()[None]
    first = [0, *(SHAPE.top_k + level * SHAPE.top_k**2 for level in range(SHAPE.depth - 1))]
    index = [[at + rank for rank in range(SHAPE.top_k)] for at in first]
    return Candidates(scores, torch.zeros_like(found.tokens), torch.tensor([index], device=DEVICE))


def state() -> DecodeState:
    one = {name: whole(1) for name in ("kv_len", "root", "count", "generated", "budget")}
    return DecodeState(**one, tokens=whole(1, 3), features=None, done=torch.tensor([False], device=DEVICE))


def accepted() -> Acceptance:
    return Acceptance(nodes=whole(1, 3), tokens=whole(1, 3), count=whole(1) + 1)


def cache(*layers: int) -> torch.Tensor:
    return numbers(*layers, 1, 2, 9, 8)


def angles() -> torch.Tensor:
    return numbers(1, 3, 8)


GOOD: dict[str, Callable[[], list[Any]]] = {
    "attention": lambda: [numbers(1, 3, 4, 8), cache(), cache(), whole(1), whole(1, 3, 1) + 7],
    "kv_append": lambda: [cache(), numbers(1, 2, 3, 8), whole(1)],
    "kv_retrieve": lambda: [cache(), whole(1, 4)],
    "kv_compact": lambda: [cache(2), cache(2), whole(1, 3), whole(1), whole(1)],
    "rope_append": lambda: [
        *(numbers(1, 3, heads, 8) for heads in (4, 2, 2)),
        *(angles(), angles(), cache(), cache(), whole(1)),
    ],
    "rope_": lambda: [numbers(1, 3, 4, 8), angles(), angles()],
    "grow_tree": lambda: [candidates(), frontier(), 1, numbers(1, 3, 3), whole(1, 3, 3)],
    "finish_tree": lambda: [candidates(), whole(1), 8],
    "evaluate_posterior": lambda: [numbers(1, 4, 10), tree(), 3, Sampling(0.8), torch.rand(1, 3, device=DEVICE)],
    "evaluate_posterior_seeded": lambda: [numbers(1, 4, 10), tree(), 3, Sampling(0.8), whole(1), whole(1)],
    "update_inputs": lambda: [state(), accepted(), numbers(1, 4, 6), whole(2)],
    "rms_norm": lambda: [numbers(2, 8), numbers(8), 1e-5],
    "add_rms_norm": lambda: [numbers(2, 8), numbers(2, 8), numbers(8), 1e-5],
    "cat_rms_norm": lambda: [numbers(2, 8), numbers(8), numbers(2, 8), numbers(8), 1e-5, 1e-5],
    "draft_input": lambda: [
        *(numbers(1, 3, 8), whole(1, 2), whole(1, 2), numbers(5, 8), numbers(8), numbers(8)),
        *(1e-5, 1e-5),
    ],
    "draft_positions": lambda: [whole(1), whole(1), SHAPE],
    "swiglu": lambda: [numbers(2, 8), numbers(2, 8)],
    "linear": lambda: [numbers(2, 8), numbers(6, 8), numbers(6)],
    "gate_up_swiglu": lambda: [numbers(2, 8), numbers(6, 8)],
    "linear_add_rms_norm": lambda: [numbers(2, 8), numbers(6, 8), numbers(2, 6), numbers(6), 1e-5],
}
SCALED = {"attention": {"scale": 0.3}}
UNREAD = {
    "grow_tree": ("Frontier.tokens", "Frontier.rows"),
    "evaluate_posterior": ("DraftTree.words",),
    "evaluate_posterior_seeded": ("DraftTree.words",),
    "update_inputs": ("DecodeState.tokens", "DecodeState.count"),
}
"""What comes with a dataclass and is nothing to the launcher."""


def call(name: str, arguments: list[Any]) -> Any:
    return getattr(triton_kernels, name)(*arguments, **SCALED.get(name, {}))


def elsewhere(arguments: list[Any]) -> list[tuple[str, list[Any]]]:
    """The arguments with one of their tensors on another device, for each of them."""
    found = []
    for index, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            found.append((str(index), [*arguments[:index], argument.to("meta"), *arguments[index + 1 :]]))
        elif is_dataclass(argument):
            for field in fields(argument):
                if isinstance(value := getattr(argument, field.name), torch.Tensor):
                    moved = replace(argument, **{field.name: value.to("meta")})
                    place = f"{type(argument).__name__}.{field.name}"
                    found.append((place, [*arguments[:index], moved, *arguments[index + 1 :]]))
    return found


@pytest.mark.parametrize("name", GOOD)
def test_tensors_on_two_devices_are_refused(name: str) -> None:
    call(name, GOOD[name]())
    for place, arguments in elsewhere(GOOD[name]()):
        if place not in UNREAD.get(name, ()):
            with pytest.raises(ValueError, match=r" on meta"):
                call(name, arguments)


def test_every_kernel_is_here_or_takes_one_tensor() -> None:
    alone = {"topk_log_softmax", "swiglu_packed"}
    assert set(GOOD) | alone | NO_KERNELS == set(triton_kernels._KERNELS)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter takes CPU tensors")
@pytest.mark.parametrize("name", [*GOOD, "topk_log_softmax", "swiglu_packed"])
def test_cpu_tensors_are_refused_beside_a_gpu(name: str) -> None:
    arguments = GOOD.get(name, lambda: [numbers(2, 8), *([3] if name == "topk_log_softmax" else [])])()

    def on_cpu(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.cpu()
        if not is_dataclass(value):
            return value
        return replace(value, **{field.name: on_cpu(getattr(value, field.name)) for field in fields(value)})

    with pytest.raises(ValueError, match=r"CUDA|expected"):
        call(name, [on_cpu(argument) for argument in arguments])


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, device=DEVICE)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("attention", lambda: [zeros(1, 1, 2, 257), *(zeros(1, 1, 9, 257) for _ in range(2)), whole(1)], "256"),
        ("kv_compact", lambda: [cache(1), cache(1), whole(1, 65), whole(1), whole(1)], "64"),
        ("topk_log_softmax", lambda: [zeros(2, 5), 6], r"k is 6 for logits \(2, 5\)"),
        ("finish_tree", lambda: [empty_candidates(TreeShape(8, 5, 9), 1, torch.device(DEVICE)), whole(1), 257], "256"),
        ("evaluate_posterior", lambda: [zeros(1, 257, 10), tree(257), 3, Sampling()], "256"),
        ("rms_norm", lambda: [zeros(1, 32769), zeros(32769), 1e-5], "32768"),
        ("rope_append", lambda: [*GOOD["rope_append"]()[:1], numbers(1, 3, 1, 8), *GOOD["rope_append"]()[2:]], "Hkv"),
        ("linear", lambda: [zeros(2, 8).double(), zeros(6, 8).double()], "float64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sizes_beyond_a_kernel_are_named(name: str, arguments: Callable[[], list[Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(name, arguments())


@pytest.mark.parametrize(("index", "words"), [(1, r"rows .* from 0 to 2"), (2, r"tokens .* from 0 to 4")])
def test_debug_mode_reads_the_draft_inputs_indices(index: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAGLE_DEBUG", "1")
    arguments = GOOD["draft_input"]()
    call("draft_input", arguments)
    for wrong in (-1, 7):
        arguments[index] = torch.full((1, 2), wrong, device=DEVICE)
        with pytest.raises(ValueError, match=words):
            call("draft_input", arguments)


@pytest.mark.parametrize("name", sorted(set(triton_kernels._KERNELS) - NO_KERNELS))
def test_every_kernel_is_a_registered_operator(name: str) -> None:
    getattr(triton_kernels, name)
    packet = getattr(torch.ops.eagle, name)
    assert packet.default._schema.name == f"eagle::{name}"
