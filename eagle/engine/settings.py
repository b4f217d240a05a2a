"""How the steps of a model run: the choices `optimize_eagle_with_triton` makes and `restore_eagle` takes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eagle.errors import InvalidInputError

ENGINES = ("auto", "captured", "eager")
FUSED = ("auto", "on", "off")
ONE_BYTE = ("int8", "fp8")

Exact = bool | Literal["auto"]
"""What `EngineSettings.exact` may be."""


@dataclass(frozen=True)
class EngineSettings:
    """``engine``: "captured" replays a step as one CUDA graph, "eager" runs its ops one by one, "auto" captures on a
    CUDA device and says in `EaModel.kernel_report` where a model can't be. ``fused``: "on" runs a Llama-like target's
    layers and the head through the fused ops instead of module by module, "auto" does where it can. ``exact``: greedy
    output equals plain decoding's bit for bit, also by a target's own modules, whose products the kernels then compute, or
    else in passes padded to whole tiles of rows (`row_bits`); "auto" leaves out what would take more than a tenth
    longer (`exactness`): padding plain decoding and most batches of small trees, and a large target's products of more than
    256 rows in 16 bits. ``draft_dtype``: keep the head's weights in one byte a value; the output can't change, only what is
    proposed. ``target_dtype``: the same for a fused target's products, weights rounded by output channel; the output is
    then the rounded model's.
    """

    engine: str = "eager"
    fused: str = "off"
    exact: Exact = False
    draft_dtype: str | None = None
    target_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise InvalidInputError(f"engine is {self.engine!r}; expected one of {', '.join(ENGINES)}")
        if self.fused not in FUSED:
            raise InvalidInputError(f"fused is {self.fused!r}; expected one of {', '.join(FUSED)}")
        if not isinstance(self.exact, bool) and self.exact != "auto":
            raise InvalidInputError(f"exact is {self.exact!r}; expected True, False or 'auto'")
        for name, dtype in (("draft_dtype", self.draft_dtype), ("target_dtype", self.target_dtype)):
            if dtype is not None and dtype not in ONE_BYTE:
                raise InvalidInputError(f"{name} is {dtype!r}; expected None or one of {', '.join(ONE_BYTE)}")
        if self.target_dtype is not None and self.fused == "off":
            raise InvalidInputError(
                f"target_dtype is {self.target_dtype!r} and fused is 'off'; one-byte weights need the fused target: "
                "leave fused at 'auto'"
            )
