import json

import numpy as np
import pytest
import torch
from train_case import tiny_target, tiny_tokenizer

from eagle.errors import TrainingError
from eagle.train.generate import Sampler
from eagle.train.openings import first_message, follow_up
from eagle.train.selfchat import ChatSettings, SelfChat, repeats, settings_match, write_conversations
from eagle.train.template import chat_pieces

SETTINGS = ChatSettings(seed=4, max_length=256, max_user_tokens=24, max_answer_tokens=60, shard_size=8)


def _write(folder, tokens, rows=6, should_pause=lambda: False):
    tokenizer, target = tiny_tokenizer(), tiny_target()
    pieces = chat_pieces(tokenizer, {1})
    sampler = Sampler(target, rows=rows, slots=256, stop=pieces.stop, capture=False)
    return write_conversations(
        sampler, SelfChat(tokenizer, pieces, SETTINGS), folder, tokens, should_pause=should_pause
    )


def _shards(folder):
    result = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as data:
            result[path.name] = {name: data[name].tolist() for name in data.files}
    return result


def test_pieces_rebuild_the_template():
    tokenizer = tiny_tokenizer()
    pieces = chat_pieces(tokenizer, {1})
    messages = [{"role": r, "content": c} for r, c in (("user", "ab"), ("assistant", "cd"), ("user", "ef"))]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("ab", "cd", "ef")]
    built = [
        *pieces.head, *ids[0], *pieces.to_answer, *ids[1], pieces.end_of_answer, *pieces.to_user, *ids[2],
        *pieces.to_answer,
    ]  # fmt: skip
    assert tokenizer.decode(built) == whole
    assert pieces.end_of_answer == 1


def test_no_chat_template_asks_for_data():
    with pytest.raises(TrainingError, match="--data"):
        chat_pieces(tiny_tokenizer(template=False), {1})


def test_conversations_are_reproducible_and_well_formed(tmp_path):
    total = _write(tmp_path / "a", 2000)
    assert total >= 1800
    _write(tmp_path / "b", 2000)
    shards = _shards(tmp_path / "a")
    assert shards == _shards(tmp_path / "b")
    tokenizer = tiny_tokenizer()
    greedy = 0
    for shard in shards.values():
        for begin, end in zip(shard["offsets"][:-1], shard["offsets"][1:], strict=True):
            tokens, mask = shard["tokens"][begin:end], shard["mask"][begin:end]
            assert len(tokens) <= 256
            assert tokenizer.decode(tokens[: mask.index(1)]).endswith("<|s|>assistant\n")
            assert tokenizer.decode(tokens).startswith("<|s|>user\n")
            assert mask[-1] == 1
        greedy += sum(shard["greedy"])
    assert greedy > 0


def test_shards_that_are_there_are_kept(tmp_path):
    _write(tmp_path, 1500)
    before = _shards(tmp_path)
    name = sorted(before)[0]
    (tmp_path / name).unlink()
    _write(tmp_path, 3000)
    assert _shards(tmp_path)[name] == before[name]


def test_a_pause_leaves_whole_shards(tmp_path):
    calls = []
    _write(tmp_path, 10**6, should_pause=lambda: len(calls) >= 2 or calls.append(0))
    assert len(_shards(tmp_path)) == 2


def test_other_settings_are_refused_with_both_named(tmp_path):
    settings_match(tmp_path, {"seed": 1, "model": "a"})
    settings_match(tmp_path, {"seed": 1, "model": "a"})
    with pytest.raises(TrainingError, match="seed = 1, but seed = 2"):
        settings_match(tmp_path, {"seed": 2, "model": "a"})
    assert json.loads((tmp_path / "settings.json").read_text())["seed"] == 1


def test_openings_are_many_and_filled():
    rng = np.random.default_rng(0)
    drawn = [first_message(rng) for _ in range(5000)] + [follow_up(rng) for _ in range(300)]
    assert len({text for text, _ in drawn}) > 2500
    for text, opening in drawn:
        assert text.strip()
        assert "{" not in text
        assert "|" not in text
        assert not (opening and text.endswith("..."))
    assert 0.4 < np.mean([opening for _, opening in drawn]) < 0.7


def test_repeats():
    assert repeats([1, 2, 3, 4, 5]) == 0
    assert repeats([7] * 50) > 0.95
    assert repeats([]) == 0
    assert torch.tensor(repeats([1, 2, 3, 1, 2, 3])) > 0
