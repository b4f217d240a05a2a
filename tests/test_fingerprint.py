"""What a fingerprint notices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from eagle.model.fingerprint import Fingerprint


def model() -> nn.Module:
    shared = nn.Linear(3, 3)
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(shared, nn.ReLU(), nn.Linear(3, 3, bias=False)), shared)


def deep(net: nn.Module) -> nn.Linear:
    return net[1][2]


def test_what_stays_holds() -> None:
    net, other = model(), model()
    found = Fingerprint(net, other)
    net(torch.ones(2, 3))
    with torch.no_grad():
        deep(net).weight.mul_(2.0)
    net.train()
    assert found.holds(net, other)
    assert not found.holds(other, net)
    assert not found.holds(net)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net[1].__setitem__(1, nn.GELU()),
        lambda net: net[1].append(nn.ReLU()),
        lambda net: net.__delitem__(2),
        lambda net: setattr(deep(net), "forward", lambda x: x),
        lambda net: deep(net).register_forward_hook(lambda *_: None),
        lambda net: net[0].register_forward_pre_hook(lambda *_: None),
        lambda net: setattr(deep(net), "weight", nn.Parameter(torch.ones(3, 3))),
        lambda net: setattr(deep(net).weight, "data", torch.ones(3, 3)),
        lambda net: setattr(deep(net), "bias", nn.Parameter(torch.ones(3))),
        lambda net: net.to(torch.float64),
    ],
)
def test_a_change_is_noticed(change: Callable[[nn.Module], object]) -> None:
    net = model()
    found = Fingerprint(net)
    change(net)
    assert not found.holds(net)
    assert Fingerprint(net).holds(net)


def test_a_hook_taken_away_leaves_no_trace() -> None:
    net = model()
    found = Fingerprint(net)
    handle = deep(net).register_forward_hook(lambda *_: None)
    assert not found.holds(net)
    handle.remove()
    assert found.holds(net)
