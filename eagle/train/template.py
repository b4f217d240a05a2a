"""The fixed pieces of a chat template, found by rendering it around marker texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eagle.errors import TrainingError

_MARKS = ("\u27eaone\u27eb", "\u27eatwo\u27eb", "\u27eathree\u27eb")


@dataclass(frozen=True)
class ChatPieces:
    """Token ids around the turns of a conversation.

    A conversation reads ``head`` user ``to_answer`` answer ``to_user`` user ``to_answer`` answer ... ``tail``.
    ``to_user`` and ``tail`` begin after the token that ends an answer.
    """

    head: list[int]
    to_answer: list[int]
    to_user: list[int]
    user_stop: frozenset[int]
    """Tokens that end a user message which the model writes."""
    answer_stop: frozenset[int]
    """Tokens that end an answer; the first token after an answer in the template is one of them."""
    end_of_answer: int
    """The token that the template writes after an answer."""

    @property
    def stop(self) -> frozenset[int]:
        return self.user_stop | self.answer_stop


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def chat_pieces(tokenizer: Any, eos_ids: set[int]) -> ChatPieces:
    """Take a tokenizer's chat template apart.

    Args:
        tokenizer: a Hugging Face tokenizer.
        eos_ids: the model's end-of-sequence tokens.

    Raises:
        TrainingError: there is no chat template, or it does not keep a message's text as it is.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise TrainingError(
            "the target has no chat template, so it cannot write its own conversations: give --data FILE.jsonl"
        )
    messages = [
        {"role": "user", "content": _MARKS[0]},
        {"role": "assistant", "content": _MARKS[1]},
        {"role": "user", "content": _MARKS[2]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    parts = [text]
    for mark in _MARKS:
        if parts[-1].count(mark) != 1:
            raise TrainingError(
                "the target's chat template does not keep a message's text once and in order: give --data FILE.jsonl"
            )
        parts[-1:] = parts[-1].split(mark)
    head, to_answer, between, _ = parts
    after_answer = _ids(tokenizer, between)
    user_stop = frozenset(_ids(tokenizer, to_answer)[:1]) | frozenset(eos_ids)
    if not after_answer:
        raise TrainingError("the target's chat template writes nothing after an answer: give --data FILE.jsonl")
    return ChatPieces(
        head=_ids(tokenizer, head),
        to_answer=_ids(tokenizer, to_answer),
        to_user=after_answer[1:],
        user_stop=user_stop,
        answer_stop=frozenset(eos_ids) | {after_answer[0]},
        end_of_answer=after_answer[0],
    )


def message_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a message's text, as they stand between the template's pieces."""
    return _ids(tokenizer, text)
