"""EaModel's promises: equal output, limits, end tokens, batches, streaming, growth, reuse, bad input."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from tiny import tiny_draft, tiny_eagle, tiny_target

from eagle.engine.loop import GenerationStats
from eagle.errors import InvalidInputError
from eagle.model import ea_model
from eagle.model.ea_model import EaModel
from eagle.model.inputs import padding_mask
from eagle.model.ops import Sampling


@pytest.fixture(scope="module")
def eagle() -> EaModel:
    torch.manual_seed(3)
    return tiny_eagle(total_token=50, depth=2, top_k=7)


def prompt(length: int = 12) -> torch.Tensor:
    return torch.randint(1, 17, (1, length))


def test_speculative_output_is_plain_output_and_really_speculates(eagle: EaModel) -> None:
    taus = []
    for length in (1, 2, 9, 70):
        ids = prompt(length)
        fast = eagle.generate(ids, max_new_tokens=60)
        taus.append(eagle.last_stats.accept_length)
        assert torch.equal(fast, eagle.generate(ids, max_new_tokens=60, speculative=False))
        assert fast.shape == (1, length + 60)
        assert eagle.last_stats.accept_length == 1.0
    assert max(taus) > 1.2


def test_prompt_longer_than_a_prefill_chunk() -> None:
    eagle = tiny_eagle(max_position_embeddings=2048)
    ids = prompt(1100)
    wanted = eagle.base_model.generate(ids, do_sample=False, max_new_tokens=20, attention_mask=torch.ones_like(ids))
    assert torch.equal(eagle.generate(ids, max_new_tokens=20), wanted)


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_limits_are_exact(eagle: EaModel, limit: int) -> None:
    ids = prompt()
    assert eagle.generate(ids, max_new_tokens=limit).shape[1] == 12 + limit
    assert eagle.generate(ids, max_length=12 + limit).shape[1] == 12 + limit
    assert eagle.eagenerate(ids, max_new_tokens=limit).shape[1] == 12 + limit
    assert eagle.eagenerate(ids, max_length=12 + limit).shape[1] == 12 + limit


def test_max_length_counts_padding_as_transformers_does(eagle: EaModel) -> None:
    padding = torch.zeros(1, 20, dtype=torch.int64)
    ids, mask = torch.cat((prompt(), padding), 1), torch.cat((torch.ones(1, 12), padding), 1)
    assert eagle.generate(ids, attention_mask=mask, max_length=35).shape[1] == 35
    with pytest.raises(InvalidInputError, match="max_length is 32"):
        eagle.generate(ids, attention_mask=mask, max_length=32)


def test_output_fills_the_context_and_stops() -> None:
    eagle = tiny_eagle(max_position_embeddings=64)
    ids = prompt(50)
    wanted = eagle.generate(ids, max_new_tokens=500, speculative=False)
    assert wanted.shape[1] == 64
    assert torch.equal(eagle.generate(ids, max_new_tokens=500), wanted)


def test_output_ends_at_the_first_end_token(eagle: EaModel) -> None:
    ids = prompt()
    free = eagle.generate(ids, max_new_tokens=40)[0, 12:].tolist()
    for end in sorted(set(free)):
        out = eagle.generate(ids, max_new_tokens=40, eos_token_id=[end, 1000])[0, 12:].tolist()
        assert out == free[: free.index(end) + 1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_of_a_batch_is_what_it_is_alone(eagle: EaModel, side: str) -> None:
    rows = [prompt(n)[0] for n in (3, 14, 1, 9)]
    alone = [eagle.generate(row, max_new_tokens=25)[0, len(row) :].tolist() for row in rows]
    end = alone[1][6]
    alone = [row[: row.index(end) + 1] if end in row else row for row in alone]
    ids, mask = torch.full((4, 14), 11), torch.zeros(4, 14, dtype=torch.int64)
    for index, row in enumerate(rows):
        where = slice(14 - len(row), 14) if side == "left" else slice(0, len(row))
        ids[index, where], mask[index, where] = row, 1
    out = eagle.generate(ids, attention_mask=mask, max_new_tokens=25, eos_token_id=end, pad_token_id=16)
    assert torch.equal(out[:, :14], ids)
    for got, wanted in zip(out[:, 14:].tolist(), alone, strict=True):
        assert got[: len(wanted)] == wanted
        assert set(got[len(wanted) :]) <= {16}


def test_padding_that_may_be_text_is_warned_of(eagle: EaModel, recwarn: pytest.WarningsRecorder) -> None:
    row = prompt(9)[0] % 11
    ids = torch.stack((row, torch.cat((row[:-2], torch.tensor([11, 11])))))
    given = {"max_new_tokens": 6, "pad_token_id": torch.tensor(11), "eos_token_id": 11}
    with pytest.warns(UserWarning, match="token 11, which both pads and ends text"):
        out = eagle.generate(ids, **given)
    assert torch.equal(out, eagle.generate(ids, attention_mask=torch.ones_like(ids), **given))
    for alike in (ids[1:], ids[[1, 1]]):
        assert torch.equal(eagle.generate(alike, **given), out[1:].expand(len(alike), -1))
    assert not recwarn


@pytest.mark.parametrize(
    ("rows", "mask"),
    [
        ([[11, 3, 4, 5], [11, 5, 6, 7]], None),  # every row's own start
        ([[11, 11, 11, 3], [11, 4, 5, 6]], [[0, 0, 1, 1], [1, 1, 1, 1]]),
        ([[11, 11, 11, 3], [4, 5, 6, 7]], [[0, 0, 0, 1], [1, 1, 1, 1]]),
        ([[11, 3, 11, 11], [11, 4, 11, 6]], [[1, 1, 0, 0], [1, 1, 1, 1]]),
        ([[11, 11, 11, 11], [11, 11, 5, 6]], [[1, 1, 1, 1], [0, 1, 1, 1]]),
    ],
)
def test_a_start_token_that_pads(rows: list[list[int]], mask: list[list[int]] | None) -> None:
    found = padding_mask(torch.tensor(rows), 11, {2}, {11})
    assert found is None if mask is None else found.long().tolist() == mask


def test_a_row_of_the_padding_token_alone_is_text(eagle: EaModel) -> None:
    ids = torch.full((1, 3), 11)
    wanted = eagle.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6)
    assert torch.equal(eagle.generate(ids, pad_token_id=11, max_new_tokens=6), wanted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_found_as_transformers_finds_it(eagle: EaModel, side: str, recwarn: pytest.WarningsRecorder) -> None:
    rows, pad = [prompt(n)[0] % 11 for n in (3, 14, 9)], 11
    rows[1][5] = pad  # inside a row it is text
    alone = [eagle.generate(row, max_new_tokens=6, pad_token_id=pad)[0, len(row) :].tolist() for row in rows]
    ids = torch.full((3, 14), pad)
    for index, row in enumerate(rows):
        ids[index, slice(14 - len(row), 14) if side == "left" else slice(0, len(row))] = row
    for given in (ids, ids.tolist()):
        out = eagle.generate(given, max_new_tokens=6, pad_token_id=pad)
        assert out[:, 14:].tolist() == alone
    assert not recwarn


def test_do_sample_is_transformers_word(eagle: EaModel) -> None:
    ids = prompt()
    greedy, sampled = (
        eagle.generate(ids, max_new_tokens=20),
        eagle.generate(ids, temperature=1.0, seed=3, max_new_tokens=20),
    )
    assert not torch.equal(greedy, sampled)
    assert torch.equal(eagle.generate(ids, do_sample=False, temperature=1.0, max_new_tokens=20), greedy)
    assert torch.equal(eagle.generate(ids, do_sample=True, seed=3, max_new_tokens=20), sampled)
    warm = {"temperature": 0.7, "seed": 3, "max_new_tokens": 20}
    assert torch.equal(eagle.generate(ids, do_sample=True, **warm), eagle.generate(ids, **warm))


def test_reference_methods(eagle: EaModel) -> None:
    ids = prompt()
    out, new_tokens, last_step = eagle.eagenerate(ids, max_new_tokens=30, log=True)
    assert new_tokens == 30
    assert last_step + 1 == eagle.last_stats.steps
    assert torch.equal(out, eagle.naivegenerate(ids, max_new_tokens=30))
    steps = list(eagle.ea_generate(ids, max_new_tokens=30))
    assert torch.equal(steps[-1], out)
    assert all(torch.equal(step, out[:, : step.shape[1]]) for step in steps)
    assert len(list(eagle.naive_generate(ids, max_new_tokens=30))) == 30
    assert eagle.get_tokenizer() is eagle.tokenizer


def test_streamer_gets_the_prompt_and_every_token(eagle: EaModel) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.tolist()

        def end(self) -> None:
            self.ended = True

    streamer, ids = Streamer(), prompt()
    out = eagle.generate(ids, max_new_tokens=20, streamer=streamer)
    assert streamer.ended
    assert streamer.tokens == out[0].tolist()


def test_cache_grows_and_a_growing_chat_reuses_it() -> None:
    eagle = tiny_eagle(total_token=50, depth=2, top_k=7)
    history = prompt(40)[0].tolist()
    for _ in range(4):
        wanted = [token for step in eagle.stream([history], max_new_tokens=90, speculative=False) for token in step[0]]
        fresh = [token for step in eagle.stream([history], max_new_tokens=90) for token in step[0]]
        stats = eagle.last_stats
        again = [token for step in eagle.stream([history], max_new_tokens=90, reuse_prefix=True) for token in step[0]]
        assert wanted == fresh == again
        assert eagle.last_stats.reused_tokens == len(history) - 1
        assert stats.accept_lengths == eagle.last_stats.accept_lengths, "the draft must see the same past"
        history = history + again[:30] + [3, 4]


def test_reused_history_of_a_whole_reply() -> None:
    eagle = tiny_eagle(total_token=50, depth=2, top_k=7)
    history = prompt(20)[0].tolist()
    reply = [token for step in eagle.stream([history], max_new_tokens=50) for token in step[0]]
    longer = [*history, *reply, 5, 6, 7]
    reused = [token for step in eagle.stream([longer], max_new_tokens=40, reuse_prefix=True) for token in step[0]]
    stats = eagle.last_stats
    assert stats.reused_tokens >= len(history) + len(reply) - eagle.tree_shape.path - 1
    fresh = [token for step in eagle.stream([longer], max_new_tokens=40) for token in step[0]]
    assert reused == fresh
    assert stats.accept_lengths == eagle.last_stats.accept_lengths


def test_an_interrupted_reply_can_be_continued_from_its_cache() -> None:
    eagle = tiny_eagle(total_token=50, depth=2, top_k=7)
    history = prompt(30)[0].tolist()
    steps = eagle.stream([history], max_new_tokens=40)
    said = [token for _ in range(5) for token in next(steps)[0]]
    steps.close()
    longer = [*history, *said, 4, 5]
    reused = [token for step in eagle.stream([longer], max_new_tokens=30, reuse_prefix=True) for token in step[0]]
    assert eagle.last_stats.reused_tokens >= len(history)
    assert reused == [token for step in eagle.stream([longer], max_new_tokens=30) for token in step[0]]


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8}, {"top_k": 4}, {"top_p": 0.7, "top_k": 5}])
def test_sampled_text_is_plain_sampled_text_of_the_same_seed(eagle: EaModel, settings: dict) -> None:
    ids = prompt().expand(3, -1)
    options = {"max_new_tokens": 40, "temperature": 1.1, **settings}
    fast = eagle.generate(ids, seed=5, **options)
    assert torch.equal(fast, eagle.generate(ids, seed=5, speculative=False, **options))
    assert torch.equal(fast, eagle.generate(ids, generator=torch.Generator().manual_seed(5), **options))
    assert not torch.equal(fast, eagle.generate(ids, seed=6, **options))
    torch.manual_seed(11)
    first = eagle.generate(ids, **options)
    torch.manual_seed(11)
    assert torch.equal(first, eagle.generate(ids, **options))


def test_an_abandoned_generation_leaves_the_model_usable(eagle: EaModel) -> None:
    ids = prompt()
    wanted = eagle.generate(ids, max_new_tokens=20)
    steps = eagle.ea_generate(ids, max_new_tokens=20)
    next(steps)
    with pytest.raises(InvalidInputError, match="still open"):
        eagle.generate(ids, max_new_tokens=20)
    steps.close()
    assert torch.equal(eagle.generate(ids, max_new_tokens=20), wanted)

    class Broken:
        def put(self, value: torch.Tensor) -> None:
            raise RuntimeError("planted")

        def end(self) -> None: ...

    with pytest.raises(RuntimeError, match="planted"):
        eagle.generate(ids, max_new_tokens=20, streamer=Broken())
    assert torch.equal(eagle.generate(ids, max_new_tokens=20), wanted)


def test_two_threads_take_turns(eagle: EaModel) -> None:
    prompts = [prompt(5), prompt(17)]
    wanted = [eagle.generate(ids, max_new_tokens=30) for ids in prompts]
    got: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        got[index] = eagle.generate(prompts[index], max_new_tokens=30)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(torch.equal(got[index], wanted[index]) for index in (0, 1))


def test_each_call_counts_its_own_steps_whatever_other_threads_do(eagle: EaModel) -> None:
    ids = prompt()
    alone = eagle.eagenerate(ids, max_new_tokens=60, log=True)[1:]
    long, short = eagle.ea_generate(ids, max_new_tokens=60), []
    next(long)
    worker = threading.Thread(target=lambda: short.append(eagle.eagenerate(ids, max_new_tokens=3, log=True)[1:]))
    worker.start()  # waits for its turn
    while eagle.last_stats.prompt_tokens:  # until the worker has made its call
        time.sleep(0.01)
    stats = GenerationStats()
    steps = eagle.stream(ids, max_new_tokens=4, stats=stats)
    assert eagle.last_stats is stats
    steps.close()
    taken = sum(1 for _ in long)
    worker.join(timeout=60)
    assert short[0][0] == 3
    assert short[0][1] < 3
    assert taken == alone[1] + 1


def test_a_logged_call_beside_another_thread_counts_its_own_steps(eagle: EaModel, monkeypatch) -> None:
    ids, found = prompt(), []
    wanted = eagle.eagenerate(ids, max_new_tokens=40, log=True)[1:]
    original = EaModel.stream

    def beside(self, *args, **kwargs):
        steps = original(self, *args, **kwargs)

        def interleaved():
            yield from steps
            self.last_stats = GenerationStats(steps=999)  # what another thread's call does

        return interleaved()

    monkeypatch.setattr(EaModel, "stream", beside)
    found = eagle.eagenerate(ids, max_new_tokens=40, log=True)[1:]
    assert found == wanted
    _, count, last = eagle.naivegenerate(ids, max_new_tokens=7, log=True)
    assert (count, last) == (7, 6)


def test_total_token_can_be_measured() -> None:
    model = tiny_target()
    eagle = EaModel(model, tiny_draft(model), total_token=-1)
    assert eagle.tree_shape.total_token in (40, 48, 50, 56, 60)
    assert EaModel(model, tiny_draft(model), total_token=-1, depth=1, top_k=3).tree_shape.total_token == 13


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": -3}, "max_new_tokens is -3"),
        ({"max_length": 12}, "max_length is 12, but the prompt alone has 12"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample is True, but temperature 0"),
        ({"do_sample": True, "temperature": 1e-6}, "do_sample is True, but temperature 1e-06 is greedy"),
        ({"do_sample": 3}, "do_sample is 3"),
        ({"do_sample": False, "temperature": -1.0}, "temperature is -1"),
        ({"pad_token_id": "a"}, "pad_token_id is 'a'"),
        ({"pad_token_id": [1]}, r"pad_token_id is \[1\]"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": -0.1}, "top_p is -0.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"seed": 1, "generator": torch.Generator(), "temperature": 1.0}, "both generator and seed"),
        ({"seed": 1 << 70, "temperature": 1.0}, "64 bits"),
        ({"attention_mask": torch.ones(1, 5)}, r"\[1, 5\], input_ids \[1, 12\]"),
        ({"attention_mask": torch.tensor([[1] * 5 + [0] + [1] * 6])}, "gap"),
        ({"attention_mask": torch.zeros(1, 12)}, "empty"),
        ({"attention_mask": "x"}, "attention_mask is text; expected numbers"),
        ({"temperature": "0.7"}, "temperature is '0.7'"),
        ({"top_p": "a", "temperature": 1.0}, "top_p is 'a'"),
        ({"top_k": "5", "temperature": 1.0}, "top_k is '5'"),
        ({"seed": "a", "temperature": 1.0}, "seed is 'a'"),
        ({"generator": 3, "temperature": 1.0}, "generator is 3"),
        ({"streamer": 3}, "streamer is 3"),
        ({"stop_strings": 3}, "stop_strings is 3"),
        ({"stop_strings": "a", "tokenizer": "abc"}, "tokenizer is 'abc'"),
        ({"eos_token_id": "a"}, "eos_token_id is 'a'"),
        ({"eos_token_id": 1.5}, "eos_token_id is 1.5"),
    ],
)
def test_bad_arguments_are_named(eagle: EaModel, arguments: dict, words: str) -> None:
    ids = prompt()
    with pytest.raises(InvalidInputError, match=words):
        eagle.generate(ids, **arguments)
    assert eagle.generate(ids, max_new_tokens=3).shape[1] == 15


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.empty(1, 0, dtype=torch.int64), "empty"),
        ([], "empty"),
        ([[1.5, 2.5]], "float32"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.int64)}, "pass its 'input_ids'"),
        ("hello", "input_ids is text"),
        (["hello", "you"], "input_ids is text"),
        (torch.tensor([[1, 17]]), "id 17; expected ids from 0 to 16"),
        (torch.tensor([[1, -1]]), "id -1"),
        (torch.rand(1, 3), "float32"),
        (torch.ones(1, 512, dtype=torch.int64), "512 tokens, but the model's context holds 512"),
        (torch.ones(1, 900, dtype=torch.int64), "900 tokens"),
    ],
)
def test_bad_prompts_are_named(eagle: EaModel, ids: torch.Tensor, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        eagle.generate(ids, max_new_tokens=3)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"total_token": 1}, "total_token is 1"),
        ({"depth": -1}, "depth is -1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 18}, "knows only 17 tokens"),
        ({"total_token": 60, "depth": 1, "top_k": 3}, "only 12 candidates"),
        ({"threshold": 0.0}, "threshold is 0.0"),
    ],
)
def test_bad_trees_are_named(tree: dict, words: str) -> None:
    model = tiny_target()
    with pytest.raises(InvalidInputError, match=words):
        EaModel(model, tiny_draft(model), **tree)


@pytest.mark.parametrize(("typed", "meant"), [("totl_token", "total_token"), ("device", "device_map")])
def test_a_keyword_that_is_nearly_right(typed: str, meant: str) -> None:
    with pytest.raises(InvalidInputError, match=f"no '{typed}'; did you mean {meant}"):
        EaModel.from_pretrained("SmolLM2-135M", **{typed: 8})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name_or_path": 5}, "given as 5; expected a name"),
        ({"ea_model_path": b"x"}, "given as b'x'"),
        ({"dtype": torch.int8}, "dtype is torch.int8; expected a floating-point dtype"),
        ({"torch_dtype": "float99"}, "torch_dtype is 'float99'"),
        ({"dtype": "Tensor"}, "dtype is 'Tensor'"),
        ({"device_map": True}, "device_map is True"),
        ({"device_map": -1}, "device_map is -1"),
        ({"total_token": 1}, "total_token is 1; expected"),
        ({"depth": "a"}, "depth is 'a'"),
        ({"total_token": 60, "depth": 0, "top_k": 3}, "give only 3 candidates"),
    ],
)
def test_bad_settings_are_named_before_anything_is_read(
    arguments: dict, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ea_model, "load_pair", None)
    with pytest.raises(InvalidInputError, match=words):
        EaModel.from_pretrained(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device_map", ["cuda", 0, {"": "cuda:1"}])
def test_a_device_that_is_not_there(device_map: object) -> None:
    with pytest.raises(InvalidInputError, match=r"device_map is .*sees no CUDA device"):
        EaModel.from_pretrained(device_map=device_map)


def test_a_first_call_in_inference_mode_leaves_the_caches_usable() -> None:
    eagle, ids = tiny_eagle(), prompt()
    with torch.inference_mode():
        wanted = eagle.generate(ids, max_new_tokens=5)
    assert torch.equal(eagle.generate(ids, max_new_tokens=5), wanted)


def test_eval_is_the_model_itself(eagle: EaModel) -> None:
    assert eagle.eval() is eagle


def test_stream_takes_sampling_and_rows_of_unequal_length(eagle: EaModel) -> None:
    rows = [[3, 4, 5], [6], [7, 8, 9, 10, 11]]
    out: list[list[int]] = [[], [], []]
    for new in eagle.stream(rows, max_new_tokens=11, sampling=Sampling(0.9), seed=1):
        for row, tokens in zip(out, new, strict=True):
            row += tokens
    assert [len(row) for row in out] == [11, 11, 11]
