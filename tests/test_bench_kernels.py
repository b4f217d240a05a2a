"""`eagle bench kernels` and `tune`: the cases, the checks that can fail, the timed path on a clock of our own, the files."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from eagle.bench import kernels, report_files, timing, tune
from eagle.bench.bandwidth import BLOCK, Ceilings, measure_ceilings, read_sum
from eagle.bench.kernel_cases import MODELS, PARTS, PREFIXES, Case, ModelShape, all_cases, select_cases
from eagle.bench.kernel_ops.table import TRIALS
from eagle.bench.kernel_ops.trial import BOUNDS, TORCH, Mismatch
from eagle.bench.kernels import GREEN, NOT_REACHED, RED, SKIPPED, run_cases
from eagle.bench.linear_candidates import neighbours, tiles
from eagle.cli import main
from eagle.commands.bench_kernels import row_line, tuned_line
from eagle.errors import InvalidInputError
from eagle.model.triton_kernels import linear_config, tuned_table
from eagle.model.triton_kernels.linear_config import DeviceTraits, LinearConfig, choose, fits, rule
from eagle.model.triton_kernels.selection import OPS as SEAM

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
H100 = DeviceTraits("NVIDIA H100 80GB HBM3", (9, 0), 132, 227 << 10)
ROOT = Path(__file__).resolve().parents[1]
CEILINGS = Ceilings(3000.0, {"float32": 50.0, "float16": 700.0, "bfloat16": 700.0})


def shrunken(op: str, model: int = 0, dtype: torch.dtype = torch.float16) -> Case:
    return Case(op, MODELS[model], dtype, (PARTS[op] or ("",))[0]).shrunk()


def tensors(out: object) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, (tuple, list)):
        return [t for part in out for t in tensors(part)]
    return [] if out is None else tensors(list(vars(out).values()))


def test_cases_cover_what_is_promised():
    cases = list(all_cases())
    assert set(TRIALS) == set(PARTS) == {case.op for case in cases}
    assert {case.model.name for case in cases} == {model.name for model in MODELS}
    tree = [
        c for c in cases if c.op == "attention_tree" and c.model.name == "Llama-3.1-8B" and c.dtype == torch.float16
    ]
    assert sorted(case.prefix for case in tree) == list(PREFIXES)
    assert len(cases) == len(set(cases)) == len({(c.op, c.label, c.dtype) for c in cases})
    sizes = {part: MODELS[0].linear(part) for part in ("qkv", "o", "gate_up", "down", "lm_head", "draft_lm_head")}
    assert list(sizes.values()) == [
        (6144, 4096),
        (4096, 4096),
        (28672, 4096),
        (4096, 14336),
        (128256, 4096),
        (32000, 4096),
    ]


@pytest.mark.parametrize("op", SEAM)
def test_every_op_of_a_step_is_measured(op):
    assert any(part == op or part.startswith(f"{op}_") for part in PARTS)


def test_selection_and_order():
    everything = select_cases()
    quick = select_cases(quick=True)
    assert everything[: len(quick)] == quick  # whatever is cut off, the quick ones come first
    assert {case.dtype for case in quick} == {torch.bfloat16}
    assert len(everything) == len(list(all_cases()))
    assert {case.op for case in select_cases(ops=["attention"])} == {op for op in PARTS if op.startswith("attention_")}
    one = select_cases(ops=["attention_tree"], models=["smollm2-135m"], dtypes=["float32"])
    assert [case.prefix for case in one] == list(PREFIXES)
    assert {case.dtype for case in select_cases(interpreted=True)} == {torch.float16, torch.float32}
    for wrong in ({"ops": ["attn"]}, {"models": ["8B"]}, {"dtypes": ["fp16"]}):
        with pytest.raises(InvalidInputError, match="expected one of"):
            select_cases(**wrong)
    with pytest.raises(InvalidInputError, match=r"expected one of attention, draft, evaluate, kv, attention_tree"):
        select_cases(ops=["attn"])


OPS = [op for op in PARTS if op != "linear_fp8" or DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (8, 9)]


@pytest.mark.parametrize("op", OPS)
def test_kernels_and_rivals_pass_the_same_check(op):
    """The kernel with poison around its inputs; the rivals without, as they are timed."""
    model = int(torch.randint(len(MODELS), ()))
    trial = TRIALS[op](shrunken(op, model), DEVICE, poisoned=True)
    with kernels.poisoned_memory():
        out = trial.run()
    assert trial.check(out) < BOUNDS[torch.float16]
    assert trial.traffic > 0
    assert trial.size > 0
    writes_in_place = op in ("kv_append", "kv_compact", "rope_append", "grow_tree")
    trial = TRIALS[op](shrunken(op, model), DEVICE, poisoned=writes_in_place)
    assert next(iter(trial.rivals)) == TORCH
    for name, rival in trial.rivals.items():
        out = rival()
        assert trial.check(heads_last(out, op, MODELS[model]) if name == "sdpa" else out) < BOUNDS[torch.float16]


def heads_last(out: torch.Tensor, op: str, model: ModelShape) -> torch.Tensor:
    """SDPA's own layout as [1, T, Hq, D]."""
    if op == "attention_prefill":
        return out.transpose(1, 2)
    heads, group = out.shape[1], model.heads // model.kv_heads
    return out.view(1, heads, group, -1, out.shape[-1]).permute(0, 3, 1, 2, 4).flatten(2, 3)


