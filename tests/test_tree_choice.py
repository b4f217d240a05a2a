"""The measured tree: figures of real runs, the fastest first, remembered under all it depends on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_eagle

from eagle.commands.console import choose_tree
from eagle.engine.session import Session
from eagle.engine.settings import EngineSettings
from eagle.engine.tree_choice import TreeFigures, choice_key, measure_trees, remember, remembered
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
        assert (figures.replies, figures.equal) == (2, 2)
    assert model.tree_shape == before


def test_a_reply_that_differs_from_plain_decodings_is_told(monkeypatch) -> None:
    model = tiny_eagle(total_token=9, depth=1, top_k=4)
    stream = model.stream

    def misread(prompts, **options):
        """Speculative decoding of the second prompt ends in another token."""
        tokens = [token for (new,) in stream(prompts, **options) for token in new]
        if options["speculative"] and prompts == [[6, 7]]:
            tokens[-1] += 1
        yield [tokens]

    monkeypatch.setattr(model, "stream", misread)
    (figures,) = measure_trees(model, [[3, 4, 5], [6, 7], [8]], SHAPES[:1], new_tokens=12)
    assert (figures.replies, figures.equal) == (3, 2)
    assert str(figures).endswith("2 of 3 replies equal to plain decoding's")


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


def test_a_folder_that_can_not_be_written_costs_the_memory_alone(tmp_path, monkeypatch, capsys) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    monkeypatch.setenv("EAGLE_CACHE", str(file))
    monkeypatch.setattr(Session, "replays", True)
    monkeypatch.setattr("eagle.commands.reply.encode_prompt", lambda tokenizer, text, raw: [3, 4, 5])
    best = TreeFigures(SHAPES[1], 100.0, 1.0, 2.0, 3, 3)
    monkeypatch.setattr("eagle.engine.tree_choice.measure_trees", lambda model, rows, told: [best])
    model = tiny_eagle(total_token=9, depth=1, top_k=4)
    choose_tree(model)
    assert model.tree_shape == SHAPES[1]
    said = capsys.readouterr().err
    assert "can't be remembered" in said
    assert str(file) in said


def test_a_choice_that_can_not_be_read_is_measured_again(tmp_path, monkeypatch, capsys) -> None:
    read_text = Path.read_text

    def fail(self, *args: object, **kwargs: object) -> str:
        if self.suffix == ".json":
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self, *args, **kwargs)

    monkeypatch.setenv("EAGLE_CACHE", str(tmp_path))
    monkeypatch.setattr(Session, "replays", True)
    monkeypatch.setattr("eagle.commands.reply.encode_prompt", lambda tokenizer, text, raw: [3, 4, 5])
    monkeypatch.setattr(
        "eagle.engine.tree_choice.measure_trees", lambda *_, **__: [TreeFigures(SHAPES[0], 9.0, 1.0, 2.0, 3, 3)]
    )
    model = tiny_eagle(total_token=9, depth=1, top_k=4)
    remember(tmp_path, choice_key(model), SHAPES[1])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fail)
        patch.setattr("eagle.bench.prompts.read_prompts", list)
        choose_tree(model)
    assert model.tree_shape == SHAPES[0]
    assert "can't be read" in capsys.readouterr().err
    assert remembered(tmp_path, choice_key(model)) == SHAPES[0]


def test_a_damaged_file_is_measured_again(tmp_path) -> None:
    key = choice_key(tiny_eagle())
    remember(tmp_path, key, SHAPES[0])
    (path,) = tmp_path.rglob("*.json")
    path.write_text("{")
    assert remembered(tmp_path, key) is None
