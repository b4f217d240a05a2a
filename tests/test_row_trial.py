"""Trials of a target's modules: what differs from row to row is found, whatever the ops look like."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_row_local import DEVICE, HAS_GPU, OPS
from tiny import tiny_target

from eagle.model.row_local import NotRowLocal
from eagle.model.row_trial import check_row_local, equal_rows, lone_rows
from eagle.model.target import Target

DTYPE = torch.float32 if HAS_GPU else torch.bfloat16
"""A CPU's library sums the rows of a pass in several orders, which few digits hide."""


def target(change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Target:
    """A tiny Llama; change: made to the output [B, T, hidden] of its last layer."""
    model = tiny_target().to(DEVICE, DTYPE)
    if change is not None:
        model.model.layers[-1].register_forward_hook(lambda module, args, out: change(out))
    return Target(model, OPS)


@pytest.mark.parametrize("nodes", [1, 2, 5, 64, 65])
@pytest.mark.parametrize("trees", [1, 3])
def test_rows_of_one_kind_are_equal_and_of_others_are_not(trees: int, nodes: int) -> None:
    kinds = torch.randint(3, (trees, nodes))
    rows = lone_rows(target(), OPS, kinds)
    assert rows.shape[:2] == (trees, nodes)
    for first in range(nodes):
        for second in range(nodes):
            assert torch.equal(rows[0, first], rows[-1, second]) == (kinds[0, first] == kinds[-1, second])


def test_kinds_differ_in_token_and_position(monkeypatch) -> None:
    trial, seen = target(), []
    forward = trial.model.forward
    monkeypatch.setattr(trial.model, "forward", lambda **given: (seen.append(given), forward(**given))[1])
    lone_rows(trial, OPS, torch.tensor([[0, 1, 2, 0]] * 2))
    for given in (seen[0]["input_ids"], seen[0]["position_ids"]):
        first, second, third, again = given[0].tolist()
        assert len({first, second, third}) == 3
        assert first == again
        assert 0 not in given  # a token 0 may be padding, and position 0 turns nothing
        assert torch.equal(given[0], given[1])


@pytest.mark.parametrize("vocab", [1, 2, 3])
def test_few_tokens_will_do(vocab: int) -> None:
    few = Target(tiny_target(vocab_size=vocab, bos_token_id=None).to(DEVICE, DTYPE), OPS)
    check_row_local(few, OPS, 1, 5)


@pytest.mark.parametrize(("trees", "nodes"), [(1, 2), (1, 60), (4, 16), (1, 1)])
def test_modules_that_keep_each_rows_bits_pass(trees: int, nodes: int) -> None:
    check_row_local(target(), OPS, trees, nodes)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x + x.shape[1] % 2,
        lambda x: x + (torch.arange(x.shape[1], device=x.device) == 59)[:, None],
        lambda x: x + (torch.arange(x.shape[0], device=x.device) == 1)[:, None, None],
        lambda x: torch.cat([x[:, :1], x[:, 1:] + 1], 1),
        lambda x: x[:1].expand_as(x),
        lambda x: torch.cat([x[1:], x[:1]]),
        lambda x: x + (x.shape[1] > 1) * (torch.arange(x.shape[1], device=x.device) % 3 == 1)[:, None],
        lambda x: x + (x.shape[1] > 1) * (torch.arange(x.shape[1], device=x.device) % 3 == 2)[:, None],
    ],
    ids=[
        "number of rows",
        "last row",
        "second tree",
        "all but the first",
        "the first tree's",
        "another tree's",
        "a second kind",
        "a third kind",
    ],
)
def test_what_follows_from_other_rows_is_found(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(NotRowLocal, match="the bits of a row alone differ from those of its like among 2 × 60"):
        check_row_local(target(change), OPS, 2, 60)


def test_the_op_that_is_not_row_local_is_named() -> None:
    with pytest.raises(NotRowLocal, match=r"aten\._softmax"):
        check_row_local(target(lambda x: x.softmax(-1)), OPS)


def test_bits_are_compared_and_not_numbers() -> None:
    zeros = torch.tensor([[0.0], [0.0], [-0.0]]).view(torch.uint8)
    nan = torch.full((4, 2), torch.nan).view(torch.uint8)
    assert not equal_rows(zeros, zeros[:1])
    assert equal_rows(nan, nan[:1])
