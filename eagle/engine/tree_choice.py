"""Which tree is fastest for a model here: measured on text, since step time and acceptance both depend on it.

A larger tree commits more tokens a step and costs more; where the two cross differs with target, head and GPU. Each
candidate generates the same short replies; the one with the most tokens a second of decoding wins. Plain decoding writes
them too, so that a speed comes with the share of replies that equal its own. The result is kept in the user's cache folder,
under everything it depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle.errors import InvalidInputError
from eagle.model.ops import TreeShape
from eagle.versions import installed_version

if TYPE_CHECKING:
    from eagle.model.ea_model import EaModel

CANDIDATES = (
    TreeShape(60, 7, 10),
    TreeShape(64, 9, 8),
    TreeShape(48, 5, 10),
    TreeShape(32, 7, 6),
    TreeShape(24, 5, 6),
    TreeShape(16, 5, 4),
    TreeShape(8, 4, 2),
    TreeShape(5, 3, 1),
)
"""From the paper's tree down to a chain of four: passes of the head (depth) cost as much as nodes do."""

NEW_TOKENS = 96
"""Of each reply measured: about twenty steps."""


@dataclass(frozen=True)
class TreeFigures:
    """One candidate's result."""

    shape: TreeShape
    tokens_per_second: float
    ms_a_step: float
    accept_length: float
    replies: int
    equal: int
    """Of the replies, those that equal plain decoding's token for token."""

    def __str__(self) -> str:
        shape = self.shape
        return (
            f"{shape.total_token},{shape.depth},{shape.top_k}: {self.tokens_per_second:.0f} tokens/s, "
            f"{self.ms_a_step:.2f} ms a step, accept length {self.accept_length:.2f}, "
            f"{self.equal} of {self.replies} replies equal to plain decoding's"
        )


def measure_trees(
    model: EaModel,
    prompts: list[list[int]],
    candidates: tuple[TreeShape, ...] = CANDIDATES,
    new_tokens: int = NEW_TOKENS,
    told: Callable[[TreeFigures], None] | None = None,
) -> list[TreeFigures]:
    """Figures of each candidate that the head's vocabulary allows, best first. The model's own tree is left as it was.

    prompts: token rows; the first one is also run unmeasured, for captures and caches. Raises InvalidInputError for none.
    """
    if not prompts:
        raise InvalidInputError("no prompts to measure trees on; pass at least one list of token ids")
    before, found = model.tree_shape, []
    try:
        plain = [_reply(model, row, new_tokens, speculative=False) for row in prompts]
        for shape in candidates:
            if shape.top_k > model.ea_layer.config.draft_vocab_size:
                continue
            model.set_tree(shape.total_token, shape.depth, shape.top_k)
            steps, seconds, lengths, equal = 0, 0.0, [], 0
            _reply(model, prompts[0], new_tokens)  # captures and caches
            for row, expected in zip(prompts, plain, strict=True):
                equal += _reply(model, row, new_tokens) == expected
                stats = model.last_stats
                steps, seconds = steps + stats.steps, seconds + stats.decode_seconds
                lengths += stats.accept_lengths
            figures = TreeFigures(
                shape,
                sum(lengths) / seconds,
                1e3 * seconds / max(1, steps),
                sum(lengths) / max(1, len(lengths)),
                len(prompts),
                equal,
            )
            found.append(figures)
            if told is not None:
                told(figures)
    finally:
        model.set_tree(before.total_token, before.depth, before.top_k)
        model.drop_captures()  # a capture for each candidate, of which one will be wanted
    return sorted(found, key=lambda figures: -figures.tokens_per_second)


def _reply(model: EaModel, prompt: list[int], new_tokens: int, *, speculative: bool = True) -> list[int]:
    """``new_tokens`` tokens after a prompt."""
    options = {"max_new_tokens": new_tokens, "eos_token_id": (), "speculative": speculative}
    return [token for (new,) in model.stream([prompt], **options) for token in new]


def choice_key(model: EaModel) -> dict[str, Any]:
    """What a measured choice depends on."""
    import torch

    import eagle

    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {torch.get_num_threads()}"
    weights = model.ea_layer.fc.weight.detach()
    head = hashlib.sha256(weights[:8].float().cpu().numpy().tobytes()).hexdigest()[:16]
    return {
        "device": name,
        "target": [str(model.base_model.config.name_or_path), *map(int, vars(model.target.spec).values())],
        "dtype": str(model.target.feature_dtype),
        "head": head,
        "engine": asdict(model.engine),
        "kernels": [f"{choice.op} {choice.when} {choice.implementation}" for choice in model.kernel_report()],
        "versions": [eagle.__version__, torch.__version__, installed_version("triton")],
    }


def remembered(folder: Path, key: dict[str, Any]) -> TreeShape | None:
    """An earlier choice under ``key``, or None. Raises OSError where there is one that can't be read."""
    path = _path(folder, key)
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return TreeShape(*(int(saved[name]) for name in ("total_token", "depth", "top_k")))
    except (ValueError, KeyError, TypeError):
        return None  # cut off or edited: measured again and overwritten


def remember(folder: Path, key: dict[str, Any], shape: TreeShape) -> None:
    """Keep a choice for the next time. Raises OSError where the folder can't be written."""
    path = _path(folder, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({**asdict(shape), "key": key}, indent=1), encoding="utf-8")
    part.replace(path)


def _path(folder: Path, key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return folder / "trees" / f"{digest}.json"
