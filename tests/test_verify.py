"""Acceptance: the reference's sequential rejection sampling in distribution, and the walk's edge cases."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from scipy.stats import chi2_contingency
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from eagle.model.ops import Acceptance, DecodeState, DraftTree, Sampling
from eagle.model.tree import ancestor_words
from eagle.model.verify import draw, evaluate_posterior, next_token_probs, update_inputs

VOCAB = 7
PARENTS = [-1, 0, 0, 0, 1, 1, 4, 2]
DEPTHS = [0, 1, 1, 1, 2, 2, 3, 2]
TOKENS = [5, 3, 0, 6, 2, 4, 2, 1]


def toy_tree(batch: int) -> DraftTree:
    parents = torch.tensor([PARENTS]).expand(batch, -1)
    tokens, depths = (torch.tensor([rows]).expand(batch, -1) for rows in (TOKENS, DEPTHS))
    return DraftTree(tokens, parents, depths, ancestor_words(parents, 3))


def rejection_by_loops(probs: list[list[float]], rng: random.Random) -> tuple[int, int]:
    """EAGLE's multi-candidate rejection sampling, one child after the other: (accepted nodes, bonus token)."""
    node, count = 0, 1
    while True:
        left = list(probs[node])
        for child in (n for n, parent in enumerate(PARENTS) if parent == node):
            token = TOKENS[child]
            if rng.random() <= left[token]:
                node, count = child, count + 1
                break
            left[token] = 0.0
            total = sum(left)
            left = [p / total for p in left]
        else:
            return count, rng.choices(range(VOCAB), left)[0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_walk_equals_sequential_rejection(temperature: float) -> None:
    runs = 20_000
    logits = torch.randn(1, len(PARENTS), VOCAB) * 1.5
    sampling = Sampling(temperature)
    probs = next_token_probs(logits[0], sampling).tolist()
    out = evaluate_posterior(logits.expand(runs, -1, -1), toy_tree(runs), 4, sampling, torch.rand(runs, 4))
    bonus = out.tokens.gather(1, out.count[:, None] - 1)[:, 0]
    ours = Counter(zip(out.count.tolist(), bonus.tolist(), strict=True))
    rng = random.Random(7)
    theirs = Counter(rejection_by_loops(probs, rng) for _ in range(runs))
    keys = [key for key in ours | theirs if ours[key] + theirs[key] >= 10]
    assert len(keys) > 8
    assert chi2_contingency([[ours[key] for key in keys], [theirs[key] for key in keys]]).pvalue > 1e-4


@pytest.mark.parametrize("top_k_first", [True, False])
@pytest.mark.parametrize(("top_p", "top_k"), [(0.0, 0), (0.8, 0), (0.0, 3), (0.7, 4), (1.0, 100)])
def test_next_token_probs_are_those_of_transformers(top_p: float, top_k: int, top_k_first: bool) -> None:
    logits = torch.randn(5, 23) * 2
    cuts = [TopKLogitsWarper(top_k)] if top_k else []
    nucleus = [TopPLogitsWarper(top_p)] if 0 < top_p < 1 else []
    order = [*cuts, *nucleus] if top_k_first else [*nucleus, *cuts]
    wanted = LogitsProcessorList([TemperatureLogitsWarper(0.8), *order])(None, logits).softmax(-1)
    torch.testing.assert_close(next_token_probs(logits, Sampling(0.8, top_p, top_k, top_k_first)), wanted)


def test_draw_never_takes_what_has_no_probability() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).expand(5, -1)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.9, 1 - 2**-24])
    assert draw(probs, uniform).tolist() == [1, 1, 3, 3, 3]


def test_greedy_walk_follows_the_argmax_only() -> None:
    logits = torch.zeros(2, len(PARENTS), VOCAB)
    logits[0, 0, 3] = logits[0, 1, 2] = logits[0, 4, 0] = 1.0  # nodes 0 → 1 → 4, then a token no child has
    logits[1, 0, 1] = 1.0  # a token of the tree, but not of the root's children
    out = evaluate_posterior(logits, toy_tree(2), 4, Sampling())
    assert out.count.tolist() == [3, 1]
    assert out.nodes[0, :3].tolist() == [0, 1, 4]
    assert out.tokens[0, :3].tolist() == [3, 2, 0]
    assert out.tokens[1, 0].item() == 1


def test_sampling_needs_uniforms() -> None:
    with pytest.raises(ValueError, match=r"needs uniforms \[B, 4\]"):
        evaluate_posterior(torch.zeros(1, len(PARENTS), VOCAB), toy_tree(1), 4, Sampling(1.0))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_p": -1.0}, "top_p is -1.0"),
        ({"top_p": 2.0}, "top_p is 2.0"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"top_k": -5}, "top_k is -5"),
        ({"top_k": 2.5}, "top_k is 2.5"),
    ],
)
def test_sampling_that_is_none_is_refused(values: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}; expected"):
        Sampling(**{"temperature": 0.8} | values)


@pytest.mark.parametrize(
    ("eos", "budget", "done", "wanted", "finished"),
    [
        ([], 9, False, 3, False),
        ([8], 9, False, 2, True),  # cut right after the end token
        ([9], 9, False, 3, True),  # the end token is the bonus
        ([1], 9, False, 3, False),  # beyond the accepted path: must not count
        ([], 2, False, 2, True),
        ([9], 2, False, 2, True),
        ([8], 9, True, 0, True),  # a finished row stays
    ],
)
def test_update_inputs_cuts(eos: list[int], budget: int, done: bool, wanted: int, finished: bool) -> None:
    accepted = Acceptance(torch.tensor([[0, 2, 5, 0]]), torch.tensor([[7, 8, 9, 1]]), torch.tensor([3]))
    one = torch.ones(1, dtype=torch.int64)
    state = DecodeState(
        kv_len=11 * one,
        root=4 * one,
        tokens=torch.zeros(1, 4, dtype=torch.int64),
        features=None,
        count=one,
        generated=6 * one,
        budget=budget * one,
        done=torch.tensor([done]),
    )
    features = torch.randn(1, 6, 3)
    new = update_inputs(state, accepted, features, torch.tensor(eos, dtype=torch.int64))
    assert (new.count.item(), new.done.item(), new.kv_len.item()) == (wanted, finished, 11 + wanted)
    assert (new.budget.item(), new.generated.item()) == (budget - wanted, 6 + wanted)
    assert new.root.item() == ([7, 8, 9][wanted - 1] if wanted else 4)
    assert torch.equal(new.features[0, :3], features[0, [0, 2, 5]])
