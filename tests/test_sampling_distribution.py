"""Sampling keeps the target's distribution: the next three tokens of a toy model, counted and compared (chi-square)."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from scipy.stats import chisquare
from tiny import tiny_draft, tiny_target
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from eagle.model.ea_model import EaModel

VOCAB, RUNS, NEW = 8, 20_000, 3


def exact_distribution(model, prompt: list[int], warpers: LogitsProcessorList) -> dict[tuple[int, ...], float]:
    """The probability of each continuation of three tokens, one forward for each prefix."""
    chances = {(): 1.0}
    for _ in range(NEW):
        longer = {}
        for path, chance in chances.items():
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *path]])).logits[:, -1]
            for token, p in enumerate(warpers(None, logits.float()).softmax(-1)[0].tolist()):
                longer[(*path, token)] = chance * p
        chances = longer
    return chances


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.8}, {"top_k": 3}, {"top_p": 0.75, "top_k": 5}], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_next_three_tokens_follow_the_target(temperature: float, cut: dict) -> None:
    model = tiny_target(vocab_size=VOCAB, num_hidden_layers=3, spread=2.5)
    eagle = EaModel(model, tiny_draft(model), total_token=12, depth=1, top_k=6)
    prompt = torch.randint(VOCAB, (5,)).tolist()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(cut["top_k"])] if "top_k" in cut else []
    warpers += [TopPLogitsWarper(cut["top_p"])] if "top_p" in cut else []
    wanted = exact_distribution(model, prompt, warpers)
    counts = dict.fromkeys(product(range(VOCAB), repeat=NEW), 0)
    accepted: list[int] = []
    for start in range(0, RUNS, 4000):
        ids = torch.tensor([prompt] * 4000)
        out = eagle.generate(ids, max_new_tokens=NEW, temperature=temperature, seed=start + 17, **cut)
        accepted += eagle.last_stats.accept_lengths
        for row in out[:, len(prompt) :].tolist():
            counts[tuple(row)] += 1
    assert max(accepted) > 1, "nothing was ever accepted, so nothing was tested"
    assert all(wanted[path] > 0 for path, count in counts.items() if count)
    common = [path for path, p in wanted.items() if p * RUNS >= 8]
    observed = [counts[path] for path in common]
    expected = [wanted[path] * RUNS for path in common]
    rest = RUNS - sum(observed), RUNS - sum(expected)
    if rest[1] >= 8:
        observed, expected = [*observed, rest[0]], [*expected, rest[1]]
    else:
        expected = [value * sum(observed) / sum(expected) for value in expected]
    assert chisquare(observed, expected).pvalue > 1e-4
