"""The static step: the same tokens as the eager one, read one step late, over buffers that stay where they are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tiny import tiny_draft, tiny_eagle, tiny_target

from eagle.engine import captures, exactness, row_bits
from eagle.engine.session import Session
from eagle.engine.settings import EngineSettings
from eagle.engine.state import ROW_TILE, StaticState
from eagle.errors import InvalidInputError, UnsupportedModelError
from eagle.model.ea_model import EaModel
from eagle.model.ops import DecodeState, Sampling
from eagle.model.verify import evaluate_posterior


@pytest.fixture(params=["tree", "padded"])
def eagle(request: pytest.FixtureRequest) -> EaModel:
    model = tiny_eagle(total_token=30, depth=2, top_k=5)
    model.exact = request.param == "padded"
    return model


def static(monkeypatch: pytest.MonkeyPatch, model: EaModel) -> None:
    """Have a CPU model run its steps over static buffers."""
    monkeypatch.setattr(Session, "replays", True)
    model.configure_engine(EngineSettings("captured", exact=model.exact))


def prompts(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(lengths)
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    return torch.randint(1, 17, (len(lengths), width)), mask


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_k": 5, "seed": 4}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("lengths", [(9,), (3, 17, 1)], ids=str)
@pytest.mark.parametrize("speculative", [True, False], ids=["eagle", "plain"])
def test_static_steps_give_the_eager_tokens(eagle, lengths, options, speculative, monkeypatch) -> None:
    ids, mask = prompts(*lengths)
    options = {**options, "attention_mask": mask, "max_new_tokens": 40, "speculative": speculative}
    wanted, before = eagle.generate(ids, **options), eagle.last_stats
    ends = {**options, "eos_token_id": int(wanted[0, -20])}
    ended = eagle.generate(ids, **ends)
    static(monkeypatch, eagle)
    assert torch.equal(eagle.generate(ids, **options), wanted)
    assert eagle.last_stats.accept_lengths == before.accept_lengths
    assert eagle.last_stats.steps == before.steps
    assert torch.equal(eagle.generate(ids, **ends), ended)
    assert torch.equal(eagle.generate(ids, **options), wanted), "an earlier call's end tokens or uniforms stayed"
    assert len(eagle._session.captures.steps()) == 1, "equal calls must share one step"


def test_a_longer_call_gets_larger_caches_and_a_new_step(eagle, monkeypatch) -> None:
    static(monkeypatch, eagle)
    short, long = prompts(5)[0], prompts(300)[0]
    for ids in (short, long, short):
        out = eagle.generate(ids, max_new_tokens=30)
        assert torch.equal(out, eagle.generate(ids, max_new_tokens=30, speculative=False))


def test_an_early_end_leaves_the_model_usable_and_the_prefix_right(eagle, monkeypatch) -> None:
    ids = prompts(20)[0]
    wanted = eagle.generate(ids, max_new_tokens=60)
    static(monkeypatch, eagle)
    stream = eagle.stream(ids, max_new_tokens=60)
    got = [token for _, new in zip(range(4), stream, strict=False) for token in new[0]]
    stream.close()
    assert got == wanted[0, 20 : 20 + len(got)].tolist()
    longer = wanted[:, : 20 + len(got) + 3]
    rest = [token for new in eagle.stream(longer, max_new_tokens=20, reuse_prefix=True) for token in new[0]]
    assert eagle.last_stats.reused_tokens > 15
    assert rest == eagle.generate(longer, max_new_tokens=20)[0, longer.shape[1] :].tolist()


def test_settings_can_change_between_calls_only(eagle, monkeypatch) -> None:
    static(monkeypatch, eagle)
    stream = eagle.stream(prompts(4)[0], max_new_tokens=9)
    next(stream)
    with pytest.raises(InvalidInputError, match="still open"):
        eagle.configure_engine(EngineSettings())
    stream.close()
    eagle.configure_engine(EngineSettings())


@pytest.mark.parametrize(
    "bad",
    [{"engine": "fast"}, {"fused": True}, {"draft_dtype": "int4"}, {"exact": "on"}, {"exact": None}, {"exact": 1}],
    ids=str,
)
def test_unknown_settings_are_refused(bad: dict) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        EngineSettings(**bad)


def step_rows(monkeypatch: pytest.MonkeyPatch, model: EaModel) -> list[int]:
    """The rows of each sequence in the target passes of steps to come; prefill's have no depths."""
    forward, found = model.target.forward, []

    def counted(tokens: torch.Tensor, *args, depths=None, **options):
        if depths is not None:
            found.append(tokens.shape[1])
        return forward(tokens, *args, depths=depths, **options)

    monkeypatch.setattr(model.target, "forward", counted)
    return found


