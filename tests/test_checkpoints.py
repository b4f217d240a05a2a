import contextlib
import dataclasses
import json
import re

import pytest
import torch
from checkpoint_writers import (
    DEFAULT,
    EAGLE3_WRITERS,
    TARGET,
    angelslim,
    drop,
    midlayer,
    modelopt,
    nemo,
    put,
    safeailab_eagle1,
    safeailab_eagle3,
    sizes,
    specforge,
    speculators,
    state,
    with_t2d,
    without,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from eagle.errors import CheckpointError, EagleError
from eagle.model.checkpoints import default_draft_config, load_draft, random_draft, save_draft
from eagle.model.draft_config import TargetSpec

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_same(loaded, expected):
    assert loaded.config == expected.config
    assert sorted(loaded.tensors) == sorted(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype, name
        assert torch.equal(loaded.tensors[name], tensor), name


def refused(folder, *said, target=TARGET, **options):
    with pytest.raises(CheckpointError) as caught:
        load_draft(folder, target, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert str(part) in message, message


# ---- every format gives the same canonical state


@pytest.mark.parametrize("writer", EAGLE3_WRITERS)
@pytest.mark.parametrize("draft_vocab", [17, None], ids=["own-vocab", "full-vocab"])
def test_eagle3_formats_agree(tmp_path, writer, draft_vocab):
    expected = state(seed=3, draft_vocab=draft_vocab, embed=writer != "SafeAILab EAGLE-3")
    loaded = load_draft(EAGLE3_WRITERS[writer](expected, tmp_path), TARGET, use_eagle3=True)
    assert_same(loaded, expected)
    assert loaded.producer == writer
    assert loaded.config.aux_layers == DEFAULT
    assert any(writer in note for note in loaded.notes)


@pytest.mark.parametrize(("bias", "qkv", "layers"), [(True, False, 1), (False, True, 1), (True, True, 2)])
def test_eagle1_format(tmp_path, bias, qkv, layers):
    expected = state("eagle1", fc_bias=bias, qkv_bias=qkv, num_layers=layers)
    loaded = load_draft(safeailab_eagle1(expected, tmp_path), TARGET, use_eagle3=False)
    assert_same(loaded, expected)
    assert loaded.producer == "SafeAILab EAGLE-1/2"
    assert "layers.0.input_layernorm.weight" not in loaded.tensors
    assert loaded.config.head_dim == TARGET.hidden_size // 4  # the configuration says 99


def test_eagle1_fc_has_a_bias_when_the_key_is_absent(tmp_path):
    folder = safeailab_eagle1(state("eagle1", fc_bias=True), tmp_path, bias=None)
    assert load_draft(folder, TARGET).config.fc_bias
    folder = safeailab_eagle1(state("eagle1", fc_bias=False), tmp_path, bias=None)
    refused(folder, "missing tensors: fc.bias", '"bias": false')


@pytest.mark.parametrize("writer", [specforge, speculators])
def test_eagle31_fields(tmp_path, writer):
    fields = {"fc_norm": True, "norm_output": True, "aux_layers": (0, 4, 7, 11)}
    if writer is speculators:
        fields |= {"norm_before_residual": True, "norm_before_fc": True}
    expected = state(**fields)
    assert_same(load_draft(writer(expected, tmp_path), TARGET), expected)


def test_second_layer_of_eagle3_is_a_plain_layer(tmp_path):
    expected = state(num_layers=2)
    assert expected.tensors["layers.0.self_attn.q_proj.weight"].shape[1] == 48
    assert expected.tensors["layers.1.self_attn.q_proj.weight"].shape[1] == 24
    assert_same(load_draft(modelopt(expected, tmp_path), TARGET), expected)


def test_head_dim_of_the_field_elsewhere(tmp_path):
    expected = state(head_dim=10)  # 4 heads of 10 over a hidden size of 24
    for name, writer in EAGLE3_WRITERS.items():
        extra = {"head_dim": 10} if name == "SafeAILab EAGLE-3" else {}
        loaded = load_draft(writer(expected, tmp_path / name, **extra), TARGET)
        assert_same(loaded, expected)
        assert loaded.producer != "SafeAILab EAGLE-3"


def test_head_of_another_width_than_its_target(tmp_path):
    expected = state(hidden_size=16)
    for name, writer in EAGLE3_WRITERS.items():
        loaded = load_draft(writer(expected, tmp_path / name, target_hidden_size=24), TARGET)
        assert_same(loaded, expected)
        assert loaded.producer == name
    broken = without(expected, "embed_tokens.weight", "lm_head.weight")
    folder = safeailab_eagle3(broken, tmp_path / "x", target_hidden_size=24)
    refused(folder, "embed_tokens.weight", "lm_head.weight", "24 wide", "16")


@pytest.mark.parametrize("writer", [modelopt, angelslim, specforge])
def test_optional_tensors_are_the_targets(tmp_path, writer):
    expected = without(state(), "lm_head.weight", "embed_tokens.weight")
    loaded = load_draft(writer(expected, tmp_path), TARGET)
    assert_same(loaded, expected)
    for name in ("lm_head", "embed_tokens"):
        assert f"{name} not stored: the target's rows serve" in loaded.notes


@pytest.mark.parametrize("stored_fc", [True, False])
def test_no_aux_hidden_state(tmp_path, stored_fc):
    expected = state(aux_layers=())
    assert expected.tensors["fc.weight"].shape == (24, 24)
    if not stored_fc:
        expected.tensors["fc.weight"] = torch.eye(24)
    writer_sees = expected if stored_fc else without(expected, "fc.weight")
    loaded = load_draft(modelopt(writer_sees, tmp_path), TARGET)
    assert_same(loaded, expected)
    assert any("final norm" in note for note in loaded.notes)


def test_tied_lm_head(tmp_path):
    s = state(draft_vocab=None)
    s.tensors["lm_head.weight"] = s.tensors["embed_tokens.weight"]
    folder = specforge(without(s, "lm_head.weight"), tmp_path, tie_word_embeddings=True)
    assert_same(load_draft(folder, TARGET), s)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_dtype_is_kept(tmp_path, dtype):
    s = state()
    s.tensors = {k: v if k == "d2t" else v.to(dtype) for k, v in s.tensors.items()}
    assert_same(load_draft(nemo(s, tmp_path), TARGET), s)


def test_byproducts_of_training_are_ignored(tmp_path):
    s = state()
    tensors = midlayer(with_t2d(s)) | {"midlayer.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    tensors |= {"verifier_lm_head.weight": torch.ones(2, 2)}
    config = sizes(s) | {"draft_vocab_size": 17}
    assert_same(load_draft(put(tmp_path, config, tensors), TARGET), s)


# ---- conventions


@pytest.mark.parametrize(
    ("writer", "config", "layers", "said"),
    [
        (specforge, {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 4, 7]}}, (2, 5, 8), "outputs"),
        (specforge, {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 4, 7]}}, (3, 5, 8), "outputs"),
        (specforge, {"eagle_config": {"use_aux_hidden_state": True}}, (2, 5, 8), "not stated"),
        (modelopt, {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 3, 10]}}, (1, 4, 11), "outputs"),
        (angelslim, {"eagle_aux_hidden_state_layer_ids": [1, 3, 6]}, (2, 4, 7), "outputs"),
        (angelslim, {"eagle_aux_hidden_state_layer_ids": [2, 5, 8]}, (2, 5, 8), "inputs (the default list"),
        (speculators, {"eagle_aux_hidden_state_layer_ids": [2, 5, 8]}, (2, 5, 8), "inputs"),
        (speculators, {"eagle_aux_hidden_state_layer_ids": [1, 5, 9]}, (1, 5, 9), "inputs"),
        (speculators, {"eagle_aux_hidden_state_layer_ids": [1, 4, 7]}, (2, 5, 8), "outputs (the default list"),
        (speculators, {"eagle_aux_hidden_state_layer_ids": None}, (2, 5, 8), "not stated"),
        (safeailab_eagle3, {}, (2, 5, 8), "not stated"),
        (nemo, {}, (2, 5, 8), "not stated"),
    ],
)
def test_aux_layer_conventions(tmp_path, writer, config, layers, said):
    loaded = load_draft(writer(state(embed=False), tmp_path, **config), TARGET)
    assert loaded.config.aux_layers == layers
    assert any("aux layers" in note and said in note for note in loaded.notes), loaded.notes


