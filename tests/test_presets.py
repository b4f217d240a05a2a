import pytest

from eagle.errors import ModelNotFoundError
from eagle.model.hub import looks_like_hub_id
from eagle.model.locate import locate
from eagle.model.presets import DEFAULT_MODEL, PRESETS, find_preset, heads_for, near_matches
from eagle.model.widened import SIZES

HUB = [preset for preset in PRESETS.values() if preset.origin == "hub"]


def test_the_default_is_embedded():
    assert PRESETS[DEFAULT_MODEL].origin == "embedded"
    assert PRESETS[DEFAULT_MODEL].kind == "eagle3"


def test_the_widened_models_start_from_the_default():
    for name in ("EAGLE-3B", "EAGLE-8B"):
        assert (PRESETS[name].origin, PRESETS[name].base) == ("widened", DEFAULT_MODEL)
    assert {name for name, preset in PRESETS.items() if preset.origin == "widened"} == set(SIZES)


def test_at_least_twenty_pairs_of_both_kinds_with_hub_ids():
    assert len(HUB) >= 20
    assert {preset.kind for preset in HUB} == {"eagle1", "eagle3"}
    assert all(looks_like_hub_id(preset.base) and looks_like_hub_id(preset.draft) for preset in HUB)


def test_heads_and_names_are_unique_in_any_case():
    assert len({preset.draft.lower() for preset in HUB}) == len(HUB)
    assert len({name.lower() for name in PRESETS}) == len(PRESETS)


def test_the_kind_agrees_with_the_head_s_name():
    for preset in HUB:
        assert (preset.kind == "eagle3") == ("eagle3" in preset.draft.lower()), preset


@pytest.mark.parametrize("typed", ["smollm2-135m", " SMOLLM2-135M ", "SmolLM2-135M"])
def test_lookup_ignores_case(typed):
    assert find_preset(typed).name == DEFAULT_MODEL


def test_unknown_names_get_near_matches():
    assert find_preset("SmolLM2-135") is None
    with pytest.raises(ModelNotFoundError, match=r"SmolLM2-136M.*did you mean SmolLM2-135M"):
        locate("SmolLM2-136M")
    assert near_matches("eagle-8b")[0] == "EAGLE-8B"
    assert near_matches("qwen3-8b")[0] == "eagle3-qwen3-8b"
    assert near_matches("meta-llama/Llama-3.1-8B-Instruc")[0] == "meta-llama/Llama-3.1-8B-Instruct"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("eagle3-qwen3-8", ["eagle3-qwen3-8b", "eagle3-qwen3-8b-redhat", "eagle3-qwen3-8b-tengyunw"]),
        ("eagle3-qwen3-32", ["eagle3-qwen3-32b", "eagle3-qwen3-32b-redhat"]),
        ("Eagle_Qwen3 8B", ["eagle3-qwen3-8b"]),
        ("eagel3-qwen3-8b", ["eagle3-qwen3-8b"]),
        ("eagle3-qwen3-8b-awq", ["eagle3-qwen3-8b"]),
        ("Llama-3.1-8B", ["eagle-llama3.1-8b", "eagle3-llama3.1-8b"]),
        ("SmolLM2-135M-Instruct", [DEFAULT_MODEL]),
        ("smol", [DEFAULT_MODEL]),
        ("olmoe", ["eagle3-olmoe-1b-7b"]),
        ("Qwen/Qwen3-235B", ["Qwen/Qwen3-235B-A22B"]),
        (
            "llama3.3-70B-Instruct",
            ["eagle3-llama3.3-70b", "eagle3-llama3.3-70b-redhat", "eagle3-llama3.3-70b-specforge"],
        ),
    ],
)
def test_near_matches_are_close_and_the_best_comes_first(typed, meant):
    assert near_matches(typed) == meant


@pytest.mark.parametrize(
    "typed", ["", "-", "8b", "70b", "llama", "qwen3", "gpt2", "mistral", "SmolLM2-360M", "foo/bar", "zzz"]
)
def test_what_is_far_or_fits_many_gets_no_near_match(typed):
    assert near_matches(typed) == []


@pytest.mark.parametrize("name", PRESETS)
def test_a_slip_leads_back_to_the_name(name):
    """The last letter missing, another left out, one doubled."""
    for typed in (name[:-1], name[:2] + name[3:], name[:4] + name[3:]):
        found = near_matches(typed)
        assert name in found, typed
        assert len(found) <= 3


def test_the_error_is_one_line():
    with pytest.raises(ModelNotFoundError) as caught:
        locate("nothing like it")
    assert "\n" not in str(caught.value)
    assert "org/name" in str(caught.value)


def test_heads_for_a_target():
    drafts = {preset.draft for preset in heads_for("Qwen/Qwen3-8B")}
    assert {"AngelSlim/Qwen3-8B_eagle3", "RedHatAI/Qwen3-8B-speculator.eagle3"} <= drafts
    assert heads_for("no/such") == []
