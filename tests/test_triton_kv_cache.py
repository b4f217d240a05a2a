"""Triton's append, retrieve and compact against loops, with poisoned neighbours and overlapping moves."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st

from eagle.model.triton_kernels.kv_cache import MAX_PATH, kv_append, kv_compact, kv_retrieve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16]  # bfloat16 on the GPU below; the interpreter has none
EXAMPLES = 12 if DEVICE == "cpu" else 100
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(DEVICE)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 2),
    rows=st.integers(1, 9),
    size=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
def test_append_writes_its_rows_and_nothing_else(batch: int, heads: int, rows: int, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    cache, start = numbers(batch, heads, 40, size), torch.randint(0, 33 - rows + 1, (batch,))
    cache[:, :, 33:] = float("nan")
    new = numbers(batch, rows, heads, size).transpose(1, 2)
    wanted = cache.clone()
    for b in range(batch):
        for t in range(rows):
            wanted[b, :, start[b] + t] = new[b, :, t]
    kv_append(cache[:, :, :33], new, whole(start))
    assert torch.equal(cache.nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_append_casts() -> None:
    cache, new = numbers(1, 1, 4, 8, dtype=torch.float16), numbers(1, 1, 2, 8)
    kv_append(cache, new, whole(torch.tensor([1])))
    assert torch.equal(cache[:, :, 1:3], new.half())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_retrieve(dtype: torch.dtype) -> None:
    cache, indices = numbers(3, 2, 19, 80, dtype=dtype), torch.randint(0, 17, (3, 37))
    cache[:, :, 17:] = float("nan")
    out = kv_retrieve(cache, whole(indices))
    for b in range(3):
        for n in range(37):
            assert torch.equal(out[b, :, n], cache[b, :, indices[b, n]])


def check_compact(layers, batch, heads, path, size, v_size, dtype) -> None:
    nodes, slots = path + 14, path + 51
    k, v = (
        numbers(layers, batch, heads, slots, size, dtype=dtype),
        numbers(layers, batch, heads, slots, v_size, dtype=dtype),
    )
    kv_len, count = torch.randint(0, slots - nodes, (batch,)), torch.randint(1, path + 1, (batch,))
    chosen = torch.tensor([[0, *sorted(torch.randperm(nodes - 1)[: path - 1].add(1).tolist())] for _ in range(batch)])
    given_nodes = chosen.masked_fill(torch.arange(path) >= count[:, None], 10**9)  # undefined entries are not read
    wanted = []
    for cache in (k, v):
        wanted.append(cache.clone())
        for b in range(batch):
            for i in range(count[b].item()):
                wanted[-1][:, b, :, kv_len[b] + i] = cache[:, b, :, kv_len[b] + chosen[b, i]]
    kv_compact(k, v, whole(given_nodes), whole(kv_len), whole(count))
    assert torch.equal(k, wanted[0])
    assert torch.equal(v, wanted[1])


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    batch=st.integers(1, 2),
    path=st.integers(1, 9),
    size=st.integers(1, 40),
    v_size=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_compact_moves_the_path_down(batch: int, path: int, size: int, v_size: int, seed: int) -> None:
    torch.manual_seed(seed)
    check_compact(2, batch, 2, path, size, v_size, torch.float32)


def test_compact_of_long_paths_over_several_columns() -> None:
    check_compact(1, 1, 2, MAX_PATH, 80, 96, torch.float16)


def test_compact_of_a_shifted_chain_overlaps_safely() -> None:
    """Every row's source is the next row's target."""
    k, v = numbers(2, 1, 1, 20, 8), numbers(2, 1, 1, 20, 8)
    wanted = k.clone()
    wanted[:, :, :, 4:11] = k[:, :, :, [3, 5, 6, 7, 8, 9, 10]][:, :, :, [1, 2, 3, 4, 5, 6, 6]]
    wanted[:, :, :, 10] = k[:, :, :, 11]
    wanted[:, :, :, 4:10] = k[:, :, :, 5:11]
    nodes = whole(torch.tensor([[0, 2, 3, 4, 5, 6, 7, 8]]))
    kv_compact(k, v, nodes, whole(torch.tensor([3])), whole(torch.tensor([8])))
    assert torch.equal(k, wanted)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", [1, 9, 16, 33, MAX_PATH])
def test_gpu_compact(path: int, dtype: torch.dtype) -> None:
    for _ in range(20):
        check_compact(32, 2, 8, path, 128, 128, dtype)


@pytest.mark.gpu
@needs_gpu
def test_gpu_append_and_retrieve_in_a_cache_beyond_32_bit_offsets() -> None:
    cache = torch.zeros(1, 9, 2**20, 256, dtype=torch.bfloat16, device=DEVICE)
    new, start = numbers(1, 9, 3, 256, dtype=torch.bfloat16), whole(torch.tensor([2**20 - 3]))
    kv_append(cache, new, start)
    assert torch.equal(kv_retrieve(cache, start[:, None] + torch.arange(3, device=DEVICE)), new)


def test_what_does_not_fit_is_named() -> None:
    cache, new, start = numbers(2, 3, 9, 8), numbers(2, 3, 4, 8), whole(torch.tensor([0, 1]))
    nodes, k = whole(torch.zeros(2, 3, dtype=torch.int64)), numbers(1, 2, 3, 9, 8)
    for call in (
        lambda: kv_append(cache, new[:, :2], start),
        lambda: kv_append(cache, new, start.int()),
        lambda: kv_append(cache, new.mT.contiguous().mT, start),
        lambda: kv_append(cache.double(), new, start),
        lambda: kv_retrieve(cache, nodes[:1]),
        lambda: kv_retrieve(cache, nodes.float()),
        lambda: kv_compact(k, k[:, :1], nodes, start, start),
        lambda: kv_compact(k, k, nodes[:1], start, start),
        lambda: kv_compact(k, k, nodes.repeat(1, 30), start, start),
    ):
        with pytest.raises(ValueError, match=r"; got \w+ "):
            call()


def test_debug_mode_reads_the_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAGLE_DEBUG", "1")
    cache, new, count = numbers(1, 1, 9, 8), numbers(1, 1, 4, 8), whole(torch.tensor([2]))
    kv_append(cache, new, whole(torch.tensor([5])))
    with pytest.raises(ValueError, match="9 slots"):
        kv_append(cache, new, whole(torch.tensor([6])))
    with pytest.raises(ValueError, match="9 slots"):
        kv_retrieve(cache, whole(torch.tensor([[9]])))
    k = cache[None].clone()
    kv_compact(k, k.clone(), whole(torch.tensor([[0, 3, 99]])), whole(torch.tensor([5])), count)
    with pytest.raises(ValueError, match="9 slots"):
        kv_compact(k, k.clone(), whole(torch.tensor([[0, 4, 99]])), whole(torch.tensor([5])), count)
    with pytest.raises(ValueError, match="9 slots"):
        kv_compact(k, k.clone(), whole(torch.tensor([[0, 3, 99]])), whole(torch.tensor([5])), -count)


def test_slots_outside_the_cache_are_neither_read_nor_written() -> None:
    memory = numbers(1, 1, 20, 8)
    before, cache = memory.clone(), memory[:, :, 5:14]
    kv_append(cache, numbers(1, 1, 4, 8), whole(torch.tensor([9])))
    kv_append(cache, numbers(1, 1, 4, 8), whole(torch.tensor([-4])))
    assert torch.equal(memory, before)
    assert kv_retrieve(cache, whole(torch.tensor([[-1, 9]]))).eq(0).all()


def test_opcheck() -> None:
    start, nodes = whole(torch.tensor([1, 2])), whole(torch.tensor([[0, 2], [0, 3]]))
    k, v = numbers(2, 2, 1, 9, 8), numbers(2, 2, 1, 9, 6)
    torch.library.opcheck(torch.ops.eagle.kv_append.default, (numbers(2, 1, 9, 8), numbers(2, 1, 3, 8), start))
    torch.library.opcheck(torch.ops.eagle.kv_retrieve.default, (numbers(2, 1, 9, 8), nodes))
    torch.library.opcheck(torch.ops.eagle.kv_compact.default, (k, v, nodes, start, start))
