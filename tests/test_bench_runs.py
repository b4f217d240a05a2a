"""The measuring of whole runs: its counts are the engine's, its times add up."""

from __future__ import annotations

import json
import time

import pytest
import torch
from tiny import tiny_draft, tiny_eagle, tiny_target

from eagle.bench.runs import check_prompts, measure, parting, percentile, warmups
from eagle.errors import InvalidInputError
from eagle.model.ea_model import EaModel

PROMPTS = [[3, 4, 5, 6, 7], [9], [1, 2, 3]]


@pytest.mark.parametrize("speculative", [True, False], ids=["eagle", "plain"])
def test_the_counts_are_those_of_single_generations(speculative):
    model = tiny_eagle(vocab_size=17)
    found = measure(model, PROMPTS, 19, speculative=speculative, repeats=2, warmup=1)
    lengths, steps = [], 0
    for prompt, output in zip(PROMPTS, found.outputs, strict=True):
        ids = torch.tensor([prompt])
        assert model.generate(ids, max_new_tokens=19, speculative=speculative)[0, len(prompt) :].tolist() == [*output]
        lengths += model.last_stats.accept_lengths
        steps += model.last_stats.steps
    assert found.repeatable
    assert found.steps == 2 * steps
    assert found.new_tokens == 2 * 3 * 19
    assert found.prompt_tokens == 9
    assert found.accept_length == pytest.approx(sum(lengths) / len(lengths))
    positions = found.acceptance_by_position
    assert len(positions) == (model.tree_shape.path if speculative else 1)
    assert positions[0] == 1.0
    assert sum(positions) == pytest.approx(found.accept_length)
    assert found.peak_memory_bytes is None


def test_batches_give_each_row_its_own_output():
    model = tiny_eagle(vocab_size=17)
    alone = measure(model, PROMPTS, 13, warmup=0)
    together = measure(model, PROMPTS, 13, warmup=0, batch=2)
    assert together.outputs == alone.outputs
    assert together.accept_length == pytest.approx(alone.accept_length)
    assert together.batch == 2


def test_the_times_fit_together():
    found = measure(tiny_eagle(), PROMPTS, 24, repeats=3)
    assert 0 < found.first_token_seconds < found.seconds_max
    assert 0 < found.seconds_min <= found.seconds_median <= found.seconds_max
    assert found.token_seconds_median <= found.token_seconds_p99
    assert 0 < found.token_seconds_median <= found.step_seconds_median * 1.5
    runs = len(PROMPTS) * 3
    assert found.new_tokens / found.tokens_per_second <= runs * found.seconds_max
    assert found.new_tokens / found.tokens_per_second >= runs * found.seconds_min
    assert found.step_ms == pytest.approx(1e3 * found.step_seconds_median)


class SlowModel:
    """A model's public face, whose steps take known times."""

    def __init__(self, model, first, step):
        self._model, self._first, self._step = model, first, step

    def __getattr__(self, name):
        return getattr(self._model, name)

    def stream(self, *args, **kwargs):
        inner = self._model.stream(*args, **kwargs)

        def steps():
            for index, new in enumerate(inner):
                time.sleep(self._step if index else self._first)
                yield new

        return steps()


def test_time_to_first_token_and_steps_are_told_apart():
    model = tiny_eagle()
    slow = measure(SlowModel(model, 0.15, 0.03), [PROMPTS[0]], 10, speculative=False)
    assert slow.first_token_seconds >= 0.15
    assert 0.03 <= slow.step_seconds_median < 0.15
    assert slow.token_seconds_median == slow.step_seconds_median
    assert slow.seconds_median >= 0.15 + 9 * 0.03
    assert slow.decode_tokens_per_second <= 1 / 0.03
    assert slow.tokens_per_second <= 10 / (0.15 + 9 * 0.03)


def test_sampling_is_repeatable_by_its_seed():
    model = tiny_eagle(vocab_size=40)
    one = measure(model, PROMPTS, 16, temperature=1.0, seed=5, repeats=2, warmup=0)
    same = measure(model, PROMPTS, 16, temperature=1.0, seed=5, warmup=0)
    other = measure(model, PROMPTS, 16, temperature=1.0, seed=6, warmup=0)
    unseeded = measure(model, PROMPTS, 16, temperature=1.0, seed=None, repeats=3, warmup=0)
    assert one.repeatable
    assert not unseeded.repeatable
    assert one.outputs == same.outputs != other.outputs


