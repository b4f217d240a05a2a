"""The shapes of EAGLE-3B and EAGLE-8B, and widened models in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_pair import NAME, WIDE_SIZES, save_small_pair
from tiny import relative_error
from transformers import AutoModelForCausalLM

from eagle.errors import CheckpointError, InvalidInputError, OutOfMemoryError
from eagle.model import locate, memory
from eagle.model.checkpoints import default_draft_config
from eagle.model.draft_config import TargetSpec
from eagle.model.ea_model import EaModel
from eagle.model.loading import build_draft, load_pair
from eagle.model.locate import ModelLocation
from eagle.model.presets import PRESETS
from eagle.model.widened import SIZES, SmallPair, build_in_memory, part_bytes, shape_of
from eagle.model.widened_folder import ensure_widened, widened_folder
from eagle.model.widening import Shape, Widening

CPU = torch.device("cpu")
SMOLLM2 = Shape(
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    num_layers=30,
    vocab_size=49_152,
    draft_intermediate_size=4096,
    draft_vocab_size=16_384,
    aux_layers=(2, 15, 27),
)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallPair:
    monkeypatch.setitem(SIZES, NAME, WIDE_SIZES)
    monkeypatch.setenv("EAGLE_CACHE", str(tmp_path / "cache"))
    return save_small_pair(tmp_path / "small")


def located(small: SmallPair, draft: str | None = None) -> ModelLocation:
    return ModelLocation(str(small.target), draft or str(small.head), PRESETS[NAME], widen=small)


def parts(name: str) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Names and shapes of the target's and the head's tensors; nothing is made."""
    widening = Widening(SMOLLM2, shape_of(name), 1e-5, dtype=torch.bfloat16)
    names = dict.fromkeys(("model.embed_tokens.weight", "model.norm.weight"), torch.empty(0))
    spec = TargetSpec(576, 49_152, 30)
    sizes = {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "draft_vocab_size": 16_384, "rms_norm_eps": 1e-5}
    head = widening.draft(default_draft_config(spec, **sizes), {"lm_head.weight": torch.empty(0)}, torch.empty(0))
    return tuple({part.name: part.shape for part in found} for found in (widening.target(names), head))


