import numpy as np
import pytest
import torch

from eagle.errors import TrainingError
from eagle.train.corpus import Conversation, Corpus, Cursor, Packer, make_labels, shard_tokens, write_shard
from eagle.train.vocab import choose_vocabulary, draft_first, offsets


def _conversation(rng, length, greedy=True):
    tokens = rng.integers(0, 50, length).tolist()
    return Conversation(tokens, [0, 0, *[1] * (length - 2)], greedy)


def _corpus(folder, count=23, seed=0):
    rng = np.random.default_rng(seed)
    conversations = [_conversation(rng, int(rng.integers(10, 90)), bool(i % 3)) for i in range(count)]
    write_shard(folder / "shard-00000.npz", conversations[: count // 2])
    write_shard(folder / "shard-00001.npz", conversations[count // 2 :])
    return conversations, Corpus.load(folder, 64)


def test_shards_come_back_cut_and_without_duplicates(tmp_path):
    conversations, corpus = _corpus(tmp_path)
    assert len(corpus) == len(conversations)
    for i, conversation in enumerate(conversations):
        assert corpus.tokens[corpus.rows(i)].tolist() == conversation.tokens[:64]
        assert corpus.mask[corpus.rows(i)].tolist() == conversation.mask[:64]
        assert corpus.greedy[i] == conversation.greedy
    assert shard_tokens(tmp_path / "shard-00000.npz") == sum(len(c.tokens) for c in conversations[:11])
    write_shard(tmp_path / "shard-00002.npz", conversations[:5])
    assert len(Corpus.load(tmp_path, 64)) == len(conversations)
    assert not list(tmp_path.glob("*.tmp"))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="no conversation"):
        Corpus.load(tmp_path, 64)


def test_held_out_conversations_are_greedy_and_not_trained_on(tmp_path):
    _, corpus = _corpus(tmp_path, count=60)
    training, held_out = corpus.split(5, seed=3)
    assert len(held_out) == 5
    assert held_out.greedy.all()
    assert not set(training.starts) & set(held_out.starts)
    assert len(training) == 55


def test_batches_are_full_and_an_epoch_has_everything_once(tmp_path):
    conversations, corpus = _corpus(tmp_path)
    packer = Packer(corpus, seed=1, steps=3, chunk=16, device=torch.device("cpu"))
    cursor, seen = Cursor(), []
    while cursor.epoch == 0:
        batch, cursor = packer.draw(cursor, 128)
        assert batch.tokens.shape == batch.positions.shape == (128,)
        assert sum(batch.packing.lengths) == 128
        begin = 0
        for length in batch.packing.lengths:
            assert batch.positions[begin : begin + length].tolist() == list(range(length))
            seen.append(tuple(batch.tokens[begin : begin + 8].tolist()))
            begin += length
    begun = {tuple(c.tokens[:8]) for c in conversations}
    assert begun <= set(seen)
    again, _ = packer.draw(Cursor(), 128)
    first, _ = Packer(corpus, seed=1, steps=3, chunk=16, device=torch.device("cpu")).draw(Cursor(), 128)
    assert torch.equal(again.tokens, first.tokens)


def test_ranks_share_an_epoch(tmp_path):
    _, corpus = _corpus(tmp_path)
    orders = [
        Packer(corpus, seed=1, steps=3, chunk=16, device=torch.device("cpu"), rank=r, world=2).order(0) for r in (0, 1)
    ]
    assert len(orders[0]) == len(orders[1])
    assert not set(orders[0]) & set(orders[1])


def test_in_order_holds_all_conversations(tmp_path):
    _, corpus = _corpus(tmp_path)
    batches = list(Packer(corpus, seed=1, steps=3, chunk=16, device=torch.device("cpu")).in_order(150))
    assert all(len(batch.tokens) == 150 for batch in batches)
    labels = sum(batch.labels.counts[0] for batch in batches)
    assert labels == sum(max(0, int(corpus.mask[corpus.rows(i)].sum()) - 1) for i in range(len(corpus)))


def test_labels_follow_their_definition():
    mask = (np.random.default_rng(4).random(57) < 0.85).astype(np.uint8)
    mask[0] = 0
    labels = make_labels(mask, 4, 10, torch.device("cpu"))
    got = {
        (step, int(p))
        for step in range(4)
        for p, w in zip(labels.positions, labels.weights[step], strict=True)
        if w > 0
    }
    expected = {(j, p) for j in range(4) for p in range(j, 56) if mask[p - j : p + 2].all() and p - j > 0}
    assert got == expected


def test_vocabulary_keeps_the_frequent_and_the_required(tmp_path):
    _, corpus = _corpus(tmp_path)
    ids, coverage = choose_vocabulary(corpus, 70, 20, [69, 3])
    written = np.concatenate(
        [corpus.tokens[corpus.rows(i)][corpus.mask[corpus.rows(i)] == 1] for i in range(len(corpus))]
    )
    counts = np.bincount(written, minlength=70)
    assert len(ids) == 20
    assert {69, 3} <= set(ids.tolist())
    kept = [i for i in ids.tolist() if i not in (69, 3)]
    dropped = [i for i in range(70) if i not in ids.tolist()]
    assert counts[kept].min() >= counts[dropped].max()
    assert coverage == pytest.approx(counts[ids.numpy()].sum() / counts.sum())
    assert torch.equal(torch.arange(20) + offsets(ids), ids)
    order = draft_first(ids, 70)
    assert torch.equal(order[:20], ids)
    assert sorted(order.tolist()) == list(range(70))