def test_one_token_needs_no_step():
    found = measure(tiny_eagle(), [[1, 2]], 1)
    assert (found.steps, found.new_tokens, found.accept_length) == (0, 1, 1.0)
    assert found.step_seconds_median == found.token_seconds_p99 == found.decode_tokens_per_second == 0.0
    assert found.tokens_per_second > 0


def test_progress_and_json():
    told = []
    found = measure(tiny_eagle(), PROMPTS, 5, repeats=2, warmup=1, told=lambda *pair: told.append(pair))
    assert told == [(done, 7) for done in range(1, 8)]
    values = json.loads(json.dumps(found.to_json()))
    assert "outputs" not in values
    assert values["new_tokens"] == 30
    assert values["acceptance_by_position"] == list(found.acceptance_by_position)


@pytest.mark.parametrize("name", ["repeats", "warmup", "batch"])
def test_bad_counts(name):
    with pytest.raises(InvalidInputError, match=f"{name} is -1"):
        measure(tiny_eagle(), PROMPTS, 5, **{name: -1})


def test_bad_prompts_are_named():
    model = tiny_eagle(max_position_embeddings=16)
    for prompts, words in (([], "no prompts"), ([[1], []], "prompt 2 is empty"), ([[1], [2] * 16], "prompt 2 has 16")):
        with pytest.raises(InvalidInputError, match=words):
            check_prompts(model, prompts)
    with pytest.raises(InvalidInputError, match="prompt 1 has 17"):
        measure(model, [[1] * 17], 4)


def test_where_outputs_part():
    assert parting([1, 2], (1, 2)) is None
    assert parting([1, 2, 3], [1, 5, 3]) == 1
    assert parting([1, 2], [1, 2, 3]) == 2
    assert parting([], [4]) == 0


def test_percentiles_are_nearest_rank():
    values = torch.randperm(200).tolist()
    assert percentile(values, 0.99) == 197
    assert percentile(values, 0.5) == 99
    assert percentile([4.0], 0.99) == 4.0
    assert percentile([], 0.5) == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_on_a_gpu_holds_the_weights():
    target = tiny_target().cuda()
    found = measure(EaModel(target, tiny_draft(target), total_token=12, depth=2, top_k=4), PROMPTS, 9, repeats=2)
    assert found.peak_memory_bytes >= sum(weight.numel() * weight.element_size() for weight in target.parameters())
    assert found.peak_memory_bytes <= torch.cuda.max_memory_allocated()
    assert found.new_tokens == 2 * 3 * 9


def lengths_of(groups: list[list[list[int]]]) -> list[list[int]]:
    return [[len(row) for row in group] for group in groups]


def test_warm_ups_cover_batch_sizes_and_lengths() -> None:
    alone = [[[1] * length] for length in (3, 30, 33, 64, 65, 2, 40)]
    last = [[[1] * 9, [1] * 5]]
    assert lengths_of(warmups(alone + last, by_chunks=False)) == [[9, 5], [65]]
    assert lengths_of(warmups(alone + last, by_chunks=True)) == [[9, 5], [65], [64], [30]]


def test_warm_ups_cover_every_chunk_of_long_prompts() -> None:
    alone = [[[1] * length] for length in (1000, 540, 700, 620)]
    assert lengths_of(warmups(alone, by_chunks=True)) == [[1000], [700], [620], [540]]
    together = [[[1] * 700, [1] * 540], [[1] * 1000, [1] * 20], [[1] * 600, [1] * 512]]
    assert lengths_of(warmups(together, by_chunks=True)) == [[1000, 20], [700, 540], [600, 512]]


@pytest.mark.parametrize("captures", [True, False])
def test_warm_ups_run_before_what_counts(captures, monkeypatch) -> None:
    model, told, ran = tiny_eagle(max_position_embeddings=1024), [], []
    monkeypatch.setattr(type(model), "captures_steps", captures)
    stream = model.stream
    monkeypatch.setattr(model, "stream", lambda group, **options: ran.append(len(group[0])) or stream(group, **options))
    measure(model, [[3] * 540, [4] * 200], 2, told=lambda *pair: told.append(pair))
    assert ran == [540, *([200] if captures else []), 540, 200]
    assert told[-1] == (len(ran), len(ran))
