"""Triton attention: against loops in float64, and bit for bit against decoding one row at a time."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import relative_error

from eagle.model.ops import mask_words
from eagle.model.tree import ancestor_words
from eagle.model.triton_kernels.attention import DECODE_ROWS, attention
from eagle.model.triton_kernels.attention_config import DecodeConfig, decode_config
from eagle.model.triton_kernels.attention_decode import _copied

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
NO_BFLOAT16 = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no bfloat16")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


def paths(parents: torch.Tensor | None, rows: int) -> list[list[int]]:
    """For each row, the new rows it sees in path order; without parents, all up to its own."""
    if parents is None:
        return [list(range(t + 1)) for t in range(rows)]
    found: list[list[int]] = []
    for t, parent in enumerate(parents.tolist()):
        found.append([*(found[parent] if parent >= 0 else []), t])
    return found


def by_loops(q, k, v, kv_len, parents, scale, window, softcap) -> torch.Tensor:
    q, k, v = (t.double().cpu() for t in (q, k, v))
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b, start in enumerate(kv_len.tolist()):
        for t, path in enumerate(paths(None if parents is None else parents[b], q.shape[1])):
            slots = [*range(start), *(start + node for node in path)][-(window or 10**9) :]
            for h in range(q.shape[2]):
                kv = h * k.shape[1] // q.shape[2]
                scores = k[b, kv, slots] @ q[b, t, h] * scale
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                out[b, t, h] = scores.softmax(0) @ v[b, kv, slots]
    return out


def random_parents(batch: int, nodes: int, deep: bool = False) -> torch.Tensor:
    low = (lambda node: max(0, node - 2)) if deep else (lambda node: 0)
    rows = [[-1, *(int(torch.randint(low(n), n, ())) for n in range(1, nodes))] for _ in range(batch)]
    return torch.tensor(rows)


def new_case(batch, rows, heads, kv_heads, size, slots, dtype, kv_len, v_size=None):
    """q, and caches that are slices of larger ones and NaN wherever nobody may look."""
    q = torch.randn(batch, heads, rows, size, dtype=dtype, device=DEVICE).transpose(1, 2)
    caches = []
    for width in (size, v_size or size):
        cache = torch.randn(batch, kv_heads, slots + 7, width, dtype=dtype, device=DEVICE)
        for b, start in enumerate(kv_len.tolist()):
            cache[b, :, start + rows :] = float("nan")
        caches.append(cache[:, :, :slots])
    return q, *caches


def check(dtype, batch, rows, heads, kv_heads, size, slots, kv_len, tree, window=None, softcap=None, v_size=None):
    q, k, v = new_case(batch, rows, heads, kv_heads, size, slots, dtype, kv_len, v_size)
    parents = random_parents(batch, rows) if tree else None
    words = ancestor_words(parents, rows).to(DEVICE) if tree else None
    out = attention(q, k, v, kv_len.to(DEVICE), words, scale=size**-0.5, window=window, softcap=softcap)
    assert out.shape == (*q.shape[:3], v.shape[-1])
    assert out.dtype == dtype
    wanted = by_loops(q, k, v, kv_len, parents, size**-0.5, window, softcap)
    assert relative_error(out.cpu(), wanted) < BOUNDS[dtype]


@pytest.mark.parametrize(
    ("dtype", "window", "softcap"),
    [
        (torch.float32, None, None),
        (torch.float32, 40, 5.0),
        (torch.float16, None, None),
        (torch.float16, 6, None),
        pytest.param(torch.bfloat16, None, 5.0, marks=NO_BFLOAT16),
    ],
    ids=str,
)
@pytest.mark.parametrize(("counts", "tree"), [((1, 5), False), ((37,), False), ((6,), True)])
def test_attention(
    counts: tuple[int, ...], tree: bool, window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    for rows in counts:
        check(dtype, 2, rows, 6, 2, 24, 150, torch.tensor([9, 97]), tree, window, softcap, v_size=40)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(3, 3, 80), (5, 1, 32), (5, 1, 256), (18, 1, 96), (3, 3, 256), (18, 1, 5)]
)
def test_head_sizes_and_groups(heads: int, kv_heads: int, size: int) -> None:
    check(torch.float16, 1, 2, heads, kv_heads, size, 61, torch.tensor([35]), True)


def test_many_nodes_and_words() -> None:
    rows = 256 if DEVICE == "cuda" else 67
    check(torch.float32, 1, rows, 1, 1, 16, rows + 45, torch.tensor([45]), True)


HEADS = st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 40))
"""kv heads, group, head size; a GPU compiles for each, so there are few there."""
GPU_HEADS = [(1, 1, 16), (3, 3, 48)]
"""Whole multiples of 16: of other sizes' strides some are divisible by 16, and each such pattern is compiled apart."""


