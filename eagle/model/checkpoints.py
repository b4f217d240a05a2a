"""Draft checkpoints of every format → one canonical, validated state; and heads made from nothing.

Canonical names: ``fc.weight`` (``fc.bias``), ``layers.{i}.…`` with Llama's names and, in EAGLE-3's first layer, a
``hidden_norm``; ``norm.weight``, ``lm_head.weight``, ``embed_tokens.weight``, ``fc_norm.{i}.weight``,
``input_norm.weight``, ``d2t`` (int64 offsets: target_id = draft_id + d2t[draft_id]; present when and only when the head
has a vocabulary of its own). Where ``embed_tokens`` or ``lm_head`` is absent the target's rows serve.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from eagle.errors import CheckpointError
from eagle.model.checkpoint_checks import check_config, check_d2t, check_t2d, check_tensors, expected_shapes
from eagle.model.checkpoint_files import read_config, read_tensors, write_checkpoint
from eagle.model.checkpoint_formats import (
    AUX_IDS,
    EAGLE3,
    OWN,
    Draft,
    default_aux_layers,
    identify,
    resolve_config,
)
from eagle.model.draft_config import DraftConfig, TargetSpec


@dataclass
class DraftState:
    """A draft head: its configuration, its tensors by canonical name (on the CPU, in their stored dtypes), the tool
    that wrote it, and a readable line for each convention that was resolved."""

    config: DraftConfig
    tensors: dict[str, torch.Tensor]
    producer: str = OWN
    notes: list[str] = field(default_factory=list)


def load_draft(
    folder: str | Path,
    target: TargetSpec,
    *,
    use_eagle3: bool | None = None,
    target_rms_eps: float | None = None,
) -> DraftState:
    """Read the draft head in ``folder``, whatever tool wrote it, and check that it fits ``target``.

    Args:
        folder: holds ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin`` (whole or sharded).
        target: the sizes the head must fit.
        use_eagle3: what the caller believes the head to be; None takes it as it is.
        target_rms_eps: serves where the configuration states no ``rms_norm_eps``.

    Raises:
        ModelNotFoundError: no such folder, or it lacks its configuration or weights.
        CheckpointError: damaged or unsafe files, or a head that contradicts itself, ``use_eagle3`` or the target.
    """
    where = f"draft {folder}"
    config = read_config(folder)
    draft = identify(config, read_tensors(folder), where)
    if use_eagle3 is not None and use_eagle3 != (draft.kind == "eagle3"):
        found, wanted = ("EAGLE-3", False) if draft.kind == "eagle3" else ("EAGLE-1/2", True)
        raise CheckpointError(
            f"{where} is an {found} head, but use_eagle3={wanted} was given: pass use_eagle3={not wanted}"
        )
    canonical = resolve_config(draft, target, target_rms_eps)
    check_config(canonical, target, where)
    _settle_tensors(draft, canonical)
    check_tensors(canonical, draft.tensors, target, where)
    for name in ("lm_head", "embed_tokens"):
        if f"{name}.weight" not in draft.tensors:
            draft.notes.append(f"{name} not stored: the target's rows serve")
    return DraftState(canonical, draft.tensors, draft.producer, draft.notes)


def save_draft(state: DraftState, folder: str | Path) -> None:
    """Write ``state`` in SafeAILab's format, as ``config.json`` and ``model.safetensors``; load_draft gives it back.

    SGLang and vLLM read the result too: each finds the feature layers under its own key and in its own convention.

    Raises:
        CheckpointError: the tensors are not those of the configuration.
    """
    config, tensors = state.config, dict(state.tensors)
    made_for = TargetSpec(config.target_hidden_size, config.vocab_size, max(config.aux_layers, default=0))
    check_config(config, made_for, "the draft state")
    check_tensors(config, tensors, made_for, "the draft state")
    if "d2t" in tensors:
        mask = torch.zeros(config.vocab_size, dtype=torch.bool)
        mask[tensors["d2t"] + torch.arange(config.draft_vocab_size)] = True
        tensors["t2d"] = mask
    if config.kind == "eagle3":
        tensors = {
            "midlayer." + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name: tensor
            for name, tensor in tensors.items()
        }
    write_checkpoint(folder, _stored_config(state), tensors)


def default_draft_config(
    target: TargetSpec,
    *,
    kind: Literal["eagle1", "eagle3"] = "eagle3",
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    intermediate_size: int | None = None,
    hidden_size: int | None = None,
    draft_vocab_size: int | None = None,
    **fields: Any,
) -> DraftConfig:
    """The configuration of a head for ``target``: its width and vocabulary, EAGLE-3's usual feature layers.

    ``fields`` are any others of :class:`DraftConfig` (``rope_theta``, ``aux_layers``, …).

    Raises:
        CheckpointError: the sizes contradict each other or the target.
    """
    hidden = hidden_size or target.hidden_size
    fields.setdefault("aux_layers", default_aux_layers(target.num_layers) if kind == "eagle3" else ())
    config = DraftConfig(
        kind=kind,
        hidden_size=hidden,
        intermediate_size=intermediate_size or 4 * hidden,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads or num_heads,
        head_dim=head_dim or hidden // num_heads,
        vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocab_size or target.vocab_size,
        target_hidden_size=target.hidden_size,
        **fields,
    )
    check_config(config, target, "the new draft head")
    return config


def random_draft(
    config: DraftConfig,
    *,
    seed: int = 0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> DraftState:
    """An untrained head: norms of one, biases of zero, the rest normal with standard deviation 1/sqrt(fan in).

    ``embed_tokens`` and ``lm_head`` are left to the target unless the head has its own vocabulary (then ``lm_head`` and
    ``d2t``, a random choice of target tokens in ascending order) or another width than the target (then both).

    Args:
        generator: a CPU generator, which is advanced; without one, a new one with ``seed``.
    """
    if generator is None:
        generator = torch.Generator().manual_seed(seed)
    need, optional = expected_shapes(config)
    own_vocab = config.draft_vocab_size != config.vocab_size
    if own_vocab:
        need |= {name: shape for name, shape in optional.items() if name == "lm_head.weight"}
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in need.items():
        if name == "d2t":
            chosen = torch.randperm(config.vocab_size, generator=generator)[: config.draft_vocab_size].sort().values
            tensors[name] = chosen - torch.arange(config.draft_vocab_size)
        elif name.endswith(".bias"):
            tensors[name] = torch.zeros(shape, dtype=dtype)
        elif len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=dtype)
        else:
            tensors[name] = (torch.randn(shape, generator=generator) * shape[1] ** -0.5).to(dtype)
    return DraftState(config, tensors, notes=["untrained: random weights"])


def _settle_tensors(draft: Draft, config: DraftConfig) -> None:
    """Drop or supply the tensors that are stored by habit rather than by need, and check the vocabulary tables."""
    tensors, where = draft.tensors, draft.where
    t2d = tensors.pop("t2d", None)
    if "d2t" in tensors:
        d2t = check_d2t(tensors.pop("d2t"), config.draft_vocab_size, config.vocab_size, where)
        if config.draft_vocab_size != config.vocab_size:
            tensors["d2t"] = d2t
            if t2d is not None:
                check_t2d(t2d, d2t, config.vocab_size, where)
        elif not d2t.any() or draft.producer == EAGLE3:  # SafeAILab reads no table in this case
            draft.notes.append("d2t dropped: the draft vocabulary is the target's")
        else:
            raise CheckpointError(
                f"{where}: d2t permutes the vocabulary at {int(d2t.count_nonzero())} of {config.vocab_size} tokens, "
                "expected no offsets where the draft vocabulary is the target's: set d2t to zero or drop it"
            )
    if config.kind == "eagle1":
        if tensors.pop("lm_head.weight", None) is not None:
            draft.notes.append("lm_head dropped: EAGLE-1/2 scores tokens by the target's")
        return
    if not config.aux_layers and "fc.weight" not in tensors and config.hidden_size == config.target_hidden_size:
        like = tensors.get("layers.0.self_attn.q_proj.weight", torch.empty(0))
        tensors["fc.weight"] = torch.eye(config.hidden_size, dtype=like.dtype)
        draft.notes.append("fc not stored: the feature enters unchanged (an identity fc)")
    embed = tensors.get("embed_tokens.weight")
    same_vocab = config.draft_vocab_size == config.vocab_size
    if embed is not None and same_vocab and "lm_head.weight" not in tensors and draft.flag("tie_word_embeddings"):
        tensors["lm_head.weight"] = embed
        draft.notes.append("lm_head tied: the head's embed_tokens scores its tokens")


def _stored_config(state: DraftState) -> dict[str, Any]:
    config = state.config
    stored: dict[str, Any] = {
        "producer": OWN,
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "num_hidden_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "max_position_embeddings": config.max_position_embeddings,
        "qkv_bias": config.qkv_bias,
        "attention_bias": config.qkv_bias,
        "tie_word_embeddings": False,
        "torch_dtype": str(state.tensors["fc.weight"].dtype).removeprefix("torch."),
    }
    if config.kind == "eagle1":
        return stored | {"architectures": ["LlamaForCausalLM"], "bias": config.fc_bias}
    own_head = "lm_head.weight" in state.tensors or config.draft_vocab_size != config.vocab_size
    stored |= {
        "architectures": ["LlamaForCausalLMEagle3"],
        # SGLang takes null as "use the target's lm_head"; vLLM as "the whole vocabulary".
        "draft_vocab_size": config.draft_vocab_size if own_head else None,
        "norm_before_residual": config.norm_before_residual,
        "norm_output": config.norm_output,
        "fc_norm": config.fc_norm,
        "norm_before_fc": config.norm_before_fc,
        "eagle_config": {"use_aux_hidden_state": bool(config.aux_layers)},
    }
    if config.aux_layers:
        stored["eagle_config"][AUX_IDS] = [i - 1 for i in config.aux_layers]  # SGLang: outputs of layers
        stored[AUX_IDS] = list(config.aux_layers)  # vLLM: inputs of layers
    if config.target_hidden_size != config.hidden_size:
        stored["target_hidden_size"] = config.target_hidden_size
    return stored