def test_default_aux_layers_follow_the_targets_depth(tmp_path):
    folder = safeailab_eagle3(state(embed=False), tmp_path)
    assert load_draft(folder, dataclasses.replace(TARGET, num_layers=32)).config.aux_layers == (2, 16, 29)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("writer", [specforge, angelslim, modelopt, nemo])
@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    ],
    ids=["v4", "v4-type", "v5", "v5-wins"],
)
def test_rope_spellings(tmp_path, writer, config):
    loaded = load_draft(writer(state(), tmp_path, **config), TARGET).config
    assert loaded.rope_theta == 5e5
    assert loaded.rope_scaling == {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}


@pytest.mark.parametrize("writer", [safeailab_eagle1, safeailab_eagle3])
def test_safeailab_rope_is_plain_whatever_the_config_scales(tmp_path, writer):
    s = state("eagle1" if writer is safeailab_eagle1 else "eagle3", embed=False)
    folder = writer(s, tmp_path, rope_theta=123.0, rope_scaling={"rope_type": "llama3", **LLAMA3})
    loaded = load_draft(folder, TARGET)
    assert (loaded.config.rope_theta, loaded.config.rope_scaling) == (123.0, None)
    assert any("RoPE scaling 'llama3' ignored" in note for note in loaded.notes)


