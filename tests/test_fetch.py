import errno
import os
import shutil
from collections import namedtuple

import pytest
from test_hub import model_folder

from eagle.errors import EagleError, InvalidInputError, ModelNotFoundError, OutOfMemoryError
from eagle.model import fetch as module
from eagle.model.embedded import MANIFEST
from eagle.model.fetch import fetch
from eagle.model.locate import locate


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose cache holds every repository as links into a blob store, as the real one does."""

    def local(hub_id, what, *, revision=None, progress=True):
        folder = tmp_path / "cache" / hub_id.replace("/", "--")
        if not folder.exists():
            blobs = model_folder(tmp_path / "blobs" / hub_id.replace("/", "--"))
            (blobs / "model.safetensors").write_bytes(os.urandom(2_000))
            (blobs / MANIFEST).write_text("{}")
            folder.mkdir(parents=True)
            for blob in blobs.iterdir():
                (folder / blob.name).symlink_to(blob)
        return folder

    monkeypatch.setattr(module, "ensure_local", local)
    monkeypatch.setattr(module, "_LINK_FROM_BYTES", 1_000)
    return tmp_path


def test_both_parts_stay_in_the_cache(hub):
    target, head = fetch("eagle3-qwen3-8b")
    assert target.name == "Qwen--Qwen3-8B"
    assert head.name == "AngelSlim--Qwen3-8B_eagle3"


def test_a_model_without_a_head_has_one_part(hub):
    assert len(fetch("org/name")) == 1
    assert len(fetch("org/name", ea_model_path="random")) == 1
    assert len(fetch("org/name", ea_model_path="org/head")) == 2


def test_out_becomes_plain_folders_that_name_the_pair(hub):
    cached = fetch("eagle3-qwen3-8b")
    out = hub / "deep" / "out"
    placed = fetch("eagle3-qwen3-8b", out)
    assert placed == [out / "target", out / "head"]
    for source, folder in zip(cached, placed, strict=True):
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
        assert not any(path.is_symlink() for path in folder.iterdir())
        assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    location = locate(out)
    assert (location.base, location.draft) == (str(out / "target"), str(out / "head"))


def test_an_edited_config_leaves_the_cache_alone(hub):
    (cached,) = fetch("org/name")
    (placed,) = fetch("org/name", hub / "out")
    (placed / "config.json").write_text("edited")
    assert (cached / "config.json").read_text() == "{}"


def test_large_files_are_linked_and_copied_where_they_cannot_be(hub, monkeypatch):
    (cached,) = fetch("org/name")
    (linked,) = fetch("org/name", hub / "linked")
    assert (linked / "model.safetensors").samefile((cached / "model.safetensors").resolve())

    def refuse(*args, **kwargs):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    (copied,) = fetch("org/name", hub / "copied")
    assert not (copied / "model.safetensors").samefile((cached / "model.safetensors").resolve())
    assert (copied / "model.safetensors").read_bytes() == (cached / "model.safetensors").read_bytes()


def test_what_is_there_is_not_overwritten(hub):
    fetch("org/name", hub / "out")
    with pytest.raises(InvalidInputError, match="target exists already"):
        fetch("org/other", hub / "out")


def test_a_full_disk_leaves_nothing(hub, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OutOfMemoryError, match="no disk space left"):
        fetch("org/name", hub / "out")
    assert list((hub / "out").iterdir()) == []


def test_a_disk_without_room_is_told_before_anything_is_written(hub, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module, "_LINK_FROM_BYTES", 10_000)  # all is copied
    needed = sum(path.stat().st_size for path in fetch("org/name")[0].iterdir() if path.name != MANIFEST)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - needed + 1, needed - 1))
    with pytest.raises(OutOfMemoryError, match=r"out takes 0\.\d+ GB, 0\.\d+ GB are free on its disk"):
        fetch("org/name", hub / "out")
    assert not (hub / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - needed, needed))
    fetch("org/name", hub / "out")


def test_out_that_cannot_be_written(hub):
    (hub / "file").write_text("in the way")
    with pytest.raises(EagleError, match="cannot write"):
        fetch("org/name", hub / "file" / "out")


def test_a_folder_that_takes_no_file_is_found_before_anything_is_fetched(hub, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("eagle.model.fetch.tempfile.TemporaryDirectory", refuse)
    monkeypatch.setattr("eagle.model.fetch.ensure_local", lambda *_, **__: pytest.fail("fetched"))
    with pytest.raises(EagleError, match=r"cannot write .*out \(Permission denied\)"):
        fetch("org/name", hub / "out")


def test_an_unknown_name_makes_no_folder(hub):
    with pytest.raises(ModelNotFoundError):
        fetch("smolm2-135m", hub / "out")
    assert not (hub / "out").exists()