@pytest.mark.parametrize("op", [op for op in OPS if op not in ("kv_append", "kv_compact")])
def test_checks_can_fail(op):
    trial = TRIALS[op](shrunken(op), DEVICE, poisoned=True)
    out = trial.run()
    for tensor in tensors(out):
        if tensor.dtype != torch.bool:
            tensor[(0,) * tensor.dim()] += 90
    try:
        error = trial.check(out)
    except Mismatch:
        return
    assert error > BOUNDS[torch.float16]


@pytest.mark.parametrize("op", ["kv_append", "kv_compact"])
def test_a_kernel_that_does_nothing_is_seen(op):
    trial = TRIALS[op](shrunken(op), DEVICE, poisoned=True)
    with pytest.raises(Mismatch, match="differs"):
        trial.check(None)


def test_unwritten_memory_is_seen():
    before = torch.are_deterministic_algorithms_enabled()
    with kernels.poisoned_memory():
        assert torch.ones(3).new_empty(5).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


def fake_trials(monkeypatch, **replacements):
    for op, make in replacements.items():
        monkeypatch.setitem(kernels.TRIALS, op, make)


def failing(_case, _device, *, poisoned):
    raise RuntimeError("\nout of luck\nmore")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="for the interpreter")
def test_a_red_case_leaves_the_others_alone(monkeypatch):
    fake_trials(monkeypatch, swiglu=failing)
    cases = select_cases(ops=["swiglu", "rms_norm"], models=["SmolLM2-135M"])
    report = run_cases(cases, CPU)
    states = {(row.op, row.dtype): row.state for row in report.rows}
    assert states["swiglu", "float16"] == RED
    assert states["rms_norm", "float16"] == states["rms_norm", "float32"] == GREEN
    assert states["rms_norm", "bfloat16"] == SKIPPED
    red = next(row for row in report.rows if row.state == RED)
    assert red.reason == "RuntimeError: out of luck"
    assert red.us is None
    assert any("red: swiglu" in line and "out of luck" in line for line in report_files.summary(report))


