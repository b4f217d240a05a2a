"""Turns: threads wait for one another, none waits for itself, whoever drives a generation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_eagle

from eagle.engine.settings import EngineSettings
from eagle.errors import InvalidInputError
from eagle.model.ea_model import EaModel
from eagle.model.kv_cache import kv_append
from eagle.model.torch_ops import TORCH_OPS
from eagle.model.triton_kernels import optimize_eagle_with_triton, restore_eagle


@pytest.fixture
def eagle() -> EaModel:
    return tiny_eagle(12, 2, 4)


def prompt() -> torch.Tensor:
    return torch.randint(1, 17, (1, 8))


class Thread:
    """A thread whose result or exception can be asked for."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self._found = work, []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found.append(self._work())
        except Exception as error:  # noqa: BLE001 - whatever a thread raises is the finding
            self._found.append(error)

    def waits(self) -> bool:
        self._thread.join(0.3)
        return self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(20)
        assert not self._thread.is_alive(), "the thread waits forever"
        return self._found[0]


def test_the_thread_that_drives_a_generation_may_not_start_another(eagle: EaModel) -> None:
    ids = prompt()
    wanted = eagle.generate(ids, max_new_tokens=40)
    stream = eagle.stream(ids, max_new_tokens=40)
    got = list(next(stream)[0])

    def elsewhere() -> Exception | None:
        got.extend(next(stream)[0])
        try:
            eagle.generate(ids, max_new_tokens=3)
        except InvalidInputError as error:
            return error
        return None

    error = Thread(elsewhere).result()
    assert "still open" in str(error)
    here = Thread(lambda: eagle.generate(ids, max_new_tokens=3))
    assert here.waits(), "a generation was open"
    got += [token for new in stream for token in new[0]]
    assert here.result().shape == (1, 11)
    assert got == wanted[0, 8:].tolist()


def test_the_thread_that_handed_its_generation_over_waits(eagle: EaModel) -> None:
    ids, handed = prompt(), threading.Event()
    stream = eagle.stream(ids, max_new_tokens=40)

    def first() -> torch.Tensor:
        next(stream)
        handed.set()
        taken.wait(20)
        return eagle.generate(ids, max_new_tokens=3)

    taken = threading.Event()
    starter = Thread(first)
    assert handed.wait(20)
    next(stream)
    taken.set()
    assert starter.waits()
    with pytest.raises(InvalidInputError, match="still open"):
        eagle.generate(ids, max_new_tokens=3)
    stream.close()
    assert starter.result().shape == (1, 11)
    assert eagle.generate(ids, max_new_tokens=3).shape == (1, 11)


def table() -> Any:
    """Ops that differ in one entry and no engine setting."""
    return TORCH_OPS.replaced(kv_append=lambda *args: kv_append(*args))


def test_ops_are_not_swapped_under_an_open_generation(eagle: EaModel) -> None:
    stream = eagle.stream(prompt(), max_new_tokens=30)
    next(stream)
    with pytest.raises(InvalidInputError, match="still open"):
        optimize_eagle_with_triton(eagle, ops=table())
    assert eagle.ops is TORCH_OPS
    assert not eagle.switches
    other = Thread(lambda: optimize_eagle_with_triton(eagle, ops=table())[1])
    assert other.waits()
    stream.close()
    original = other.result()
    assert eagle.ops is not TORCH_OPS
    stream = eagle.stream(prompt(), max_new_tokens=30)
    next(stream)
    for mapping in (original, {"kv_append": kv_append}):
        with pytest.raises(InvalidInputError, match="still open"):
            restore_eagle(eagle, mapping)
    stream.close()
    restore_eagle(eagle, original)
    assert eagle.ops.kv_append is TORCH_OPS.kv_append


def test_a_switch_changes_engine_and_ops_in_one_turn(eagle: EaModel) -> None:
    _, original = optimize_eagle_with_triton(eagle, ops=table(), fused="on")
    assert eagle.engine.fused == "on"
    restore_eagle(eagle, original)
    assert eagle.engine == EngineSettings()
    with eagle._session.exclusive():
        eagle.drop_captures()
        with pytest.raises(InvalidInputError, match="change of this thread"):
            eagle.generate(prompt(), max_new_tokens=3)
    assert eagle.generate(prompt(), max_new_tokens=3).shape == (1, 11)


def test_a_waiting_generation_runs_with_the_ops_of_its_turn(eagle: EaModel) -> None:
    used: list[int] = []
    open_one = eagle.stream(prompt(), max_new_tokens=30)
    next(open_one)
    waiting = eagle.stream(prompt(), max_new_tokens=9)  # made before the ops change, run after it
    open_one.close()
    ops = TORCH_OPS.replaced(kv_append=lambda *args: (used.append(1), kv_append(*args))[1])
    optimize_eagle_with_triton(eagle, ops=ops)
    list(waiting)
    assert used