@pytest.mark.parametrize("replays", [False, True], ids=["eager", "static"])
@pytest.mark.parametrize("exact", ["auto", True, False])
def test_which_passes_are_padded(exact, replays, monkeypatch) -> None:
    """Of 20 nodes one tree takes 44 rows to fill its tile and two take 88; plain decoding takes 63."""
    eagle = tiny_eagle(20, 2, 5)
    monkeypatch.setattr(Session, "replays", replays)
    eagle.configure_engine(EngineSettings("captured", exact=exact))
    rows = step_rows(monkeypatch, eagle)
    for speculative, batch in [(False, 1), (False, 3), (True, 3), (True, 1), (False, 2), (True, 2)]:
        out = eagle.generate(prompts(*[5] * batch)[0], max_new_tokens=6, speculative=speculative)
        assert out.shape == (batch, 11)
        padded = exact is True or (exact == "auto" and speculative and batch == 1)
        assert set(rows) == {ROW_TILE if padded else 20 if speculative else 1}, (speculative, batch)
        rows.clear()


def test_a_fused_target_is_padded_only_where_a_library_multiplies(monkeypatch) -> None:
    eagle = tiny_eagle(20, 2, 5)
    eagle.configure_engine(EngineSettings(fused="on", exact="auto"))
    rows = step_rows(monkeypatch, eagle)
    eagle.generate(prompts(5)[0], max_new_tokens=6)
    assert set(rows) == {ROW_TILE}
    monkeypatch.setattr(row_bits, "products_by_kernel", lambda ops: True)
    monkeypatch.setattr(row_bits, "kernel_serves_attention", lambda ops, layers: True)
    assert "exact" not in eagle.kernel_report()[-2].reason
    rows.clear()
    eagle.generate(prompts(5)[0], max_new_tokens=6)
    assert set(rows) == {20}


@pytest.mark.parametrize(("exact", "taken"), [("auto", True), (True, True), (False, False)])
def test_exact_calls_take_the_ops_for_any_number_of_rows(exact, taken, monkeypatch) -> None:
    eagle, asked = tiny_eagle(12, 2, 4), []
    monkeypatch.setattr(row_bits, "decoding_ops", lambda ops: (asked.append(ops), ops)[1])
    eagle.configure_engine(EngineSettings(exact=exact))
    for batch in (1, 2):
        asked.clear()
        eagle.generate(prompts(*[5] * batch)[0], max_new_tokens=3, speculative=False)
        assert bool(asked) == taken


@pytest.mark.parametrize(("exact", "kept"), [("auto", [4]), (True, [4, 5]), (False, [])])
def test_a_large_targets_products_of_many_rows_are_the_librarys(exact, kept, monkeypatch) -> None:
    target, asked = tiny_target().to(torch.bfloat16), []
    eagle = EaModel(target, tiny_draft(target), total_token=60, depth=3, top_k=8)
    monkeypatch.setattr(row_bits, "decoding_ops", lambda ops: (asked.append(ops), ops)[1])
    monkeypatch.setattr(exactness, "SMALL", 0)
    eagle.configure_engine(EngineSettings(exact=exact))
    found = []
    for batch in (4, 5):
        eagle.generate(prompts(*[5] * batch)[0], max_new_tokens=3)
        found += [batch] * bool(asked)
        asked.clear()
    assert found == kept


def test_the_report_tells_what_is_padded(monkeypatch) -> None:
    eagle = tiny_eagle(12, 2, 4)
    said = {}
    eagle.configure_engine(EngineSettings(exact=True))
    assert eagle.kernel_report()[-2].reason.endswith("; not exact: no kernel serves attention")
    monkeypatch.setattr(row_bits, "kernel_serves_attention", lambda ops, layers: True)
    for exact in ("auto", True, False):
        eagle.configure_engine(EngineSettings(exact=exact))
        said[exact] = {choice.op: choice.reason for choice in eagle.kernel_report()}["step"]
    why = " (the kernels don't compute all its products)"
    assert said[True] == f"{said[False]}; exact: every pass in whole tiles of 64 rows{why}"
    assert said["auto"] == f"{said[True].removesuffix(why)} where that takes at most a tenth longer{why}"