def test_a_budget_leaves_cases_unreached(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(kernels.time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(kernels, "_run_case", lambda case, row, device, ceilings: setattr(row, "state", GREEN))
    report = run_cases(select_cases(ops=["swiglu"])[:6], CPU, seconds=2.5)
    assert [row.state for row in report.rows] == [GREEN, GREEN, *[NOT_REACHED] * 4]
    assert "4 cases were not reached: 2.5 seconds were over" in report_files.summary(report)


class FakeEvent:
    """Time stands still but for what is replayed."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at - self.at


class FakeGraph:
    """Remembers how often its calls ran while it was captured."""

    current: FakeGraph | None = None

    def __init__(self) -> None:
        self.milliseconds = 0.0

    def replay(self) -> None:
        FakeEvent.now += self.milliseconds

    def reset(self) -> None:
        pass


@contextmanager
def capture(graph: FakeGraph):
    before, start = FakeGraph.current, FakeEvent.now
    FakeGraph.current = graph
    yield
    graph.milliseconds, FakeGraph.current, FakeEvent.now = FakeEvent.now - start, before, start


@pytest.fixture
def fake_gpu(monkeypatch):
    """Enough of torch.cuda for the timed path; a call takes what it adds to FakeEvent.now."""
    stream = SimpleNamespace(wait_stream=lambda _other: None)
    fakes = {
        "Event": FakeEvent,
        "CUDAGraph": FakeGraph,
        "graph": capture,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _stream: capture(FakeGraph()),
        "synchronize": lambda: None,
        "mem_get_info": lambda _device: (1 << 40, 1 << 40),
        "get_device_properties": lambda _device: SimpleNamespace(L2_cache_size=1 << 20),
        "get_device_capability": lambda _device: (9, 0),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    FakeEvent.now = 0.0


def taking(microseconds: float):
    def call() -> None:
        FakeEvent.now += microseconds * 1e-3

    return call


def test_median_is_of_one_call(fake_gpu):
    found = timing.time_graph([taking(3.0), taking(5.0)])
    assert found.median == pytest.approx(4.0)
    assert found.repeats == timing.REPEATS
    assert found.calls % 2 == 0
    assert 200 < found.calls * found.median < timing.GRAPH_MICROSECONDS + 1
    slow = timing.time_graph([taking(90_000.0)] * 3)
    assert (slow.median, slow.calls) == (pytest.approx(90_000.0), 1)
    assert 3 <= slow.repeats < timing.REPEATS
    assert timing.time_eager([taking(7.0)]).median == pytest.approx(7.0)
    assert timing.sets_beyond_cache(1 << 20, 1 << 20, CPU) == (3, True)
    assert timing.sets_beyond_cache(100, 100, CPU) == (timing.MAX_SETS, False)
    assert timing.sets_beyond_cache(1 << 20, 1 << 38, CPU) == (1, False)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="for the interpreter")
def test_timed_rows_and_files(fake_gpu, monkeypatch, tmp_path):
    """The whole timed path with a kernel of 10 µs, PyTorch's of 20 µs, a rival that fails, and a red one."""

    def timed(case, device, *, poisoned):
        trial = TRIALS_BEFORE[case.op](case.shrunk(), CPU, poisoned=poisoned)
        if not poisoned:  # the set that is checked runs the kernel, those that are timed only let time pass
            trial.run = taking(10.0)
            trial.rivals = {TORCH: taking(20.0), "broken": lambda: torch.ones(2) @ torch.ones(3)}
        return trial

    TRIALS_BEFORE = dict(TRIALS)
    monkeypatch.setattr(kernels, "measure_ceilings", lambda device, dtypes: CEILINGS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fake_trials(monkeypatch, rms_norm=timed, attention_decode=timed, swiglu=failing)
    cases = select_cases(ops=["attention_decode", "rms_norm", "swiglu"], models=["SmolLM2-135M"], dtypes=["float16"])
    lines = []
    report = run_cases(cases, torch.device("cuda"), told=lambda _index, row: lines.append(row_line(row)))
    assert [row.state for row in report.rows] == [GREEN] * (len(cases) - 1) + [RED]
    row = report.rows[0]
    assert (row.us, row.rivals[TORCH], row.speedup) == pytest.approx((10.0, 20.0, 2.0))
    assert row.rivals["broken"].startswith("RuntimeError: ")
    assert row.share == pytest.approx(row.floor_us / 10.0)
    assert row.gb_s == pytest.approx(row.share * CEILINGS.read_gb_s, rel=0.5)
    assert "10.0 µs, torch 20.0" in lines[0]
    assert report.rows[-1].us is None

    notes = report_files.write_report(report, tmp_path, {"device": "a fake"})
    content = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    assert content["rows"][0]["speedup"] == pytest.approx(2.0)
    assert content["provenance"] == {"device": "a fake"}
    markdown = (tmp_path / "kernels.md").read_text(encoding="utf-8")
    assert "| attention_decode | SmolLM2-135M 128 | float16 |" in markdown
    assert "2.00×" in markdown
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "kernels_floor.png").stat().st_size > 5000
        assert (tmp_path / "attention_bandwidth.png").stat().st_size > 5000
    else:
        assert any("matplotlib" in line for line in notes)


def test_a_dead_device_ends_the_run(fake_gpu, monkeypatch):
    def dead() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(kernels, "measure_ceilings", lambda device, dtypes: CEILINGS)
    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    fake_trials(monkeypatch, swiglu=failing)
    report = run_cases(select_cases(ops=["swiglu"])[:3], torch.device("cuda"))
    assert [row.state for row in report.rows] == [RED, NOT_REACHED, NOT_REACHED]
    assert "the device failed in swiglu" in report.stopped


def test_kernels_are_compiled_ahead(fake_gpu, monkeypatch):
    launched = []

    def trial(case, _device, *, poisoned):
        return SimpleNamespace(run=lambda: launched.append(case))

    monkeypatch.setattr(kernels, "measure_ceilings", lambda device, dtypes: CEILINGS)
    monkeypatch.setattr(kernels, "_run_case", lambda case, row, *_: setattr(row, "reason", str(len(launched))))
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    monkeypatch.setattr(kernels, "AHEAD", 2)
    fake_trials(monkeypatch, swiglu=trial, rms_norm=failing)
    cases = select_cases(ops=["swiglu"])[:4] + select_cases(ops=["rms_norm"])[:1]
    report = run_cases(cases, torch.device("cuda"), jobs=2)
    assert [row.reason for row in report.rows] == ["2", "2", "4", "4", "4"]


def test_read_kernel_reads_everything():
    x = torch.randint(-1000, 1000, (3 * BLOCK,), dtype=torch.int32, device=DEVICE)
    out = torch.full((3,), 7, dtype=torch.int32, device=DEVICE)
    read_sum(x, out)
    assert out.tolist() == x.view(3, -1).sum(1).tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ceilings_leave_the_librarys_precision_as_it_was():
    before = torch.get_float32_matmul_precision()
    found = measure_ceilings(torch.device("cuda"), {torch.float32, torch.bfloat16})
    assert torch.get_float32_matmul_precision() == before
    assert 0 < found.tflop_s["float32"] < found.tflop_s["bfloat16"]
    assert found.read_gb_s > 0


def test_floor():
    assert CEILINGS.floor(3_000_000, 0, "float32") == pytest.approx(1.0)
    assert CEILINGS.floor(0, 700_000_000, "float16") == pytest.approx(1.0)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="for the interpreter")
def test_the_command(tmp_path, capsys, monkeypatch):
    arguments = ["bench", "kernels", "--ops", "swiglu", "--ops", "rms_norm", "--quick", "--out", str(tmp_path)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "[4/4] swiglu, SmolLM2-135M, float16: green" in out
    assert "timings skipped: no CUDA device" in out
    assert json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))["rows"][0]["state"] == GREEN
    fake_trials(monkeypatch, swiglu=failing)
    assert main(arguments) == 1
    assert "out of luck" in capsys.readouterr().out
    assert main(["bench", "kernels", "--ops", "linear_fp8", "--dtype", "float32"]) == 2
    assert main(["bench", "kernels", "--seconds", "0"]) == 2
    assert main(["bench", "tune"]) == 2
    assert "CUDA" in capsys.readouterr().err
    assert main(["bench", "tune", "--ops", "attention"]) == 2


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.int8, torch.float32])
@pytest.mark.parametrize("size", [(6144, 4096), (576, 1536), (128256, 4096), (31, 576)])
def test_candidates_fit_the_device(weight_dtype, size):
    dtype = torch.float32 if weight_dtype == torch.float32 else torch.bfloat16
    for device in (H100, DeviceTraits("small", (8, 6), 28, 101376)):
        kind = (dtype, weight_dtype, device)
        first = tiles(*size, *kind)
        assert first[0] == rule(*size, *kind)
        assert len(set(first)) == len(first) < 120
        for config in [*first, *neighbours(first[-1], *kind)]:
            assert fits(config, *kind)
            assert not (config.tma or config.prefetch) or device is H100