def test_eagle_8b_has_the_shape_of_llama_31_8b_and_of_its_published_head() -> None:
    target, head = parts("EAGLE-8B")
    assert sum(torch.Size(shape).numel() for shape in target.values()) == 8_030_261_248
    assert sum(name.endswith("down_proj.weight") for name in target) == 32
    assert target["lm_head.weight"] == target["model.embed_tokens.weight"] == (128_256, 4096)
    assert target["model.layers.31.mlp.gate_proj.weight"] == (14_336, 4096)
    qkv = [head[f"layers.0.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert qkv == [(4096, 8192), (1024, 8192), (1024, 8192)]
    assert head["fc.weight"] == (4096, 12_288)
    assert head["lm_head.weight"] == (32_000, 4096)
    assert head["d2t"] == (32_000,)
    assert "embed_tokens.weight" not in head


def test_eagle_3b_has_thirty_layers_of_llama_32_3b() -> None:
    target, head = parts("EAGLE-3B")
    assert sum(torch.Size(shape).numel() for shape in target.values()) == 3_808_091_136
    assert sum(name.endswith("down_proj.weight") for name in target) == 30
    layer = [
        target[f"model.layers.29.{name}.weight"] for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    ]
    assert layer == [(3072, 3072), (1024, 3072), (8192, 3072)]
    assert head["layers.0.mlp.down_proj.weight"] == (3072, 8192)


@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
def test_built_in_memory_it_is_the_small_model(small: SmallPair, device: str) -> None:
    model, state = build_in_memory(NAME, small, device=torch.device(device), dtype=torch.float32, progress=False)
    assert not model.training
    assert model.device.type == device
    plain = AutoModelForCausalLM.from_pretrained(small.target, dtype=torch.float32)
    size = plain.config.vocab_size
    ids = torch.randint(size, (2, 21))
    with torch.no_grad():
        assert relative_error(model(ids.to(device)).logits[..., :size].cpu(), plain(ids).logits) < 1e-5
    assert model.generation_config.eos_token_id == plain.generation_config.eos_token_id
    eagle = EaModel(model, build_draft(state), total_token=15, depth=3, top_k=4)
    wanted = plain.generate(ids[:1], do_sample=False, max_new_tokens=12, attention_mask=torch.ones_like(ids[:1]))
    assert torch.equal(eagle.generate(ids[:1], max_new_tokens=12).cpu(), wanted)


def test_memory_and_folder_hold_the_same_bits(small: SmallPair) -> None:
    folder = ensure_widened(NAME, small, progress=False)
    wanted = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.bfloat16)
    location = ModelLocation(str(folder / "target"), str(folder / "head"))
    _, stored, _ = load_pair(location, hf_kwargs={"dtype": torch.bfloat16})
    model, draft, _ = load_pair(located(small), hf_kwargs={"dtype": "bfloat16", "device_map": "cpu"})
    for ours, theirs in ((model, wanted), (draft, stored)):
        state, other = ours.state_dict(), theirs.state_dict()
        assert state.keys() == other.keys()
        assert all(torch.equal(state[name], other[name]) for name in state)
        assert all(
            torch.equal(a, b) for (_, a), (_, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True)
        )
    assert draft.config == stored.config
    skipped = {"_name_or_path", "transformers_version"}
    assert {k: v for k, v in model.config.to_dict().items() if k not in skipped} == {
        k: v for k, v in wanted.config.to_dict().items() if k not in skipped
    }


def test_from_pretrained_builds_in_memory(small: SmallPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "_small_pair", lambda preset, progress: small)
    model = EaModel.from_pretrained(NAME, in_memory=True, dtype=torch.float32, total_token=12, depth=2, top_k=4)
    plain = EaModel.from_pretrained(
        str(small.target), ea_model_path=str(small.head), dtype=torch.float32, total_token=12, depth=2, top_k=4
    )
    ids = torch.randint(200, (1, 8))
    assert torch.equal(model.generate(ids, max_new_tokens=30), plain.generate(ids, max_new_tokens=30))
    assert model.last_stats.accept_length == plain.last_stats.accept_length
    assert model.get_tokenizer().chat_template == plain.get_tokenizer().chat_template
    assert not widened_folder(NAME).exists()


def test_another_head_goes_before_the_widened_one(small: SmallPair) -> None:
    model, draft, notes = load_pair(located(small, "random"))
    assert draft.config.hidden_size == model.config.hidden_size == 48
    assert "untrained" in notes[0]
    with pytest.raises(CheckpointError, match="use_eagle3=False"):
        load_pair(located(small), use_eagle3=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"load_in_4bit": True}, "load_in_4bit"),
        ({"device_map": "auto"}, r"device_map='auto'"),
        ({"revision": "x"}, "revision"),
    ],
)
def test_options_that_cannot_be_followed_in_memory(small: SmallPair, options: dict, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        load_pair(located(small), hf_kwargs=options)


def test_a_model_that_does_not_fit_is_refused_before_it_is_made(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "host_memory", lambda: 100_000)
    monkeypatch.setattr(Widening, "_noise", None)
    with pytest.raises(OutOfMemoryError, match=r"EAGLE-3B take .* float32, and this machine has .*bfloat16"):
        build_in_memory(NAME, small, device=CPU, dtype=torch.float32)


def test_sizes_are_counted_from_the_shapes(small: SmallPair) -> None:
    widening = small.widening(shape_of(NAME), CPU, torch.bfloat16)
    for part in (*small.target_parts(widening), *small.draft_parts(widening)):
        assert part.make().nbytes == part_bytes(part, torch.bfloat16)


def test_the_presets_name_the_sizes() -> None:
    for name in SIZES:
        target, head = parts(name)
        total = sum(2 * torch.Size(shape).numel() for shape in (*target.values(), *head.values()))
        assert f"({total / 1e9:.1f} GB)" in PRESETS[name].about
