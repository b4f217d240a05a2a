from pathlib import Path

import pytest
from test_hub import model_folder

from eagle.errors import InvalidInputError, ModelNotFoundError
from eagle.model import locate as module
from eagle.model.locate import locate
from eagle.model.presets import DEFAULT_MODEL, PRESETS


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """The embedded model is there, the package ships no head."""
    folder = model_folder(tmp_path / "embedded")
    monkeypatch.setattr(module, "ensure_embedded", lambda progress: folder)
    monkeypatch.setattr(module, "ASSETS", tmp_path / "assets")
    return folder


def test_nothing_given_means_the_default_with_an_untrained_head(embedded):
    location = locate()
    assert (location.base, location.draft) == (str(embedded), "random")
    assert location.draft_is_untrained
    assert location.preset is PRESETS[DEFAULT_MODEL]


def test_the_head_of_the_package_serves_once_it_ships(embedded, tmp_path):
    head = model_folder(tmp_path / "assets" / "smollm2-135m-eagle3")
    location = locate("smollm2-135m")
    assert location.draft == str(head)
    assert not location.draft_is_untrained


def test_a_packaged_head_without_weights_is_not_passed_over(embedded, tmp_path):
    head = model_folder(tmp_path / "assets" / "smollm2-135m-eagle3")
    (head / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"head folder .* no weights"):
        locate()


def test_a_hub_preset_is_not_looked_up():
    location = locate("EAGLE3-Llama3.1-8B", revision="main")
    assert location.base == "meta-llama/Llama-3.1-8B-Instruct"
    assert location.draft == "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B"
    assert location.revision == "main"


def test_the_given_head_goes_first(embedded, tmp_path):
    head = model_folder(tmp_path / "head")
    assert locate(DEFAULT_MODEL, head).draft == str(head)
    assert not locate(DEFAULT_MODEL, head).draft_is_untrained
    assert locate("eagle3-qwen3-8b", "Tengyunw/qwen3_8b_eagle3").draft == "Tengyunw/qwen3_8b_eagle3"
    assert locate("eagle3-qwen3-8b", "eagle3-qwen3-8b-redhat").draft == "RedHatAI/Qwen3-8B-speculator.eagle3"
    assert locate("eagle3-qwen3-8b", "random").draft_is_untrained


@pytest.fixture
def widened(embedded, tmp_path, monkeypatch):
    """The widened models need not be built: their folder is made up, and what it was to be built from is kept."""
    model_folder(tmp_path / "assets" / "smollm2-135m-eagle3")
    asked = []

    def ensure(name, small, progress):
        asked.append((name, small))
        return tmp_path / name

    monkeypatch.setattr(module, "ensure_widened", ensure)
    return asked


@pytest.mark.parametrize(("typed", "name"), [("EAGLE-3B", "EAGLE-3B"), ("eagle-8b", "EAGLE-8B")])
def test_widened_models_are_built_from_the_default_pair(widened, embedded, tmp_path, typed, name):
    location = locate(typed)
    assert (location.base, location.draft) == (str(tmp_path / name / "target"), str(tmp_path / name / "head"))
    assert location.preset is PRESETS[name]
    assert location.widen is None
    small = module.SmallPair(embedded, tmp_path / "assets" / "smollm2-135m-eagle3")
    assert widened == [(name, small)]
    assert locate(typed, "random").draft_is_untrained


def test_in_memory_nothing_is_built_yet(widened, embedded, tmp_path):
    location = locate("EAGLE-8B", in_memory=True)
    assert widened == []
    assert location.widen == module.SmallPair(embedded, tmp_path / "assets" / "smollm2-135m-eagle3")
    assert (location.base, location.draft) == (str(location.widen.target), str(location.widen.head))
    assert locate("EAGLE-8B", "org/head", in_memory=True).draft == "org/head"


@pytest.mark.parametrize("name", [None, DEFAULT_MODEL, "eagle3-qwen3-8b", "org/name", "./folder"])
def test_only_widened_models_are_built_in_memory(name):
    with pytest.raises(InvalidInputError, match=r"in_memory=True is for .*EAGLE-3B and EAGLE-8B"):
        locate(name, in_memory=True)


def test_near_misses_of_widened_names():
    with pytest.raises(ModelNotFoundError, match=r"'EAGLE8B'.*did you mean .*EAGLE-8B"):
        locate("EAGLE8B")
    with pytest.raises(ModelNotFoundError, match=r"'EAGLE-7B'.*did you mean .*EAGLE-"):
        locate("EAGLE-7B", in_memory=False)


def test_a_folder_is_itself(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "model")
    assert locate(folder) == module.ModelLocation(str(folder), None)
    assert locate(base_model_path=str(folder)).base == str(folder)
    monkeypatch.chdir(tmp_path)
    assert locate("model").base == "model"
    model_folder(Path(DEFAULT_MODEL))
    assert Path(locate(f"./{DEFAULT_MODEL}").base) == Path(DEFAULT_MODEL)


def test_a_fetched_pair_brings_its_head(tmp_path):
    target = model_folder(tmp_path / "pair" / "target")
    assert locate(tmp_path / "pair") == module.ModelLocation(str(target), None)
    head = model_folder(tmp_path / "pair" / "head")
    assert locate(tmp_path / "pair") == module.ModelLocation(str(target), str(head))


def test_folders_without_config_or_weights(tmp_path):
    folder = model_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"target folder .* no weights"):
        locate(folder)
    with pytest.raises(ModelNotFoundError, match=r"head folder .* no weights"):
        locate("eagle3-qwen3-8b", folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"target folder .* no config\.json"):
        locate(folder)


@pytest.mark.parametrize("name", ["./absent", "~/absent-model", "/absent/model", "a/b/c", "..\\absent"])
def test_a_path_to_nothing(name):
    with pytest.raises(ModelNotFoundError, match=r"target folder .* is not there"):
        locate(name)


def test_a_hub_id_is_left_as_it_is():
    assert locate("org/name", "org2/head") == module.ModelLocation("org/name", "org2/head")


def test_unknown_names():
    with pytest.raises(ModelNotFoundError, match=r"'SmolLM-135M'.*did you mean SmolLM2-135M"):
        locate("SmolLM-135M")
    with pytest.raises(ModelNotFoundError, match="unknown head 'nonsense'"):
        locate("org/name", "nonsense")
    with pytest.raises(ModelNotFoundError, match="unknown model ''"):
        locate("")
    with pytest.raises(ModelNotFoundError, match="unknown head ''"):
        locate("org/name", "")


def test_two_targets():
    with pytest.raises(InvalidInputError, match=r"'org/a'.*'org/b'"):
        locate("org/a", base_model_path="org/b")
    assert locate("org/a", base_model_path="org/a").base == "org/a"


def test_names_are_checked_without_building(monkeypatch):
    monkeypatch.setattr(module, "ensure_embedded", lambda **_: pytest.fail("built"))
    for name in (DEFAULT_MODEL, "EAGLE-8B", "eagle3-qwen3-8b", "org/name"):
        module.check_name(name)
    with pytest.raises(ModelNotFoundError, match="unknown model 'nosuch'"):
        module.check_name("nosuch")
