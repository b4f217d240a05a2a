"""Memory that runs short: what is counted, what is let go of, what is kept, and what the error says."""

from __future__ import annotations

import gc

import pytest
import torch
from tiny import tiny_eagle

from eagle.engine.captures import Captures
from eagle.engine.memory import RESERVE, cache_bytes
from eagle.engine.session import Session
from eagle.engine.settings import EngineSettings
from eagle.errors import InvalidInputError, OutOfMemoryError
from eagle.model.ea_model import EaModel
from eagle.model.fused_draft import FusedDraft
from eagle.model.kv_cache import KVCache

FULL = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB"


@pytest.fixture
def eagle(monkeypatch: pytest.MonkeyPatch) -> EaModel:
    """A model on a CPU whose steps run over static buffers, as captured ones do."""
    model = tiny_eagle(12, 2, 4)
    monkeypatch.setattr(Session, "replays", True)
    monkeypatch.setattr("eagle.engine.cache_store.roomy_slots", lambda target, draft, batch, slots, most, shape: slots)
    model.configure_engine(EngineSettings("captured"))
    return model


def prompts(batch: int, length: int = 8) -> torch.Tensor:
    return torch.randint(1, 17, (batch, length))


def row_bytes(model: EaModel, slots: int = 256) -> int:
    return cache_bytes(model.target, model.ea_layer, 1, slots)


def held() -> int:
    """Bytes of all caches that are alive."""
    gc.collect()
    found = [cache for cache in gc.get_objects() if type(cache) is KVCache]
    return sum({k.data_ptr(): k.nbytes + v.nbytes for cache in found for k, v in cache.groups}.values())


def set_free(monkeypatch: pytest.MonkeyPatch, free) -> None:
    for module in ("memory", "cache_store", "session"):
        monkeypatch.setattr(f"eagle.engine.{module}.free_bytes", free)


def leave_rows(monkeypatch: pytest.MonkeyPatch, model: EaModel, rows: float) -> None:
    """Leave room for caches of ``rows`` rows of 256 slots beside those there are now, and for any step."""
    monkeypatch.setattr("eagle.engine.memory.pass_bytes", lambda target, batch, shape: 0)
    limit = held() + int(rows * row_bytes(model)) + RESERVE
    set_free(monkeypatch, lambda device: limit - held())


def test_the_row_for_prefill_is_counted_before_anything_is_taken(eagle, monkeypatch) -> None:
    ids = prompts(4)
    wanted = eagle.generate(ids, max_new_tokens=5)
    eagle._session.forget()
    leave_rows(monkeypatch, eagle, 4.5)
    for _ in range(2):
        with pytest.raises(OutOfMemoryError, match="4 sequences, and 1 more for their prefill, of 256 positions"):
            eagle.generate(ids, max_new_tokens=5)
    assert not eagle._session.captures.steps()
    leave_rows(monkeypatch, eagle, 5.5)
    assert torch.equal(eagle.generate(ids, max_new_tokens=5), wanted)
    (step,) = eagle._session.captures.steps()
    assert torch.equal(eagle.generate(ids, max_new_tokens=5), wanted)
    assert eagle._session.captures.steps() == [step], "the batch's caches were not kept"


def test_where_no_prompt_is_captured_no_row_is_needed_for_it(eagle, monkeypatch) -> None:
    ids = prompts(4)
    eagle._session.captures.prefill_reason = "not here"
    leave_rows(monkeypatch, eagle, 4.5)
    assert eagle.generate(ids, max_new_tokens=5).shape == (4, 13)


def test_the_row_for_prefill_may_be_lost_and_found_again(eagle, monkeypatch) -> None:
    ids = prompts(4)
    wanted = eagle.generate(ids, max_new_tokens=5)
    store = eagle._session._store
    own = store.kept(4)
    store._drop_one_row()
    leave_rows(monkeypatch, eagle, 0.5)
    with pytest.raises(OutOfMemoryError, match="1 more for their prefill"):
        eagle.generate(ids, max_new_tokens=5)
    assert store.kept(4) is own, "the caches in use were let go of"
    leave_rows(monkeypatch, eagle, 1.5)
    assert torch.equal(eagle.generate(ids, max_new_tokens=5), wanted)


