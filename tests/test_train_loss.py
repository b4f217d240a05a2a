import numpy as np
import pytest
import torch

from eagle.train.corpus import make_labels
from eagle.train.loss import STEP_DECAY, chunked_loss


def _case(seed, rows=41, steps=3, vocab=23, draft=11, width=6):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(rows, generator=generator) < 0.8).numpy().astype(np.uint8)
    mask[0] = 0
    hidden = [torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(steps)]
    teacher_hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    teacher_head = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    lm_head = torch.randn(draft, width, generator=generator, dtype=torch.float64)
    return mask, hidden, lm_head, teacher_hidden, teacher_head


def _plain(mask, hidden, lm_head, teacher_hidden, teacher_head):
    """The definition, a row and a step at a time."""
    draft = lm_head.shape[0]
    teacher = (teacher_hidden @ teacher_head.t()).softmax(-1)
    total, losses, hits, counts = 0.0, [], [], []
    for step, h in enumerate(hidden):
        loss, hit, count = torch.zeros((), dtype=torch.float64), 0, 0
        for t in range(len(mask)):
            label = t + 1 + step
            if label + 1 >= len(mask) or not mask[t + 1 : label + 2].all():
                continue
            logits = lm_head @ h[t]
            loss = loss - (teacher[label, :draft] * logits.log_softmax(-1)).sum()
            hit += int(logits.argmax() == teacher[label].argmax())
            count += 1
        losses.append(loss)
        hits.append(hit)
        counts.append(count)
        total = total + STEP_DECAY**step * loss / max(1, count)
    return total / sum(STEP_DECAY**j for j in range(len(hidden))), losses, hits, counts


@pytest.mark.parametrize("chunk", [5, 64])
def test_loss_and_gradients_match_the_definition(chunk):
    mask, hidden, lm_head, teacher_hidden, teacher_head = _case(seed=chunk)
    inputs = [lm_head, *hidden]
    for tensor in inputs:
        tensor.requires_grad_()
    labels = make_labels(mask, len(hidden), chunk, torch.device("cpu"))
    total, losses, hits = chunked_loss(hidden, lm_head, labels, teacher_hidden, teacher_head)
    expected, losses_plain, hits_plain, counts = _plain(mask, hidden, lm_head, teacher_hidden, teacher_head)
    assert labels.counts == counts
    assert labels.positions.shape[0] % chunk == 0
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.double(), torch.stack(losses_plain), rtol=1e-5, atol=1e-5)
    assert hits.int().tolist() == hits_plain
    for a, b in zip(torch.autograd.grad(total * 1.7, inputs), torch.autograd.grad(expected * 1.7, inputs), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


def test_a_batch_without_labels_gives_zero():
    mask, hidden, lm_head, teacher_hidden, teacher_head = _case(seed=1)
    hidden[0].requires_grad_()
    labels = make_labels(np.zeros_like(mask), 3, 8, torch.device("cpu"))
    total, _, hits = chunked_loss(hidden, lm_head, labels, teacher_hidden, teacher_head)
    assert total.item() == 0
    assert hits.sum() == 0
    assert torch.autograd.grad(total, hidden[0])[0].abs().max() == 0


def test_nothing_is_kept_for_gradients_without_need():
    mask, hidden, lm_head, teacher_hidden, teacher_head = _case(seed=2)
    labels = make_labels(mask, 3, 8, torch.device("cpu"))
    total, _, _ = chunked_loss(hidden, lm_head, labels, teacher_hidden, teacher_head)
    assert not total.requires_grad
