import numpy as np
import torch
from train_case import tiny_target, tiny_tokenizer

from eagle.train.generate import Request, Sampler, sample, uniform


def _run(requests, rows=3, slots=64, stop=(1,), seed=0):
    target = tiny_target(seed=seed)
    sampler = Sampler(target, rows=rows, slots=slots, stop=stop, refill_every=4, capture=False)
    got = {}

    def on_finish(finished):
        got.update({request.tag: tokens for request, tokens in finished})
        return []

    sampler.run(iter(requests), on_finish)
    return target, got


def _requests(count, seed, **fields):
    rng = np.random.default_rng(seed)
    return [
        Request(
            rng.integers(2, 258, int(rng.integers(1, 20))).tolist(), int(rng.integers(1, 40)), i + 100, tag=i, **fields
        )
        for i in range(count)
    ]


def test_greedy_equals_transformers_generate():
    requests = _requests(11, seed=5)
    target, got = _run(requests)
    target.model.set_attn_implementation("sdpa")
    for request in requests:
        prompt = torch.tensor([request.prompt])
        expected = target.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=request.max_new,
            eos_token_id=1, pad_token_id=1,
        )[0, len(request.prompt):].tolist()  # fmt: skip
        assert got[request.tag] == expected[: 64 - len(request.prompt)]


def test_sampling_depends_on_the_request_and_not_on_its_row():
    requests = _requests(9, seed=6, temperature=0.9)
    _, first = _run(requests, rows=2)
    _, second = _run(requests[::-1], rows=5)
    assert first == second
    for request in requests:
        request.seed += 1
    _, other = _run(requests, rows=2)
    assert other != first


def test_sample_follows_the_distribution_and_min_p():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01])).repeat(20000, 1)
    rows = torch.arange(20000)
    tokens = sample(logits, torch.ones(20000), torch.full((20000,), 0.2), uniform(rows, rows * 0 + 3))
    shares = torch.bincount(tokens, minlength=5) / 20000
    expected = torch.tensor([0.5, 0.3, 0.15, 0, 0]) / 0.95
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)


def test_the_tiny_tokenizer_is_sane():
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer("Héllo <|e|>")["input_ids"]) == "Héllo <|e|>"
