"""What weights take, what a device has, and a refusal that names both."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eagle.errors import OutOfMemoryError
from eagle.model import memory
from eagle.model.memory import check_fits, check_memory, host_memory, weight_bytes

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards: 35 numbers in bfloat16, 9 in float32, 6 bytes of integers; and a shard of another layout."""
    save_file({"a": torch.ones(5, 7, dtype=torch.bfloat16)}, tmp_path / "model-00001-of-00002.safetensors")
    rest = {"b": torch.ones(9), "c": torch.ones(6, dtype=torch.int8)}
    save_file(rest, tmp_path / "model-00002-of-00002.safetensors")
    save_file({"d": torch.ones(99)}, tmp_path / "consolidated.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return tmp_path


def test_bytes_of_weights(folder: Path) -> None:
    assert weight_bytes(folder) == 35 * 2 + 9 * 4 + 6
    assert weight_bytes(folder, torch.float32) == (35 + 9) * 4 + 6
    assert weight_bytes(folder, torch.float16) == (35 + 9) * 2 + 6
    save_file({"a": torch.ones(3)}, folder / "model.safetensors")
    assert weight_bytes(folder) == 12


def test_bytes_without_an_index_or_header(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")
    assert weight_bytes(folder) == 35 * 2 + 9 * 4 + 6 + 99 * 4
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x" * 1234)
    assert weight_bytes(folder, torch.float64) == 1234
    (folder / "model.safetensors").write_bytes(b"x" * 55)
    assert weight_bytes(folder) == 55


def test_a_cpu_is_judged_by_all_of_its_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = weight_bytes(folder, torch.float32)
    monkeypatch.setattr(memory, "host_memory", lambda: needed)
    check_memory(folder, torch.float32, CPU)
    monkeypatch.setattr(memory, "host_memory", lambda: needed - 1)
    with pytest.raises(OutOfMemoryError, match=r"float32, and this machine has 0\.0 GB .*bfloat16") as caught:
        check_memory(folder, torch.float32, CPU)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    check_memory(folder, torch.bfloat16, CPU)
    monkeypatch.setattr(memory, "host_memory", lambda: None)
    check_memory(folder, torch.float32, CPU)


def test_a_gpu_is_judged_by_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"mem_get_info": (3_000_000_000, 80_000_000_000), "memory_reserved": 2_000_000_000}
    values |= {"memory_allocated": 1_500_000_000, "get_device_name": "Card", "is_available": True}
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    check_fits(3_500_000_000, GPU, "the weights")
    with pytest.raises(
        OutOfMemoryError, match=r"the weights take 16\.1 GB in bfloat16, and Card has 3\.5 GB free of 80"
    ):
        check_fits(16_100_000_000, GPU, "the weights", torch.bfloat16)


def test_other_devices_are_not_judged() -> None:
    check_fits(1 << 60, torch.device("meta"), "the weights")
    if not torch.cuda.is_available():
        check_fits(1 << 60, GPU, "the weights")


def test_memory_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    group = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_CGROUP_LIMIT", group)
    whole = host_memory()
    assert whole is None if os.name == "nt" else whole > 100_000_000
    for text, expected in (("max\n", whole), ("123456789\n", 123_456_789)):
        group.write_text(text)
        assert host_memory() == (None if whole is None else expected)
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert host_memory() is None
