"""A step reads nothing on the host: no scalar leaves a tensor, no shape depends on data."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_draft, tiny_target
from torch.utils._python_dispatch import TorchDispatchMode

from eagle.engine.prefill import prefill
from eagle.engine.state import Caches, Run, slots_needed
from eagle.engine.step import step
from eagle.model.ops import Sampling, TreeShape
from eagle.model.target import Target
from eagle.model.torch_ops import TORCH_OPS

READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}


class NoHostReads(TorchDispatchMode):
    """Raises where an op would need the host to know a tensor's values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        if name in READS:
            raise AssertionError(f"the step read the host: {name}")
        return func(*args, **(kwargs or {}))


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("the step turned a tensor into Python values")


def make_run(kind: str, sampling: Sampling, speculative: bool, device: str = "cpu") -> Run:
    model = tiny_target().to(device)
    draft = tiny_draft(model, kind)
    target = Target(model, TORCH_OPS, draft.config.aux_layers)
    draft.attach(target)
    shape = TreeShape(20, 2, 4)
    slots = slots_needed(60, shape, speculative)
    caches = Caches(target.new_cache(3, slots), draft.new_cache(3, slots))
    uniforms = None if sampling.greedy else torch.rand(3, 40, device=device)
    eos = torch.tensor([16], device=device)
    return Run(target, draft if speculative else None, TORCH_OPS, shape, sampling, caches, eos, uniforms)


def test_the_guard_notices_a_read() -> None:
    with NoHostReads(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        torch.ones(1).item()


HELD = Sampling(0.9, 0.8, 5).on(torch.device("cpu"))


@pytest.mark.parametrize("speculative", [True, False], ids=["eagle", "plain"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, 0.8, 5), HELD], ids=["greedy", "sampled", "held"])
@pytest.mark.parametrize("kind", ["eagle3", "eagle1"])
def test_no_host_reads(kind: str, sampling: Sampling, speculative: bool, monkeypatch) -> None:
    run = make_run(kind, sampling, speculative)
    state = prefill(run, [[3, 4, 5], [6], [7, 8, 9, 10]], budgets=[30] * 3)
    for name in ("tolist", "item", "numpy", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    with NoHostReads():
        step(run, step(run, state, 10), 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, 0.8, 5)], ids=["greedy", "sampled"])
def test_no_device_synchronisation(sampling: Sampling) -> None:
    run = make_run("eagle3", sampling, speculative=True, device="cuda")
    state = prefill(run, [[3, 4, 5], [6], [7, 8, 9, 10]], budgets=[30] * 3)
    step(run, state, 10)  # library handles are made in a first pass
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(run, state, 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")
