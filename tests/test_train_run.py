import json
import math

import pytest
import torch
from safetensors.torch import load_file
from train_case import save_dialogues, save_tiny

from eagle.cli import main
from eagle.errors import InvalidInputError, TrainingError
from eagle.model.checkpoints import load_draft
from eagle.model.draft_config import TargetSpec
from eagle.model.ea_model import EaModel
from eagle.train import loop, run, setup
from eagle.train.loop import Trainer, chain_length, learning_rate
from eagle.train.options import TrainOptions
from eagle.train.run import train


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return save_tiny(folder / "target"), save_dialogues(folder / "talk.jsonl")


def _options(inputs, out, **changes):
    model, data = inputs
    values = {
        "model": str(model), "out": out, "data": data, "steps": 30, "batch_tokens": 256, "max_length": 128,
        "draft_vocab": 100, "intermediate_size": 40, "held_out": 4, "log_every": 5, "ttt_steps": 4, "lr": 5e-3,
        "checkpoint_seconds": 0.0,
    }  # fmt: skip
    return TrainOptions(**{**values, **changes})


def _log(out):
    return [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]


def _without_times(entries):
    times = ("seconds", "tokens_per_second")
    return [{k: v for k, v in entry.items() if k not in times} for entry in entries]


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "plain"
    return out, train(_options(inputs, out))


def test_loss_falls_and_the_folder_is_complete(inputs, trained):
    out, result = trained
    losses = [entry["loss"] for entry in _log(out) if "loss" in entry]
    assert all(last < first for first, last in zip(losses[0], losses[-1], strict=True))
    assert result.finished
    assert len(result.accuracy) == 4
    state = load_draft(out, TargetSpec(32, 258, 2))
    assert state.config.draft_vocab_size == 100
    assert state.config.intermediate_size == 40
    assert state.tensors["lm_head.weight"].shape == (100, 32)
    assert state.tensors["d2t"].dtype == torch.int64
    card = (out / "README.md").read_text()
    assert str(inputs[0]) in card
    assert "30 steps" in card
    assert (out / "accuracy.png").stat().st_size > 1000


def test_the_folder_loads_in_eamodel(inputs, trained):
    model = EaModel.from_pretrained(str(inputs[0]), ea_model_path=str(trained[0]))
    assert model is not None