@settings(max_examples=10 if DEVICE == "cpu" else 100, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_random_shapes(data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    kv_heads, group, size = data.draw(HEADS if DEVICE == "cpu" else st.sampled_from(GPU_HEADS))
    batch, rows = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 6))
    kv_len = torch.tensor([data.draw(st.integers(0, 200)) for _ in range(batch)])
    window = data.draw(st.none() | st.integers(1, 60))
    slots = int(kv_len.max()) + rows + data.draw(st.integers(0, 30))
    tree = data.draw(st.booleans())
    check(torch.float32, batch, rows, group * kv_heads, kv_heads, size, slots, kv_len, tree, window)


@pytest.fixture
def ordered_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's dots are numpy's, whose library sums in an order that varies with the row's place in the tile;
    a tensor core's does not. So sum along K in order."""

    def matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return (a[:, :, None].astype(dtype) * b[None].astype(dtype)).sum(1)

    if DEVICE == "cpu":
        monkeypatch.setattr(np, "matmul", matmul)


TOGETHER = 16
"""Rows that are decoded one by one in the same call: each has a cache of its own, of up to 40 MB."""


def assert_equal_to_one_row_at_a_time(q, k, v, start: int, parents: torch.Tensor, slots: int, **options) -> None:
    """Every node of the first sequence's tree against T = 1 over a cache in which its path lies contiguously."""
    nodes = len(parents)
    device = {"device": q.device}
    words = ancestor_words(parents[None], nodes).to(q.device)
    length = torch.tensor([start], **device)
    together = attention(q, k, v, length, words, **options)[0]
    assert together.isfinite().all()
    routes = paths(parents, nodes)
    longest = slots + max(map(len, routes))
    for begin in range(0, nodes, TOGETHER):
        some = routes[begin : begin + TOGETHER]
        k_alone, v_alone = (t.new_full((len(some), t.shape[1], longest, t.shape[3]), float("nan")) for t in (k, v))
        for t, path in enumerate(some):
            index = torch.tensor([*range(start), *(start + node for node in path)], **device)
            k_alone[t, :, : len(index)] = k[0, :, index]
            v_alone[t, :, : len(index)] = v[0, :, index]
        lengths = torch.tensor([start + len(path) - 1 for path in some], **device)
        one = torch.ones(len(some), 1, 1, dtype=torch.int64, **device)
        rows = slice(begin, begin + len(some))
        for words in (one, None)[: 2 if DEVICE == "cuda" or start % 4 == 0 else 1]:
            alone = attention(q[0][rows, None], k_alone, v_alone, lengths, words, **options)[:, 0]
            assert torch.equal(together[rows], alone)


def tree_case(start: int, nodes: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype, deep: bool):
    q, k, v = new_case(1, nodes, heads, kv_heads, size, start + nodes, dtype, torch.tensor([start]))
    return q, k, v, start, random_parents(1, nodes, deep)[0], start + nodes


@pytest.mark.usefixtures("ordered_dots")
@pytest.mark.parametrize("first", [108] if DEVICE == "cuda" else [108, 116, 124, 132])
def test_every_alignment_of_the_length_gives_the_bits_of_plain_decoding(first: int) -> None:
    """In the interpreter, blocks of 16 in 4 splits: lengths 108 … 139 meet all alignments and two rounds of splits."""
    for start in range(first, 140 if DEVICE == "cuda" else first + 8):
        dtype = torch.float16 if start % 2 else torch.float32
        assert_equal_to_one_row_at_a_time(*tree_case(start, 3, 3, 1, 16, dtype, deep=True), scale=0.3)


@pytest.mark.usefixtures("ordered_dots")
@pytest.mark.parametrize(("window", "softcap"), [(9, None), (40, 5.0)])
def test_window_and_cap_give_the_bits_of_plain_decoding(window: int, softcap: float | None) -> None:
    for start in (0, 7, 250):
        case = tree_case(start, 6, 4, 2, 16, torch.float16, deep=True)
        assert_equal_to_one_row_at_a_time(*case, scale=0.3, window=window, softcap=softcap)


@pytest.mark.usefixtures("ordered_dots")
def test_paths_longer_than_a_block_give_the_bits_of_plain_decoding() -> None:
    q, k, v = new_case(1, 20, 2, 1, 16, 140, torch.float32, torch.tensor([110]))
    chain = torch.arange(-1, 19)
    assert_equal_to_one_row_at_a_time(q, k, v, 110, chain, 140, scale=0.3)