def test_the_report_tells_what_a_large_target_leaves_to_the_library(monkeypatch) -> None:
    eagle = tiny_eagle(12, 2, 4)
    eagle.configure_engine(EngineSettings(fused="on", exact="auto"))
    monkeypatch.setattr(row_bits, "products_by_kernel", lambda ops: True)
    monkeypatch.setattr(row_bits, "kernel_serves_attention", lambda ops, layers: True)
    told = "not exact: products of more than 256 rows"
    assert told not in eagle.kernel_report()[-2].reason
    monkeypatch.setattr(exactness, "favours_kernels", lambda width, dtype: False)
    assert told in eagle.kernel_report()[-2].reason


@pytest.mark.parametrize(("captured", "trees"), [(False, 3), (True, 4)])
def test_a_pass_has_the_rows_its_step_was_captured_for(captured, trees, monkeypatch) -> None:
    eagle, asked = tiny_eagle(12, 2, 4), []
    eagle.configure_engine(EngineSettings("captured", exact="auto"))
    monkeypatch.setattr(Session, "replays", captured)
    monkeypatch.setattr(exactness, "pads", lambda *size: (asked.append(size), False)[1])
    eagle.generate(prompts(5, 5, 5)[0], max_new_tokens=3)
    hidden = eagle.base_model.config.hidden_size
    assert set(asked) == {(12, trees, hidden, torch.float32)}


def test_auto_takes_turns_with_one_set_of_caches_and_one_step_a_kind(monkeypatch) -> None:
    eagle = tiny_eagle(52, 2, 7)
    eagle.exact = "auto"
    short, long = prompts(9, 2, 5), prompts(210, 7, 30)  # long's positions and 64 rows more exceed a block of slots
    calls = [(ids, mask, kind) for ids, mask in (short, long, short) for kind in (False, True)]

    def generate(ids: torch.Tensor, mask: torch.Tensor, speculative: bool) -> torch.Tensor:
        return eagle.generate(ids, attention_mask=mask, max_new_tokens=15, speculative=speculative)

    wanted = [generate(*call) for call in calls]
    static(monkeypatch, eagle)
    for call, tokens in zip(calls, wanted, strict=True):
        assert torch.equal(generate(*call), tokens)
    steps = eagle._session.captures.steps()
    assert {(step.run.draft is None, step.run.pad_rows) for step in steps} == {(True, False), (False, True)}
    assert len(steps) == 2


def test_a_failed_capture_is_an_error_where_asked_for_and_a_warning_else(monkeypatch) -> None:
    model = tiny_target()
    eagle = EaModel(model, tiny_draft(model), total_token=12, depth=1, top_k=4)
    monkeypatch.setattr(Session, "replays", property(lambda self: self.captures.step_reason is None))
    monkeypatch.setattr("eagle.engine.captures.StaticStep", _fails)
    eagle.configure_engine(EngineSettings("captured"))
    with pytest.raises(UnsupportedModelError, match=r"can't be captured .operation not permitted"):
        eagle.generate(prompts(4)[0], max_new_tokens=5)
    eagle.configure_engine(EngineSettings("auto"))
    with pytest.warns(UserWarning, match="one op at a time"):
        out = eagle.generate(prompts(4)[0], max_new_tokens=5)
    assert out.shape[1] == 9
    assert eagle.engine_trouble.startswith("operation not permitted")


def _fails(*_: object, **__: object) -> None:
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


def test_batch_sizes_keep_their_captures_and_the_prefix(eagle, monkeypatch) -> None:
    static(monkeypatch, eagle)
    one, two = prompts(12)[0], prompts(9, 9)[0]
    first = eagle.generate(one, max_new_tokens=20)
    eagle.generate(two, max_new_tokens=20)
    steps = set(eagle._session.captures.steps())
    again = [token for new in eagle.stream(first, max_new_tokens=5, reuse_prefix=True) for token in new[0]]
    assert eagle.last_stats.reused_tokens > 0, "another batch size took the chat's prefix"
    assert len(again) == 5
    eagle.generate(two, max_new_tokens=20)
    assert set(eagle._session.captures.steps()) >= steps


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 4}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("lengths", [(9, 2, 5), (3, 17, 1, 8, 40)], ids=str)
@pytest.mark.parametrize("speculative", [True, False], ids=["eagle", "plain"])
@pytest.mark.parametrize("in_turns", [True, False], ids=["in turns", "together"])
def test_idle_rows_change_no_token(eagle, lengths, options, speculative, in_turns, monkeypatch) -> None:
    ids, mask = prompts(*lengths)
    options = {**options, "attention_mask": mask, "max_new_tokens": 30, "speculative": speculative}
    wanted, before = eagle.generate(ids, **options), eagle.last_stats
    ends = {**options, "eos_token_id": int(wanted[1, -12])}
    ended = eagle.generate(ids, **ends)
    static(monkeypatch, eagle)
    if not in_turns:
        eagle._session.captures.prefill_reason = "not here"
    for _ in range(2):
        assert torch.equal(eagle.generate(ids, **options), wanted)
        assert eagle.last_stats.accept_lengths == before.accept_lengths
        assert eagle.last_stats.new_tokens == 30 * len(lengths)
        assert torch.equal(eagle.generate(ids, **ends), ended)
    (step,) = eagle._session.captures.steps()
    assert step.run.caches.target.batch == {3: 4, 5: 8}[len(lengths)]


