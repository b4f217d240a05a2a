import json

import pytest
from train_case import save_dialogues, tiny_tokenizer

from eagle.errors import TrainingError
from eagle.train.dialogues import encode, read_dialogues


def test_answers_are_marked_with_the_token_that_ends_them():
    tokenizer = tiny_tokenizer()
    messages = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo you"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "ok"},
    ]
    got = encode(tokenizer, messages, frozenset({1}))
    assert tokenizer.decode(got.tokens) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode([t for t, m in zip(got.tokens, got.mask, strict=True) if m]) == "yo you<|e|>ok<|e|>"


def test_both_formats_are_read(tmp_path):
    conversations, left_out = read_dialogues(save_dialogues(tmp_path / "d.jsonl", 10), tiny_tokenizer(), frozenset({1}))
    assert len(conversations) == 10
    assert left_out == ""


def test_without_a_template_turns_are_joined(tmp_path):
    conversations, _ = read_dialogues(
        save_dialogues(tmp_path / "d.jsonl", 2), tiny_tokenizer(template=False), frozenset({1})
    )
    assert conversations[0].tokens[-1] == 1
    assert conversations[0].mask[0] == 0


def test_some_bad_lines_are_left_out_and_the_first_is_named(tmp_path):
    path = save_dialogues(tmp_path / "d.jsonl", 4)
    path.write_text(path.read_text() + "{broken\n" + json.dumps({"messages": []}) + "\n")
    conversations, left_out = read_dialogues(path, tiny_tokenizer(), frozenset({1}))
    assert len(conversations) == 4
    assert "2 lines" in left_out
    assert "line 5: not JSON" in left_out


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nonsense", "not JSON"),
        ('{"text": "hello"}', 'no "messages"'),
        ('{"messages": [{"role": "wizard", "content": "x"}]}', "role 'wizard'"),
        ('{"messages": [{"role": "user", "content": "only me"}]}', "no assistant turn"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 3}]}', "type int"),
        ("[1, 2]", "not an object"),
    ],
)
def test_no_usable_line_names_the_first_bad_one(tmp_path, line, reason):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n" + line + "\n")
    with pytest.raises(TrainingError, match="line 2") as error:
        read_dialogues(path, tiny_tokenizer(), frozenset({1}))
    assert reason in str(error.value)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(TrainingError, match="no data file"):
        read_dialogues(tmp_path / "none.jsonl", tiny_tokenizer(), frozenset({1}))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(TrainingError, match="it is empty"):
        read_dialogues(tmp_path / "empty.jsonl", tiny_tokenizer(), frozenset({1}))