@pytest.mark.usefixtures("ordered_dots")
@pytest.mark.parametrize("starts", [(0, 31, 50)] if DEVICE == "cuda" else [(0,), (31,), (50,)])
def test_deep_paths_give_the_bits_of_plain_decoding(starts: tuple[int, ...]) -> None:
    """Most paths have more nodes than a row reads by itself (16 on a GPU, 4 in the interpreter), and few are chains."""
    nodes = 60 if DEVICE == "cuda" else 21
    for start in starts:
        case = tree_case(start, nodes, 2, 1, 16, torch.float32, deep=True)
        assert_equal_to_one_row_at_a_time(*case, scale=0.3)
        check(torch.float32, 1, nodes, 2, 1, 16, start + nodes, torch.tensor([start]), tree=True)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "dtype"),
    [
        *((32, 8, 128, dtype) for dtype in BOUNDS),
        *((9, 3, 64, dtype) for dtype in BOUNDS),
        (8, 4, 256, torch.float32),
        (8, 4, 256, torch.bfloat16),
        (32, 32, 80, torch.float16),
        (71, 1, 64, torch.bfloat16),
        (64, 8, 128, torch.bfloat16),
    ],
    ids=str,
)
def test_gpu_trees_give_the_bits_of_plain_decoding(heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> None:
    for start in [*range(448, 577), 2047, 2048, 2049, 4000, 9001]:
        nodes = 7 if start % 4 == 0 else 60
        case = tree_case(start, nodes, heads, kv_heads, size, dtype, deep=start % 3 == 0)
        window = 300 if start % 5 == 0 and heads == 9 else None  # each choice compiles four more kernels
        assert_equal_to_one_row_at_a_time(*case, scale=size**-0.5, window=window)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "dtype"),
    [
        (32, 8, 128, torch.float32),
        (32, 8, 128, torch.bfloat16),
        (9, 3, 64, torch.float16),
        (8, 4, 256, torch.float32),
        (8, 4, 256, torch.bfloat16),
        (14, 2, 96, torch.float16),
    ],
    ids=str,
)
def test_gpu_sizes(heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> None:
    from eagle.model.attention import attention as plain

    kv_len = torch.tensor([0, 1023, 9001])
    for rows, tree in ((1, True), (60, True), (256, True), (9, False), (700, False)):
        q, k, v = new_case(3, rows, heads, kv_heads, size, 9800, dtype, kv_len)
        words = ancestor_words(random_parents(3, rows), rows).to(DEVICE) if tree else None
        out = attention(q, k, v, kv_len.to(DEVICE), words, scale=size**-0.5)
        wide = (t.nan_to_num().double() for t in (q, k, v))
        wanted = plain(*wide, kv_len.to(DEVICE), words, scale=size**-0.5)
        assert relative_error(out, wanted) < BOUNDS[dtype], f"{rows} rows"


@pytest.mark.gpu
@needs_gpu
def test_gpu_graph_stays_valid_as_the_cache_grows() -> None:
    q, k, v = new_case(2, 60, 32, 8, 128, 5000, torch.bfloat16, torch.tensor([4900, 4900]))
    kv_len = torch.tensor([10, 700], device=DEVICE)
    words = ancestor_words(random_parents(2, 60), 60).to(DEVICE)
    attention(q, k, v, kv_len, words, scale=0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, kv_len, words, scale=0.1)
    for lengths in ([10, 700], [4800, 63]):
        kv_len.copy_(torch.tensor(lengths))
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, attention(q, k, v, kv_len, words, scale=0.1))


@pytest.mark.usefixtures("ordered_dots")
def test_rows_and_the_cache_bound_do_not_change_a_row() -> None:
    kv_len = torch.tensor([70, 33])
    q, k, v = (t.clone() for t in new_case(2, 6, 4, 2, 16, 120, torch.float16, kv_len))
    kv_len = kv_len.to(DEVICE)
    words = ancestor_words(random_parents(2, 6), 6).to(DEVICE)
    out = attention(q, k, v, kv_len, words, scale=0.2)
    tight = attention(q[1:, 2:4], k[1:, :, :40], v[1:, :, :40], kv_len[1:], words[1:, 2:4].contiguous(), scale=0.2)
    assert torch.equal(tight, out[1:, 2:4])
    assert torch.equal(attention(q, k, v, kv_len, scale=0.2)[:, :3], attention(q[:, :3], k, v, kv_len, scale=0.2))


@pytest.mark.usefixtures("ordered_dots")
def test_rows_of_prefill_do_not_depend_on_the_chunk() -> None:
    rows = DECODE_ROWS + 5
    kv_len = torch.tensor([21], device=DEVICE)
    q, k, v = new_case(1, rows + 9, 2, 1, 16, 80, torch.float16, kv_len)
    out = attention(q, k, v, kv_len, scale=0.2)
    assert torch.equal(attention(q[:, :rows], k, v, kv_len, scale=0.2), out[:, :rows])


