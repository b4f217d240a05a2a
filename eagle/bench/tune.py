"""`eagle bench tune`: the small-M linear's candidates under the clock, for a model's products, on this GPU.

Two rounds a size (`linear_candidates`): every tile and split of K once, then the neighbours of the best. Candidates are
compiled by several threads ahead of their timing. Each must give the right product before its time counts. A product
with the norm that follows it is a size of its own. Never part of a run: a table is written, which `linear_config.choose`
loads.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from eagle.bench.bandwidth import measure_ceilings
from eagle.bench.kernel_cases import LINEAR_PARTS, LINEAR_ROWS, ModelShape
from eagle.bench.kernel_ops.layers import EPS, norm_reference
from eagle.bench.kernel_ops.linear import product_reference, random_linear
from eagle.bench.kernel_ops.trial import BOUNDS, nbytes, relative_error
from eagle.bench.kernels import FAILURES, first_line
from eagle.bench.linear_candidates import neighbours, tiles
from eagle.bench.timing import sets_beyond_cache, time_graph
from eagle.model.triton_kernels.linear import linear, linear_add_rms_norm
from eagle.model.triton_kernels.linear_config import LinearConfig, device_traits
from eagle.model.triton_kernels.quantize import quantize_weight

WORTH = 0.98
"""The rule's choice stays unless another takes less than this part of its time: a table should not record noise."""

WAKE_SECONDS = 0.03
"""Work before the first timing: the clocks fall while the compilers are waited for."""

FINALISTS = 3
NORM_AFTER = ("o", "down")
"""Products that the residual and a norm follow, and are fused with."""

PLAIN_ONLY = "lm_head"
"""The target's head, which stays as it is where layers and draft are quantised."""


@dataclass(frozen=True)
class Size:
    """One product to tune."""

    n: int
    k: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    norm_after: bool = False
    """Whether the residual and a norm follow, as in `linear_add_rms_norm`."""
    label: str = field(default="", compare=False)

    @property
    def names(self) -> tuple[str, str]:
        return str(self.dtype).removeprefix("torch."), str(self.weight_dtype).removeprefix("torch.")


@dataclass
class Tuned:
    """What was found for a size; microseconds."""

    size: Size
    config: LinearConfig
    us: float
    rule_us: float
    blas_us: float
    floor_us: float
    tried: int
    failed: dict[LinearConfig, str] = field(default_factory=dict)
    """Candidates without a time, and why."""

    def entry(self) -> dict[str, Any]:
        """The table's entry."""
        dtype, weight_dtype = self.size.names
        config = asdict(self.config)
        del config["block_m"]  # `linear_config.tall` chooses it by the number of rows
        return {
            "n": self.size.n,
            "k": self.size.k,
            "dtype": dtype,
            "weight_dtype": weight_dtype,
            "norm_after": self.size.norm_after,
            "config": config,
            "us": round(self.us, 2),
            "rule_us": round(self.rule_us, 2),
            "blas_us": round(self.blas_us, 2),
            "floor_us": round(self.floor_us, 2),
            "rows": LINEAR_ROWS,
            "tried": self.tried,
            "for": self.size.label,
        }


def products(model: ModelShape) -> dict[str, tuple[int, int]]:
    """(N, K) of the target's products, and of those of its EAGLE-3 head that differ: two and three hidden states wide."""
    found = {part: model.linear(part) for part in LINEAR_PARTS}
    found["draft_qkv"] = (found["qkv"][0], 2 * model.hidden)
    found["draft_fc"] = (model.hidden, 3 * model.hidden)
    return found


def sizes_of(models: Iterable[ModelShape], dtypes: Iterable[torch.dtype]) -> list[Size]:
    """The products of the models in that order, each size once: plain weights, and one-byte ones in the layers."""
    found: dict[Size, None] = {}
    models, dtypes = list(models), list(dtypes)
    for dtype in dtypes:
        one_byte = () if dtype == torch.float32 else (torch.int8, torch.float8_e4m3fn)
        for weight_dtype in (dtype, *one_byte):
            for model in models:
                for part, (n, k) in products(model).items():
                    if weight_dtype == dtype or part != PLAIN_ONLY:
                        found.setdefault(Size(n, k, dtype, weight_dtype, label=f"{model.name} {part}"))
                    if part in NORM_AFTER:
                        found.setdefault(Size(n, k, dtype, weight_dtype, True, f"{model.name} {part}, norm after"))
    return list(found)


def second_round(
    times: dict[LinearConfig, float], around: Callable[[LinearConfig], list[LinearConfig]]
) -> list[LinearConfig]:
    """What has not been timed around the best of the first round."""
    best = sorted(times, key=times.__getitem__)[:FINALISTS]
    return list(dict.fromkeys(other for config in best for other in around(config) if other not in times))


@dataclass(frozen=True)
class Product:
    """Inputs of a size, and what its launcher gives for a weight and a configuration."""

    size: Size
    x: torch.Tensor
    scale: torch.Tensor | None
    residual: torch.Tensor
    gain: torch.Tensor

    def run(self, weight: torch.Tensor, config: LinearConfig) -> torch.Tensor:
        """[rows, N]."""
        if self.size.norm_after:
            rest = {"scale": self.scale, "config": config}
            return linear_add_rms_norm(self.x, weight, self.residual, self.gain, EPS, **rest)[0]
        return linear(self.x, weight, scale=self.scale, config=config)

    def reference(self, weight: torch.Tensor) -> torch.Tensor:
        """The same in float64."""
        total = product_reference(self.x, weight, self.scale)
        return norm_reference(total + self.residual.double(), self.gain) if self.size.norm_after else total