def test_batches_and_settings_that_take_turns_are_captured_once(monkeypatch) -> None:
    eagle = tiny_eagle(6, 1, 3)
    eagle.exact = True
    static(monkeypatch, eagle)
    made: list[str] = []
    kept = captures._kept
    monkeypatch.setattr(captures, "_kept", lambda *args: (made.append(type(args[2]).__name__), kept(*args))[1])

    def cycle() -> None:
        for batch in range(1, 8):
            eagle.generate(prompts(*[5] * batch)[0], max_new_tokens=3)
        for tenths in range(5, 14):
            eagle.generate(prompts(5)[0], max_new_tokens=3, temperature=tenths / 10, seed=1)
            eagle.generate(prompts(5)[0], max_new_tokens=3, temperature=1, top_k=tenths - 2, seed=1)

    cycle()
    assert made.count("StaticStep") == 4 + 2  # for batches of 1, 2, 4 and 8 rows; drawn, with top-k and without
    made.clear()
    cycle()
    assert not made


def test_one_step_serves_every_temperature(eagle, monkeypatch) -> None:
    ids = prompts(7)[0]
    settings = [(0.6, 0.9, 0), (1.4, 0.5, 0), (0.9, 0.99, 0), (0.6, 0.9, 0)]
    rules = [dict(zip(("temperature", "top_p", "top_k"), each, strict=True)) for each in settings]
    wanted = [eagle.generate(ids, max_new_tokens=20, seed=3, **rule) for rule in rules]
    assert not torch.equal(wanted[0], wanted[1])
    static(monkeypatch, eagle)
    for rule, tokens in zip(rules, wanted, strict=True):
        assert torch.equal(eagle.generate(ids, max_new_tokens=20, seed=3, **rule), tokens)
    assert len(eagle._session.captures.steps()) == 1


def test_an_op_of_a_callers_own_sees_the_settings_of_each_call(eagle, monkeypatch) -> None:
    seen: list[float] = []

    def mine(logits, tree, path, sampling, uniforms):
        seen.append(sampling.temperature)
        return evaluate_posterior(logits, tree, path, sampling, uniforms)

    eagle.ops = eagle.ops.replaced(evaluate_posterior=mine)
    static(monkeypatch, eagle)
    for temperature in (0.5, 1.5):
        seen.clear()
        eagle.generate(prompts(5)[0], max_new_tokens=6, temperature=temperature, seed=1)
        assert set(seen) == {temperature}


