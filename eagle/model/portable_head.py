"""A head as other engines read it: with an output matrix of its own.

A head may leave its output matrix to the target, whose rows for the draft vocabulary then serve. SGLang and vLLM take
either the head's own matrix or all of the target's, so that such a head would guess other tokens there than here.
"""

from __future__ import annotations

from pathlib import Path

import torch

from eagle.errors import CheckpointError
from eagle.model.checkpoint_files import read_config, read_tensors
from eagle.model.checkpoints import load_draft, save_draft
from eagle.model.draft_config import TargetSpec

OUTPUTS = ("lm_head.weight", "model.embed_tokens.weight")
"""Where a target's output matrix is; where it is tied, files hold the embedding alone."""


def portable_head(target: Path, head: Path, folder: Path) -> tuple[Path, str]:
    """The head's folder, or ``folder`` with a copy that has the matrix, and the kind of the head, "eagle1" or "eagle3".

    Raises CheckpointError as `load_draft` does, also where the target's weights hold no output matrix.
    """
    config = read_config(target)
    text = config.get("text_config") or config
    spec = TargetSpec(text["hidden_size"], text["vocab_size"], text["num_hidden_layers"])
    state = load_draft(head, spec, target_rms_eps=text.get("rms_norm_eps"))
    if state.config.kind != "eagle3" or "lm_head.weight" in state.tensors or "d2t" not in state.tensors:
        return head, state.config.kind
    weights = read_tensors(target)
    output = next((weights[name] for name in OUTPUTS if name in weights), None)
    if output is None:
        raise CheckpointError(f"the weights in {target} hold none of {', '.join(OUTPUTS)}; expected an output matrix")
    rows = torch.arange(state.config.draft_vocab_size) + state.tensors["d2t"]
    state.tensors["lm_head.weight"] = output[rows].to(state.tensors["fc.weight"].dtype)
    save_draft(state, folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes 0600, and others may read the copy
    return folder, state.config.kind
