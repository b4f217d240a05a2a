"""The user's own conversations: one JSON object a line, in ShareGPT's or OpenAI's message format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eagle.errors import TrainingError
from eagle.train.corpus import Conversation

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def parse_line(line: str) -> list[dict[str, str]]:
    """Messages ``{"role", "content"}`` of one line.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from error
    turns = record.get("messages", record.get("conversations")) if isinstance(record, dict) else record
    if not isinstance(turns, list) or not turns:
        raise ValueError('no "messages" or "conversations" list')
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError("a turn that is not an object")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in _ROLES or not isinstance(content, str):
            raise ValueError(f"a turn with role {role!r} and content of type {type(content).__name__}")
        messages.append({"role": _ROLES[role], "content": content})
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages[1:]):
        raise ValueError("no assistant turn after another turn")
    return messages


def _render(tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool) -> str:
    if getattr(tokenizer, "chat_template", None):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    end = tokenizer.eos_token or ""
    return "".join(f"{m['content']}{end if m['role'] == 'assistant' else chr(10)}" for m in messages)


def encode(tokenizer: Any, messages: list[dict[str, str]], stop: frozenset[int]) -> Conversation:
    """Tokens of a conversation with the assistant's marked, the token that ends an answer included.

    Raises:
        ValueError: the chat template does not extend its own prefixes, so the answers cannot be found.
    """
    tokens: list[int] = []
    mask: list[int] = []

    def add(text: str, answer: bool) -> None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        marks = [int(answer)] * len(ids)
        ends = [i for i, token in enumerate(ids) if token in stop]
        if answer and ends:
            marks[ends[0] + 1 :] = [0] * (len(ids) - ends[0] - 1)
        tokens.extend(ids)
        mask.extend(marks)

    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i == 0:
            continue
        before, after = (
            _render(tokenizer, messages[:i], prompt=True),
            _render(tokenizer, messages[: i + 1], prompt=False),
        )
        if not before.startswith(done) or not after.startswith(before):
            raise ValueError("the chat template rewrites earlier turns, so the answers cannot be told apart")
        add(before[len(done) :], answer=False)
        add(after[len(before) :], answer=True)
        done = after
    return Conversation(tokens, mask, greedy=False)


def read_dialogues(path: Path, tokenizer: Any, stop: frozenset[int]) -> tuple[list[Conversation], str]:
    """Read a file of conversations.

    Returns:
        The usable conversations, and a line about what was left out (empty where nothing was).

    Raises:
        TrainingError: the file is missing, or no line is usable; the first bad line is named.
    """
    if not path.is_file():
        raise TrainingError(f"no data file {path}: give --data a .jsonl file of conversations")
    conversations, first_bad, bad = [], "", 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                conversation = encode(tokenizer, parse_line(line), stop)
                if sum(conversation.mask) < 3:
                    raise ValueError("answers of fewer than 3 tokens")
            except ValueError as error:
                bad += 1
                first_bad = first_bad or f"line {number}: {error}"
                continue
            conversations.append(conversation)
    if not conversations:
        raise TrainingError(
            f"{path} has no usable conversation ({first_bad or 'it is empty'}); expected one JSON object a line with "
            '"messages" [{"role", "content"}] or "conversations" [{"from", "value"}]'
        )
    return conversations, f"{bad} lines of {path} left out, the first: {first_bad}" if bad else ""
