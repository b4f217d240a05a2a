"""A widened model computes the small one's function: the same logits, features, tokens and accept lengths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import relative_error, tiny_draft_config, tiny_target
from transformers import LlamaConfig, LlamaForCausalLM

from eagle.errors import UnsupportedModelError
from eagle.model.checkpoints import DraftState, random_draft
from eagle.model.ea_model import EaModel
from eagle.model.loading import build_draft
from eagle.model.ops import Sampling
from eagle.model.widening import Shape, Widening, layer_sources

VOCAB, EPS = 29, 1e-5
SMALL = Shape(
    hidden_size=24,
    intermediate_size=28,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    num_layers=6,
    vocab_size=VOCAB,
    draft_intermediate_size=20,
    draft_vocab_size=13,
    aux_layers=(2, 3, 3),
)
BIG = Shape(
    hidden_size=48,
    intermediate_size=45,
    num_heads=16,  # room for a fourth query head in each group, and for two more groups
    num_kv_heads=4,
    head_dim=16,
    num_layers=9,
    vocab_size=71,
    draft_intermediate_size=31,
    draft_vocab_size=40,
    aux_layers=(2, 4, 6),
)
SAME_HEADS = replace(BIG, num_heads=6, num_kv_heads=2, head_dim=24)
SAME_LAYERS = replace(BIG, num_layers=6, aux_layers=(2, 3, 3), head_dim=8, draft_vocab_size=13, vocab_size=VOCAB)
SHAPES = {"larger": BIG, "longer-heads": SAME_HEADS, "same-layers-and-vocabulary": SAME_LAYERS}


@pytest.fixture
def small(request: pytest.FixtureRequest) -> tuple[LlamaForCausalLM, DraftState]:
    tied = getattr(request, "param", True)
    target = tiny_target(
        vocab_size=VOCAB,
        hidden_size=SMALL.hidden_size,
        intermediate_size=SMALL.intermediate_size,
        num_attention_heads=SMALL.num_heads,
        num_key_value_heads=SMALL.num_kv_heads,
        head_dim=SMALL.head_dim,
        num_hidden_layers=SMALL.num_layers,
        tie_word_embeddings=tied,
        rms_norm_eps=EPS,
        rope_theta=777.0,
    )
    for name, weight in target.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.2, 1.7)
    sizes = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 8, "intermediate_size": SMALL.draft_intermediate_size}
    config = tiny_draft_config(
        target, draft_vocab_size=SMALL.draft_vocab_size, rms_norm_eps=2 * EPS, rope_theta=500.0, **sizes
    )
    state = random_draft(config, seed=int(torch.randint(1 << 30, ()).item()))
    for name, tensor in state.tensors.items():
        if tensor.dim() > 1:
            state.tensors[name] = 4.0 * tensor
    return target, state


def widening(big: Shape, dtype: torch.dtype = torch.float32, **options) -> Widening:
    return Widening(SMALL, big, EPS, dtype=dtype, **options)


def widen(small: tuple[LlamaForCausalLM, DraftState], big: Shape) -> tuple[LlamaForCausalLM, DraftState]:
    target, state = small
    recipe, tensors = widening(big), dict(target.state_dict())
    if target.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    config = LlamaConfig(
        vocab_size=big.vocab_size,
        hidden_size=big.hidden_size,
        intermediate_size=big.intermediate_size,
        num_attention_heads=big.num_heads,
        num_key_value_heads=big.num_kv_heads,
        head_dim=big.head_dim,
        num_hidden_layers=big.num_layers,
        rms_norm_eps=recipe.eps(EPS),
        rope_theta=777.0,
        max_position_embeddings=512,
        eos_token_id=None,
    )
    wide = LlamaForCausalLM(config).eval()
    wide.load_state_dict({part.name: part.make() for part in recipe.target(tensors)}, strict=True)
    output = target.get_output_embeddings().weight.detach()
    parts = list(recipe.draft(state.config, state.tensors, output))
    assert all(part.make().shape == part.shape for part in parts)
    return wide, DraftState(recipe.draft_config(state.config), {part.name: part.make() for part in parts})


def eagles(small, wide, **tree) -> tuple[EaModel, EaModel]:
    return tuple(EaModel(model, build_draft(state), **tree) for model, state in (small, wide))


@pytest.mark.parametrize("small", [True, False], indirect=True, ids=["tied", "untied"])
@pytest.mark.parametrize("big", SHAPES.values(), ids=SHAPES)
def test_logits_and_features_are_the_small_model_s(small, big: Shape) -> None:
    wide = widen(small, big)
    ids = torch.randint(VOCAB, (2, 19))
    with torch.no_grad():
        ours = [
            (eagle.target.forward(ids, eagle.target.new_cache(2, 19), torch.zeros(2, dtype=torch.int64)))
            for eagle in eagles(small, wide, total_token=9, depth=2, top_k=3)
        ]
    (logits, features), (wide_logits, wide_features) = ours
    assert relative_error(wide_logits[..., :VOCAB], logits) < 1e-5
    live = wide_features.unflatten(-1, (3, big.hidden_size))[..., : SMALL.hidden_size]
    assert relative_error(live, features.unflatten(-1, (3, -1))) < 1e-5
    assert not wide_features.unflatten(-1, (3, big.hidden_size))[..., SMALL.hidden_size + 1 :].any()


@pytest.mark.parametrize("big", SHAPES.values(), ids=SHAPES)
def test_tokens_and_accept_lengths_are_the_small_pair_s(small, big: Shape) -> None:
    # As many branches as the small draft vocabulary has tokens: a surplus token would show.
    tree = {"total_token": 24, "depth": 3, "top_k": 13}
    plain, wide = eagles(small, widen(small, big), **tree)
    ids = torch.randint(VOCAB, (1, 7))
    wanted = plain.generate(ids, max_new_tokens=40)
    assert torch.equal(wide.generate(ids, max_new_tokens=40), wanted)
    assert wide.last_stats.accept_length == plain.last_stats.accept_length > 1
    assert torch.equal(wide.generate(ids, max_new_tokens=40, speculative=False), wanted)


def test_sampling_never_meets_a_surplus_token(small) -> None:
    plain, wide = eagles(small, widen(small, BIG), total_token=12, depth=2, top_k=4)
    ids = torch.randint(VOCAB, (1, 5))
    options = {"max_new_tokens": 60, "temperature": 2.0, "seed": 3}
    assert torch.equal(wide.generate(ids, **options), plain.generate(ids, **options))
    assert Sampling().greedy  # the other tests' setting


def test_surplus_tokens_lose_to_the_tokens_they_copy(small) -> None:
    wide, _ = widen(small, BIG)
    ids = torch.randint(VOCAB, (1, 11))
    with torch.no_grad():
        logits = wide(ids).logits
    surplus = torch.arange(VOCAB, BIG.vocab_size)
    assert (logits[..., surplus] < logits[..., surplus % VOCAB] - 10).all()
    assert (logits[..., surplus].amax(-1) < logits[..., :VOCAB].amin(-1)).all()
    assert torch.equal(wide.model.embed_tokens.weight[surplus], wide.model.embed_tokens.weight[surplus % VOCAB])


def test_the_draft_vocabulary_keeps_its_tokens_and_gains_surplus_ones(small) -> None:
    _, state = small
    _, wide = widen(small, BIG)
    ids = wide.tensors["d2t"] + torch.arange(BIG.draft_vocab_size)
    own = state.tensors["d2t"] + torch.arange(SMALL.draft_vocab_size)
    assert torch.equal(ids[: SMALL.draft_vocab_size], own)
    assert (ids[SMALL.draft_vocab_size :] >= VOCAB).all()
    assert len(ids.unique()) == BIG.draft_vocab_size
    assert int(ids.max()) < BIG.vocab_size


def test_a_head_without_an_lm_head_gets_the_target_s_rows(small) -> None:
    target, state = small
    own = state.tensors["d2t"] + torch.arange(SMALL.draft_vocab_size)
    rows = target.get_output_embeddings().weight.detach()[own]
    bare = {name: tensor for name, tensor in state.tensors.items() if name != "lm_head.weight"}
    wide = widen((target, DraftState(state.config, bare)), BIG)[1].tensors["lm_head.weight"]
    assert torch.equal(wide[: len(own), : SMALL.hidden_size], rows)


def test_almost_nothing_is_zero(small) -> None:
    """Products with zeros are faster: a matrix is to hold as few as the function allows."""
    wide, head = widen(small, BIG)
    share = SMALL.hidden_size / BIG.hidden_size
    for name, weight in (*wide.state_dict().items(), *head.tensors.items()):
        zeros = (weight == 0).float().mean()
        if "q_proj" in name or "gate_proj" in name:
            assert zeros == 0, name
        elif "k_proj" in name or "v_proj" in name or "up_proj" in name or "fc." in name:
            assert zeros <= share, name
        elif "lm_head" in name:
            assert zeros <= 1 / BIG.hidden_size, name  # the pilot, which lowers surplus tokens only
        elif "o_proj" in name or "down_proj" in name:
            assert zeros < 1 - share, name  # at most what the live columns would write to the padded channels
    surplus = [index for index, source in enumerate(layer_sources(SMALL, BIG)) if source is None]
    for index in surplus:
        layer = wide.model.layers[index]
        assert (layer.mlp.down_proj.weight != 0).all()
        assert (layer.self_attn.o_proj.weight != 0).all()


def test_layers_go_where_the_features_stay() -> None:
    small = replace(SMALL, num_layers=30, aux_layers=(2, 15, 27))
    large = replace(BIG, num_layers=32, aux_layers=(2, 16, 29))
    sources = layer_sources(small, large)
    assert [index for index, source in enumerate(sources) if source is None] == [15, 28]
    assert [source for source in sources if source is not None] == list(range(30))
    assert layer_sources(small, replace(small)) == list(range(30))


def test_tensors_are_the_same_every_time(small) -> None:
    target = small[0]
    tensors = target.state_dict()
    first, second = (list(widening(BIG, torch.bfloat16).target(tensors)) for _ in range(2))
    for one, other in zip(first, reversed(second), strict=False):
        again = next(part for part in second if part.name == one.name)
        other.make()  # the order in which tensors are made does not matter
        assert torch.equal(one.make(), again.make())
    fills = [part.make()[:, -1] for part in first if part.name.endswith("mlp.gate_proj.weight")]
    assert not torch.equal(fills[0], fills[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": SMALL.hidden_size}, "hidden_size"),
        ({"head_dim": 12}, "head_dim"),
        ({"num_heads": 8, "num_kv_heads": 4}, "num_heads"),
        ({"num_layers": 8, "aux_layers": (2, 2, 5)}, "layers between"),
        ({"aux_layers": (2, 6)}, "layers between"),
        ({"vocab_size": 20}, "vocab_size"),
        ({"draft_vocab_size": 70}, "draft_vocab_size"),
    ],
)
def test_a_shape_without_room_is_refused(change: dict, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        widening(replace(BIG, **change))


def test_a_head_of_another_kind_is_refused(small) -> None:
    target, state = small
    output = target.get_output_embeddings().weight
    for change in ({"norm_before_residual": True}, {"num_layers": 2}, {"head_dim": 16}):
        with pytest.raises(UnsupportedModelError, match=next(iter(change))):
            list(widening(BIG).draft(replace(state.config, **change), state.tensors, output))
