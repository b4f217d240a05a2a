"""The embedded model as a person meets it: EAGLE's greedy text is plain decoding's and transformers' own."""

from __future__ import annotations

import pytest
import torch

from eagle.bench.prompts import read_prompts
from eagle.model.ea_model import EaModel
from eagle.model.embedded import cache_folder, is_complete

FOLDER = cache_folder() / "models" / "SmolLM2-135M"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_complete(FOLDER), reason="the default model is not here yet: eagle fetch SmolLM2-135M"),
]


@pytest.fixture(scope="module")
def eagle() -> EaModel:
    return EaModel.from_pretrained("SmolLM2-135M", dtype=torch.float32)


def prompt_rows(eagle: EaModel, count: int) -> list[list[int]]:
    rows = []
    for prompt in read_prompts(limit=count):
        message = [{"role": "user", "content": prompt.text}]
        rows.append(eagle.tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"])
    return rows


def test_text_is_transformers_own(eagle: EaModel) -> None:
    rows = prompt_rows(eagle, 2)
    longest = max(map(len, rows))
    ids = torch.tensor([[2] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    wanted = eagle.base_model.generate(
        ids.to(eagle.device), attention_mask=mask.to(eagle.device), do_sample=False, max_new_tokens=24
    )
    eagle.set_tree(16, 4, 6)
    fast = eagle.generate(ids, attention_mask=mask, max_new_tokens=24)
    assert torch.equal(fast, wanted.cpu())
    assert torch.equal(fast, eagle.generate(ids, attention_mask=mask, max_new_tokens=24, speculative=False))