def test_multimodal_rope_is_plain_for_text(tmp_path):
    folder = specforge(state(), tmp_path, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 1]})
    assert load_draft(folder, TARGET).config.rope_scaling is None


def test_keys_that_published_configurations_leave_out(tmp_path):
    absent = dict.fromkeys(["rope_theta", "hidden_act", "max_position_embeddings", "num_hidden_layers"])
    s = state(embed=False, num_kv_heads=4)
    folder = safeailab_eagle3(s, tmp_path, num_key_value_heads=None, draft_vocab_size=None, **absent)
    loaded = load_draft(folder, TARGET)
    assert_same(loaded, s)
    assert "draft_vocab_size not stated: 17, as in d2t" in loaded.notes


def test_missing_eps_is_the_targets(tmp_path):
    folder = specforge(state(), tmp_path, rms_norm_eps=None)
    assert load_draft(folder, TARGET, target_rms_eps=3e-5).config.rms_norm_eps == 3e-5
    assert load_draft(folder, TARGET).config.rms_norm_eps == 1e-6


# ---- heads that do not fit


@pytest.mark.parametrize("writer", [safeailab_eagle1, *EAGLE3_WRITERS.values()])
def test_wrong_target(tmp_path, writer):
    s = state("eagle1" if writer is safeailab_eagle1 else "eagle3", embed=writer is not safeailab_eagle3)
    folder = writer(s, tmp_path)
    refused(folder, 53, 54, target=dataclasses.replace(TARGET, vocab_size=54))
    width = [24, 32] if writer is safeailab_eagle1 else [72, "3 * 32 = 96"]
    refused(folder, *width, target=dataclasses.replace(TARGET, hidden_size=32))


@pytest.mark.parametrize("given", [True, False])
def test_use_eagle3_contradicts_the_file(tmp_path, given):
    s = state("eagle1" if given else "eagle3", embed=False)
    folder = (safeailab_eagle1 if given else safeailab_eagle3)(s, tmp_path)
    refused(folder, "EAGLE-1/2 head" if given else "EAGLE-3 head", f"use_eagle3={not given}", use_eagle3=given)


def test_aux_layers_beyond_the_target(tmp_path):
    ids = {"eagle_aux_hidden_state_layer_ids": [1, 4, 11]}
    refused(specforge(state(), tmp_path, eagle_config=ids), "input of target layer 12", "11 layers")
    ids = {"eagle_aux_hidden_state_layer_ids": [-1, 5, 8]}
    refused(speculators(state(), tmp_path / "b", **ids), "target layer -1", "11 layers")


def test_target_hidden_size_stated_for_another_target(tmp_path):
    refused(safeailab_eagle3(state(), tmp_path, target_hidden_size=40), 40, 24)