def test_the_second_round_goes_round_the_best():
    kind = (torch.bfloat16, torch.bfloat16, H100)
    first = tiles(6144, 4096, *kind)
    times = {config: float(i) for i, config in enumerate(first)}
    second = tune.second_round(times, lambda config: neighbours(config, *kind))
    assert second
    assert not set(second) & set(first)
    for config in second:
        changed = [sum(vars(config)[name] != vars(best)[name] for name in vars(best)) for best in first[:3]]
        assert min(changed) <= 2


def test_tune_sizes_come_once_and_in_order():
    sizes = tune.sizes_of(MODELS, [torch.bfloat16])
    assert sizes[0].label == "Llama-3.1-8B gate_up"
    assert len(set(sizes)) == len(sizes)
    assert {size.weight_dtype for size in sizes} == {torch.bfloat16, torch.int8, torch.float8_e4m3fn}
    assert {size.norm_after for size in sizes} == {False, True}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="for the interpreter")
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("norm_after", [False, True])
def test_tuning_takes_the_fastest_right_candidate(fake_gpu, monkeypatch, weight_dtype, norm_after):
    """The tuner on a clock of our own: a wrong candidate is the fastest, and must not win."""
    rule = LinearConfig(32, 32)
    best, wrong, slow = (LinearConfig(16, 32), LinearConfig(16, 32, num_stages=3), LinearConfig(64, 32))
    took = {rule: 20.0, best: 10.0, wrong: 1.0, slow: 30.0}
    real = tune.Product.run

    def timed(product, weight, config):
        taking(took[config])()
        out = real(product, weight, config)
        return out * 1.5 if config == wrong else out

    monkeypatch.setattr(tune.Product, "run", timed)
    monkeypatch.setattr(tune, "tiles", lambda *_: [rule, best, slow])
    monkeypatch.setattr(tune, "neighbours", lambda *_: [wrong, best])
    size = tune.Size(40, 64, torch.float16, weight_dtype, norm_after, "a size")
    monkeypatch.setattr(tune.F, "linear", lambda x, w: (taking(15.0)(), x @ w.T)[1])
    found = tune.tune_size(size, CPU, 3000.0, jobs=1, deadline=None)
    assert (found.config, found.us, found.rule_us, found.blas_us) == (best, *map(pytest.approx, (10.0, 20.0, 15.0)))
    assert list(found.failed) == [wrong]
    assert "2.00×" in tuned_line(found)


