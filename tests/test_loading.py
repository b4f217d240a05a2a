"""Loading a target and its head from folders: what is damaged is named, nothing is filled in at random."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_draft_config, tiny_target
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

from eagle.errors import CheckpointError, InvalidInputError, ModelNotFoundError, OutOfMemoryError, UnsupportedModelError
from eagle.model import loading, memory
from eagle.model.checkpoints import random_draft, save_draft
from eagle.model.ea_model import EaModel
from eagle.model.loading import build_draft


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    model = tiny_target(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "target")
    save_draft(random_draft(tiny_draft_config(model)), tmp_path / "head")
    return tmp_path / "target", tmp_path / "head"


def load(pair: tuple[Path, Path], **options) -> EaModel:
    return EaModel.from_pretrained(base_model_path=str(pair[0]), ea_model_path=str(pair[1]), **options)


def edit_config(folder: Path, field: str, value: object) -> None:
    """Set a field of config.json; an int multiplies what is there, but 0 is 0."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, field: config[field] * value if isinstance(value, int) else value}))


def test_a_pair_of_folders(pair: tuple[Path, Path]) -> None:
    model = load(pair, use_eagle3=True, total_token=13, depth=2, top_k=3, torch_dtype=torch.float32)
    assert model.tokenizer is None
    ids = torch.randint(17, (1, 6))
    wanted = model.base_model.generate(ids, do_sample=False, max_new_tokens=9, attention_mask=torch.ones_like(ids))
    assert torch.equal(model.generate(ids, max_new_tokens=9), wanted)


def test_a_missing_tensor_is_named(pair: tuple[Path, Path]) -> None:
    path = pair[0] / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.self_attn.q_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack model\.layers\.2\.self_attn\.q_proj\.weight; transformers would"):
        load(pair)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size"])
def test_a_config_that_does_not_fit_the_weights(pair: tuple[Path, Path], field: str) -> None:
    edit_config(pair[0], field, 2)
    with pytest.raises(CheckpointError, match=r"mismatch in .*embed_tokens"):
        load(pair)


@pytest.mark.parametrize(("field", "value"), [("num_attention_heads", 0), ("hidden_size", "sixteen")])
def test_a_target_config_that_makes_no_sense(pair: tuple[Path, Path], field: str, value: object) -> None:
    edit_config(pair[0], field, value)
    with pytest.raises(ModelNotFoundError, match="target") as caught:
        load(pair)
    assert "\n" not in str(caught.value)


class Code:
    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: torch.save({"x": Code()}, path), "wants to run code"),
        (lambda path: path.write_bytes(pickle.dumps({"x": Code()})), "wants to run code"),
        (lambda path: path.write_bytes(path.read_bytes()[:-2000]), "truncated or corrupt"),
        (lambda path: path.write_bytes(b"hello" * 99), "truncated or corrupt"),
    ],
)
def test_a_damaged_or_unsafe_pickle_of_a_target(
    pair: tuple[Path, Path], damage: Callable[[Path], object], words: str, capsys: pytest.CaptureFixture
) -> None:
    weights = pair[0] / "model.safetensors"
    torch.save(load_file(weights), pair[0] / "pytorch_model.bin")
    weights.unlink()
    load(pair)
    damage(pair[0] / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=words):
        load(pair)
    assert "never run" not in capsys.readouterr().out


def test_an_unknown_keyword_is_named(pair: tuple[Path, Path]) -> None:
    with pytest.raises(InvalidInputError, match="takes no 'bogus', and nor does the model"):
        load(pair, bogus=1)


def test_weights_that_cannot_fit_are_refused_before_they_are_read(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "host_memory", lambda: memory.weight_bytes(pair[0], torch.bfloat16))
    load(pair, dtype="bfloat16", device_map="cpu")
    load(pair, dtype="auto", device_map="auto")  # may be spread, or kept on the disk
    with monkeypatch.context() as patch:
        patch.setattr(loading, "AutoModelForCausalLM", None)
        for dtype in (torch.float32, "auto"):
            with pytest.raises(OutOfMemoryError, match=r"target take 0\.0 GB.*this machine has"):
                load(pair, dtype=dtype, device_map={"": "cpu"})


@pytest.mark.parametrize(
    ("device_map", "device"),
    [(None, "cpu"), ("cpu", "cpu"), ("cuda:1", "cuda:1"), (1, "cuda:1"), ({"": 0}, "cuda:0"), ({"": "cpu"}, "cpu")],
)
def test_a_device_map_of_one_device(device_map: object, device: str) -> None:
    assert loading._one_device(device_map) == torch.device(device)
    for spread in ("auto", "balanced", {"model": 0, "lm_head": 1}):
        assert loading._one_device(spread) is None


def test_rope_scaling_that_lacks_a_value(pair: tuple[Path, Path]) -> None:
    edit_config(pair[1], "rope_scaling", {"rope_type": "llama3"})
    with pytest.raises(CheckpointError, match=r"RoPE scaling .*factor"):
        load(pair)


def test_truncated_target_weights(pair: tuple[Path, Path]) -> None:
    path = pair[0] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises((CheckpointError, ModelNotFoundError), match="target"):
        load(pair)


def test_a_broken_tokenizer(pair: tuple[Path, Path]) -> None:
    (pair[0] / "tokenizer.json").write_text("{ not json")
    (pair[0] / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer"):
        load(pair)


def test_a_missing_tokenizer_json_is_named(pair: tuple[Path, Path]) -> None:
    (pair[0] / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(CheckpointError, match=r"there is no tokenizer\.json"):
        load(pair)


@pytest.mark.parametrize("draft", ["random", "head"])
def test_a_target_without_attention_is_refused_before_a_head_is_made(pair: tuple[Path, Path], draft: str) -> None:
    folder = pair[0].with_name("mamba")
    MambaForCausalLM(MambaConfig(vocab_size=17, hidden_size=16, num_hidden_layers=4)).save_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match=r"MambaForCausalLM\b.*: use a"):
        load((folder, draft if draft == "random" else pair[1]))


def test_an_encoder_decoder_is_refused_by_name(pair: tuple[Path, Path]) -> None:
    folder = pair[0].with_name("t5")
    small = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1}
    T5ForConditionalGeneration(T5Config(vocab_size=17, **small)).save_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match=r"t5 holds T5Config, .* no decoder-only causal LM"):
        load((folder, pair[1]))


def test_no_head_named(pair: tuple[Path, Path]) -> None:
    with pytest.raises(ModelNotFoundError, match="ea_model_path"):
        EaModel.from_pretrained(str(pair[0]))


def test_wrong_kind_of_head(pair: tuple[Path, Path]) -> None:
    with pytest.raises(CheckpointError, match="use_eagle3"):
        load(pair, use_eagle3=False)


def test_a_head_of_several_layers_is_built_and_runs() -> None:
    model = tiny_target()
    state = random_draft(tiny_draft_config(model, num_layers=2))
    eagle = EaModel(model, build_draft(state), total_token=9, depth=1, top_k=4)
    ids = torch.randint(17, (1, 6))
    assert torch.equal(eagle.generate(ids, max_new_tokens=9), eagle.generate(ids, max_new_tokens=9, speculative=False))
