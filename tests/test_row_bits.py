"""How a call's passes keep each row's bits: by the kernels under a target's own modules, by padding, or not at all; also
where a call's modules turn out otherwise."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from test_row_local import DEVICE, HAS_GPU, OPS
from test_target import FAMILIES
from tiny import tiny_draft, tiny_target

from eagle.engine import cache_store, captures, exactness, row_bits
from eagle.engine.graphs import StaticStep
from eagle.engine.session import Session
from eagle.engine.state import Run
from eagle.errors import InvalidInputError, OutOfMemoryError
from eagle.model import row_trial
from eagle.model.ea_model import EaModel
from eagle.model.ops import Ops
from eagle.model.target import Target
from eagle.model.torch_ops import TORCH_OPS
from eagle.model.triton_kernels import optimize_eagle_with_triton, restore_eagle
from eagle.model.triton_kernels.dispatch import Served
from eagle.model.triton_kernels.integration import plan_for


class Engine:
    """A model under the kernels.

    passes: what each target pass of its steps was, rows and whether row-local; trials: the sizes that were tried, trees and
    nodes; told: the lines a user sees. replays: have it hold its steps captured, though here their ops run in turn.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, family: str, exact: bool | str = True, *, replays: bool = True):
        model = tiny_target(FAMILIES[family]).to(DEVICE)
        self.model = EaModel(model, tiny_draft(model), total_token=12, depth=2, top_k=4)
        monkeypatch.setattr(Session, "replays", property(lambda own: replays and own.captures.step_reason is None))
        kept, plan = ("attention", "linear", "gate_up_swiglu", "linear_add_rms_norm"), plan_for(self.model)
        served = {op: Served(op, getattr(OPS, op), getattr(TORCH_OPS, op), (), plan) for op in kept}
        optimize_eagle_with_triton(self.model, ops=OPS.replaced(**served), engine="eager", fused="off", exact=exact)
        self.told: list[str] = []
        self.model.told = self.told.append
        self.passes: list[tuple[int, bool]] = []
        self.trials: list[tuple[int, int]] = []
        forward = self.model.target.forward

        def watched(tokens: torch.Tensor, *args, row_local: bool = False, **options):
            if options.get("depths") is not None:
                self.passes.append((tokens.shape[1], row_local))
            return forward(tokens, *args, row_local=row_local, **options)

        def tried(target: Target, ops: Ops, trees: int, nodes: int) -> None:
            self.trials.append((trees, nodes))
            assert self.model._session._turns._owner is threading.current_thread(), "tried out of turn"
            before = len(self.passes)
            try:
                row_trial.check_row_local(target, ops, trees, nodes)
            finally:
                del self.passes[before:]

        if not HAS_GPU:  # a CPU's library sums the rows of a pass in several orders
            monkeypatch.setattr(row_trial, "equal_rows", lambda rows, alone: True)
        monkeypatch.setattr(row_bits, "check_row_local", tried)
        monkeypatch.setattr(self.model.target, "forward", watched)
        nothing = {"capture": False, "pool": None, "stream": None}
        monkeypatch.setattr(self.model._session.captures, "_place", lambda run: nothing)

    def generate(self, *, speculative: bool = True, batch: int = 1) -> tuple[torch.Tensor, set[tuple[int, bool]]]:
        """Three tokens after ``batch`` prompts that follow from nothing but ``batch``, and the passes they took."""
        ids = (torch.arange(5 * batch, device=DEVICE).view(batch, 5) * 7 + 3) % 29
        self.passes.clear()
        return self.model.generate(ids, max_new_tokens=3, speculative=speculative), set(self.passes)

    def said(self) -> str:
        """The report's line on steps."""
        return {choice.op: choice.reason for choice in self.model.kernel_report()}["step"]


