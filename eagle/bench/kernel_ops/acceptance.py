"""The trials of acceptance and of the state's update."""

from __future__ import annotations

import torch

from eagle.bench.kernel_cases import Case
from eagle.bench.kernel_ops.inputs import random_tree
from eagle.bench.kernel_ops.trial import TORCH, Mismatch, Trial, nbytes, relative_error, same
from eagle.model import verify as torch_verify
from eagle.model.ops import Acceptance, DecodeState, DraftTree, Sampling
from eagle.model.triton_kernels.posterior import evaluate_posterior
from eagle.model.triton_kernels.update_inputs import update_inputs

SAMPLING = Sampling(temperature=0.8, top_p=0.9, top_k=50)
CLEAR = 1e-5
"""A draw nearer than this to the border between two tokens is not judged: float32 may put it on either side."""


def posterior_trial(case: Case, device: torch.device, *, poisoned: bool) -> Trial:
    """The target's logits at every node of a tree; four of five children are likely, so that walks are long."""
    nodes, vocab, path = case.tree.total_token, case.model.vocab, case.tree.path
    tree = random_tree(case.tree, vocab, device)
    logits = torch.randn(1, nodes, vocab, device=device).to(case.dtype)
    likely = torch.rand(nodes - 1, device=device) < 0.8
    logits[0, tree.parents[0, 1:][likely], tree.tokens[0, 1:][likely]] = 12.0
    sampling = SAMPLING if case.op.endswith("sampled") else Sampling()
    uniforms = torch.rand(1, path, device=device)

    def check(out: Acceptance) -> float:
        found = _walk(logits[0], tree, path, sampling, uniforms[0].tolist())
        expected_nodes, expected_tokens, finished = found
        count = len(expected_nodes)
        if finished:
            same("count", out.count.cpu(), torch.tensor([count]))
        same("nodes", out.nodes[0, :count].cpu(), torch.tensor(expected_nodes, dtype=torch.int64))
        same("tokens", out.tokens[0, :count].cpu(), torch.tensor(expected_tokens, dtype=torch.int64))
        return 0.0

    return Trial(
        run=lambda: evaluate_posterior(logits, tree, path, sampling, uniforms),
        rivals={TORCH: lambda: torch_verify.evaluate_posterior(logits, tree, path, sampling, uniforms)},
        check=check,
        traffic=nbytes(logits),
        inputs=(logits,),
    )


def _walk(
    logits: torch.Tensor, tree: DraftTree, path: int, sampling: Sampling, uniforms: list[float]
) -> tuple[list[int], list[int], bool]:
    """Nodes and tokens of the path in float64, and whether it was followed to its end (no draw was too close)."""
    parents, tokens = tree.parents[0].tolist(), tree.tokens[0].tolist()
    nodes: list[int] = []
    chosen: list[int] = []
    node = 0
    while len(nodes) < path:
        row = logits[node].double()
        token = int(row.argmax()) if sampling.greedy else _draw(row, sampling, uniforms[len(nodes)])
        if token is None:
            return nodes, chosen, False
        if sampling.greedy:
            token = int((row == row.max()).nonzero()[0])  # of equals the lowest id
        nodes.append(node)
        chosen.append(token)
        children = [n for n, parent in enumerate(parents) if parent == node and tokens[n] == token]
        if not children:
            break
        node = children[-1]
    return nodes, chosen, True


def _draw(row: torch.Tensor, sampling: Sampling, uniform: float) -> int | None:
    """The token of one row by top-k, then top-p, then the running sum in id order; None where it is too close."""
    scores = row / sampling.temperature
    scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], float("-inf"))
    ordered, order = scores.sort(stable=True)
    running = ordered.softmax(0).cumsum(0) - (1 - sampling.top_p)
    drop = running <= 0
    drop[-1] = False
    scores = scores.clone()
    scores[order[drop]] = float("-inf")
    shares = scores.softmax(0).cumsum(0)
    if float(running.abs().min()) < CLEAR or float((shares - uniform).abs().min()) < CLEAR:
        return None
    return int((shares > uniform).nonzero()[0])


def update_trial(case: Case, device: torch.device, *, poisoned: bool) -> Trial:
    """A full path to commit, with the features of EAGLE-3's three layers; one of the tokens may end the text."""
    nodes, path, size = case.tree.total_token, case.tree.path, 3 * case.model.hidden
    features = torch.randn(1, nodes, size, dtype=case.dtype, device=device)
    accepted = Acceptance(
        nodes=torch.randperm(nodes, device=device)[None, :path].contiguous(),
        tokens=torch.randint(40, (1, path), device=device),
        count=torch.randint(1, path + 1, (1,), device=device),
    )
    eos = torch.randint(40, (2,), device=device)
    one = {"dtype": torch.int64, "device": device}
    state = DecodeState(
        kv_len=torch.tensor([case.prefix], **one),
        root=torch.tensor([7], **one),
        tokens=accepted.tokens,
        features=None,
        count=torch.tensor([1], **one),
        generated=torch.tensor([3], **one),
        budget=torch.randint(1, 2 * path, (1,), device=device),
        done=torch.tensor([False], device=device),
    )
    return Trial(
        run=lambda: update_inputs(state, accepted, features, eos),
        rivals={TORCH: lambda: torch_verify.update_inputs(state, accepted, features, eos)},
        check=lambda new: _check_update(new, state, accepted, features, eos.tolist()),
        traffic=2 * nbytes(features[:, :path]),
        inputs=(features,),
    )


def _check_update(
    new: DecodeState, state: DecodeState, accepted: Acceptance, features: torch.Tensor, eos: list[int]
) -> float:
    tokens, count = accepted.tokens[0].tolist(), int(accepted.count[0])
    committed: list[int] = []
    ended = False
    for token in tokens[: min(count, int(state.budget[0]))]:
        committed.append(token)
        if token in eos:
            ended = True
            break
    kept, left = len(committed), int(state.budget[0]) - len(committed)
    found = (new.count, new.kv_len - state.kv_len, new.generated - state.generated, new.budget, new.root)
    expected = (kept, kept, kept, left, committed[-1])
    for name, out, value in zip(("count", "kv_len", "generated", "budget", "root"), found, expected, strict=True):
        same(name, out.cpu(), torch.tensor([value]))
    if bool(new.done[0]) != (ended or left <= 0):
        raise Mismatch(f"done is {bool(new.done[0])}; expected {ended or left <= 0}")
    return relative_error(new.features[:, :kept], features[:, accepted.nodes[0, :kept]])
