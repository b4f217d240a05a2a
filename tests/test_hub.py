import errno
import http.server
import json
import os
import threading

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled

from eagle.errors import DownloadError, ModelNotFoundError, OutOfMemoryError
from eagle.model.hub import check_model_folder, ensure_local, looks_like_hub_id


def model_folder(path, weights="model.safetensors"):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / weights).write_bytes(b"weights")
    return path


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does where a model cannot be had."""

    def do_GET(self):
        code, reason = {
            "gated": (403, "GatedRepo"),
            "missing": (404, "RepoNotFound"),
            "meta-llama": (404, "RepoNotFound"),
            "revised": (404, "RevisionNotFound"),
        }.get(self.path.split("/")[3], (400, "Other"))
        self.send_response(code)
        self.send_header("X-Error-Code", reason)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("weights", "other"), [("model.safetensors", "bin"), ("pytorch_model.bin", "safetensors")])
def test_the_list_of_a_format_that_was_left_on_the_hub_does_not_matter(tmp_path, weights, other):
    folder = model_folder(tmp_path / "model", weights)
    listing = {"weight_map": {"layer": f"x-00001-of-00001.{other}"}}
    (folder / f"x.{other}.index.json").write_text(json.dumps(listing))
    assert check_model_folder(folder) == folder


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "model-00001-of-00001.safetensors"])
def test_a_whole_folder_is_itself(tmp_path, weights):
    folder = model_folder(tmp_path / "model", weights)
    assert check_model_folder(folder) == folder
    assert ensure_local(folder) == folder
    assert ensure_local(str(folder), "head") == folder


def test_what_a_folder_lacks_is_named(tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(ModelNotFoundError, match=r"head folder .* is not there"):
        ensure_local(folder, "head")
    folder.mkdir()
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        ensure_local(folder)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.bin").write_text("")
    with pytest.raises(ModelNotFoundError, match="no weights"):
        ensure_local(folder)
    with pytest.raises(ModelNotFoundError, match="is a file"):
        ensure_local(folder / "config.json")


def test_missing_shards_are_named(tmp_path):
    folder = model_folder(tmp_path / "model", "model-00001-of-00003.safetensors")
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"layer.{i}": name for i, name in enumerate(names)}}))
    with pytest.raises(ModelNotFoundError, match=rf"lacks 2 .*{names[1]}, {names[2]}"):
        check_model_folder(folder)
    index.write_text("{")
    with pytest.raises(ModelNotFoundError, match="no list of weight files"):
        check_model_folder(folder)


def test_hub_ids():
    assert looks_like_hub_id("org/name-1.5B_x")
    for text in ("name", "a/b/c", "./name", "/abs", "org/", "org/na me", "~/name", "../x", "org/näme"):
        assert not looks_like_hub_id(text), text


def test_errors_of_the_hub(hub):
    with pytest.raises(ModelNotFoundError, match=r"'gated/model' is gated.*http.*gated/model.*hf auth login"):
        ensure_local("gated/model")
    with pytest.raises(
        ModelNotFoundError, match="head 'missing/model' is neither a folder here nor a model on the hub"
    ):
        ensure_local("missing/model", "head")
    with pytest.raises(ModelNotFoundError, match=r"did you mean meta-llama/Llama-3\.1-8B-Instruct"):
        ensure_local("meta-llama/Llama-3.1-8B-Instruc")
    with pytest.raises(ModelNotFoundError, match="no revision 'nope'"):
        ensure_local("revised/model", revision="nope")
    with pytest.raises(DownloadError, match="could not fetch the model 'other/model'"):
        ensure_local("other/model")


def test_an_unreachable_hub_says_what_to_do(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError) as caught:
        ensure_local("org/model", "target")
    text = str(caught.value)
    assert "\n" not in text
    assert all(part in text for part in ("target 'org/model'", "eagle fetch", "HF_HUB_OFFLINE", "local folder"))


def test_only_weights_and_data_are_asked_for(tmp_path, monkeypatch):
    asked = []

    def snapshot(repo, *, revision, allow_patterns, ignore_patterns):
        asked.append(allow_patterns)
        assert (repo, revision) == ("org/model", "v2")
        assert "*/*" in ignore_patterns
        folder = tmp_path / "snapshot"
        if len(asked) == 1:
            folder.mkdir()
            (folder / "config.json").write_text("{}")
        else:
            (folder / "pytorch_model.bin").write_bytes(b"weights")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert ensure_local("org/model", revision="v2") == tmp_path / "snapshot"
    assert "*.safetensors" in asked[0]
    assert "pytorch_model*.bin" in asked[1]
    assert not any(pattern.endswith(".py") for patterns in asked for pattern in patterns)


def test_a_full_disk(monkeypatch):
    def snapshot(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(OutOfMemoryError, match="HF_HUB_CACHE"):
        ensure_local("org/model")


def test_progress_bars_are_hidden_only_meanwhile(tmp_path, monkeypatch):
    seen = []

    def snapshot(*args, **kwargs):
        seen.append(are_progress_bars_disabled())
        return str(folder)

    folder = model_folder(tmp_path / "model")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    before = are_progress_bars_disabled()
    ensure_local("org/model", progress=False)
    assert seen == [True]
    assert are_progress_bars_disabled() == before
