"""How the steps of a model run: the choices `optimize_eagle_with_triton` makes and `restore_eagle` takes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eagle.errors import InvalidInputError

ENGINES = ("auto", "captured", "eager")
FUSED = ("auto", "on", "off")
DRAFT_DTYPES = ("int8", "fp8")


@dataclass(frozen=True)
class EngineSettings:
    """``engine``: "captured" replays a step as one CUDA graph, "eager" runs its ops one by one, "auto" captures on a
    CUDA device and says in `EaModel.kernel_report` where a model can't be. ``fused``: "on" runs a Llama-like target's
    layers and the head through the fused ops instead of module by module, "auto" does where it can. ``exact``: greedy
    output equals plain decoding's bit for bit, also where a library computes the matrix products. ``draft_dtype``: keep
    the head's weights in one byte a value; the output can't change, only what is proposed.
    """

    engine: str = "eager"
    fused: str = "off"
    exact: bool = False
    draft_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise InvalidInputError(f"engine is {self.engine!r}; expected one of {', '.join(ENGINES)}")
        if self.fused not in FUSED:
            raise InvalidInputError(f"fused is {self.fused!r}; expected one of {', '.join(FUSED)}")
        if self.draft_dtype is not None and self.draft_dtype not in DRAFT_DTYPES:
            raise InvalidInputError(
                f"draft_dtype is {self.draft_dtype!r}; expected None or one of {', '.join(DRAFT_DTYPES)}"
            )


class FormerEngine:
    """The settings that `optimize_eagle_with_triton` replaced. Calling it puts them back.

    Undone out of turn, an earlier switch takes the later ones' way back with it: what is gone is not put in again.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings

    def __call__(self, model: Any) -> None:
        """Apply the former settings to an `EaModel`."""
        model.configure_engine(self.settings)
        history = model.former_engines
        if self in history:
            for later in history[history.index(self) :]:
                later.settings = self.settings
            del history[history.index(self) :]
