"""Self-distillation data: the target writes conversations that begin like what people ask.

A conversation is a first user message (own-written, or begun and then continued by the model at a cool temperature), an
answer (greedy for most, as deployed), and for some a second turn. Conversations are numbered; each draws its choices
from (seed, number) alone, and they are written in shards of consecutive numbers, so that a run can be resumed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eagle.errors import TrainingError
from eagle.train.corpus import Conversation, shard_tokens, write_shard
from eagle.train.generate import Request, Sampler
from eagle.train.openings import first_message, follow_up
from eagle.train.template import ChatPieces, message_ids

SHORTEST_ANSWER = 4
SHORTEST_TURN = 96
"""Slots that a second turn needs to be worth starting."""

SETTINGS = "settings.json"
"""What a folder's data were made with."""


@dataclass(frozen=True)
class ChatSettings:
    """What decides the data; written beside them and compared on resume."""

    seed: int = 0
    greedy_share: float = 0.75
    second_turn_share: float = 0.25
    user_temperature: float = 0.7
    user_min_p: float = 0.1
    answer_min_p: float = 0.05
    max_user_tokens: int = 64
    max_answer_tokens: int = 300
    max_length: int = 512
    shard_size: int = 2048


@dataclass
class _State:
    """A conversation that is being written."""

    number: int
    rng: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    greedy: bool = True
    user: list[int] = field(default_factory=list)
    turn: int = 0
    writing: str = "user"


