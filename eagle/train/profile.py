"""Where a training step's time goes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch

from eagle.train.loop import Trainer


def profile(trainer: Trainer, steps: int) -> dict[str, float]:
    """Seconds a step spends in each part, the device waited for after each; the trainer is left as it was.

    The sum exceeds an ordinary step's time, as nothing overlaps.
    """
    device = trainer.target.device
    step, optimiser = trainer.step, trainer.optimiser
    weights = {name: tensor.clone() for name, tensor in step.head.state_dict().items()}
    state = copy.deepcopy(optimiser.state_dict())
    spent: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
        return result

    cursor = trainer.progress.cursor
    for index in range(steps + 1):
        if index == 1:
            spent.clear()  # the first step warms up
        batch, cursor = timed("batch", lambda c=cursor: trainer.packer.draw(c, trainer.progress.batch_tokens))
        features, hidden = timed(
            "target forward", lambda b=batch: trainer.target.features(b.tokens, b.positions, b.packing)
        )
        outputs = timed("head forward", lambda b=batch, f=features: step.outputs(b, f))
        total, *_ = timed("loss", lambda b=batch, o=outputs, h=hidden: step.score(o, b, h))
        timed("head backward", total.backward)
        timed("optimiser", lambda: trainer.update(0.5))
    step.head.load_state_dict(weights)
    optimiser.load_state_dict(state)
    return {name: seconds / steps for name, seconds in spent.items()}