@pytest.mark.parametrize(
    ("family", "exact", "replays", "rows", "row_local"),
    [
        ("llama", True, True, 12, True),
        ("llama", "auto", True, 12, True),
        ("llama", True, False, 64, False),
        ("llama", "auto", False, 12, False),
        ("llama", False, True, 12, False),
        ("gpt2", True, True, 64, False),
        ("gpt2", "auto", True, 12, False),  # 52 rows added to 12: too many
    ],
)
def test_which_passes_are_row_local(family, exact, replays, rows, row_local, monkeypatch) -> None:
    engine = Engine(monkeypatch, family, exact, replays=replays)
    tree, passes = engine.generate()
    assert passes == {(rows, row_local)}
    plain, passes = engine.generate(speculative=False)
    assert torch.equal(plain, tree)
    assert passes == {(64 if rows == 64 else 1, row_local)}


def test_each_size_is_tried_once_and_before_it_is_captured(monkeypatch) -> None:
    engine = Engine(monkeypatch, "llama")
    for _ in range(2):
        alone = torch.cat([engine.generate()[0], engine.generate(speculative=False)[0]])
        together, passes = engine.generate(batch=3)  # captured for four
        assert passes == {(12, True)}
    assert engine.trials == [(1, 12), (1, 1), (4, 12)]
    assert next(line for line in engine.told if "trying" in line) == "trying the target's modules on 1 × 12 rows"
    assert torch.equal(alone[0], alone[1])
    assert torch.equal(together[0], alone[0])


