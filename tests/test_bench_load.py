"""Loading to measure: what is built in memory, and what a plain load gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_pair import NAME, WIDE_SIZES, save_small_pair
from tiny_folder import save_pair

from eagle.bench import load
from eagle.bench.load import builds_in_memory, load_for_bench, prepare
from eagle.errors import InvalidInputError, ModelNotFoundError, OutOfMemoryError
from eagle.model import locate, memory
from eagle.model.widened import SIZES, part_bytes, shape_of


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    torch.manual_seed(3)
    return save_pair(tmp_path_factory.mktemp("pair"))


def test_a_pair_with_tree_and_dtype(pair):
    prepare(str(pair))
    model = load_for_bench(str(pair), dtype="bfloat16", tree=(12, 2, 4))
    assert model.base_model.dtype == torch.bfloat16
    assert (model.tree_shape.total_token, model.tree_shape.depth, model.tree_shape.top_k) == (12, 2, 4)


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    save_pair(tmp_path, tokenizer=False)
    with pytest.raises(InvalidInputError, match="has no tokenizer"):
        load_for_bench(str(tmp_path))


def test_unknown_names_and_missing_heads(pair):
    with pytest.raises(ModelNotFoundError, match="unknown model"):
        prepare("SmolLM3")
    with pytest.raises(ModelNotFoundError, match="no draft head"):
        prepare(str(pair / "target"))


@pytest.mark.parametrize(
    ("name", "gpu", "on_disk", "expected"),
    [
        ("EAGLE-3B", True, False, True),
        ("eagle-8b", True, False, True),
        ("EAGLE-3B", True, True, False),
        ("EAGLE-3B", False, False, False),
        ("SmolLM2-135M", True, False, False),
        ("org/name", True, False, False),
    ],
)
def test_widened_models_are_built_on_a_gpu_unless_they_lie_on_disk(name, gpu, on_disk, expected, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(load, "widened_folder", lambda preset: tmp_path if on_disk else tmp_path / preset)
    monkeypatch.setattr(load.EaModel, "from_pretrained", lambda *args, **kwargs: asked.append(kwargs) or FakeModel())
    assert builds_in_memory(name) is expected
    load_for_bench(name)
    assert asked[0].get("in_memory", False) is expected


def test_a_widened_model_too_large_to_load_is_refused_before_it_is_built(tmp_path, monkeypatch):
    small = save_small_pair(tmp_path / "small")
    built = []

    def ensure(name, small, progress):
        built.append(name)
        return tmp_path / name

    monkeypatch.setenv("EAGLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(locate, "_small_pair", lambda preset, progress: small)
    monkeypatch.setattr(locate, "ensure_widened", ensure)
    monkeypatch.setitem(SIZES, NAME, WIDE_SIZES)
    target = small.target_parts(small.widening(shape_of(NAME), "cpu", torch.float32))
    size = sum(part_bytes(part, torch.float32) for part in target)
    monkeypatch.setattr(memory, "host_memory", lambda: size - 1)
    for load_it in (lambda: prepare(NAME), lambda: load.EaModel.from_pretrained(NAME)):
        with pytest.raises(OutOfMemoryError, match=f"the weights of {NAME} take .* in float32, and this machine has"):
            load_it()
    assert not built
    with pytest.raises(ModelNotFoundError):  # the made-up folder does not exist
        prepare(NAME, dtype="bfloat16")
    monkeypatch.setattr(memory, "host_memory", lambda: size)
    with pytest.raises(ModelNotFoundError):
        prepare(NAME)
    locate.locate(NAME)  # to fetch: nobody loads it here
    assert built == [NAME] * 3


class FakeModel:
    def get_tokenizer(self):
        return "a tokenizer"