@pytest.fixture
def no_tables():
    """Tables are read once by a process: forget them before and after."""
    caches = (tuned_table.tuned_linears, linear_config.choose)
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


def test_a_written_table_is_chosen(tmp_path, monkeypatch, no_tables):
    config = LinearConfig(64, 128, split_k=3, num_warps=8, tma=True)
    size = tune.Size(6144, 4096, torch.bfloat16, torch.bfloat16, False, "8B qkv")
    path = tmp_path / "deep" / tuned_table.file_name(H100.name)
    tune.write_table([tune.Tuned(size, config, 20.0, 25.0, 22.0, 17.0, 30)], path, {"device": H100.name})
    other = tune.Size(4096, 4096, torch.bfloat16, torch.int8, True, "8B o")
    tune.write_table([tune.Tuned(other, config, 9.0, 9.0, 9.0, 8.0, 3)], path, {"device": H100.name})
    entries = json.loads(path.read_text(encoding="utf-8"))["linear"]
    assert [entry["us"] for entry in entries] == [20.0, 9.0]  # the second run kept the first one's

    monkeypatch.setattr(tuned_table, "FOLDER", tmp_path)
    assert choose(6144, 4096, torch.bfloat16, torch.bfloat16, H100) != config
    for where in ("own", "package"):
        for function in (tuned_table.tuned_linears, linear_config.choose):
            function.cache_clear()
        monkeypatch.setattr(tuned_table, "FOLDER", path.parent if where == "package" else tmp_path)
        monkeypatch.delenv("EAGLE_TUNED", raising=False)
        if where == "own":
            monkeypatch.setenv("EAGLE_TUNED", str(path))
        assert choose(6144, 4096, torch.bfloat16, torch.bfloat16, H100) == config
        assert (
            choose(6144, 4096, torch.bfloat16, torch.bfloat16, H100, norm_after=True) == config
        )  # no own entry: the plain
        assert choose(4096, 4096, torch.bfloat16, torch.int8, H100, norm_after=True) == config
        assert choose(4096, 4096, torch.bfloat16, torch.int8, H100) != config
        assert choose(6144, 4096, torch.float16, torch.float16, H100) == config
        family, stranger = (replace(H100, name=name) for name in ("NVIDIA H200", "NVIDIA A100-SXM4-80GB"))
        assert choose(6144, 4096, torch.bfloat16, torch.bfloat16, family) == config
        if where == "package":
            assert choose(6144, 4096, torch.bfloat16, torch.bfloat16, stranger) != config
            continue
        with pytest.raises(InvalidInputError, match="was measured on NVIDIA H100 80GB HBM3, and this is NVIDIA A100"):
            choose(6144, 4096, torch.bfloat16, torch.bfloat16, stranger)