def test_number_of_aux_layers_must_match_fc(tmp_path):
    folder = specforge(state(), tmp_path, eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 4]})
    refused(folder, 72, "2 * 24 = 48")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_key_value_heads": 3}, ["4 query heads over 3"]),
        ({"head_dim": 7}, ["head_dim 7", "even"]),
        ({"hidden_act": "exotic"}, ["hidden_act 'exotic'"]),
        ({"intermediate_size": 36}, ["mlp.gate_proj.weight", "[35, 24]", "[36, 24]"]),
        ({"intermediate_size": "35"}, ["intermediate_size", "'35'", "positive whole number"]),
        ({"hidden_size": None}, ["hidden_size is missing"]),
        ({"num_attention_heads": 0}, ["num_attention_heads", "0"]),
        ({"num_hidden_layers": 2}, ["missing tensors: layers.1."]),
        ({"num_hidden_layers": 10**12}, ["1000000000000 layers"]),
        ({"draft_vocab_size": 18}, ["d2t has 17 entries", "18"]),
        ({"draft_vocab_size": 60}, ["60", "53"]),
        ({"rms_norm_eps": -1}, ["rms_norm_eps", "-1"]),
        ({"norm_output": "yes"}, ["norm_output", "'yes'"]),
        ({"rope_scaling": {"rope_type": "spiral"}}, ["RoPE", "spiral"]),
        ({"rope_scaling": [1]}, ["rope_scaling", "[1]"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantised", "quantization_config"]),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": "2,5"}}, ["layer_ids", "'2,5'"]),
        ({"eagle_config": 3}, ["eagle_config", "3"]),
    ],
)
def test_bad_configuration(tmp_path, change, said):
    refused(specforge(state(), tmp_path, **change), *said)


def test_other_speculators_heads_are_refused(tmp_path):
    refused(speculators(state(), tmp_path, speculators_model_type="dflash"), "dflash", "eagle3")


def test_not_a_draft_head(tmp_path):
    s = state("eagle1")
    plain = put(tmp_path, sizes(s), drop(s.tensors, "fc.weight", "fc.bias"))
    refused(plain, "not an EAGLE head", "fc.weight")


# ---- bad tensors


def rewritten(tmp_path, change):
    s = state()
    tensors = with_t2d(s)
    change(tensors)
    return put(tmp_path, sizes(s) | {"draft_vocab_size": 17}, midlayer(tensors))


def test_missing_and_unexpected_tensors_are_listed(tmp_path):
    def change(tensors):
        del tensors["layers.0.hidden_norm.weight"], tensors["norm.weight"]
        tensors |= {"layers.0.self_attn.q_norm.weight": torch.ones(6), "extra": torch.ones(1)}

    folder = rewritten(tmp_path, change)
    refused(folder, "missing tensors: layers.0.hidden_norm.weight, norm.weight")
    refused(folder, "unexpected tensors: extra, layers.0.self_attn.q_norm.weight")


def test_a_long_list_is_cut(tmp_path):
    folder = rewritten(tmp_path, lambda t: t.update({f"extra.{i:02}": torch.ones(1) for i in range(30)}))
    refused(folder, "extra.07 and 22 more")


@pytest.mark.parametrize("name", ["norm.weight", "layers.0.self_attn.k_proj.weight", "lm_head.weight"])
def test_wrong_shape(tmp_path, name):
    wrong = torch.ones(5, 7)
    refused(rewritten(tmp_path, lambda t: t.update({name: wrong})), name, "[5, 7]", list(state().tensors[name].shape))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.bool])
def test_wrong_dtype(tmp_path, dtype):
    name = "layers.0.mlp.up_proj.weight"
    folder = rewritten(tmp_path, lambda t: t.update({name: t[name].to(dtype)}))
    refused(folder, name, str(dtype).removeprefix("torch."), "float16")


def test_quantised_tensors(tmp_path):
    folder = rewritten(tmp_path, lambda t: t.update({"layers.0.mlp.up_proj.weight_scale": torch.ones(1)}))
    refused(folder, "quantised", "weight_scale")