def tune_size(size: Size, device: torch.device, read_gb_s: float, *, jobs: int, deadline: float | None) -> Tuned:
    """Time the candidates of one size on a CUDA device. deadline: time.monotonic() at which to stop with what there is.

    Raises RuntimeError where the rule's own choice fails.
    """
    traits = device_traits(device)
    kind = (size.dtype, size.weight_dtype, traits)
    found = tiles(size.n, size.k, *kind)
    x, plain = random_linear(size.n, size.k, LINEAR_ROWS, size.dtype, device)
    weights, scale, dense = _weights(size, plain, device)
    residual = torch.randn(LINEAR_ROWS, size.n, dtype=size.dtype, device=device)
    gain = torch.rand(size.n, dtype=size.dtype, device=device) + 0.5
    product = Product(size, x, scale, residual, gain)
    reference = product.reference(weights[0])
    traffic = nbytes(x, weights[0]) + LINEAR_ROWS * size.n * x.element_size()
    times: dict[LinearConfig, float] = {}
    failed: dict[LinearConfig, str] = {}

    def compile_only(config: LinearConfig) -> None:
        try:
            product.run(weights[0], config)
        except FAILURES as error:
            failed[config] = first_line(error)

    def measure(some: Sequence[LinearConfig]) -> None:
        for config in some[:1]:
            compile_only(config)  # alone: what the first launch sets up, threads then only read
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(compile_only, some[1:]))
        _wake(lambda: torch.mm(x, dense[0].T))
        for config in some:
            if deadline is not None and time.monotonic() > deadline and times:
                return
            if config not in failed:
                _measure_one(config)

    def _measure_one(config: LinearConfig) -> None:
        try:
            error = relative_error(product.run(weights[0], config), reference)
            if error >= BOUNDS[size.dtype]:
                failed[config] = f"relative error {error:.2e}"
                return
            calls = [lambda w=w: product.run(w, config) for w in weights]
            times[config] = time_graph(calls).median
        except FAILURES as error:
            failed[config] = first_line(error)

    measure(found)
    if deadline is None or time.monotonic() < deadline:
        measure(second_round(times, lambda config: neighbours(config, *kind)))
    rule = found[0]
    if rule not in times:
        raise RuntimeError(f"the rule's choice {rule} fails for {size.label}: {failed.get(rule)}")
    best = min(times, key=times.__getitem__)
    if times[best] > WORTH * times[rule]:
        best = rule
    blas = time_graph([lambda w=w: F.linear(x, w) for w in dense]).median
    floor = traffic / read_gb_s * 1e-3
    return Tuned(size, best, times[best], times[rule], blas, floor, len(times), failed)


def tune_sizes(
    sizes: Sequence[Size],
    device: torch.device,
    *,
    seconds: float | None,
    jobs: int,
    told: Callable[[Tuned | Size, str], None],
) -> tuple[list[Tuned], list[Size]]:
    """Tune sizes until they or the ``seconds`` are over. told: with each result, or a size and why it has none.

    → the results, and the sizes that were not reached.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    read_gb_s = measure_ceilings(device, set()).read_gb_s
    done: list[Tuned] = []
    for index, size in enumerate(sizes):
        if deadline is not None and time.monotonic() > deadline:
            return done, list(sizes[index:])
        try:
            done.append(tune_size(size, device, read_gb_s, jobs=jobs, deadline=deadline))
            told(done[-1], "")
        except FAILURES as error:
            told(size, first_line(error))
    return done, []


def write_table(results: Sequence[Tuned], path: Path, origin: dict[str, Any]) -> None:
    """Write results as JSON, over the same sizes of an earlier table of the same device, beside its others."""
    entries: dict[tuple[Any, ...], dict[str, Any]] = {}
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier.get("device") == origin["device"]:
            entries = {_entry_key(entry): entry for entry in earlier["linear"]}
    entries |= {_entry_key(result.entry()): result.entry() for result in results}
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"device": origin["device"], "provenance": origin, "linear": list(entries.values())}
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def _entry_key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry["n"], entry["k"], entry["dtype"], entry["weight_dtype"], entry["norm_after"]


def _wake(work: Callable[[], Any]) -> None:
    until = time.monotonic() + WAKE_SECONDS
    while time.monotonic() < until:
        for _ in range(8):
            work()
        torch.cuda.synchronize()


def _weights(
    size: Size, plain: torch.Tensor, device: torch.device
) -> tuple[list[torch.Tensor], torch.Tensor | None, list[torch.Tensor]]:
    """Equal weights beyond the cache together, their scale, and the library's counterparts in the wide dtype."""
    values, scale = (plain, None) if size.weight_dtype == size.dtype else quantize_weight(plain, size.weight_dtype)
    count, _ = sets_beyond_cache(nbytes(values), nbytes(plain), device)
    weights = [values, *(values.clone() for _ in range(count - 1))]
    if scale is None:
        return weights, None, weights
    count, _ = sets_beyond_cache(nbytes(plain), nbytes(plain), device)
    return weights, scale, [plain, *(plain.clone() for _ in range(count - 1))]
