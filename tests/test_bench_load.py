"""Loading to measure: what is built in memory, and what a plain load gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_folder import save_pair

from eagle.bench import load
from eagle.bench.load import builds_in_memory, load_for_bench, prepare
from eagle.errors import InvalidInputError, ModelNotFoundError


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


class FakeModel:
    def get_tokenizer(self):
        return "a tokenizer"