def test_what_fixes_the_bits_does_not_follow_the_rows() -> None:
    def configs(size: int, dtype: torch.dtype, capability: tuple[int, int]) -> list[DecodeConfig]:
        return [decode_config(4 * rows, 4, 8, size, size, dtype, capability) for rows in (1, 16, 17, 60, 256)]

    for dtype in BOUNDS:
        for size in (64, 80, 128, 256):
            free = {"prefix_m": 0, "prefix_warps": 0, "stages": 0}
            assert len({replace(c, **free) for c in configs(size, dtype, (9, 0))}) == 1
            for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):
                assert len(set(configs(size, dtype, capability))) == 1


def test_which_caches_are_rows_of_one_matrix() -> None:
    whole = torch.empty(2, 3, 40, 64, dtype=torch.float16)
    assert all(map(_copied, (whole, whole[:, :, :17], whole[1:, 1:])))
    assert not _copied(whole.transpose(1, 2))
    assert not _copied(torch.empty(2, 3, 40, 65, dtype=torch.float16)[..., :64])
    assert not _copied(torch.empty(2, 3, 40 * 64 + 8, dtype=torch.float16)[..., 8:].unflatten(-1, (40, 64)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [64, 128])
def test_gpu_copied_blocks_give_the_bits_of_loaded_ones(size: int, dtype: torch.dtype) -> None:
    lengths = torch.tensor([700, 391], device=DEVICE)
    q, k, v = new_case(2, 60, 8, 2, size, 900, dtype, lengths)
    words = ancestor_words(random_parents(2, 60), 60).to(DEVICE)
    odd = []
    for cache in (k, v):
        odd.append(torch.full((*cache.shape[:3], size + 2), float("nan"), dtype=cache.dtype, device=DEVICE)[..., :size])
        odd[-1].copy_(cache)
    assert (_copied(k[:, :, :850]), _copied(odd[0])) == (True, False)
    for rows in (60, 1):
        mask = words[:, :rows].contiguous()
        wanted = attention(q[:, :rows], *odd, lengths, mask, scale=0.1)
        assert torch.equal(attention(q[:, :rows], k[:, :, :850], v[:, :, :850], lengths, mask, scale=0.1), wanted)


def good_arguments() -> dict:
    words = torch.ones(2, 1, mask_words(1), dtype=torch.int64, device=DEVICE)
    q, k, v = new_case(2, 1, 4, 2, 16, 20, torch.float32, torch.tensor([3, 5]))
    kv_len = torch.tensor([3, 5], device=DEVICE)
    return {"q": q, "k_cache": k, "v_cache": v, "kv_len": kv_len, "tree_words": words, "scale": 0.3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": lambda a: a["q"][:, :, :3]}, "multiple of kv heads"),
        ({"q": lambda a: a["q"].double()}, "one dtype"),
        ({"q": lambda a: a["q"][:1]}, "q's B"),
        ({"q": lambda a: a["q"][..., :8]}, "head size"),
        ({"k_cache": lambda a: a["k_cache"].half()}, "one dtype"),
        ({"v_cache": lambda a: a["v_cache"].mT.contiguous().mT}, "stride 1"),
        ({"kv_len": lambda a: a["kv_len"].int()}, "int64"),
        ({"kv_len": lambda a: a["kv_len"][:1]}, "kv_len must be"),
        ({"tree_words": lambda a: a["tree_words"][:, :0]}, "tree_words must be"),
        ({"window": lambda a: 0}, "window"),
        ({"softcap": lambda a: -1.0}, "softcap"),
        ({"scale": lambda a: 0.0}, "scale"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, message: str) -> None:
    arguments = good_arguments()
    arguments |= {name: make(arguments) for name, make in change.items()}
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


def test_more_rows_than_mask_bits() -> None:
    arguments = good_arguments()
    arguments["q"] = arguments["q"].expand(2, 65, 4, 16)
    arguments["tree_words"] = torch.ones(2, 65, 1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="64 a word"):
        attention(**arguments)


def test_debug_mode_reads_the_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAGLE_DEBUG", "1")
    arguments = good_arguments()
    attention(**arguments)
    for change in ({"kv_len": arguments["kv_len"] + 16}, {"tree_words": arguments["tree_words"] << 17}):
        with pytest.raises(ValueError, match="20 slots"):
            attention(**(arguments | change))


def test_opcheck() -> None:
    arguments = good_arguments()
    torch.library.opcheck(torch.ops.eagle.attention.default, (), arguments)
