"""The captured step on a GPU: tokens of the eager step, bits of plain decoding, no synchronisation, honest failures."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from scipy.stats import chisquare
from tiny import tiny_draft, tiny_target
from transformers import Gemma2Config, GPT2Config, LlamaConfig, MixtralConfig, Phi3Config, PretrainedConfig, Qwen2Config

from eagle.engine.steps import StaticSteps
from eagle.errors import OutOfMemoryError
from eagle.model.ea_model import EaModel
from eagle.model.triton_kernels import optimize_eagle_with_triton, restore_eagle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "eos_token_id": None,
    "bos_token_id": 1,
    "pad_token_id": None,
}


def build(dtype: torch.dtype = torch.float32, config=LlamaConfig, tree=(20, 3, 4), **sizes) -> EaModel:
    model = tiny_target(config(**{**SIZES, **sizes})).to("cuda", dtype)
    draft = tiny_draft(model, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96)
    return EaModel(model, draft, total_token=tree[0], depth=tree[1], top_k=tree[2])


def prompt(*shape: int) -> torch.Tensor:
    return torch.randint(2, 257, shape, device="cuda")


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [1, 3])
def test_replays_give_the_eager_tokens_and_restore_undoes_it(fused: str, options: dict, batch: int) -> None:
    eagle, ids = build(), prompt(batch, 30)
    wanted = eagle.generate(ids, max_new_tokens=80, **options)
    _, original = optimize_eagle_with_triton(eagle, engine="captured", fused=fused, kernels="triton")
    assert torch.equal(eagle.generate(ids, max_new_tokens=80, **options), wanted)
    assert eagle._session.captures.steps(), "nothing was captured"
    restore_eagle(eagle, original)
    assert eagle.engine.engine == "eager"
    assert eagle.target.fused is None
    assert torch.equal(eagle.generate(ids, max_new_tokens=80, **options), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("tree", [(60, 7, 10), (16, 5, 4), (5, 3, 1)], ids=str)
def test_greedy_output_is_plain_output(dtype: torch.dtype, fused: str, tree: tuple[int, int, int]) -> None:
    eagle = build(dtype, tree=tree)
    optimize_eagle_with_triton(eagle, engine="captured", fused=fused, exact=True)
    for length in (1, 70, 700):
        ids = prompt(1, length)
        assert torch.equal(
            eagle.generate(ids, max_new_tokens=120), eagle.generate(ids, max_new_tokens=120, speculative=False)
        )


@pytest.mark.parametrize(
    "config", [Gemma2Config, GPT2Config, Phi3Config, Qwen2Config], ids=lambda config: config.model_type
)
@pytest.mark.parametrize("exact", [True, "auto"], ids=str)
def test_other_modules_give_plain_output_too(config: type[PretrainedConfig], exact: bool | str) -> None:
    """GPT-2's weights are not as the kernels take them: its passes are padded, by "auto" not those of plain decoding, so
    that only what other trees write is the same."""
    sizes = {"n_embd": 64, "n_head": 4, "n_layer": 4, "n_positions": 2048} if config is GPT2Config else {"head_dim": 16}
    eagle = build(torch.bfloat16, config, (60, 7, 10), **sizes)
    optimize_eagle_with_triton(eagle, engine="captured", fused="off", exact=exact)
    assert eagle.library_products == (config is GPT2Config)
    for length in (1, 70, 700):
        ids = prompt(1, length)
        found = eagle.generate(ids, max_new_tokens=120)
        if config is GPT2Config and exact == "auto":
            eagle.set_tree(16, 5, 4)
            other = eagle.generate(ids, max_new_tokens=120)
            eagle.set_tree(60, 7, 10)
        else:
            other = eagle.generate(ids, max_new_tokens=120, speculative=False)
        assert torch.equal(found, other)


@pytest.mark.parametrize("exact", [True, "auto"], ids=str)
def test_a_mixture_of_experts_is_captured(exact: bool | str) -> None:
    """In 16 bits, where transformers' experts are one grouped product; its float32 copies to the host."""
    eagle = build(torch.bfloat16, MixtralConfig, (60, 7, 10), num_local_experts=4, head_dim=16)
    optimize_eagle_with_triton(eagle, engine="captured", exact=exact)
    for length in (1, 70):
        ids = prompt(1, length)
        first = eagle.generate(ids, max_new_tokens=80)
        assert torch.equal(eagle.generate(ids, max_new_tokens=80), first)
    assert eagle._session.captures.steps()


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_row_of_a_batch_is_what_it_is_alone(dtype: torch.dtype, fused: str) -> None:
    eagle = build(dtype, tree=(60, 7, 10))
    optimize_eagle_with_triton(eagle, engine="captured", fused=fused)
    lengths = [5, 40, 90, 17]
    ids = torch.ones(4, 90, dtype=torch.int64, device="cuda")
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, 90 - length :], mask[row, 90 - length :] = prompt(length), 1
    for speculative in (True, False):
        together = eagle.generate(ids, attention_mask=mask, max_new_tokens=60, speculative=speculative)
        for row, length in enumerate(lengths):
            alone = eagle.generate(ids[row : row + 1, 90 - length :], max_new_tokens=60, speculative=speculative)
            assert torch.equal(together[row, 90:], alone[0, length:])


