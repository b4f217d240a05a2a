"""Acceptance in plain PyTorch: walk the tree by the target's own choices, then hand the state to the next step.

The reference tries a node's children one after the other, accepts child x with probability p(x), and on rejection sets
p(x) to 0 and renormalises. Its drafts are a deterministic top-k (q = 1), so child i is reached and accepted with
probability ``(1 - Σ_{j<i} p(x_j)) · p(x_i) / (1 - Σ_{j<i} p(x_j)) = p(x_i)``, and the bonus token after all rejections
follows p restricted to the other tokens. That is the same as drawing one token y from p and stepping to the child that
carries y, or stopping with y as the bonus token. So one walk serves greedy decoding and sampling: only the choice of y
differs. With one uniform number for each output position, sampled EAGLE output is also the sampled plain output of the
same seed.
"""

from __future__ import annotations

import torch

from eagle.model.ops import Acceptance, DecodeState, DraftTree, Sampling


def evaluate_posterior(
    logits: torch.Tensor, tree: DraftTree, path: int, sampling: Sampling, uniforms: torch.Tensor | None = None
) -> Acceptance:
    """Accept the longest path of the tree that the target itself would have produced.

    logits: [B, N, V], the target's at each node; path: P, the most nodes a path can have; uniforms: [B, P] in [0, 1),
    one for each token that may be committed, required unless greedy.
    """
    batch, nodes, vocab = logits.shape
    node_index = torch.arange(nodes, device=logits.device)
    node = torch.zeros(batch, dtype=torch.int64, device=logits.device)
    alive = torch.ones(batch, dtype=torch.bool, device=logits.device)
    count = torch.zeros_like(node)
    if sampling.greedy:
        choices = logits.argmax(-1)
    elif uniforms is None:
        raise ValueError(f"sampling at temperature {sampling.temperature} needs uniforms [B, {path}], got None")
    path_nodes, path_tokens = [], []
    for step in range(path):
        if sampling.greedy:
            token = choices.gather(1, node[:, None])[:, 0]
        else:
            row = logits.gather(1, node[:, None, None].expand(batch, 1, vocab))[:, 0]
            token = draw(next_token_probs(row, sampling), uniforms[:, step])
        path_nodes.append(node)
        path_tokens.append(token)
        count = count + alive
        child = (tree.parents == node[:, None]) & (tree.tokens == token[:, None])
        alive = alive & child.any(-1)
        node = torch.where(alive, (child * node_index).amax(-1), node)
    return Acceptance(nodes=torch.stack(path_nodes, 1), tokens=torch.stack(path_tokens, 1), count=count)


def next_token_probs(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution after temperature, top-k and top-p. logits: [..., V]; returns float32 [..., V]."""
    scores = logits.float() * _number(sampling, 0)
    filters = [_keep_top_k, _keep_top_p] if sampling.top_k_first else [_keep_top_p, _keep_top_k]
    for keep in filters:
        scores = keep(scores, sampling)
    return scores.softmax(-1)


def draw(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulative distribution passes ``uniform`` [B]. probs: [B, V]; returns [B] int64.

    Summed in float64, so that no token of a 262,144-word vocabulary is lost to rounding; a token of probability 0 is
    never drawn.
    """
    cumulative = probs.double().cumsum(-1)
    level = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, level, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)


def update_inputs(
    state: DecodeState,
    accepted: Acceptance,
    features: torch.Tensor | None,
    eos: torch.Tensor,
    *,
    out: DecodeState | None = None,
) -> DecodeState:
    """Commit the accepted tokens: cut at the first end token and at the budget, advance lengths, mark finished rows.

    features: [B, N, F] of the tree's nodes or None; eos: [E] int64, may be empty. out: static buffers to write into,
    then returned; may be ``state`` itself.
    """
    path = accepted.nodes.shape[1]
    step = torch.arange(path, device=state.root.device)
    # Not torch.isin: with a dozen end tokens or more it sorts out duplicates, whose number the host must read.
    ends = (accepted.tokens[..., None] == eos).any(-1) & (step < accepted.count[:, None])
    first_end = torch.where(ends, step, path).amin(-1)
    count = torch.minimum(torch.minimum(accepted.count, first_end + 1), state.budget)
    count = torch.where(state.done, 0, count)
    last = accepted.tokens.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0]
    budget = state.budget - count
    if features is not None:
        features = features.gather(1, accepted.nodes[..., None].expand(-1, -1, features.shape[-1]))
    new = DecodeState(
        kv_len=state.kv_len + count,
        root=torch.where(count > 0, last, state.root),
        tokens=accepted.tokens,
        features=features,
        count=count,
        generated=state.generated + count,
        budget=budget,
        done=state.done | (first_end < count) | (budget <= 0),
    )
    return new if out is None else out.load(new)


def _number(sampling: Sampling, place: int) -> float | torch.Tensor:
    """One of `Sampling.numbers`: where it is held on the device, that tensor."""
    return sampling.numbers[place] if sampling.held is None else sampling.held[place]


def _keep_top_k(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    if not sampling.cuts_rank(scores.shape[-1]):
        return scores
    if sampling.held is None:
        smallest = scores.topk(sampling.top_k, dim=-1).values[..., -1:]
    else:
        rank = (sampling.held[2].long() - 1).expand(*scores.shape[:-1], 1)
        smallest = scores.sort(dim=-1, descending=True).values.gather(-1, rank)
    return scores.masked_fill(scores < smallest, float("-inf"))


def _keep_top_p(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    if not sampling.cuts_share:
        return scores
    ordered, index = torch.sort(scores, dim=-1, descending=False, stable=True)
    drop = ordered.softmax(-1).cumsum(-1) <= _number(sampling, 1)
    drop[..., -1] = False
    return scores.masked_fill(torch.empty_like(drop).scatter_(-1, index, drop), float("-inf"))