def test_a_default_dtype_does_not_round_the_settings(eagle, monkeypatch) -> None:
    static(monkeypatch, eagle)
    eagle.generate(prompts(5)[0], max_new_tokens=6, temperature=0.9, top_p=0.8, seed=1)
    (step,) = eagle._session.captures.steps()
    torch.set_default_dtype(torch.bfloat16)
    try:
        step.prepare(replace(step.run, sampling=Sampling(0.6, 0.93)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(step.run.sampling.held, Sampling(0.6, 0.93).on(step.run.sampling.held.device).held)


def test_a_step_that_can_not_be_captured_runs_without_idle_rows(eagle, monkeypatch) -> None:
    ids, mask = prompts(3, 9, 4)
    wanted = eagle.generate(ids, attention_mask=mask, max_new_tokens=12)
    monkeypatch.setattr(Session, "replays", property(lambda self: self.captures.step_reason is None))
    monkeypatch.setattr(captures, "StaticStep", _fails)
    eagle.configure_engine(EngineSettings("auto", exact=eagle.exact))
    with pytest.warns(UserWarning, match="one op at a time"):
        out = eagle.generate(ids, attention_mask=mask, max_new_tokens=12)
    assert torch.equal(out, wanted)
    assert eagle._session._store.kept(3) is not None


def test_the_targets_device_is_current_while_a_step_runs_and_not_between(eagle, monkeypatch) -> None:
    current: list[bool] = []

    @contextmanager
    def on_device(self: Session) -> Iterator[None]:
        current.append(True)
        try:
            yield
        finally:
            current.pop()

    monkeypatch.setattr(Session, "_on_device", on_device)
    static(monkeypatch, eagle)
    forward, passes = eagle.target.forward, []
    monkeypatch.setattr(eagle.target, "forward", lambda *a, **k: (passes.append(bool(current)), forward(*a, **k))[1])
    for _ in eagle.stream(prompts(7)[0], max_new_tokens=12):
        assert not current
    stream = eagle.stream(prompts(7)[0], max_new_tokens=12)
    next(stream)
    stream.close()
    assert not current
    assert len(passes) > 4
    assert all(passes)


@pytest.mark.parametrize("inside_first", [True, False])
def test_inference_mode_may_come_and_go(eagle, monkeypatch, inside_first: bool) -> None:
    static(monkeypatch, eagle)
    ids = prompts(7)[0]
    found = []
    for inside in (inside_first, not inside_first):
        with torch.inference_mode(inside):
            found.append(eagle.generate(ids, max_new_tokens=20, temperature=0.7, seed=1).clone())
    assert torch.equal(*found)


def test_a_hook_or_another_weight_after_fusing_is_seen(monkeypatch) -> None:
    eagle = tiny_eagle()
    eagle.exact = False
    static(monkeypatch, eagle)
    eagle.configure_engine(EngineSettings("auto", fused="auto"))
    ids, called = prompts(7)[0], []
    eagle.generate(ids, max_new_tokens=5)
    assert eagle.target.fused is not None
    layer = eagle.base_model.model.layers[1].mlp
    handle = layer.register_forward_hook(lambda *_: called.append(1))
    eagle.generate(ids, max_new_tokens=5)
    assert called
    assert "hook" in eagle.engine_trouble
    handle.remove()
    eagle.generate(ids, max_new_tokens=5)
    assert eagle.target.fused is not None
    for tensor in (layer.down_proj.weight, eagle.base_model.model.norm.weight):
        tensor.data = tensor.data * 1.5 + torch.randn_like(tensor) * 0.2
        got = eagle.generate(ids, max_new_tokens=25)
        mask = torch.ones_like(ids)
        wanted = eagle.base_model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=25, pad_token_id=0)
        assert torch.equal(got, wanted)


def test_a_failed_switch_leaves_things_as_they_were() -> None:
    model = tiny_target()
    eagle = EaModel(model, tiny_draft(model, hidden_act="gelu"), total_token=12, depth=1, top_k=4)
    eagle.configure_engine(EngineSettings(fused="auto"))
    assert eagle.target.fused is not None
    with pytest.raises(UnsupportedModelError, match="head can't be fused"):
        eagle.configure_engine(EngineSettings(fused="off", draft_dtype="int8"))
    assert eagle.engine == EngineSettings(fused="auto")
    assert eagle.target.fused is not None


def test_settings_may_change_in_another_thread(monkeypatch) -> None:
    eagle = tiny_eagle()
    ids = prompts(7)[0]
    wanted = eagle.generate(ids, max_new_tokens=12)
    wrong: list[object] = []
    done = threading.Event()

    def generate() -> None:
        while not done.is_set():
            out = eagle.generate(ids, max_new_tokens=12)
            if not torch.equal(out, wanted):
                wrong.append(out)

    def guarded() -> None:
        try:
            generate()
        except Exception as error:  # noqa: BLE001 - whatever a thread raises is the finding
            wrong.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(2)]
    for thread in threads:
        thread.start()
    for index in range(12):
        eagle.configure_engine(EngineSettings(fused="on" if index % 2 == 0 else "off"))
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("batch", [1, 3, 9])
def test_the_report_holds_tokens_counts_and_flags(batch: int) -> None:
    path = 4
    state = DecodeState(
        kv_len=torch.randint(50, (batch,)),
        root=torch.randint(50, (batch,)),
        tokens=torch.randint(50, (batch, path)),
        features=torch.randn(batch, path, 6),
        count=torch.randint(path + 1, (batch,)),
        generated=torch.randint(50, (batch,)),
        budget=torch.randint(50, (batch,)),
        done=torch.rand(batch) < 0.5,
    )
    static = StaticState.like(state)
    new, done = static.read(static.report.clone())
    assert done == state.done.tolist()
    assert new == [row[:count] for row, count in zip(state.tokens.tolist(), state.count.tolist(), strict=True)]
    before = state.kv_len.clone()
    static.state.kv_len.add_(1)
    assert torch.equal(state.kv_len, before), "the static state must have memory of its own"