def test_a_table_that_does_not_fit_is_refused(tmp_path, monkeypatch, no_tables):
    size = tune.Size(6144, 4096, torch.bfloat16, torch.bfloat16, False, "8B qkv")
    huge = LinearConfig(256, 256, num_stages=8)
    tune.write_table([tune.Tuned(size, huge, 9.0, 9.0, 9.0, 8.0, 3)], tmp_path / "t.json", {"device": H100.name})
    monkeypatch.setenv("EAGLE_TUNED", str(tmp_path / "t.json"))
    with pytest.raises(InvalidInputError, match="does not fit on NVIDIA H100"):
        choose(6144, 4096, torch.bfloat16, torch.bfloat16, H100)


def entry(**config):
    one = {"n": 8, "k": 8, "dtype": "float16", "weight_dtype": "int8", "norm_after": False, "config": config}
    return json.dumps({"device": H100.name, "linear": [one]})


def test_the_fields_of_a_table_are_the_configurations():
    assert set(tuned_table.FIELDS) == {field.name for field in fields(LinearConfig)} - {"block_m"}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        entry(block_n=64, block_k=64, split_k=1, wraps=4),
        entry(block_n=48, block_k=64, split_k=1),
        entry(block_n=64, block_k=64, split_k=1, num_warps="4"),
        entry(block_n=64, block_k=64, split_k=1, tma=1),
        entry(block_n=64, block_k=64),
        entry(block_n=64, block_k=64, split_k=0),
        '{"device": "NVIDIA H100 80GB HBM3", "linear": [{"n": 1}]}',
        '{"device": "NVIDIA H100 80GB HBM3", "linear": [{"n": 8, "k": 8, "dtype": "float16", "weight_dtype": "int8", '
        '"norm_after": false, '
        '"config": {"block_n": "64", "block_k": 64, "split_k": 1}}]}',
    ],
)
def test_a_bad_table_is_named(tmp_path, monkeypatch, no_tables, content):
    path = tmp_path / "table.json"
    path.write_text(content, encoding="utf-8")
    monkeypatch.setenv("EAGLE_TUNED", str(path))
    with pytest.raises(InvalidInputError, match=r"table\.json"):
        tuned_table.tuned_linears(H100.name)


