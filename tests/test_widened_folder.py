"""Widened models in the cache: plain folders, whole or absent."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small_pair import NAME, WIDE_SIZES, save_small_pair
from tiny import relative_error
from transformers import AutoModelForCausalLM, AutoTokenizer

from eagle.errors import EagleError, OutOfMemoryError
from eagle.model import widened_folder as module
from eagle.model.ea_model import EaModel
from eagle.model.embedded import MANIFEST
from eagle.model.fetch import fetch
from eagle.model.locate import locate
from eagle.model.widened import SIZES, SmallPair
from eagle.model.widened_folder import ensure_widened, is_complete, widened_folder
from eagle.model.widening import Widening


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallPair:
    monkeypatch.setitem(SIZES, NAME, WIDE_SIZES)
    monkeypatch.setattr(module, "SHARD_BYTES", 40_000)
    monkeypatch.setenv("EAGLE_CACHE", str(tmp_path / "cache"))
    return save_small_pair(tmp_path / "small")


def build(small: SmallPair) -> Path:
    return ensure_widened(NAME, small, progress=False)


def leftovers() -> list[str]:
    """Everything in the cache but the lock."""
    models = widened_folder(NAME).parent
    return [path.name for path in models.iterdir() if path.name != f".{NAME}.lock"] if models.exists() else []


def test_the_folder_loads_as_any_hugging_face_model(small: SmallPair) -> None:
    folder = build(small)
    assert leftovers() == [NAME]
    model, info = AutoModelForCausalLM.from_pretrained(folder / "target", output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    assert model.config.rms_norm_eps < 1e-5
    plain = AutoModelForCausalLM.from_pretrained(small.target)
    assert model.generation_config.eos_token_id == plain.generation_config.eos_token_id
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(small.target).chat_template
    size = plain.config.vocab_size
    ids = torch.randint(size, (2, 17))
    with torch.no_grad():
        assert relative_error(model.float()(ids).logits[..., :size], plain.float()(ids).logits) < 0.05


def test_shards_are_listed_and_small(small: SmallPair) -> None:
    folder = build(small) / "target"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == shards
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert len(shards) > 3
    assert index["metadata"]["total_size"] == sum(
        p.nbytes for p in AutoModelForCausalLM.from_pretrained(folder).parameters()
    )
    for shard in shards:
        with safe_open(folder / shard, "pt") as file:
            assert all(index["weight_map"][name] == shard for name in file.keys())  # noqa: SIM118
        assert os.name == "nt" or (folder / shard).stat().st_mode & 0o044


def test_the_head_is_in_the_published_format(small: SmallPair) -> None:
    head = build(small) / "head"
    config = json.loads((head / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (config["hidden_size"], config["draft_vocab_size"], config["vocab_size"]) == (48, 80, 300)
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
    with safe_open(head / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.get_slice("lm_head.weight").get_shape() == [80, 48]
        assert int(file.get_tensor("t2d").sum()) == 80
    assert {"d2t", "t2d", "fc.weight", "norm.weight", "midlayer.hidden_norm.weight"} <= names
    assert "embed_tokens.weight" not in names


def test_eagle_runs_on_a_fetched_copy(small: SmallPair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("eagle.model.locate._small_pair", lambda preset, progress: small)
    out = tmp_path / "out"
    assert fetch(NAME.lower(), out, progress=False) == [out / "target", out / "head"]
    assert locate(NAME, progress=False).base == str(widened_folder(NAME) / "target")
    model = EaModel.from_pretrained(str(out), dtype=torch.float32, total_token=15, depth=3, top_k=4)
    ids = torch.randint(200, (1, 9))
    assert torch.equal(
        model.generate(ids, max_new_tokens=20), model.generate(ids, max_new_tokens=20, speculative=False)
    )
    assert model.ea_layer.config.aux_layers == (2, 4, 5)
    assert not (out / "target" / MANIFEST).exists()


def test_a_later_call_does_no_work(small: SmallPair, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build(small)
    monkeypatch.setattr(module, "exclusive", None)
    assert build(small) == folder


@pytest.mark.parametrize("damage", ["manifest", "weights", "truncated", "format", "another head", "not json"])
def test_a_damaged_or_older_folder_is_made_anew(small: SmallPair, damage: str) -> None:
    folder = build(small)
    shard = next((folder / "target").glob("model-00002*"))
    before = shard.read_bytes()
    manifest = folder / MANIFEST
    if damage == "manifest":
        manifest.unlink()
    elif damage == "weights":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(before[:-1])
    elif damage == "format":
        content = json.loads(manifest.read_text())
        content["made_of"]["format"] = 0
        manifest.write_text(json.dumps(content))
    elif damage == "another head":
        config = small.head / "config.json"
        config.write_text(config.read_text() + " ")
    else:
        manifest.write_text("[]")
    assert not is_complete(folder, NAME, small.digest())
    build(small)
    assert is_complete(folder, NAME, small.digest())
    assert shard.read_bytes() == before
    assert leftovers() == [NAME]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("stage", ["_noise", "_d2t"], ids=["target", "head"])
def test_an_interruption_leaves_nothing(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch, stage: str, error: type[BaseException]
) -> None:
    calls = []

    def interrupted(self, *args):
        calls.append(args)
        if stage == "_d2t" or len(calls) > 20:
            raise error
        return original(self, *args)

    original = getattr(Widening, stage)
    with monkeypatch.context() as patch:
        patch.setattr(Widening, stage, interrupted)
        with pytest.raises(error):
            build(small)
    assert leftovers() == []
    assert is_complete(build(small), NAME, small.digest())


CHILD = """
import time
from pathlib import Path
from eagle.model import widened_folder
from eagle.model.widened import SIZES, SmallPair

