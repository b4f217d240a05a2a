"""The static step: the same tokens as the eager one, read one step late, over buffers that stay where they are."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_draft, tiny_eagle, tiny_target

from eagle.engine.session import Session
from eagle.engine.settings import EngineSettings
from eagle.engine.state import StaticState
from eagle.errors import InvalidInputError
from eagle.model.ea_model import EaModel
from eagle.model.ops import DecodeState


@pytest.fixture(params=["tree", "padded"])
def eagle(request: pytest.FixtureRequest) -> EaModel:
    model = tiny_eagle(total_token=30, depth=2, top_k=5)
    model.exact = request.param == "padded"
    return model


def static(monkeypatch: pytest.MonkeyPatch, model: EaModel) -> None:
    """Have a CPU model run its steps over static buffers."""
    monkeypatch.setattr(Session, "captures", True)
    model._session.configure(EngineSettings("captured", exact=model.exact), model.ea_layer)


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
    assert len(eagle._session._static) == 1, "equal calls must share one step"


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
        eagle._session.configure(EngineSettings(), eagle.ea_layer)
    stream.close()
    eagle._session.configure(EngineSettings(), eagle.ea_layer)


@pytest.mark.parametrize("bad", [{"engine": "fast"}, {"fused": True}, {"draft_dtype": "int4"}])
def test_unknown_settings_are_refused(bad: dict) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        EngineSettings(**bad)


def test_only_capturing_fails_loudly_or_falls_back_with_a_reason(monkeypatch) -> None:
    model = tiny_target()
    eagle = EaModel(model, tiny_draft(model), total_token=12, depth=1, top_k=4)
    monkeypatch.setattr(Session, "captures", property(lambda self: self.eager_reason is None))
    monkeypatch.setattr("eagle.engine.graphs.StaticStep._body", _sync)
    monkeypatch.setattr("eagle.engine.graphs.StaticStep._capture", lambda self, pool: self._body())
    monkeypatch.setattr("eagle.engine.session.StaticStep", _capturing)
    eagle._session.configure(EngineSettings("captured"), eagle.ea_layer)
    with pytest.raises(ValueError, match=r"can't be captured .operation not permitted"):
        eagle.generate(prompts(4)[0], max_new_tokens=5)
    eagle._session.configure(EngineSettings("auto"), eagle.ea_layer)
    with pytest.warns(UserWarning, match="one op at a time"):
        out = eagle.generate(prompts(4)[0], max_new_tokens=5)
    assert out.shape[1] == 9


def _sync(_: object) -> None:
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


def _capturing(run, *, capture, pool):
    from eagle.engine.graphs import StaticStep

    return StaticStep(run, capture=True, pool=pool)


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
