"""What one `optimize_eagle_with_triton` changed, and the way back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from eagle.engine.settings import EngineSettings
from eagle.errors import InvalidInputError

if TYPE_CHECKING:
    from eagle.model.ea_model import EaModel
    from eagle.model.triton_kernels.selection import Plan


class Switch:
    """The ops, engine settings and plan that a switch replaced. A model keeps its switches in order (`EaModel.switches`).

    Calling one puts back what stood before it, and so undoes the later ones with it; one that is undone does nothing.
    """

    def __init__(self, model: EaModel, functions: Mapping[str, Callable[..., Any]]) -> None:
        self._model = weakref.ref(model)
        self.functions = dict(functions)
        self.settings: EngineSettings = model.engine
        self.plan: Plan | None = model.kernel_plan

    def __call__(self, model: EaModel) -> None:
        """Undo. Raises InvalidInputError for another model than the one switched, and while this thread has a generation
        open; another thread's is waited for."""
        if self._model() is not model:
            raise InvalidInputError("these original methods are another model's; pass the model they came with")
        with model._session.exclusive():
            if self not in model.switches:
                return
            place = model.switches.index(self)
            if self.settings != model.engine:
                model.configure_engine(self.settings)
            ops = model.ops
            for switch in reversed(model.switches[place:]):
                ops = ops.replaced(**switch.functions)
            model.ops, model.kernel_plan = ops, self.plan
            del model.switches[place:]