def test_the_exported_head_gives_the_trained_heads_logits(inputs, trained, tmp_path, monkeypatch):
    """Canonical tensors alone, computed with plainly, must equal what was trained: the folded scale above all."""
    kept = {}
    real = run._export

    def export(options, trainer, ids, facts):
        batch = trainer.held_out[0]
        features, _ = trainer.target.features(batch.tokens, batch.positions, batch.packing)
        with torch.no_grad():
            kept["y"] = trainer.step.eval().outputs(batch, features)[0]
        kept.update(
            batch=batch, features=features, embeddings=trainer.target.embeddings, config=trainer.step.head.config
        )
        real(options, trainer, ids, facts)

    monkeypatch.setattr(run, "_export", export)
    train(_options(inputs, tmp_path / "head", steps=3))
    t = load_draft(tmp_path / "head", TargetSpec(32, 258, 2)).tensors
    config, batch = kept["config"], kept["batch"]
    length = batch.packing.lengths[0]

    def norm(x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps) * weight

    def heads(x, count):
        return x.view(length, count, config.head_dim).transpose(0, 1)

    def rotate(x):
        angles = torch.arange(length)[:, None] * config.rope_theta ** (-torch.arange(0, 8, 2) / 8)
        angles = torch.cat([angles, angles], -1)
        low, high = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-high, low], -1) * angles.sin()

    h = kept["features"][:length] @ t["fc.weight"].t()
    emb = kept["embeddings"][batch.tokens[1 : length + 1]]
    p = {k.removeprefix("layers.0."): v for k, v in t.items()}
    x = torch.cat([norm(emb, p["input_layernorm.weight"]), norm(h, p["hidden_norm.weight"])], -1)
    q = rotate(heads(x @ p["self_attn.q_proj.weight"].t(), 4))
    k = rotate(heads(x @ p["self_attn.k_proj.weight"].t(), 2)).repeat_interleave(2, 0)
    v = heads(x @ p["self_attn.v_proj.weight"].t(), 2).repeat_interleave(2, 0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    weights = (q @ k.transpose(1, 2) / math.sqrt(8)).masked_fill(~causal, -1e9).softmax(-1)
    h = h + (weights @ v).transpose(0, 1).reshape(length, -1) @ p["self_attn.o_proj.weight"].t()
    x = norm(h, p["post_attention_layernorm.weight"])
    gate = torch.nn.functional.silu(x @ p["mlp.gate_proj.weight"].t())
    h = h + (gate * (x @ p["mlp.up_proj.weight"].t())) @ p["mlp.down_proj.weight"].t()
    torch.testing.assert_close(norm(h, t["norm.weight"]), kept["y"][:length], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kill_at", [7, 20])
def test_resume_after_a_kill_equals_no_kill(inputs, trained, tmp_path, monkeypatch, kill_at):
    out, _ = trained
    real = Trainer.update

    def dying(self, fraction):
        if self.progress.step == kill_at:
            raise KeyboardInterrupt
        return real(self, fraction)

    monkeypatch.setattr(Trainer, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        train(_options(inputs, tmp_path / "head"))
    monkeypatch.setattr(Trainer, "update", real)
    train(_options(inputs, tmp_path / "head", resume=True))
    expected, got = load_file(out / "model.safetensors"), load_file(tmp_path / "head" / "model.safetensors")
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
    assert _without_times(_log(out)) == _without_times(_log(tmp_path / "head"))


def test_a_pause_can_be_resumed(inputs, trained, tmp_path):
    result = train(_options(inputs, tmp_path / "head", pause_after=1e-6))
    assert not result.finished
    assert not (tmp_path / "head" / "model.safetensors").exists()
    assert train(_options(inputs, tmp_path / "head", resume=True)).finished
    for name, tensor in load_file(tmp_path / "head" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(trained[0] / "model.safetensors")[name])


def test_a_shared_lm_head_may_stay_out(inputs, tmp_path):
    model = load_file(inputs[0] / "model.safetensors")["model.embed_tokens.weight"]
    train(_options(inputs, tmp_path / "in", steps=2, share_lm_head=True))
    state = load_draft(tmp_path / "in", TargetSpec(32, 258, 2)).tensors
    ids = torch.arange(100) + state["d2t"]
    torch.testing.assert_close(state["lm_head.weight"], model[ids])
    train(_options(inputs, tmp_path / "not", steps=2, share_lm_head=True, omit_lm_head=True))
    without = load_draft(tmp_path / "not", TargetSpec(32, 258, 2)).tensors
    assert "lm_head.weight" not in without
    assert torch.equal(without["fc.weight"], state["fc.weight"])


def test_a_whole_vocabulary_and_time_instead_of_steps(inputs, tmp_path):
    train(_options(inputs, tmp_path / "head", steps=None, minutes=0.01, draft_vocab=10**6))
    state = load_draft(tmp_path / "head", TargetSpec(32, 258, 2))
    assert "d2t" not in state.tensors
    assert 0.6 <= loop.load_checkpoint(tmp_path / "head/training" / loop.CHECKPOINT)["progress"]["elapsed"] < 3
    rates = [e["lr"] for e in _log(tmp_path / "head") if "loss" in e]
    assert rates[-1] < 5e-3  # a busy machine has time for a single entry


def test_self_distillation_end_to_end(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(setup, "MANY_TOKENS", 2000)
    options = _options(inputs, tmp_path / "head", data=None, tokens=2000, steps=4, generate_rows=8, max_length=192)
    train(options)
    assert "a CPU is slow at writing 2,000 tokens" in capsys.readouterr().out
    assert json.loads((tmp_path / "head/training/data/settings.json").read_text())["source"] == "self-distillation"
    with pytest.raises(TrainingError, match="seed = 0, but seed = 3"):
        train(_options(inputs, tmp_path / "head", data=None, tokens=2000, steps=4, seed=3, resume=True, max_length=192))


def test_a_target_without_template_asks_for_data(inputs, tmp_path):
    bare = save_tiny(tmp_path / "bare", template=False)
    with pytest.raises(TrainingError, match=r"no chat template.*--data"):
        train(_options((bare, None), tmp_path / "head"))
    assert train(_options((bare, inputs[1]), tmp_path / "head2", steps=2)).finished


def test_an_existing_folder_is_not_touched(inputs, trained, tmp_path):
    out, _ = trained
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(TrainingError, match=r"--resume.*--overwrite"):
        train(_options(inputs, out))
    assert (out / "model.safetensors").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="is a file"):
        train(_options(inputs, tmp_path / "file"))
    mine = tmp_path / "head"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep")
    train(_options(inputs, mine, steps=2, overwrite=True))
    assert (mine / "notes.txt").read_text() == "keep"


def test_resuming_with_other_settings_names_both(inputs, trained):
    with pytest.raises(TrainingError, match=r"lr = 0\.005, but this run has lr = 0\.1"):
        train(_options(inputs, trained[0], resume=True, lr=0.1))


def test_a_damaged_checkpoint_is_named(inputs, tmp_path):
    train(_options(inputs, tmp_path / "head", steps=2))
    path = tmp_path / "head" / "training" / loop.CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TrainingError, match=r"checkpoint\.pt cannot be read"):
        train(_options(inputs, tmp_path / "head", steps=2, resume=True))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(inputs, tmp_path, monkeypatch):
    real = Trainer.forward_backward

    def poisoned(self, batch):
        losses, hits = real(self, batch)
        return (losses * float("nan") if self.progress.step >= 12 else losses), hits

    monkeypatch.setattr(Trainer, "forward_backward", poisoned)
    with pytest.raises(TrainingError, match=r"not finite at step 15.*last good checkpoint"):
        train(_options(inputs, tmp_path / "head"))
    state = loop.load_checkpoint(tmp_path / "head" / "training" / loop.CHECKPOINT)
    assert state["progress"]["step"] == 10
    assert all(torch.isfinite(tensor).all() for tensor in state["head"].values())


def test_too_little_memory_halves_the_batch_once(inputs, tmp_path, monkeypatch, capsys):
    real = Trainer.forward_backward

    def limited(self, batch):
        if len(batch.tokens) > 128:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")
        return real(self, batch)

    monkeypatch.setattr(Trainer, "forward_backward", limited)
    train(_options(inputs, tmp_path / "head", steps=4))
    assert capsys.readouterr().out.count("out of memory") == 1
    state = loop.load_checkpoint(tmp_path / "head" / "training" / loop.CHECKPOINT)
    assert state["progress"]["batch_tokens"] == 128


def test_a_conversation_that_does_not_fit_is_an_error(inputs, tmp_path, monkeypatch):
    def full(self, batch):
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr(Trainer, "forward_backward", full)
    with pytest.raises(TrainingError, match=r"one conversation of \d+ tokens does not fit.*9 GiB"):
        train(_options(inputs, tmp_path / "head"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"minutes": 1.0}, "steps and minutes"),
        ({"batch_tokens": 100}, "below max_length"),
        ({"max_length": 8}, "at least 64"),
        ({"omit_lm_head": True}, "needs share_lm_head"),
        ({"overwrite": True, "resume": True}, "overwrite and resume"),
        ({"greedy_share": 1.5}, "from 0 to 1"),
        ({"attention": "magic"}, "one of auto, flash, dense"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"device": "foo"}, "device is 'foo', but must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_bad_options(inputs, tmp_path, changes, message):
    with pytest.raises(InvalidInputError, match=message):
        _options(inputs, tmp_path / "head", **changes)


def test_what_stops_a_run_at_its_start_does_not_stop_the_next(inputs, tmp_path):
    (tmp_path / "file").write_text("")
    for changes, message in [
        ({"out": tmp_path / "file" / "head"}, "--out"),
        ({"data_folder": tmp_path / "file" / "data"}, "--data-folder"),
        ({"device": "cuda:99"}, "cuda:99, but torch sees"),
    ]:
        with pytest.raises(TrainingError, match=message):
            train(_options(inputs, **{"out": tmp_path / "head", "steps": 2} | changes))
    left = tmp_path / "head" / "training" / "data" / "settings.json"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_text("{}")
    assert train(_options(inputs, tmp_path / "head", steps=2, data_folder=tmp_path / "data")).finished


def test_flash_asked_for_without_a_gpu_is_an_error(inputs, tmp_path):
    with pytest.raises(TrainingError, match="--attention dense"):
        train(_options(inputs, tmp_path / "head", attention="flash"))


def test_the_command_line(inputs, tmp_path, capsys):
    out = str(tmp_path / "x")
    assert main(["train", "--model", str(inputs[0]), "--out", out, "--data", "missing.jsonl"]) == 2
    assert "no data file missing.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_bad_data_file_leaves_nothing_that_a_better_one_meets(inputs, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{\n")
    with pytest.raises(TrainingError, match=r"bad\.jsonl"):
        train(_options((inputs[0], bad), tmp_path / "head", steps=2))
    assert train(_options(inputs, tmp_path / "head", steps=2)).finished


def test_schedule_and_chain_length():
    assert learning_rate(0.0, 1.0, 0.1) == pytest.approx(0.01)
    assert learning_rate(0.1, 1.0, 0.1) == pytest.approx(1.0)
    assert learning_rate(1.0, 1.0, 0.1) == pytest.approx(0.01)
    assert chain_length([0.5, 0.5]) == pytest.approx(1.75)


def test_a_cache_that_does_not_fit_is_refused(inputs, tmp_path):
    with pytest.raises(TrainingError, match=r"takes \d+\.\d GiB, .* are free: lower --generate-rows"):
        train(_options(inputs, tmp_path / "head", data=None, generate_rows=50_000_000))
