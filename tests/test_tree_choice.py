"""The measured tree: figures of real runs, the fastest first, remembered under all it depends on."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_eagle

from eagle.engine.settings import EngineSettings
from eagle.engine.tree_choice import choice_key, measure_trees, remember, remembered
from eagle.errors import InvalidInputError
from eagle.model.ops import TreeShape

SHAPES = (TreeShape(12, 2, 3), TreeShape(5, 3, 1), TreeShape(60, 7, 1000))


def test_candidates_are_measured_and_the_tree_stays() -> None:
    model = tiny_eagle(total_token=9, depth=1, top_k=4)
    before = model.tree_shape
    seen = []
    found = measure_trees(model, [[3, 4, 5], [6, 7]], SHAPES, new_tokens=12, told=seen.append)
    assert {figures.shape for figures in found} == set(SHAPES[:2]), "a top-k beyond the vocabulary can't be measured"
    assert sorted(seen, key=lambda figures: -figures.tokens_per_second) == found
    for figures in found:
        assert 1.0 <= figures.accept_length <= figures.shape.path
        expected = figures.accept_length / figures.ms_a_step * 1e3
        assert figures.tokens_per_second == pytest.approx(expected, rel=0.02)
        assert str(figures.shape.total_token) in str(figures)
    assert model.tree_shape == before


def test_no_prompts_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="no prompts"):
        measure_trees(tiny_eagle(), [])


def test_a_choice_is_found_again_only_under_its_own_key(tmp_path) -> None:
    model = tiny_eagle()
    key = choice_key(model)
    assert remembered(tmp_path, key) is None
    remember(tmp_path, key, SHAPES[0])
    assert remembered(tmp_path, choice_key(model)) == SHAPES[0]
    model.configure_engine(EngineSettings(fused="on"))
    assert remembered(tmp_path, choice_key(model)) is None
    model.configure_engine(EngineSettings())
    with torch.no_grad():
        model.ea_layer.fc.weight.add_(1)
    assert remembered(tmp_path, choice_key(model)) is None


def test_a_damaged_file_is_measured_again(tmp_path) -> None:
    key = choice_key(tiny_eagle())
    remember(tmp_path, key, SHAPES[0])
    (path,) = tmp_path.rglob("*.json")
    path.write_text("{")
    assert remembered(tmp_path, key) is None