def test_same_tensor_under_two_names(tmp_path):
    refused(rewritten(tmp_path, lambda t: t.update({"model.norm.weight": torch.ones(24)})), "norm.weight twice")


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31mred", "long" * 1000])
def test_tensor_names_cannot_disturb_the_message(tmp_path, name):
    folder = rewritten(tmp_path, lambda t: t.update({name: torch.ones(1)}))
    with pytest.raises(CheckpointError, match="unexpected tensors: '") as caught:
        load_draft(folder, TARGET)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_d2t_missing(tmp_path):
    refused(rewritten(tmp_path, lambda t: t.pop("d2t")), "missing tensors: d2t")


@given(st.integers(0, 16), st.integers(-(2**63), 2**63 - 1))
@QUICK
def test_d2t_out_of_range_is_always_refused(tmp_path, draft, offset):
    def change(tensors):
        tensors.pop("t2d")
        tensors["d2t"] = tensors["d2t"].clone()
        tensors["d2t"][draft] = offset

    folder = rewritten(tmp_path, change)
    others = {i + o for i, o in enumerate(state().tensors["d2t"].tolist()) if i != draft}
    if not 0 <= draft + offset < 53:
        refused(folder, "out of range", draft + offset, "[0, 53)")
    elif draft + offset in others:
        refused(folder, "17 draft tokens to 16 target tokens", f"target token {draft + offset} more than once")
    else:
        assert load_draft(folder, TARGET).tensors["d2t"][draft] == offset


@pytest.mark.parametrize("bad", [53, -1])
def test_d2t_just_outside(tmp_path, bad):
    refused(
        rewritten(tmp_path, lambda t: t["d2t"].__setitem__(4, bad - 4)), "first draft token 4", f"= {bad}", "[0, 53)"
    )


def test_d2t_duplicates(tmp_path):
    def change(tensors):
        tensors["d2t"][5] = tensors["d2t"][4] - 1

    token = 4 + int(state().tensors["d2t"][4])
    refused(rewritten(tmp_path, change), "17 draft tokens to 16", f"target token {token} more than once")


def test_d2t_of_floats(tmp_path):
    refused(rewritten(tmp_path, lambda t: t.update(d2t=t["d2t"].float())), "d2t is float32", "int64 [17]")


def test_t2d_must_agree(tmp_path):
    refused(rewritten(tmp_path, lambda t: t.update(t2d=~t["t2d"])), "t2d marks 36", "17", "differ at 53")
    refused(rewritten(tmp_path, lambda t: t.update(t2d=t["t2d"][:50])), "t2d has shape [50]", "[53]")


def test_d2t_where_the_vocabulary_is_the_targets(tmp_path):
    s = state(draft_vocab=None)
    s.tensors["d2t"] = torch.zeros(53, dtype=torch.int64)
    zeros = load_draft(specforge(s, tmp_path), TARGET)
    assert "d2t" not in zeros.tensors
    s.tensors["d2t"][:2] = torch.tensor([1, -1])
    refused(specforge(s, tmp_path), "d2t permutes the vocabulary at 2 of 53")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 60) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
KEYS = [*sizes(state()), "architectures", "head_dim", "draft_vocab_size", "target_hidden_size", "bias", "qkv_bias"]
KEYS += ["eagle_config", "fc_norm", "rope_scaling", "rope_parameters", "speculators_model_type", "producer"]
KEYS += ["transformer_layer_config", "eagle_aux_hidden_state_layer_ids", "tie_word_embeddings", "quantization_config"]


@given(st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3))
@settings(QUICK, max_examples=150)
def test_any_configuration_loads_or_is_refused_cleanly(tmp_path, change):
    folder = specforge(state(), tmp_path, **change)
    with contextlib.suppress(EagleError):  # anything else fails the test
        load_draft(folder, TARGET)


# ---- heads made from nothing, and saving