@pytest.mark.parametrize("batch", [1, 3])
def test_other_calls_caches_go_when_memory_is_short(eagle, monkeypatch, batch: int) -> None:
    leave_rows(monkeypatch, eagle, 10.5)
    eagle.generate(prompts(2), max_new_tokens=3)  # three rows, one of them for prefill
    ids = prompts(batch, 300)  # 512 slots: each is two rows
    assert eagle.generate(ids, max_new_tokens=20).shape == (batch, 320)
    assert (eagle._session._store.kept(2) is None) == (batch == 3)


def test_caches_that_are_too_small_make_room_for_their_successors(eagle, monkeypatch) -> None:
    leave_rows(monkeypatch, eagle, 6.5)
    eagle.generate(prompts(2), max_new_tokens=3)
    out = eagle.generate(prompts(2, 300), max_new_tokens=3)  # 512 slots: six rows, where three were taken
    assert out.shape == (2, 303)
    eagle._session.forget()
    first = eagle.generate(prompts(1, 100), max_new_tokens=3)
    stream = eagle.stream(torch.cat((first, prompts(1, 200)), 1), max_new_tokens=3, reuse_prefix=True)
    assert sum(len(new[0]) for new in stream) == 3
    assert eagle.last_stats.reused_tokens > 90


def test_a_batch_takes_its_own_size_where_the_power_of_two_does_not_fit(eagle, monkeypatch) -> None:
    ids = prompts(5)
    wanted = eagle.generate(ids, max_new_tokens=9)
    assert eagle._session._store.kept(8) is not None
    eagle._session.forget()
    leave_rows(monkeypatch, eagle, 7.5)
    for _ in range(2):
        assert torch.equal(eagle.generate(ids, max_new_tokens=9), wanted)
        assert eagle._session._store.kept(8) is None
        assert eagle._session._store.kept(5).target.batch == 5
    assert len(eagle._session.captures.steps()) == 1


def test_memory_in_pieces_is_gathered_once_before_the_call_fails(eagle, monkeypatch) -> None:
    eagle.generate(prompts(1), max_new_tokens=3)
    eagle.generate(prompts(2), max_new_tokens=3)
    limit = held() + int(2.5 * row_bytes(eagle))
    new_cache = eagle.target.new_cache

    def limited(batch: int, slots: int) -> KVCache:
        if held() + cache_bytes(eagle.target, eagle.ea_layer, batch, slots) > limit:
            raise torch.OutOfMemoryError(FULL)
        return new_cache(batch, slots)

    monkeypatch.setattr(eagle.target, "new_cache", limited)
    ids = prompts(4)
    assert eagle.generate(ids, max_new_tokens=3).shape == (4, 11)
    assert eagle._session._store.kept(1) is None
    limit = 0
    with pytest.raises(OutOfMemoryError, match="more than is free"):
        eagle.generate(prompts(1), max_new_tokens=3)
    limit = 1 << 40
    assert eagle.generate(ids, max_new_tokens=3).shape == (4, 11)


def test_a_step_that_runs_out_says_what_was_free_and_what_was_asked_for(monkeypatch) -> None:
    eagle = tiny_eagle(12, 2, 4)
    ids = prompts(1)
    wanted = eagle.generate(ids, max_new_tokens=6)
    forward, calls = eagle.target.forward, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError(FULL)
        return forward(*args, **kwargs)

    monkeypatch.setattr(eagle.target, "forward", full)
    session = eagle._session
    monkeypatch.setattr("eagle.engine.session.free_bytes", lambda device: (3 if session._store.kept(1) else 60) << 30)
    with pytest.raises(OutOfMemoryError) as caught:
        eagle.generate(ids, max_new_tokens=6)
    text = str(caught.value)
    assert "and 3.0 GiB are free (the allocator: CUDA out of memory. Tried to allocate 20.00 GiB); lower" in text
    assert "\n" not in text
    assert torch.equal(eagle.generate(ids, max_new_tokens=6), wanted)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(FULL), KeyboardInterrupt()], ids=["memory", "ctrl-c"])
