import pytest
import torch

from eagle.train import attention
from eagle.train.attention import Packing, packed_causal_attention, ttt_attention

LENGTHS = [7, 1, 12, 3]


def _inputs(heads, kv_heads, dim, steps, seed):
    generator = torch.Generator().manual_seed(seed)

    def make(count):
        return torch.randn(sum(LENGTHS), count, dim, generator=generator, dtype=torch.float64, requires_grad=True)

    return make(heads), [make(kv_heads) for _ in range(steps)], [make(kv_heads) for _ in range(steps)]


def _loop_reference(q, keys, values, scale):
    """One row and head at a time: K0 up to the row in its document, then the row's own later keys."""
    group = q.shape[1] // keys[0].shape[1]
    rows = []
    begin = 0
    for length in LENGTHS:
        for t in range(begin, begin + length):
            heads = []
            for h in range(q.shape[1]):
                k = torch.stack(
                    [keys[0][s, h // group] for s in range(begin, t + 1)] + [k[t, h // group] for k in keys[1:]]
                )
                v = torch.stack(
                    [values[0][s, h // group] for s in range(begin, t + 1)] + [v[t, h // group] for v in values[1:]]
                )
                heads.append((k @ q[t, h] * scale).softmax(0) @ v)
            rows.append(torch.stack(heads))
        begin += length
    return torch.stack(rows)


def _fake_flash(monkeypatch):
    """FlashAttention's contract in plain PyTorch: output with log-sum-exp; gradients from a given log-sum-exp."""

    def scores(q, k, packing, scale):
        document = torch.repeat_interleave(torch.arange(len(packing.lengths)), torch.tensor(packing.lengths))
        rows = torch.arange(len(document))
        seen = (document[:, None] == document) & (rows[:, None] >= rows)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return (torch.einsum("thd,shd->hts", q, k) * scale).masked_fill(~seen, float("-inf"))

    def forward(q, k, v, packing, scale):
        s = scores(q, k, packing, scale)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        return torch.einsum("hts,shd->thd", s.softmax(-1), v), s.logsumexp(-1), torch.zeros(1), torch.zeros(1)

    def backward(grad, q, k, v, out, lse, state, packing, scale):
        group, dim = q.shape[1] // k.shape[1], q.shape[2]
        weights = (scores(q, k, packing, scale) - lse[..., None]).exp()
        wide_k, wide_v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        delta = (grad * out).sum(-1).t()[..., None]
        grad_scores = weights * (torch.einsum("thd,shd->hts", grad, wide_v) - delta) * scale
        grad_k = torch.einsum("hts,thd->shd", grad_scores, q).view(-1, k.shape[1], group, dim).sum(2)
        grad_v = torch.einsum("hts,thd->shd", weights, grad).view(-1, k.shape[1], group, dim).sum(2)
        return torch.einsum("hts,shd->thd", grad_scores, wide_k), grad_k, grad_v

    monkeypatch.setattr(attention, "_flash_forward", forward)
    monkeypatch.setattr(attention, "_flash_backward", backward)


@pytest.mark.parametrize("backend", ["dense", "flash"])
@pytest.mark.parametrize(("heads", "kv_heads", "steps"), [(2, 2, 1), (6, 2, 4), (3, 1, 7)])
def test_ttt_attention_and_gradients_match_a_loop(monkeypatch, backend, heads, kv_heads, steps):
    _fake_flash(monkeypatch)
    q, keys, values = _inputs(heads, kv_heads, 5, steps, seed=heads * 10 + steps)
    packing = Packing.of(LENGTHS, "cpu")
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    expected = _loop_reference(q, keys, values, 0.37)
    got = ttt_attention(q, keys, values, packing, 0.37, backend)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    inputs = [q, *keys, *values]
    for a, b in zip(
        torch.autograd.grad((got.double() * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_packed_attention_keeps_documents_apart():
    q, (k,), (v,) = _inputs(4, 2, 8, 1, seed=3)
    packing = Packing.of(LENGTHS, "cpu")
    got = packed_causal_attention(q, k, v, packing, 0.5, "dense")
    torch.testing.assert_close(got, _loop_reference(q, [k], [v], 0.5))


def test_the_check_reports_a_backend_that_is_not_there():
    problem = attention.check_flash(4, 2, 16, torch.device("cpu"))
    assert problem is not None
    assert "Error" in problem
