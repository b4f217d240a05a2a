"""Which tool wrote a draft checkpoint, and what its configuration and tensor names mean in canonical terms.

Checked against the tools' public code (SafeAILab/EAGLE, sgl-project/SpecForge, vllm-project/speculators,
Tencent/AngelSlim, NVIDIA/Model-Optimizer, NVIDIA-NeMo/Automodel) and against how vLLM and SGLang read their files.
Where tools disagree on a convention, it is resolved by producer and a note says how.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from eagle.errors import CheckpointError
from eagle.model.checkpoint_files import listed, shown
from eagle.model.draft_config import DraftConfig, TargetSpec

OWN = "eagle-triton-kernels"
EAGLE1 = "SafeAILab EAGLE-1/2"
EAGLE3 = "SafeAILab EAGLE-3"
SPECFORGE, SPECULATORS, ANGELSLIM, MODELOPT, NEMO = "SpecForge", "speculators", "AngelSlim", "ModelOpt", "NeMo"

AUX_IDS = "eagle_aux_hidden_state_layer_ids"
ROPE_TYPES = ("linear", "dynamic", "llama3", "yarn", "longrope")
# Left in checkpoints by their trainers, and never read when drafting.
_BYPRODUCTS = ("rotary_emb.inv_freq", "verifier_lm_head.weight")
_QUANTISED = ("weight_scale", "weight_scale_inv", "weight_packed", "qweight", "qzeros", "input_scale", "absmax")


@dataclass
class Draft:
    """A checkpoint on its way to canonical form. ``fields`` is the flat configuration, ``where`` begins messages."""

    producer: str
    kind: Literal["eagle1", "eagle3"]
    fields: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    where: str
    notes: list[str] = field(default_factory=list)

    @property
    def by_safeailab(self) -> bool:
        return self.producer in (EAGLE1, EAGLE3)

    @property
    def eagle_config(self) -> dict[str, Any]:
        return _table(self.fields, "eagle_config", self.where)

    def flag(self, name: str, default: bool = False) -> bool:
        """A switch, which tools write at the top or inside ``eagle_config``."""
        value = self.eagle_config.get(name, self.fields.get(name))
        if value is not None and not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {name} in config.json is {shown(value)}, expected true or false")
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        """A positive whole number; ``default`` serves where it is absent or null."""
        value = self.fields.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            given = "is missing from config.json" if value is None else f"in config.json is {shown(value)}"
            raise CheckpointError(f"{self.where}: {name} {given}, expected a positive whole number")
        return value

    def number(self, name: str, default: float) -> float:
        return _number(self.fields.get(name), name, default, self.where)


def identify(config: dict[str, Any], stored: dict[str, torch.Tensor], where: str) -> Draft:
    """Name the producer and kind, flatten the configuration, and give the tensors their canonical names.

    Raises:
        CheckpointError: not an EAGLE head, a kind of head that is not supported, or a quantised one.
    """
    architectures = str(config.get("architectures") or "")
    nested = "transformer_layer_config" in config or "speculators_model_type" in config
    fields = {**config, **_table(config, "transformer_layer_config", where)} if nested else config
    if quantised := [key for key in ("quantization_config", "compression_config") if fields.get(key)]:
        raise CheckpointError(f"{where} is quantised ({quantised[0]} in config.json): use the head in bfloat16")
    if scaled := sorted(name for name in stored if name.endswith(_QUANTISED)):
        raise CheckpointError(f"{where} is quantised ({listed(scaled, 3)}): use the head in bfloat16")
    model_type = config.get("speculators_model_type", "eagle3")
    if nested and model_type != "eagle3":
        raise CheckpointError(f"{where} is a speculators head of type {shown(model_type)}: only eagle3 is supported")

    tensors = _canonical_names(stored, where)
    q_proj = tensors.get("layers.0.self_attn.q_proj.weight")
    hidden = fields.get("hidden_size")
    twice_as_wide = q_proj is not None and q_proj.dim() == 2 and [q_proj.shape[1] / 2] == [hidden]
    midlayer = any(name.removeprefix("model.").startswith("midlayer.") for name in stored)
    eagle3 = (
        nested
        or midlayer
        or twice_as_wide
        or "eagle3" in architectures.lower()
        or "d2t" in tensors
        or "layers.0.hidden_norm.weight" in tensors
    )
    if not eagle3 and "fc.weight" not in tensors:
        raise CheckpointError(f"{where} is not an EAGLE head: it has no fc.weight, but {listed(sorted(stored), 3)}")

    if config.get("producer") == OWN:
        producer = OWN
    elif nested:
        producer = SPECULATORS
    elif not eagle3:
        producer = EAGLE1
    elif "Eagle3LlamaForCausalLM" in architectures or "target_model_type" in config:
        producer = ANGELSLIM
    elif any(name.startswith(("model.layers.", "model.fc.")) for name in stored):
        producer = NEMO
    elif not midlayer:
        producer = MODELOPT
    else:
        producer = SPECFORGE if _beyond_safeailab(fields, tensors) else EAGLE3
    draft = Draft(producer, "eagle3" if eagle3 else "eagle1", fields, tensors, where)
    draft.notes.append(f"{producer} checkpoint, {'EAGLE-3' if eagle3 else 'EAGLE-1/2'} head")
    return draft


def resolve_config(draft: Draft, target: TargetSpec, target_rms_eps: float | None) -> DraftConfig:
    """The canonical configuration; every choice that a file leaves open or that tools make differently becomes a note.

    Raises:
        CheckpointError: a value is missing or of the wrong type.
    """
    hidden, heads = draft.size("hidden_size"), draft.size("num_attention_heads")
    eagle3 = draft.kind == "eagle3"
    theta, scaling = _rope(draft)
    eps = draft.number("rms_norm_eps", target_rms_eps or 1e-6)
    if draft.fields.get("rms_norm_eps") is None:
        draft.notes.append(f"rms_norm_eps not stated: {'the target' if target_rms_eps else 'the usual'} {eps:g} serves")
    vocab = draft.size("vocab_size")
    if not eagle3 and draft.fields.get("bias") is None:
        draft.notes.append("bias not stated: fc has one, as in SafeAILab's code")
    return DraftConfig(
        kind=draft.kind,
        hidden_size=hidden,
        intermediate_size=draft.size("intermediate_size"),
        num_heads=heads,
        num_kv_heads=draft.size("num_key_value_heads", heads),
        head_dim=_head_dim(draft, hidden, heads),
        vocab_size=vocab,
        draft_vocab_size=_draft_vocab_size(draft, vocab) if eagle3 else vocab,
        target_hidden_size=draft.size("target_hidden_size", target.hidden_size if eagle3 else hidden),
        num_layers=draft.size("num_hidden_layers", 1),
        rms_norm_eps=eps,
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=draft.size("max_position_embeddings", 2048),
        hidden_act="silu" if (act := draft.fields.get("hidden_act") or "silu") == "swish" else str(act),
        aux_layers=resolve_aux_layers(draft, target) if eagle3 else (),
        # For EAGLE-1/2 the reference decides by the key alone; EAGLE-3's tools share no key, so the file decides.
        fc_bias="fc.bias" in draft.tensors if eagle3 else draft.flag("bias", True),
        qkv_bias=_qkv_bias(draft),
        norm_before_residual=_switch(draft, "norm_before_residual", "the residual is hidden_norm(h), not h"),
        norm_output=_switch(draft, "norm_output", "the next draft step is fed the hidden state after the final norm"),
        fc_norm=_switch(draft, "fc_norm", "one norm for each target feature before fc"),
        norm_before_fc=_switch(draft, "norm_before_fc", "one norm over all target features before fc"),
    )


def default_aux_layers(num_layers: int) -> tuple[int, int, int]:
    """EAGLE-3's features: the inputs of layers 2, L//2 and L-3, kept inside targets of fewer than three layers."""
    return (min(2, num_layers), num_layers // 2, max(0, num_layers - 3))


def resolve_aux_layers(draft: Draft, target: TargetSpec) -> tuple[int, ...]:
    """The target layers whose *inputs* feed ``fc``, from a list that counts layer outputs or layer inputs.

    vLLM reads the list at the top of the configuration as inputs, and so do speculators' files; SGLang and the
    trainers around it read the list inside ``eagle_config`` as outputs. Every tool's default means the same tensors, so
    a list that is exactly the other convention's default has been carried over from there unchanged.
    """
    given, inner = draft.fields.get(AUX_IDS), draft.eagle_config.get(AUX_IDS)
    if not draft.flag("use_aux_hidden_state", True):
        draft.notes.append("use_aux_hidden_state is false: the feature is the last hidden state after the final norm")
        return ()
    ids = inner if inner is not None else given
    default = default_aux_layers(target.num_layers)
    if ids is None or ids == []:
        draft.notes.append(f"aux layers not stated: the inputs of layers {listed([str(i) for i in default])}")
        return default
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(
            f"{draft.where}: {AUX_IDS} in config.json is {shown(ids)}, expected a list of layer numbers"
        )
    as_inputs = draft.producer == SPECULATORS
    why = f"{draft.producer} counts layer {'inputs' if as_inputs else 'outputs'}"
    if as_inputs and ids == [i - 1 for i in default]:
        as_inputs, why = False, "the default list of tools that count layer outputs"
    elif not as_inputs and inner is None and ids == list(default):
        as_inputs, why = True, "the default list of tools that count layer inputs"
    layers = tuple(i if as_inputs else i + 1 for i in ids)
    draft.notes.append(
        f"aux layers {ids} read as layer {'inputs' if as_inputs else 'outputs'} ({why}) → inputs of layers "
        + listed([str(i) for i in layers])
    )
    return layers


def _canonical_names(stored: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        short = name.removeprefix("model.")
        if short.startswith("midlayer."):
            short = "layers.0." + short.removeprefix("midlayer.")
        if short.endswith(_BYPRODUCTS):
            continue
        if short in tensors:
            raise CheckpointError(
                f"{where} stores {listed([short])} twice, once as {listed([name])}: remove one of them"
            )
        tensors[short] = tensor
    return tensors


def _beyond_safeailab(fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bool:
    """Whether a ``midlayer.`` file has what SafeAILab's EAGLE-3 code neither writes nor reads: SpecForge made it."""
    if fields.get("eagle_config") or any(fields.get(key) for key in ("fc_norm", "norm_output", AUX_IDS)):
        return True
    if "embed_tokens.weight" in tensors and fields.get("target_hidden_size") is None:
        return True
    return _stored_head_dim(fields, tensors) not in (None, _ratio(fields))


def _stored_head_dim(fields: dict[str, Any], tensors: dict[str, torch.Tensor]) -> int | None:
    """``head_dim`` of the configuration where the query projection has that many rows a head."""
    q_proj, heads, head_dim = (
        tensors.get("layers.0.self_attn.q_proj.weight"),
        fields.get("num_attention_heads"),
        fields.get("head_dim"),
    )
    if q_proj is None or not isinstance(heads, int) or not isinstance(head_dim, int):
        return None
    return head_dim if q_proj.shape[0] == heads * head_dim else None


def _ratio(fields: dict[str, Any]) -> int | None:
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else None


def _head_dim(draft: Draft, hidden: int, heads: int) -> int:
    ratio = hidden // heads
    stated = draft.size("head_dim", max(ratio, 1))
    if not draft.by_safeailab:
        if draft.fields.get("head_dim") is None and hidden % heads:
            raise CheckpointError(
                f"{draft.where}: hidden_size {hidden} is no multiple of {heads} heads, and no head_dim says otherwise"
            )
        return stated
    if hidden % heads:
        raise CheckpointError(
            f"{draft.where}: hidden_size {hidden} is no multiple of {heads} heads, as its format needs"
        )
    if stated != ratio:
        draft.notes.append(f"head_dim {stated} ignored: SafeAILab's is hidden_size / heads = {ratio}")
    return ratio


def _draft_vocab_size(draft: Draft, vocab: int) -> int:
    if draft.fields.get("draft_vocab_size") is not None:
        return draft.size("draft_vocab_size")
    d2t = draft.tensors.get("d2t")
    size = vocab if d2t is None or d2t.dim() != 1 else len(d2t)
    draft.notes.append(f"draft_vocab_size not stated: {size}, {'the vocabulary' if size == vocab else 'as in d2t'}")
    return size


def _qkv_bias(draft: Draft) -> bool:
    stated = [draft.fields[key] for key in ("qkv_bias", "attention_bias") if isinstance(draft.fields.get(key), bool)]
    return any(stated) if stated else "layers.0.self_attn.q_proj.bias" in draft.tensors


def _switch(draft: Draft, name: str, meaning: str) -> bool:
    on = draft.kind == "eagle3" and draft.flag(name)
    if on:
        draft.notes.append(f"{name}: {meaning}")
    return on


def _rope(draft: Draft) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) from transformers 4's ``rope_scaling`` and ``rope_theta`` or transformers 5's
    ``rope_parameters``; scaling is None for plain RoPE, else ``rope_type``, its parameters and ``rope_theta``."""
    where = draft.where
    rope = {**_table(draft.fields, "rope_scaling", where), **_table(draft.fields, "rope_parameters", where)}
    theta = _number(rope.pop("rope_theta", None), "rope_theta", draft.number("rope_theta", 10000.0), where)
    old_name = rope.pop("type", None)
    rope_type = rope.pop("rope_type", None) or old_name or "default"
    if draft.by_safeailab:
        if rope_type != "default":
            draft.notes.append(f"RoPE scaling {shown(rope_type)} ignored: SafeAILab's draft layer uses plain RoPE")
        return theta, None
    partial = rope.pop("partial_rotary_factor", None) or draft.fields.get("partial_rotary_factor") or 1
    if rope.pop("mrope_section", None) is not None or rope_type == "mrope":
        rope_type = "default" if rope_type == "mrope" else rope_type
        draft.notes.append("multimodal RoPE sections dropped: for text they all hold the same position")
    if rope_type not in ("default", *ROPE_TYPES) or any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError(
            f"{where}: RoPE of type {shown(rope_type)} is not supported: only {', '.join(ROPE_TYPES)}"
        )
    if partial != 1:
        raise CheckpointError(f"{where}: partial_rotary_factor is {shown(partial)}: only whole heads (1) are supported")
    if rope_type == "default":
        return theta, None
    draft.notes.append(f"RoPE scaling {shown(rope_type)} applied, as the configuration states")
    return theta, {"rope_type": rope_type, **rope, "rope_theta": theta}


def _number(value: Any, name: str, default: float, where: str) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise CheckpointError(f"{where}: {name} in config.json is {shown(value)}, expected a positive number")
    return float(value)


def _table(fields: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    value = fields.get(name)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{where}: {name} in config.json is {shown(value)}, expected an object")
    return value or {}