SIZES[{name!r}] = {sizes!r}
original = widened_folder._write_head

def slow(*args):
    with open({log!r}, "a") as log:
        log.write("built\\n")
    while not Path({release!r}).exists():
        time.sleep(0.05)
    original(*args)

widened_folder._write_head = slow
print(widened_folder.ensure_widened({name!r}, SmallPair(Path({target!r}), Path({head!r}))))
"""


def start_child(small: SmallPair, log: Path) -> subprocess.Popen:
    """A process that builds, and stops in the middle until a file "release" lies beside ``log``."""
    paths = {"log": log, "release": log.parent / "release", "target": small.target, "head": small.head}
    code = CHILD.format(name=NAME, sizes=WIDE_SIZES, **{name: str(path) for name, path in paths.items()})
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 90
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_processes_at_once_build_once(small: SmallPair, tmp_path: Path) -> None:
    log = tmp_path / "log"
    children = [start_child(small, log)]
    wait_for(log)
    children.append(start_child(small, log))
    assert "Waiting for another process" in children[1].stderr.readline()
    (tmp_path / "release").touch()
    outputs = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert [out.strip() for out, _ in outputs] == [str(widened_folder(NAME))] * 2
    assert log.read_text() == "built\n"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_leaves_no_model_and_no_lock(small: SmallPair, tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = start_child(small, log)
    wait_for(log)
    child.kill()
    child.communicate()
    assert not widened_folder(NAME).exists()
    assert any(name.endswith(".tmp") for name in leftovers())
    build(small)
    assert leftovers() == [NAME]


def test_too_little_disk_space_is_seen_beforehand(small: SmallPair, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 40_000_000, 40_000_000))
    monkeypatch.setattr(Widening, "_noise", None)
    with pytest.raises(OutOfMemoryError, match=r"needs 0\.1 GB .* 0\.0 GB are free; .*EAGLE_CACHE.*in_memory"):
        build(small)
    assert leftovers() == []


def test_the_disk_fills_up_on_the_way(small: SmallPair, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OutOfMemoryError, match="is full"):
        build(small)
    assert leftovers() == []


def test_a_cache_that_cannot_be_written(small: SmallPair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EAGLE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(EagleError, match=r"cannot write to the cache folder .*EAGLE_CACHE"):
        build(small)


def test_progress_is_a_line_on_standard_error(small: SmallPair, capfd: pytest.CaptureFixture) -> None:
    ensure_widened(NAME, small)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Building EAGLE-3B (0.0 GB) into" in err
    ensure_widened(NAME, small)
    assert capfd.readouterr() == ("", "")


MEASURED = """
import resource, sys
from pathlib import Path
import torch, safetensors.torch
from eagle.model import widened_folder, widening
from eagle.model.widened import SIZES, SmallPair

torch.set_num_threads(1)
SIZES[{name!r}] = {sizes!r}
widened_folder.SHARD_BYTES = 1 << 24
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small = SmallPair(Path({target!r}), Path({head!r}))
small.draft, small.tensors
torch.randn(1 << 22)
before = peak()
folder = widened_folder.ensure_widened({name!r}, small, progress=False)
built = sum(path.stat().st_size for path in (folder / "target").glob("*.safetensors"))
print(built, (peak() - before) * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.skipif(os.name == "nt", reason="needs the resource module")
def test_a_build_holds_one_shard_at_a_time(small: SmallPair) -> None:
    sizes = WIDE_SIZES | {"hidden_size": 1536, "intermediate_size": 3072, "num_layers": 9}
    code = MEASURED.format(name=NAME, sizes=sizes, target=str(small.target), head=str(small.head))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    built, grown = map(int, done.stdout.split())
    assert built > 250_000_000
    assert grown < 100_000_000