def test_replays_do_not_synchronise() -> None:
    eagle = build()
    optimize_eagle_with_triton(eagle, engine="captured")
    eagle.generate(prompt(1, 9), max_new_tokens=20)
    (step,) = eagle._session.captures.steps()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            step.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("batch", [1, 3])
def test_the_loop_queues_its_steps_without_synchronising(batch: int, monkeypatch) -> None:
    eagle = build()
    optimize_eagle_with_triton(eagle, engine="captured")
    wanted = eagle.generate(ids := prompt(batch, 9), max_new_tokens=60)
    queue, queued = StaticSteps.queue, []

    def guarded(self: StaticSteps, longest: int) -> None:
        queued.append(longest)
        torch.cuda.set_sync_debug_mode("error" if len(queued) > 1 else "default")
        try:
            queue(self, longest)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(StaticSteps, "queue", guarded)
    assert torch.equal(eagle.generate(ids, max_new_tokens=60), wanted)
    assert len(queued) > 3


def test_a_model_with_other_modules_is_captured_too() -> None:
    eagle = build(config=Qwen2Config)
    wanted = eagle.generate(ids := prompt(1, 20), max_new_tokens=60)
    optimize_eagle_with_triton(eagle, engine="captured", fused="off")
    assert torch.equal(eagle.generate(ids, max_new_tokens=60), wanted)


