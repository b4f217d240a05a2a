"""Stop strings: a row ends with the token that completes one, and nothing beyond it comes out."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_eagle

from eagle.engine.stop import StopStrings
from eagle.errors import InvalidInputError


class Letters:
    """Token i is the i-th letter."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(ord("a") + int(token)) for token in tokens)


@pytest.fixture
def eagle():
    model = tiny_eagle(total_token=40, depth=3, top_k=6)
    model.tokenizer = Letters()
    return model


def cut_by_hand(text: str, stops: list[str]) -> str:
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


@pytest.mark.parametrize("speculative", [True, False])
def test_a_tokenizer_may_be_given(eagle, speculative: bool) -> None:
    ids = torch.randint(1, 17, (1, 8))
    last = eagle.generate(ids, max_new_tokens=9)[0, -1:].tolist()
    given, eagle.tokenizer = eagle.tokenizer, None
    stop = {"stop_strings": given.decode(last), "tokenizer": given, "speculative": speculative}
    out = eagle.generate(ids, max_new_tokens=30, **stop)[0, 8:].tolist()
    assert out.index(last[0]) == len(out) - 1


@pytest.mark.parametrize("speculative", [True, False])
def test_rows_end_with_the_completing_token(eagle, speculative: bool) -> None:
    ids = torch.randint(1, 17, (3, 8))
    free = eagle.generate(ids, max_new_tokens=40)[:, 8:].tolist()
    texts = [Letters().decode(row) for row in free]
    for stops in ([texts[0][5:8]], [texts[1][20:21], texts[2][3:7]], ["zz"], [texts[0][0]]):
        rows: list[list[int]] = [[], [], []]
        for new in eagle.stream(ids, max_new_tokens=40, stop_strings=stops, speculative=speculative):
            for row, tokens in zip(rows, new, strict=True):
                row += tokens
        assert [Letters().decode(row) for row in rows] == [cut_by_hand(text, stops) for text in texts]
        assert eagle.last_stats.new_tokens == sum(map(len, rows))
    assert eagle.generate(ids[:1], max_new_tokens=40, stop_strings=texts[0][2:4]).shape[1] == 8 + len(
        cut_by_hand(texts[0], [texts[0][2:4]])
    )


def test_the_model_is_free_again_after_a_stop(eagle) -> None:
    ids = torch.randint(1, 17, (1, 8))
    first = Letters().decode(eagle.generate(ids, max_new_tokens=1)[0, 8:].tolist())
    for _ in range(2):
        assert eagle.generate(ids, max_new_tokens=30, stop_strings=[first]).shape[1] == 9


def test_a_string_over_several_steps_is_found() -> None:
    stops = StopStrings(Letters(), ["cde"])
    assert stops.cut([0, 2], [3]) is None
    assert stops.cut([0, 2, 3], [4, 5]) == 1
    assert stops.cut([], [1, 2, 3, 4, 5]) == 4


@pytest.mark.parametrize("bad", [[], [""], [3]])
def test_bad_stop_strings(eagle, bad) -> None:
    with pytest.raises(InvalidInputError, match="stop_strings"):
        eagle.stream([[3]], stop_strings=bad)
    eagle.tokenizer = None
    with pytest.raises(InvalidInputError, match="no tokenizer"):
        eagle.stream([[3]], stop_strings=["x"])