@given(
    kind=st.sampled_from(["eagle1", "eagle3"]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 41)),
    vocab=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    layers=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    flags=st.tuples(*[st.booleans()] * 6),
    aux=st.none() | st.lists(st.integers(0, 40), max_size=4),
    scaled=st.booleans(),
)
@settings(QUICK, max_examples=60)
def test_save_then_load_is_the_identity(tmp_path, kind, shape, vocab, layers, dtype, flags, aux, scaled):
    kv_heads, group, half, inner = shape
    target = TargetSpec(hidden_size=22, vocab_size=max(vocab), num_layers=layers)
    eagle3 = kind == "eagle3"
    fields = {"qkv_bias": flags[0], "fc_bias": flags[1], "num_layers": 1 + flags[2], "rms_norm_eps": 3e-6}
    if eagle3:
        fields |= {"norm_before_residual": flags[3], "norm_output": flags[4], "fc_norm": flags[5]}
        fields["norm_before_fc"] = flags[3]
    if eagle3 and aux is not None:
        fields["aux_layers"] = tuple(min(i, layers) for i in aux)
    if scaled:
        fields["rope_scaling"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    config = default_draft_config(
        target,
        kind=kind,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=2 * half,
        intermediate_size=inner,
        draft_vocab_size=min(vocab) if eagle3 else None,
        hidden_size=18 if eagle3 and flags[5] else None,
        **fields,
    )
    made = random_draft(config, seed=layers, dtype=dtype)
    save_draft(made, tmp_path)
    assert_same(load_draft(tmp_path, target, use_eagle3=eagle3), made)


def test_saved_form_is_safeailabs_and_fits_other_readers(tmp_path):
    made = state()
    save_draft(made, tmp_path)
    config, stored = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["draft_vocab_size"] == 17
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 4, 7]  # SGLang adds one
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 5, 8]  # vLLM takes them as they are
    assert {name.split(".")[0] for name in stored} == {
        "midlayer",
        "fc",
        "norm",
        "lm_head",
        "embed_tokens",
        "d2t",
        "t2d",
    }
    assert stored["t2d"].nonzero().flatten().tolist() == (made.tensors["d2t"] + torch.arange(17)).tolist()
    save_draft(random_draft(default_draft_config(TARGET, num_heads=4)), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["draft_vocab_size"] is None


def test_saved_eagle1_form(tmp_path):
    save_draft(state("eagle1", fc_bias=False), tmp_path)
    config, stored = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    assert (config["architectures"], config["bias"]) == (["LlamaForCausalLM"], False)
    assert "layers.0.self_attn.q_proj.weight" in stored


def test_saving_a_state_that_is_not_whole_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing tensors: norm\.weight"):
        save_draft(without(state(), "norm.weight"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_saving_over_the_folder_a_state_was_loaded_from(tmp_path):
    made = state()
    save_draft(made, tmp_path)
    loaded = load_draft(tmp_path, TARGET)
    save_draft(state(seed=9), tmp_path)
    assert_same(loaded, made)


def test_random_draft_leaves_to_the_target_what_it_can():
    config = default_draft_config(TARGET, num_heads=4, num_kv_heads=2)
    assert {"lm_head.weight", "embed_tokens.weight", "d2t"}.isdisjoint(random_draft(config).tensors)
    own = random_draft(default_draft_config(TARGET, num_heads=4, draft_vocab_size=20)).tensors
    assert own["lm_head.weight"].shape == (20, 24)
    chosen = own["d2t"] + torch.arange(20)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert "embed_tokens.weight" not in own
    narrow = random_draft(default_draft_config(TARGET, num_heads=4, hidden_size=16)).tensors
    assert narrow["lm_head.weight"].shape == narrow["embed_tokens.weight"].shape == (53, 16)


def test_random_draft_is_reproducible_and_scaled():
    target = TargetSpec(hidden_size=200, vocab_size=53, num_layers=11)
    config = default_draft_config(target, num_heads=4, num_kv_heads=2)
    one, same, other = (random_draft(config, seed=seed).tensors["fc.weight"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.std() == pytest.approx(600**-0.5, rel=0.05)
    generator = torch.Generator().manual_seed(1)
    first, second = (random_draft(config, generator=generator).tensors["fc.weight"] for _ in range(2))
    assert torch.equal(first, one)
    assert not torch.equal(first, second)


def test_default_config_checks_its_sizes():
    with pytest.raises(CheckpointError, match="5 query heads over 3"):
        default_draft_config(TARGET, num_heads=5, num_kv_heads=3, head_dim=4)
    with pytest.raises(CheckpointError, match=re.escape("target layer 12")):
        default_draft_config(TARGET, num_heads=4, aux_layers=(12,))