@pytest.mark.parametrize(
    ("config", "sizes"), [(Phi3Config, {}), (Gemma2Config, {"head_dim": 16})], ids=["phi3", "gemma2"]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_class_the_fused_route_does_not_know_is_captured(config, sizes: dict, batch: int) -> None:
    eagle, ids = build(config=config, **sizes), prompt(batch, 20)
    wanted = eagle.generate(ids, max_new_tokens=60)
    optimize_eagle_with_triton(eagle, engine="captured")
    assert torch.equal(eagle.generate(ids, max_new_tokens=60), wanted)
    assert torch.equal(eagle.generate(ids, max_new_tokens=60, speculative=False), wanted)
    assert {step.run.draft is None for step in eagle._session.captures.steps()} == {True, False}
    report = {choice.op: choice for choice in eagle.kernel_report()}
    assert report["target"].implementation == "modules"
    assert config.__name__.removesuffix("Config") in report["target"].reason


@pytest.mark.filterwarnings("ignore:.*runs one op at a time")
def test_rope_that_follows_the_length_is_right_and_reported() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    eagle, ids = build(rope_parameters=rope, max_position_embeddings=128), prompt(1, 40)
    wanted = eagle.generate(ids, max_new_tokens=200)
    assert wanted.shape[1] == 128, "the frequencies change beyond max_position_embeddings"
    optimize_eagle_with_triton(eagle)
    for speculative in (True, False):
        assert torch.equal(eagle.generate(ids, max_new_tokens=200, speculative=speculative), wanted)
    report = {choice.op: choice for choice in eagle.kernel_report()}
    assert "'dynamic'" in report["target"].reason
    assert report["step"].implementation == "captured" or "capture failed" in report["step"].reason


def test_a_module_that_synchronises_runs_eagerly_and_the_report_says_why() -> None:
    eagle = build()
    ids = prompt(1, 20)
    wanted = eagle.generate(ids, max_new_tokens=40)
    layer = eagle.base_model.model.layers[1]
    handle = layer.register_forward_hook(lambda module, args, output: torch.cuda.synchronize())
    optimize_eagle_with_triton(eagle)
    with pytest.warns(UserWarning, match="one op at a time"):
        out = eagle.generate(ids, max_new_tokens=40)
    assert torch.equal(out, wanted)
    assert any(choice.op == "step" and choice.implementation == "eager" for choice in eagle.kernel_report())
    assert torch.rand(3, device="cuda").isfinite().all(), "the failed capture left the generator unusable"
    handle.remove()
    optimize_eagle_with_triton(eagle)
    assert torch.equal(eagle.generate(ids, max_new_tokens=40), wanted)
    assert any(choice.op == "step" and choice.implementation == "captured" for choice in eagle.kernel_report())


def test_too_large_a_run_is_refused_with_figures_and_the_next_call_is_right() -> None:
    eagle = build(max_position_embeddings=1 << 26)
    optimize_eagle_with_triton(eagle)
    ids = prompt(4, 20)
    wanted = eagle.generate(ids, max_new_tokens=20)
    with pytest.raises(OutOfMemoryError, match=r"GiB for the KV caches .* lower max_new_tokens"):
        eagle.generate(ids, max_new_tokens=(1 << 26) - 100)
    assert torch.equal(eagle.generate(ids, max_new_tokens=20), wanted)


def test_an_exception_in_a_streamer_leaves_the_model_usable() -> None:
    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            if value.numel() < 10:
                raise KeyError("mine")

        def end(self) -> None: ...

    eagle, ids = build(), prompt(1, 20)
    optimize_eagle_with_triton(eagle)
    wanted = eagle.generate(ids, max_new_tokens=40)
    with pytest.raises(KeyError, match="mine"):
        eagle.generate(ids, max_new_tokens=40, streamer=Streamer())
    assert torch.equal(eagle.generate(ids, max_new_tokens=40), wanted)


def test_sampling_keeps_the_distribution() -> None:
    vocab, runs, new = 8, 16_000, 3
    eagle = build(vocab_size=vocab, tree=(12, 1, 6))
    ids = torch.randint(vocab, (5,)).tolist()
    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(new):
        longer = {}
        for path, chance in chances.items():
            with torch.no_grad():
                logits = eagle.base_model(torch.tensor([[*ids, *path]], device="cuda")).logits[0, -1]
            longer |= {(*path, token): chance * p for token, p in enumerate(logits.float().softmax(-1).tolist())}
        chances = longer
    optimize_eagle_with_triton(eagle)
    counts = dict.fromkeys(product(range(vocab), repeat=new), 0)
    accepted: list[int] = []
    for seed in range(8):
        rows = torch.tensor([ids] * (runs // 8), device="cuda")
        out = eagle.generate(rows, max_new_tokens=new, temperature=1.0, seed=seed)
        accepted += eagle.last_stats.accept_lengths
        for row in out[:, 5:].tolist():
            counts[tuple(row)] += 1
    assert max(accepted) > 1, "nothing was ever accepted, so nothing was tested"
    common = [path for path, p in chances.items() if p * runs >= 8]
    observed, expected = [counts[path] for path in common], [chances[path] * runs for path in common]
    rest = runs - sum(observed), runs - sum(expected)
    if rest[1] >= 8:
        observed, expected = [*observed, rest[0]], [*expected, rest[1]]
    else:
        expected = [value * sum(observed) / sum(expected) for value in expected]
    assert chisquare(observed, expected).pvalue > 1e-4
