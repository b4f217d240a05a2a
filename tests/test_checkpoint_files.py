import contextlib
import errno
import json
import os
import pickle
import struct

import pytest
import torch
from checkpoint_writers import TARGET, safeailab_eagle3, specforge, state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from eagle.errors import CheckpointError, ModelNotFoundError, OutOfMemoryError
from eagle.model import checkpoint_files
from eagle.model.checkpoint_files import read_config, read_tensors, write_checkpoint
from eagle.model.checkpoints import load_draft


def tensors():
    generator = torch.Generator().manual_seed(7)
    made = {f"layer.{i}": torch.randn(3 + i, 5, generator=generator) for i in range(6)}
    return made | {"half": torch.ones(3, dtype=torch.bfloat16), "ids": torch.arange(4)}


def assert_read(folder, expected):
    found = read_tensors(folder)
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def refused(folder, *said):
    with pytest.raises(CheckpointError) as caught:
        read_tensors(folder)
    for part in said:
        assert part in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def shards(folder, suffix, save):
    made, names = tensors(), sorted(tensors())
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    files = [f"{stem}-0000{i + 1}-of-00003.{suffix}" for i in range(3)]
    for i, file in enumerate(files):
        save({name: made[name] for name in names[i::3]}, folder / file)
    weight_map = {name: files[i % 3] for i, name in enumerate(names)}
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index, weight_map


def test_every_container_reads_the_same(tmp_path):
    folders = {name: tmp_path / name for name in ("st", "zip", "old", "st-shards", "bin-shards")}
    for folder in folders.values():
        folder.mkdir()
    save_file(tensors(), folders["st"] / "model.safetensors")
    torch.save(tensors(), folders["zip"] / "pytorch_model.bin")
    torch.save(tensors(), folders["old"] / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    shards(folders["st-shards"], "safetensors", save_file)
    shards(folders["bin-shards"], "bin", torch.save)
    for folder in folders.values():
        assert_read(folder, tensors())


def test_parameters_come_back_as_plain_tensors(tmp_path):
    torch.save({"weight": torch.nn.Parameter(torch.ones(2))}, tmp_path / "pytorch_model.bin")
    assert not read_tensors(tmp_path)["weight"].requires_grad


def test_missing_folder_config_and_weights(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"nowhere is not a folder"):
        load_draft(tmp_path / "nowhere", TARGET)
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        load_draft(tmp_path, TARGET)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match=r"has no weights"):
        load_draft(tmp_path, TARGET)


@pytest.mark.parametrize("text", ["", "{", "[1]", "nul", '{"a": \x00}', "[" * 100_000])
def test_bad_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_config_that_is_not_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_config(tmp_path)


@pytest.mark.parametrize("writer", [safeailab_eagle3, specforge])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.99])
def test_truncated_weights(tmp_path, writer, keep):
    folder = writer(state(), tmp_path)
    path = next(p for p in folder.iterdir() if p.name != "config.json")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(CheckpointError) as caught:
        load_draft(folder, TARGET)
    assert path.name in str(caught.value)
    assert "truncated or corrupt" in str(caught.value)


def test_truncated_old_pickle(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors(), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for keep in (1, 10, 200, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:keep])
        refused(tmp_path, "pytorch_model.bin", "truncated or corrupt")


def test_torchs_advice_to_lift_the_restriction_is_not_passed_on(tmp_path):
    for content in (b"hello, world", pickle.dumps({"a": [1]}, protocol=5), b"\x80\x02junk"):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match="truncated or corrupt") as caught:
            read_tensors(tmp_path)
        assert "weights_only" not in str(caught.value)


@given(st.sampled_from(["zip", "old", "st"]), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes_never_escape(tmp_path, kind, flips):
    path = tmp_path / ("model.safetensors" if kind == "st" else "pytorch_model.bin")
    for old in tmp_path.iterdir():
        old.unlink()
    if kind == "st":
        save_file(tensors(), path)
    else:
        torch.save(tensors(), path, _use_new_zipfile_serialization=kind == "zip")
    damaged = bytearray(path.read_bytes())
    for place, byte in flips:
        damaged[int(place * min(len(damaged), 1500))] = byte  # where the tables are
    path.write_bytes(damaged)
    with contextlib.suppress(CheckpointError):  # anything else fails the test
        read_tensors(tmp_path)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["zip", "old", "plain-0", "plain-2", "plain-5", "module"])
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, kind):
    trap, path = tmp_path / "sprung", tmp_path / "pytorch_model.bin"
    content = {"fc.weight": torch.ones(2), "x": torch.nn.Linear(2, 2) if kind == "module" else Attack(trap)}
    if kind.startswith("plain"):
        path.write_bytes(pickle.dumps({"x": Attack(trap)}, protocol=int(kind[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != "old")
    refused(tmp_path, "pytorch_model.bin", "run code", "refused", "safetensors")
    assert not trap.exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": 1}, {"a": {"b": torch.ones(1)}}, {3: torch.ones(1)}, 7])
def test_a_pickle_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin", "expected")


def test_sparse_and_meta_tensors_are_refused(tmp_path):
    for tensor in (torch.eye(3).to_sparse(), torch.ones(2, device="meta")):
        torch.save({"a": tensor}, tmp_path / "pytorch_model.bin")
        refused(tmp_path, "'a' is not a plain dense tensor")


def test_safetensors_header_that_lies(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    refused(tmp_path, "model.safetensors", "truncated or corrupt")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_git_lfs_pointer(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    refused(tmp_path, name, "git lfs pull")


def test_bad_shards(tmp_path):
    index, weight_map = shards(tmp_path, "safetensors", save_file)
    first, name = sorted(set(weight_map.values()))[0], sorted(weight_map)[0]
    for change, said in (
        ({"ghost": first}, "ghost, in none of its shards"),
        ({name: "gone.safetensors"}, "'gone.safetensors', which is missing"),
        ({name: "../outside.safetensors"}, "expected a .safetensors or .bin file beside it"),
        ({name: "/etc/passwd"}, "expected a .safetensors or .bin file beside it"),
        ({name: 3}, "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map | change}))
        refused(tmp_path, index.name, said)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / first).write_bytes(b"short")
    refused(tmp_path, first, "truncated or corrupt")


def test_writing_replaces_whole_files_and_leaves_nothing_else(tmp_path):
    shared = torch.randn(3, 4)
    made = {"a": shared, "b": shared, "c": shared.t(), "d": shared[1]}
    write_checkpoint(tmp_path / "deep" / "er", {"x": 1}, made)
    assert sorted(p.name for p in (tmp_path / "deep" / "er").iterdir()) == ["config.json", "model.safetensors"]
    assert_read(tmp_path / "deep" / "er", made)
    assert read_config(tmp_path / "deep" / "er") == {"x": 1}


def test_a_failed_write_leaves_the_folder_as_it_was(tmp_path):
    write_checkpoint(tmp_path, {"x": 1}, tensors())
    with pytest.raises(TypeError):
        write_checkpoint(tmp_path, {"x": object()}, {"new": torch.ones(1)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_read(tmp_path, tensors())


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: full (os error 28)")]
)
def test_a_full_disk(tmp_path, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    write_checkpoint(tmp_path, {"x": 1}, tensors())
    monkeypatch.setattr(checkpoint_files, "save_file", full)
    with pytest.raises(OutOfMemoryError, match="no room for 8 bytes"):
        write_checkpoint(tmp_path, {"x": 2}, {"a": torch.ones(2)})
    assert read_config(tmp_path) == {"x": 1}
    assert len(list(tmp_path.iterdir())) == 2