def test_shipped_tables_fit_their_file_names_and_devices():
    for path in tuned_table.FOLDER.glob("*.json"):
        device = json.loads(path.read_text(encoding="utf-8"))["device"]
        assert path.name == tuned_table.file_name(device)
        for (n, k, dtype, weight_dtype, norm_after), values in tuned_table.tuned_linears(device).items():
            config = LinearConfig(**values)
            assert fits(config, dtype, weight_dtype, H100)
            traits = replace(H100, name=device)
            assert choose(n, k, dtype, weight_dtype, traits, norm_after=norm_after) == config


def test_a_device_goes_before_its_family(tmp_path, monkeypatch, no_tables):
    monkeypatch.setattr(tuned_table, "FOLDER", tmp_path)
    both, first, second = LinearConfig(64, 128), LinearConfig(32, 128), LinearConfig(128, 64)
    sizes = [tune.Size(n, 4096, torch.bfloat16, torch.bfloat16, False, "") for n in (1024, 2048)]
    for device, configs in ((H100.name, (both, first)), ("NVIDIA H200", (second,))):
        found = [tune.Tuned(size, config, 9.0, 9.0, 9.0, 8.0, 3) for size, config in zip(sizes, configs, strict=False)]
        tune.write_table(found, tmp_path / tuned_table.file_name(device), {"device": device})
    assert tuned_table.shipped("NVIDIA H200") == [H100.name, "NVIDIA H200"]
    assert tuned_table.shipped("NVIDIA GH200 480GB") == [H100.name]
    for name, expected in ((H100.name, (both, first)), ("NVIDIA H200", (second, first))):
        chosen = [choose(n, 4096, torch.bfloat16, torch.bfloat16, replace(H100, name=name)) for n in (1024, 2048)]
        assert tuple(chosen) == expected


def load_run_tests():
    spec = importlib.util.spec_from_file_location("run_tests", ROOT / "run_tests.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("tests_code", "expected", "said"),
    [(0, 3, ""), (1, 1, "a test is red"), (2, 1, "a test is red"), (4, 4, "go after --"), (5, 5, "no test was chosen")],
)
def test_detailed_report_runs_tests_first(monkeypatch, capsys, tests_code, expected, said):
    run_tests, commands = load_run_tests(), []

    def run(command, **_named):
        commands.append([str(part) for part in command])
        return SimpleNamespace(returncode=tests_code if "pytest" in command else 3 if "bench" in command else 0)

    monkeypatch.setattr(run_tests, "missing_here", list)
    monkeypatch.setattr(run_tests.subprocess, "run", run)
    assert run_tests.main(["--detailed-report", "-x", "--", "--quick"]) == expected
    tests = next(command for command in commands if "pytest" in command)
    assert tests[-1] == "-x"
    assert "tests/test_triton_linear.py" in [part.replace("\\", "/") for part in tests]
    assert "--detailed-report" not in tests
    reports = [command for command in commands if "bench" in command]
    if tests_code:
        assert reports == []
        told = capsys.readouterr().err
        assert said in told
        assert told.endswith(", so no timing is reported\n")
    else:
        assert reports == [[sys.executable, "-m", "eagle.cli", "bench", "kernels", "--quick"]]
