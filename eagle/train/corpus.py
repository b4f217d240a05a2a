"""Conversations on disk, and packed batches of them.

A corpus is a folder of ``shard-*.npz`` files: ``tokens`` (unsigned integers, all conversations after one another),
``mask`` (uint8, 1 where the assistant wrote the token, the token that ends an answer included), ``offsets`` int64
[conversations + 1] and ``greedy`` (uint8, 1 where all answers were drawn at temperature 0).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eagle.errors import TrainingError
from eagle.train.attention import Packing
from eagle.train.loss import Labels

SHORTEST_PIECE = 32
PADDING_PIECE = 64


@dataclass
class Conversation:
    """``tokens`` and ``mask`` have one entry a token; see the module's text."""

    tokens: list[int]
    mask: list[int]
    greedy: bool


def write_shard(path: Path, conversations: list[Conversation]) -> None:
    """Write one shard, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lengths = [len(conversation.tokens) for conversation in conversations]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(
            file,
            tokens=np.array([t for c in conversations for t in c.tokens], dtype=np.uint32),
            mask=np.array([m for c in conversations for m in c.mask], dtype=np.uint8),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            greedy=np.array([c.greedy for c in conversations], dtype=np.uint8),
        )
    temporary.replace(path)


def shard_tokens(path: Path) -> int:
    """How many tokens a shard holds."""
    with np.load(path) as data:
        return int(data["offsets"][-1])


@dataclass
class Corpus:
    """All conversations, in memory: ``tokens`` int64 and ``mask`` uint8 flat, ``starts`` and ``lengths`` [docs]."""

    tokens: np.ndarray
    mask: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    greedy: np.ndarray

    @classmethod
    def load(cls, folder: Path, max_length: int) -> Corpus:
        """Read every shard; exact duplicates are dropped, longer conversations cut to ``max_length``.

        Raises:
            TrainingError: there is nothing to train on.
        """
        tokens, mask, starts, lengths, greedy = [], [], [], [], []
        seen: set[bytes] = set()
        base = 0
        for path in sorted(folder.glob("shard-*.npz")):
            with np.load(path) as data:
                shard = {name: data[name] for name in ("tokens", "mask", "offsets", "greedy")}
            tokens.append(shard["tokens"].astype(np.int64))
            mask.append(shard["mask"])
            for i, (start, end) in enumerate(zip(shard["offsets"][:-1], shard["offsets"][1:], strict=True)):
                end = min(end, start + max_length)
                key = shard["tokens"][start:end].tobytes()
                if key in seen or shard["mask"][start:end].sum() < 3:
                    continue
                seen.add(key)
                starts.append(base + start)
                lengths.append(end - start)
                greedy.append(shard["greedy"][i])
            base += len(shard["tokens"])
        if not starts:
            raise TrainingError(
                f"{folder} has no conversation with an assistant's answer: generate more or give --data"
            )
        flat = np.concatenate(mask)
        flat[np.array(starts)] = 0  # a document's first token has no row before it, and must not join its neighbour
        return cls(np.concatenate(tokens), flat, np.array(starts), np.array(lengths), np.array(greedy, dtype=bool))

    def __len__(self) -> int:
        return len(self.starts)

    def subset(self, index: np.ndarray) -> Corpus:
        """The conversations at ``index``, sharing the tokens."""
        return Corpus(self.tokens, self.mask, self.starts[index], self.lengths[index], self.greedy[index])

    def split(self, held_out: int, seed: int) -> tuple[Corpus, Corpus]:
        """Training and held-out conversations; the latter are greedy where there are enough such."""
        order = np.random.default_rng([seed, 77]).permutation(len(self))
        order = np.concatenate([order[self.greedy[order]], order[~self.greedy[order]]])
        held_out = min(held_out, max(1, len(self) // 10))
        if len(self) < 2:
            return self, self
        return self.subset(np.sort(order[held_out:])), self.subset(order[:held_out])

    def rows(self, i: int) -> slice:
        return slice(int(self.starts[i]), int(self.starts[i] + self.lengths[i]))


@dataclass
class Batch:
    """Packed documents on the device, N rows in all; see :class:`Packing` and :class:`Labels`."""

    tokens: Tensor
    positions: Tensor
    packing: Packing
    labels: Labels


@dataclass
class Cursor:
    """Where the next batch begins: the epoch and the index within its order."""

    epoch: int = 0
    index: int = 0


def make_labels(mask: np.ndarray, steps: int, chunk: int, device: torch.device) -> Labels:
    """Label positions of a packed batch from its mask uint8 [N].

    Position p serves step j where tokens p - j ... p + 1 are all the assistant's: drafting starts from a token that the
    assistant wrote, and the token to be predicted is the assistant's too.
    """
    index = np.arange(len(mask))
    last_zero = np.maximum.accumulate(np.where(mask == 0, index, -1))
    run = index - last_zero
    positions = np.flatnonzero((mask[:-1] == 1) & (mask[1:] == 1))
    weights = (run[positions][None] > np.arange(steps)[:, None]).astype(np.float32)
    padding = -len(positions) % chunk if len(positions) else chunk
    counts = [int(w) for w in weights.sum(1)]
    packed = np.concatenate([positions, np.zeros(padding, dtype=np.int64)])
    weights = np.concatenate([weights, np.zeros((steps, padding), dtype=np.float32)], axis=1)
    return Labels(_send(packed, device), _send(weights, device), counts, chunk)


def _send(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Packer:
    """Draws packed batches from a corpus in a seeded order, for one of several ranks."""

    def __init__(
        self, corpus: Corpus, *, seed: int, steps: int, chunk: int, device: torch.device, rank: int = 0, world: int = 1
    ) -> None:
        self.corpus, self.seed, self.steps, self.chunk, self.device = corpus, seed, steps, chunk, device
        self.rank, self.world = rank, world
        self._order: tuple[int, np.ndarray] | None = None

    def order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.corpus))
            usable = max(self.world, len(order) - len(order) % self.world)
            self._order = epoch, np.resize(order, usable)[self.rank :: self.world]
        return self._order[1]

    def draw(self, cursor: Cursor, batch_tokens: int) -> tuple[Batch, Cursor]:
        """The next batch of exactly ``batch_tokens`` rows, and the cursor after it; the last document is cut to fit."""
        pieces, lengths, room = [], [], batch_tokens
        epoch, index = cursor.epoch, cursor.index
        while room >= SHORTEST_PIECE or not pieces:
            order = self.order(epoch)
            if index >= len(order):
                epoch, index = epoch + 1, 0
                continue
            rows = self.corpus.rows(int(order[index]))
            rows = slice(rows.start, min(rows.stop, rows.start + room))
            pieces.append(rows)
            lengths.append(rows.stop - rows.start)
            room -= lengths[-1]
            index += 1
        return self.pack(pieces, lengths, room), Cursor(epoch, index)

    def pack(self, pieces: list[slice], lengths: list[int], room: int = 0) -> Batch:
        """A batch of the given pieces of the corpus, and ``room`` rows of padding after them."""
        zeros = np.zeros(room, dtype=np.int64)
        tokens = np.concatenate([*(self.corpus.tokens[piece] for piece in pieces), zeros])
        mask = np.concatenate([*(self.corpus.mask[piece] for piece in pieces), zeros.astype(np.uint8)])
        lengths = [
            *lengths,
            *[PADDING_PIECE] * (room // PADDING_PIECE),
            *[room % PADDING_PIECE] * (room % PADDING_PIECE > 0),
        ]
        positions = np.concatenate([np.arange(n) for n in lengths])
        return Batch(
            _send(tokens, self.device),
            _send(positions, self.device),
            Packing.of(lengths, self.device),
            make_labels(mask, self.steps, self.chunk, self.device),
        )

    def in_order(self, batch_tokens: int) -> Iterator[Batch]:
        """All conversations once, in the corpus's order, in batches of ``batch_tokens`` rows, padded."""
        pieces: list[slice] = []
        lengths: list[int] = []
        for i in range(len(self.corpus)):
            rows = self.corpus.rows(i)
            rows = slice(rows.start, min(rows.stop, rows.start + batch_tokens))
            if sum(lengths) + rows.stop - rows.start > batch_tokens:
                yield self.pack(pieces, lengths, batch_tokens - sum(lengths))
                pieces, lengths = [], []
            pieces.append(rows)
            lengths.append(rows.stop - rows.start)
        yield self.pack(pieces, lengths, batch_tokens - sum(lengths))
