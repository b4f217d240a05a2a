"""`eagle chat` with piped input."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from tiny_folder import save_pair

from eagle.cli import main
from eagle.commands.chat import Conversation
from eagle.commands.reply import ReplySettings
from eagle.engine.cache_store import CacheStore
from eagle.errors import OutOfMemoryError
from eagle.model.ea_model import EaModel
from eagle.model.ops import Sampling


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    torch.manual_seed(5)
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def conversation(pair) -> Conversation:
    model = EaModel.from_pretrained(str(pair), total_token=12, depth=2, top_k=4)
    return Conversation(model, ReplySettings(13, Sampling()))


def talk(capsys, monkeypatch, pair: Path, typed: str, *flags: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    code = main(["chat", "--model", str(pair), "--tree", "12,2,4", "-n", "7", *flags])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_piped_conversation(capsys, monkeypatch, pair):
    code, out, err = talk(capsys, monkeypatch, pair, "Hi\n\n/stats\n/what\n/reset\n/stats\n/help\n/quit\nunread\n")
    assert code == 0
    assert "error" not in err
    for words in ("last reply: ", "unknown command /what", "is forgotten", "nothing has been said", "Ctrl-C"):
        assert words in out
    assert "unread" not in out


@pytest.mark.parametrize("command", ["/quit", "/exit"])
def test_what_ends_a_chat_is_in_its_help(capsys, monkeypatch, pair, command):
    code, out, _ = talk(capsys, monkeypatch, pair, f"/help\n{command}\n/stats\n")
    assert code == 0
    assert command in out
    assert "nothing has been said" not in out


def test_end_of_input_ends_the_chat(capsys, monkeypatch, pair):
    code, out, _ = talk(capsys, monkeypatch, pair, "Hi")
    assert code == 0
    assert out


def test_too_long_a_message_does_not_end_the_chat(capsys, monkeypatch, pair):
    code, out, err = talk(capsys, monkeypatch, pair, "x" * 600 + "\n/stats\nHi\n/stats\n")
    assert code == 0
    assert err.count("error: ") == 1
    assert "512" in err
    assert out.index("nothing has been said yet") < out.index("1 replies")


def test_a_reply_that_does_not_fit_leaves_the_conversation_as_it_was(capsys, monkeypatch, pair):
    original, calls = CacheStore.take, []

    def take(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise OutOfMemoryError("1 sequences of 512 positions need 3.0 GiB; lower max_new_tokens")
        return original(self, *args)

    monkeypatch.setattr(CacheStore, "take", take)
    code, out, err = talk(capsys, monkeypatch, pair, "One?\nTwo?\nThree?\n/stats\n")
    assert code == 0
    assert err.count("error: 1 sequences of 512 positions") == 1
    assert "2 replies" in out


def test_model_without_template(capsys, monkeypatch, tmp_path):
    code, _, err = talk(capsys, monkeypatch, save_pair(tmp_path, template=None), "Hi\n")
    assert code == 2
    assert "chat template" in err


def test_replies_are_those_of_a_fresh_model_and_the_cache_is_kept(conversation, pair):
    replies = [conversation.ask(text, lambda piece: None) for text in ("One?", "Two?", "Three?")]
    fresh = EaModel.from_pretrained(str(pair), total_token=12, depth=2, top_k=4)
    ids: list[int] = []
    tokenizer = fresh.get_tokenizer()
    for text, reply in zip(("One?", "Two?", "Three?"), replies, strict=True):
        # What the template writes after a reply, unless the reply's own end token was it.
        closing = "" if not ids else "\n" if ids[-1] == tokenizer.eos_token_id else "<|im_end|>\n"
        turn = f"{closing}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        exact = ids + tokenizer(turn, add_special_tokens=False)["input_ids"]
        whole = fresh.generate(torch.tensor([exact]), max_new_tokens=13)[0].tolist()
        if "\ufffd" not in tokenizer.decode(ids):  # else the text can't be matched, and is encoded again
            assert reply.tokens == whole[len(exact) :]
        ids = exact + reply.tokens
    assert all(reply.stats.reused_tokens > 0 for reply in replies[1:])


def test_history_keeps_the_tokens_that_the_model_wrote(conversation):
    tokenizer = conversation.model.get_tokenizer()
    first = conversation.prompt([{"role": "user", "content": "a"}])
    ids = first[1] + [tokenizer.convert_tokens_to_ids("b")]
    conversation._text, conversation._ids = first[0] + "b", [-7, *ids[1:]]  # a mark that no encoding gives
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text, kept = conversation.prompt([*messages, {"role": "user", "content": "c"}])
    assert kept[: len(ids)] == [-7, *ids[1:]]
    assert [ids[0], *kept[1:]] == tokenizer(text, add_special_tokens=False)["input_ids"]
    _, other = conversation.prompt([{"role": "user", "content": "z"}])
    assert -7 not in other


def test_ctrl_c_stops_a_reply_and_not_the_chat(conversation, monkeypatch):
    original = EaModel.stream
    interrupt = True

    def stream(self, *args, **kwargs):
        steps = original(self, *args, **kwargs)

        def interrupted():
            for index, new in enumerate(steps):
                if index == 2 and interrupt:
                    raise KeyboardInterrupt
                yield new

        return interrupted()

    monkeypatch.setattr(EaModel, "stream", stream)
    stopped = conversation.ask("One?", lambda piece: None)
    interrupt = False
    assert stopped.interrupted
    assert 0 < len(stopped.tokens) < 13
    whole = conversation.ask("Two?", lambda piece: None)
    assert not whole.interrupted
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2


def test_system_message_survives_reset(pair):
    model = EaModel.from_pretrained(str(pair), total_token=12, depth=2, top_k=4)
    conversation = Conversation(model, ReplySettings(3, Sampling()), system="Be brief.")
    conversation.ask("Hi", lambda piece: None)
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    assert "nothing" in conversation.stats()
