"""Growing and finishing the draft tree: equal to the loops' tree and to the PyTorch ops, ties included."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st
from reference_step import tree_by_loops

from eagle.model import tree as torch_tree
from eagle.model.ops import Candidates, DraftTree, Frontier, TreeShape, mask_words
from eagle.model.triton_kernels import tree_decoding

DEVICE = "cuda" if CUDA else "cpu"
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")


def poisoned(shape: TreeShape, batch: int) -> Candidates:
    candidates = torch_tree.empty_candidates(shape, batch, torch.device(DEVICE))
    candidates.scores.fill_(float("nan"))
    candidates.tokens.fill_(-(2**60))
    candidates.frontier_index.fill_(-(2**60))
    return candidates


def level_inputs(shape: TreeShape, batch: int, tied: bool, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each level's log-probabilities, largest first, and tokens."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for level in range(shape.depth + 1):
        size = (batch, 1 if level == 0 else shape.top_k, shape.top_k)
        log_probs = -4 * torch.rand(size, generator=generator)
        log_probs = (log_probs.round() if tied else log_probs).sort(dim=-1, descending=True).values
        inputs.append((log_probs.to(DEVICE), torch.randint(0, 2**31 - 1, size, generator=generator).to(DEVICE)))
    return inputs


def grown(ops, shape: TreeShape, batch: int, inputs: list) -> tuple[DraftTree, Candidates, list[Frontier]]:
    candidates, frontiers = poisoned(shape, batch), [None]
    for level, children in enumerate(inputs):
        frontiers.append(ops.grow_tree(candidates, frontiers[-1], level, *children))
    root = torch.arange(100, 100 + batch, device=DEVICE)
    return ops.finish_tree(candidates, root, shape.total_token), candidates, frontiers[1:]


def check(shape: TreeShape, batch: int, tied: bool, seed: int) -> None:
    inputs = level_inputs(shape, batch, tied, seed)
    ours, wanted = (grown(ops, shape, batch, inputs) for ops in (tree_decoding, torch_tree))
    for a, b in zip([*ours[:2], *ours[2]], [*wanted[:2], *wanted[2]], strict=True):
        for name, value in vars(b).items():
            assert torch.equal(getattr(a, name), value), f"{type(b).__name__}.{name}"


@settings(max_examples=25, deadline=None)
@given(
    depth=st.integers(0, 5),
    top_k=st.integers(1, 9),
    part=st.floats(0, 1),
    batch=st.integers(1, 3),
    tied=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_the_pytorch_ops(depth: int, top_k: int, part: float, batch: int, tied: bool, seed: int) -> None:
    candidates = top_k + depth * top_k**2
    check(TreeShape(1 + round(part * min(candidates, 255)), depth, top_k), batch, tied, seed)


@pytest.mark.parametrize(
    ("total", "depth", "top_k"), [(60, 7, 10), (256, 10, 20), (65, 7, 10), (2, 0, 1), (200, 1, 64), (12, 10, 1)]
)
def test_large_trees(total: int, depth: int, top_k: int) -> None:
    check(TreeShape(total, depth, top_k), 2, True, total)


def test_maps_the_ids_of_a_trimmed_vocabulary() -> None:
    shape, id_map = TreeShape(17, 3, 4), torch.randperm(1000, device=DEVICE)[:300].contiguous()
    trimmed = [(log_probs, tokens % 300) for log_probs, tokens in level_inputs(shape, 2, True, 5)]
    wanted = grown(torch_tree, shape, 2, [(log_probs, id_map[tokens]) for log_probs, tokens in trimmed])
    for ops in (tree_decoding, torch_tree):
        found = grown(ops, shape, 2, [(*pair, id_map) for pair in trimmed])
        assert all(torch.equal(getattr(found[0], name), value) for name, value in vars(wanted[0]).items())
        assert torch.equal(found[1].tokens, wanted[1].tokens)
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(found[2], wanted[2], strict=True))


def test_equals_the_tree_by_loops() -> None:
    shape, table = TreeShape(17, 3, 4), {}

    def log_probs(path: tuple[int, ...]) -> list[tuple[torch.Tensor, int]]:
        if path not in table:
            table[path] = [(-value, token) for token, value in enumerate((torch.rand(9) * 5).round())]
        return table[path]

    candidates, frontier, paths = poisoned(shape, 1), None, [()]
    for level in range(shape.depth + 1):
        ranked = [sorted(log_probs(p), key=lambda item: (-item[0].item(), item[1]))[: shape.top_k] for p in paths]
        scores = torch.tensor([[[value.item() for value, _ in row] for row in ranked]], device=DEVICE)
        tokens = torch.tensor([[[token for _, token in row] for row in ranked]], device=DEVICE)
        frontier = tree_decoding.grow_tree(candidates, frontier, level, scores, tokens)
        pairs = zip(frontier.rows[0].tolist(), frontier.tokens[0].tolist(), strict=True)
        paths = [(*paths[row], token) for row, token in pairs]
    tree = tree_decoding.finish_tree(candidates, torch.tensor([77], device=DEVICE), shape.total_token)
    wanted = tree_by_loops(log_probs, 77, shape)
    assert [*zip(*(x[0].tolist() for x in (tree.tokens, tree.parents, tree.depths)), strict=True)] == wanted
    for node, word in enumerate(tree.words[0, :, 0].tolist()):
        above, seen = node, 0
        while above >= 0:
            seen |= 1 << above
            above = wanted[above][1]
        assert word == seen


def test_bit_63_and_the_second_word() -> None:
    """A chain of 70 nodes: row i sees 0 … i."""
    shape = TreeShape(70, 68, 1)
    inputs = [(torch.full((1, 1, 1), -0.5, device=DEVICE), torch.tensor([[[i]]], device=DEVICE)) for i in range(69)]
    tree, _, frontiers = grown(tree_decoding, shape, 1, inputs)
    for node, row in enumerate(tree.words[0].tolist()):
        assert sum((word % 2**64) << (64 * i) for i, word in enumerate(row)) == 2 ** (node + 1) - 1
    assert frontiers[63].words[0, 0].tolist() == [-1, 0]


def test_a_sequence_does_not_depend_on_the_others() -> None:
    shape = TreeShape(20, 3, 4)
    inputs = level_inputs(shape, 3, False, 5)
    together = grown(tree_decoding, shape, 3, inputs)[0]
    alone = grown(tree_decoding, shape, 1, [(p[2:], t[2:]) for p, t in inputs])[0]
    assert torch.equal(alone.parents[0], together.parents[2])
    assert torch.equal(alone.words[0], together.words[2])


def test_infinitely_unlikely_candidates() -> None:
    shape = TreeShape(8, 2, 3)
    inputs = level_inputs(shape, 1, False, 3)
    for log_probs, _ in inputs:
        log_probs[..., 1:] = float("-inf")
    ours, wanted = (grown(ops, shape, 1, inputs)[0] for ops in (tree_decoding, torch_tree))
    assert torch.equal(ours.parents, wanted.parents)


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = TreeShape(8, 2, 3)
    candidates = poisoned(shape, 1)
    log_probs, tokens = level_inputs(shape, 1, False, 0)[0]
    with pytest.raises(ValueError, match=r"tokens is \(1, 1, 3\) at level 1 of 2"):
        tree_decoding.grow_tree(candidates, None, 1, log_probs, tokens)
    with pytest.raises(ValueError, match=r"log_probs is \(1, 1, 3\) torch.float16"):
        tree_decoding.grow_tree(candidates, None, 0, log_probs.half(), tokens)
    small = Candidates(candidates.scores[:, :20].clone(), candidates.tokens, candidates.frontier_index)
    with pytest.raises(ValueError, match=r"candidates.scores is \(1, 20\)"):
        tree_decoding.grow_tree(small, None, 0, log_probs, tokens)
    root = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="total_token is 23 for 21 candidates"):
        tree_decoding.finish_tree(candidates, root, 23)
    with pytest.raises(ValueError, match=r"root is \(2,\)"):
        tree_decoding.finish_tree(candidates, root.repeat(2), 8)
    for field, wrong in (("scores", log_probs[0, 0, 0]), ("scores", log_probs[0, 0]), ("frontier_index", root[0])):
        flat = replace(candidates, **{field: wrong})
        with pytest.raises(ValueError, match=r"expected \[B, C\] and \[B, depth, K\]"):
            tree_decoding.grow_tree(flat, None, 0, log_probs, tokens)
        with pytest.raises(ValueError, match=r"expected \[B, C\] and \[B, depth, K\]"):
            tree_decoding.finish_tree(flat, root, 8)
    monkeypatch.setenv("EAGLE_DEBUG", "1")
    candidates.frontier_index.fill_(21)
    with pytest.raises(ValueError, match=r"frontier_index .* holds 21 to 21; expected values from 0 to 20"):
        tree_decoding.finish_tree(candidates, root, 8)


@pytest.mark.parametrize("level", [0, 1])
def test_registered_grow(level: int) -> None:
    shape = TreeShape(8, 2, 3)
    candidates, inputs = poisoned(shape, 2), level_inputs(shape, 2, False, 1)
    candidates.scores.zero_()  # opcheck compares with a copy, and NaN equals nothing
    scores = words = None
    if level:
        frontier = tree_decoding.grow_tree(candidates, None, 0, *inputs[0])
        scores, words = frontier.scores, frontier.words
    arguments = (candidates.scores, candidates.tokens, candidates.frontier_index, scores, words, level, *inputs[level])
    torch.library.opcheck(tree_decoding.grow_tree_op, arguments)


def test_registered_finish() -> None:
    shape = TreeShape(8, 2, 3)
    _, candidates, _ = grown(tree_decoding, shape, 2, level_inputs(shape, 2, False, 1))
    root = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    arguments = (candidates.scores, candidates.tokens, candidates.frontier_index, root, 8)
    torch.library.opcheck(tree_decoding.finish_tree_op, arguments)
    assert tree_decoding.finish_tree_op(*arguments)[3].shape == (2, 8, mask_words(8))


@pytest.mark.gpu
@needs_gpu
def test_captured() -> None:
    shape = TreeShape(60, 7, 10)
    inputs = level_inputs(shape, 4, False, 0)
    grown(tree_decoding, shape, 4, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tree = grown(tree_decoding, shape, 4, inputs)[0]
    for seed in (1, 2):
        for old, new in zip(inputs, level_inputs(shape, 4, True, seed), strict=True):
            old[0].copy_(new[0])
            old[1].copy_(new[1])
        graph.replay()
        wanted = grown(torch_tree, shape, 4, inputs)[0]
        for name, value in vars(wanted).items():
            assert torch.equal(getattr(tree, name), value), name
