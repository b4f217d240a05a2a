"""The embedded model as a person meets it: EAGLE's greedy text is plain decoding's and transformers' own."""

from __future__ import annotations

import pytest
import torch
from tiny import relative_error

from eagle.bench.prompts import read_prompts
from eagle.model.ea_model import EaModel
from eagle.model.embedded import cache_folder, is_complete
from eagle.model.triton_kernels import optimize_eagle_with_triton

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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_eagle_8b_is_the_default_model_to_the_precision_of_bfloat16(eagle: EaModel) -> None:
    """Its logits are as near to float32's as the small model's in bfloat16, and so are its accept lengths."""
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    small = EaModel.from_pretrained("SmolLM2-135M", dtype=torch.bfloat16)
    wide = EaModel.from_pretrained("EAGLE-8B", in_memory=True)
    rows = prompt_rows(eagle, 6)
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row], device=eagle.device)
            exact, own, found = (model.base_model(ids).logits for model in (eagle, small, wide))
            real, surplus = found.split([exact.shape[-1], found.shape[-1] - exact.shape[-1]], dim=-1)
            assert relative_error(real, exact) < 1.5 * relative_error(own, exact)
            assert (real.amax(-1) > surplus.amax(-1)).all()
    lengths = []
    for model in (small, wide):
        optimize_eagle_with_triton(model)
        steps = tokens = 0
        for row in rows:
            model.generate([row], max_new_tokens=96)
            steps += model.last_stats.steps
            tokens += model.last_stats.accept_length * model.last_stats.steps
        lengths.append(tokens / steps)
    assert lengths[1] == pytest.approx(lengths[0], rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_eagle_8b_in_float32_writes_and_drafts_as_the_default_model(eagle: EaModel) -> None:
    """Widening is exact: the same logits to float32's precision, and prompt by prompt the same tokens and accept length."""
    if torch.cuda.mem_get_info()[0] < 44e9:
        pytest.skip("needs 44 GB of free GPU memory")
    wide = EaModel.from_pretrained("EAGLE-8B", dtype=torch.float32, in_memory=True)
    small = EaModel.from_pretrained("SmolLM2-135M", dtype=torch.float32)
    rows = prompt_rows(eagle, 6)
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row], device=eagle.device)
            exact, found = small.base_model(ids).logits, wide.base_model(ids).logits
            assert relative_error(found[..., : exact.shape[-1]], exact) < 1e-5
    optimize_eagle_with_triton(small)
    optimize_eagle_with_triton(wide)
    for row in rows:
        replies = [model.generate([row], max_new_tokens=96) for model in (small, wide)]
        assert torch.equal(*replies)
        assert wide.last_stats.accept_length == small.last_stats.accept_length