def test_a_switch_that_fails_half_way_is_undone(monkeypatch, error: BaseException) -> None:
    eagle, ids = tiny_eagle(12, 2, 4), prompts(1)
    wanted = eagle.generate(ids, max_new_tokens=12)
    with monkeypatch.context() as patch:
        patch.setattr(FusedDraft, "__init__", raising(error))
        with pytest.raises((OutOfMemoryError, KeyboardInterrupt)) as caught:
            eagle.configure_engine(EngineSettings(fused="auto"))
    if isinstance(error, RuntimeError):
        assert "Tried to allocate 20.00 GiB" in str(caught.value)
        assert "fused='off'" in str(caught.value)
    assert eagle.engine == EngineSettings()
    assert eagle.target.fused is None
    assert torch.equal(eagle.generate(ids, max_new_tokens=12), wanted)
    eagle.configure_engine(EngineSettings(fused="on"))
    assert torch.equal(eagle.generate(ids, max_new_tokens=12), wanted)


def test_fusing_anew_that_fails_is_tried_again_by_the_next_call(monkeypatch) -> None:
    eagle, ids = tiny_eagle(12, 2, 4), prompts(1)
    wanted = eagle.generate(ids, max_new_tokens=12)
    eagle.configure_engine(EngineSettings(fused="auto"))
    eagle.generate(ids, max_new_tokens=12)
    weight = eagle.base_model.model.norm.weight
    weight.data = weight.data.clone()
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(FusedDraft, "__init__", raising(torch.OutOfMemoryError(FULL)))
            with pytest.raises(OutOfMemoryError, match="packing the weights"):
                eagle.generate(ids, max_new_tokens=12)
    assert torch.equal(eagle.generate(ids, max_new_tokens=12), wanted)
    assert eagle.target.fused is not None
    assert isinstance(eagle._session.draft, FusedDraft)


def test_what_was_fused_and_can_not_be_again_is_told_by_the_next_call(monkeypatch) -> None:
    eagle, ids = tiny_eagle(12, 2, 4), prompts(1)
    wanted = eagle.generate(ids, max_new_tokens=12)
    eagle.configure_engine(EngineSettings(fused="on"))
    with monkeypatch.context() as patch:
        patch.setattr(FusedDraft, "__init__", raising(torch.OutOfMemoryError(FULL)))
        with pytest.raises(OutOfMemoryError):
            eagle.configure_engine(EngineSettings(fused="on", draft_dtype="int8"))
        assert eagle.engine == EngineSettings(fused="on")
        with pytest.raises(OutOfMemoryError):
            eagle.generate(ids, max_new_tokens=12)
    assert torch.equal(eagle.generate(ids, max_new_tokens=12), wanted)


def raising(error: BaseException):
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("what", ["StaticStep", "StaticPrefill"])
def test_a_capture_that_runs_out_leaves_its_pool(eagle, monkeypatch, what: str) -> None:
    ids = prompts(1)
    eagle.generate(ids, max_new_tokens=3)
    captures = eagle._session.captures
    captures._pool = captures._stream = pool = (0, 1)
    taken = []
    place = Captures._place
    monkeypatch.setattr(Captures, "_place", lambda self, run: (taken.append(self._pool), place(self, run))[1])
    with monkeypatch.context() as patch:
        patch.setattr(f"eagle.engine.captures.{what}", raising(torch.OutOfMemoryError(FULL)))
        patch.setattr(Session, "forget", lambda self: None)
        with pytest.raises(OutOfMemoryError):
            eagle.generate(prompts(1, 40), max_new_tokens=3, temperature=0.5)
    assert pool in taken
    assert captures._pool is None
    captures._pool = pool
    captures.drop()
    assert captures._pool is None


def test_an_error_of_another_kind_passes_through(monkeypatch) -> None:
    eagle = tiny_eagle(12, 2, 4)
    monkeypatch.setattr(eagle.target, "new_cache", raising(RuntimeError("planted")))
    with pytest.raises(RuntimeError, match="planted"):
        eagle.generate(prompts(1), max_new_tokens=3)
    with pytest.raises(InvalidInputError):
        eagle.generate(prompts(1), max_new_tokens=0)