def softmax(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself, with an op on the way that is refused."""
    return x.softmax(-1) * 0 + x


def test_a_size_that_is_refused_has_all_sizes_padded(monkeypatch) -> None:
    engine = Engine(monkeypatch, "llama")
    engine.model.base_model.lm_head.register_forward_pre_hook(
        lambda module, args: (softmax(args[0]),) if args[0].shape[1] == 12 else None
    )
    plain, passes = engine.generate(speculative=False)
    assert passes == {(1, True)}
    tree, passes = engine.generate()
    assert passes == {(64, False)}
    assert torch.equal(tree, plain)
    assert engine.generate(speculative=False)[1] == {(64, False)}
    assert "whole tiles of 64 rows (aten._softmax" in engine.said()


class WarmedUp(StaticStep):
    """A step that runs once before it is replayed, as one that is captured does."""

    def __init__(self, run: Run, **place) -> None:
        super().__init__(run, **place)
        self._body()


def test_what_no_trial_has_met_falls_back_to_padding(monkeypatch) -> None:
    engine = Engine(monkeypatch, "llama")
    monkeypatch.setattr(row_bits, "check_row_local", lambda *_: None)
    monkeypatch.setattr(captures, "StaticStep", WarmedUp)
    engine.model.base_model.lm_head.register_forward_pre_hook(lambda module, args: (softmax(args[0]),))
    tree, passes = engine.generate()
    assert passes == {(12, True), (64, False)}  # the first is given up
    plain, passes = engine.generate(speculative=False)
    assert torch.equal(tree, plain)
    assert passes == {(64, False)}
    assert engine.model.library_products


def test_where_the_capture_fails_the_same_call_is_padded(monkeypatch) -> None:
    def failing(*_, **__):
        raise RuntimeError("a sync")

    engine = Engine(monkeypatch, "llama")
    before = engine.generate(speculative=False)[0]
    monkeypatch.setattr(captures, "StaticStep", failing)
    with pytest.warns(UserWarning, match="the capture failed \\(a sync\\)"):
        tree, passes = engine.generate(batch=3)
    assert passes == {(64, False)}
    assert torch.equal(tree[:1], before)
    assert engine.model._session._store.kept(4) is None, "idle rows are for captured steps"


def test_the_size_that_is_captured_is_the_size_that_is_tried(monkeypatch) -> None:
    engine = Engine(monkeypatch, "llama")
    monkeypatch.setattr(cache_store, "captured_rows", lambda batch: batch)  # as where a power of two does not fit
    engine.generate(batch=3)
    assert engine.trials == [(3, 12)]


class OutOfResources(Exception):
    """As Triton's: no more than an Exception."""


@pytest.mark.parametrize("error", [TypeError, AssertionError, ImportError, OutOfResources, RuntimeError])
def test_a_trial_that_fails_otherwise_is_reported(error: type[Exception], monkeypatch) -> None:
    def failing(*_):
        raise error("not allocated\nand more")

    engine = Engine(monkeypatch, "llama")
    monkeypatch.setattr(row_bits, "check_row_local", failing)
    assert engine.generate()[1] == {(64, False)}
    assert f"(a trial of its modules failed: {error.__name__}: not allocated)" in engine.said()


def test_a_users_mistake_is_no_refusal(monkeypatch) -> None:
    def failing(*_):
        raise InvalidInputError("one at a time")

    engine = Engine(monkeypatch, "llama")
    with monkeypatch.context() as patch:
        patch.setattr(row_bits, "check_row_local", failing)
        with pytest.raises(InvalidInputError, match="one at a time"):
            engine.generate()
    assert engine.generate()[1] == {(12, True)}


def test_a_trial_that_runs_out_of_memory_says_so(monkeypatch) -> None:
    def failing(*_):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    engine = Engine(monkeypatch, "llama")
    with monkeypatch.context() as patch:
        patch.setattr(row_bits, "check_row_local", failing)
        with pytest.raises(OutOfMemoryError, match="two rows"):
            engine.said()
        with pytest.raises(OutOfMemoryError, match="two rows"):
            _ = engine.model.library_products
        with pytest.raises(OutOfMemoryError, match="lower the tree"):
            engine.generate()
    assert engine.generate()[1] == {(12, True)}


@pytest.mark.parametrize("kernels", [True, False], ids=["by the kernels", "by the library"])
def test_a_report_may_be_asked_for_while_a_generation_is_open(kernels: bool, monkeypatch) -> None:
    engine = Engine(monkeypatch, "llama", "auto")
    monkeypatch.setattr(exactness, "keeps_kernels", lambda *size: kernels)
    stream = engine.model.stream(torch.randint(29, (1, 5), device=DEVICE), max_new_tokens=8)
    next(stream)
    assert "own modules" in engine.said()
    stream.close()


def test_the_report_tells_how_modules_are_exact(monkeypatch) -> None:
    for exact in (True, "auto"):
        engine = Engine(monkeypatch, "llama", exact)
        said = "; exact: the kernels compute the products of the target's own modules (tried on 1 × 2 rows)"
        assert engine.said().endswith(said)
        assert engine.trials == [(1, 2)]
        engine.generate()
        assert engine.said().endswith("(tried on 1 × 2, 1 × 12 rows)")
        own = engine.model.ops
        restore_eagle(engine.model, {"attention": TORCH_OPS.attention})
        assert engine.said().endswith("; not exact: no kernel serves attention")
        assert engine.model.library_products
        assert engine.generate()[1] == {(64 if exact is True else 12, False)}
        engine.model.ops = own
    tiles, tenth = "every pass in whole tiles of 64 rows", "where that takes at most a tenth longer"
    assert f"exact but for products of experts: {tiles} (aten._softmax" in Engine(monkeypatch, "mixtral").said()
    assert f"exact: {tiles} {tenth} (a product the kernels don't" in Engine(monkeypatch, "gpt2", "auto").said()
    assert Engine(monkeypatch, "llama", replays=False).said().endswith(" in captured steps alone)")
    assert "exact" not in Engine(monkeypatch, "llama", False).said()


def test_modules_are_tried_anew_when_they_change(monkeypatch) -> None:
    engine = Engine(monkeypatch, "llama")
    assert engine.generate()[1] == {(12, True)}
    norm = engine.model.base_model.model.norm
    hook = norm.register_forward_hook(lambda module, args, out: softmax(out))
    assert engine.generate()[1] == {(64, False)}
    assert engine.model.library_products
    hook.remove()
    assert engine.generate()[1] == {(12, True)}
    assert not engine.model.library_products


def test_modules_are_tried_anew_with_other_ops(monkeypatch) -> None:
    def refusing(x: torch.Tensor, *given, **options):
        if x.dim() == 2:  # of the target's modules; the head's have a batch
            raise ValueError("no weights today")
        return OPS.linear(x, *given, **options)

    engine = Engine(monkeypatch, "llama")
    assert engine.generate()[1] == {(12, True)}
    own = engine.model.ops
    engine.model.ops = own.replaced(linear=replace(own.linear, kernel=refusing))
    assert "a product the kernels don't take: no weights today" in engine.said()
    assert engine.generate()[1] == {(64, False)}
    engine.model.ops = own
    assert engine.generate()[1] == {(12, True)}