def repeats(tokens: list[int], size: int = 3) -> float:
    """The share of a text's n-grams that occurred in it before."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


class SelfChat:
    """Writes shards of conversations with one sampler; the work of :func:`write_conversations`."""

    def __init__(self, tokenizer: Any, pieces: ChatPieces, settings: ChatSettings) -> None:
        self.tokenizer, self.pieces, self.settings = tokenizer, pieces, settings
        self.special = frozenset(tokenizer.all_special_ids) | pieces.stop

    def begin(self, number: int) -> tuple[_State, Request | None]:
        """Start conversation ``number``; no request where its first message does not fit."""
        rng = np.random.default_rng([self.settings.seed, number])
        state = _State(number, rng, tokens=list(self.pieces.head), mask=[0] * len(self.pieces.head))
        return state, self._user(state, *first_message(rng))

    def _request(self, state: _State, prompt: list[int], limit: int, temperature: float, min_p: float) -> Request:
        seed = int(state.rng.integers(2**31))
        return Request(prompt, limit, seed, temperature, min_p, state)

    def _user(self, state: _State, text: str, opening: bool) -> Request | None:
        state.user = message_ids(self.tokenizer, text)
        settings = self.settings
        if not opening:
            return self._answer(state, state.user)
        prompt = state.tokens + state.user
        if len(prompt) + settings.max_user_tokens + SHORTEST_TURN > settings.max_length:
            return None
        state.writing = "user"
        return self._request(state, prompt, settings.max_user_tokens, settings.user_temperature, settings.user_min_p)

    def _answer(self, state: _State, user: list[int]) -> Request | None:
        settings, added = self.settings, [*user, *self.pieces.to_answer]
        room = settings.max_length - len(state.tokens) - len(added)
        if room < SHORTEST_TURN // 2:
            return None
        state.tokens += added
        state.mask += [0] * len(added)
        state.writing = "answer"
        greedy = bool(state.rng.random() < settings.greedy_share)
        state.greedy &= greedy
        temperature = 0.0 if greedy else float(state.rng.uniform(0.7, 1.0))
        return self._request(
            state, list(state.tokens), min(settings.max_answer_tokens, room), temperature, settings.answer_min_p
        )

    def advance(self, state: _State, new: list[int]) -> tuple[Request | None, bool]:
        """Take what the model wrote; returns the next request, or None and whether the conversation is to be kept."""
        if state.writing == "user":
            user = self._clean_user(state.user, new)
            request = self._answer(state, user) if user else None
            return request, request is None and state.turn > 0
        ended = bool(new) and new[-1] in self.pieces.answer_stop
        if len(new) < SHORTEST_ANSWER and state.turn == 0:
            return None, False
        # Loops are what greedy decoding of a small model does, and so belong here, but not in every place.
        if repeats(new) > 0.8 and state.rng.random() < 0.5:
            return None, state.turn > 0
        state.tokens += new
        state.mask += [1] * len(new)
        state.turn += 1
        settings = self.settings
        if not ended or state.turn > 1 or state.rng.random() >= settings.second_turn_share:
            return None, True
        if len(state.tokens) + SHORTEST_TURN > settings.max_length:
            return None, True
        if new[-1] != self.pieces.end_of_answer:
            return None, True
        kept = len(state.tokens)
        state.tokens += self.pieces.to_user
        state.mask += [0] * len(self.pieces.to_user)
        request = self._user(state, *follow_up(state.rng))
        if request is None:
            del state.tokens[kept:], state.mask[kept:]
        return request, request is None

    def _clean_user(self, opening: list[int], new: list[int]) -> list[int]:
        """The whole user message as the template would tokenise it, or nothing where it is not worth answering."""
        if not new or new[-1] not in self.pieces.user_stop:
            return []
        body = new[:-1]
        if not body or self.special & set(body) or repeats(body) > 0.3:
            return []
        text = self.tokenizer.decode(opening + body).strip()
        return message_ids(self.tokenizer, text) if text else []

    def finish(self, state: _State) -> Conversation:
        while state.tokens and state.mask[-1] == 0:
            state.tokens.pop()
            state.mask.pop()
        return Conversation(state.tokens, state.mask, state.greedy)


def settings_match(folder: Path, settings: dict[str, Any]) -> None:
    """Write the data's settings, or compare them with those there.

    Raises:
        TrainingError: the folder's data were made with other settings; both are named.
    """
    path = folder / SETTINGS
    if path.is_file():
        there = json.loads(path.read_text())
        for key in sorted({*there, *settings}):
            if there.get(key) != settings.get(key):
                raise TrainingError(
                    f"{folder} holds data made with {key} = {there.get(key)}, but {key} = {settings.get(key)} was "
                    "asked for: use the same settings, another folder, or --overwrite"
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n")


def write_conversations(
    sampler: Sampler,
    chat: SelfChat,
    folder: Path,
    tokens: int,
    *,
    report: Callable[[int, int, float], None] = lambda done, conversations, rate: None,
    should_pause: Callable[[], bool] = lambda: False,
    rank: int = 0,
    world: int = 1,
) -> int:
    """Fill ``folder`` with shards until they hold ``tokens`` tokens; shards that are there count.

    Args:
        sampler: runs the requests.
        chat: writes the conversations.
        folder: of the corpus.
        tokens: for all ranks together.
        report: called with tokens so far, conversations so far and sampled tokens a second.
        should_pause: asked between shards; True ends the writing early.
        rank, world: this rank writes the shards whose number is ``rank`` modulo ``world``.

    Returns:
        The tokens in this rank's shards.
    """
    size, goal = chat.settings.shard_size, tokens // world
    done = {int(p.stem.split("-")[1]): shard_tokens(p) for p in sorted(folder.glob("shard-*.npz"))}
    total = sum(count for shard, count in done.items() if shard % world == rank)
    kept: dict[int, list[Conversation]] = {}
    open_count: dict[int, int] = {}
    finished_tokens, finished_count, started, began = 0, 0, 0, time.monotonic()

    def numbers() -> Iterator[int]:
        shard = rank
        while True:
            while shard in done:
                shard += world
            expected = (finished_tokens / finished_count if finished_count else 0.4 * sampler.slots) * (
                started - finished_count
            )
            if total + finished_tokens + expected >= goal or should_pause():
                return
            kept[shard], open_count[shard] = [], size
            yield from range(shard * size, (shard + 1) * size)
            shard += world

    def close(state: _State, keep: bool) -> None:
        nonlocal finished_tokens, finished_count
        shard = state.number // size
        finished_count += 1
        if keep:
            conversation = chat.finish(state)
            finished_tokens += len(conversation.tokens)
            kept[shard].append(conversation)
        open_count[shard] -= 1
        if not open_count[shard]:
            write_shard(folder / f"shard-{shard:05d}.npz", kept.pop(shard))

    def requests() -> Iterator[Request]:
        nonlocal started
        for number in numbers():
            started += 1
            state, request = chat.begin(number)
            if request is None:
                close(state, keep=False)
            else:
                yield request

    def on_finish(finished: list[tuple[Request, list[int]]]) -> list[Request]:
        following = []
        for request, new in finished:
            following_request, keep = chat.advance(request.tag, new)
            if following_request is None:
                close(request.tag, keep)
            else:
                following.append(following_request)
        report(total + finished_tokens, finished_count, sampler.decoded / max(1e-9, time.monotonic() - began))
        return following

    sampler.run(requests(), on_finish)
    return total + finished_tokens


def data_settings(settings: ChatSettings, model: str) -> dict[str, Any]:
    """What is written beside generated data."""
    return {"source": "self-distillation", "model": model, **asdict(settings)}
