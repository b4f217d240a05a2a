"""Does a canonical draft state fit its own configuration and its target? Every refusal names both numbers."""

from __future__ import annotations

import torch
from transformers.activations import ACT2FN

from eagle.errors import CheckpointError
from eagle.model.checkpoint_files import listed, shown
from eagle.model.draft_config import DraftConfig, TargetSpec

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Shapes = dict[str, tuple[int, ...]]


def expected_shapes(config: DraftConfig) -> tuple[Shapes, Shapes]:
    """Names and shapes of the canonical tensors: those a head must have, and those its target can stand in for."""
    hidden, inner, target = config.hidden_size, config.intermediate_size, config.target_hidden_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    eagle3 = config.kind == "eagle3"
    need: Shapes = {"fc.weight": (hidden, config.feature_size if eagle3 else hidden + target)}
    if config.fc_bias:
        need["fc.bias"] = (hidden,)
    for i in range(config.num_layers):
        layer = f"layers.{i}."
        first = i == 0
        width = 2 * hidden if eagle3 and first else hidden
        if eagle3 and first:
            need[layer + "hidden_norm.weight"] = (hidden,)
        if eagle3 or not first:
            need[layer + "input_layernorm.weight"] = (hidden,)
        need[layer + "post_attention_layernorm.weight"] = (hidden,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            need[f"{layer}self_attn.{name}_proj.weight"] = (rows, width)
            if config.qkv_bias:
                need[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        need[layer + "self_attn.o_proj.weight"] = (hidden, q)
        need[layer + "mlp.gate_proj.weight"] = (inner, hidden)
        need[layer + "mlp.up_proj.weight"] = (inner, hidden)
        need[layer + "mlp.down_proj.weight"] = (hidden, inner)
    optional: Shapes = {"embed_tokens.weight": (config.vocab_size, hidden)}
    if eagle3:
        need["norm.weight"] = (hidden,)
        optional["lm_head.weight"] = (config.draft_vocab_size, hidden)
        if config.fc_norm:
            need |= {f"fc_norm.{i}.weight": (target,) for i in range(max(1, len(config.aux_layers)))}
        if config.norm_before_fc:
            need["input_norm.weight"] = (config.feature_size,)
        if config.draft_vocab_size != config.vocab_size:
            need["d2t"] = (config.draft_vocab_size,)
        if hidden != target:  # the target's own rows are too wide or too narrow to serve
            need, optional = need | optional, {}
    return need, optional


def check_config(config: DraftConfig, target: TargetSpec, where: str) -> None:
    """Raise CheckpointError where ``config`` contradicts itself or ``target``; ``where`` begins the message."""
    if config.target_hidden_size != target.hidden_size:
        raise CheckpointError(
            f"{where} was made for a target of hidden size {config.target_hidden_size}, "
            f"but this target's is {target.hidden_size}: use the head made for this target"
        )
    if config.kind == "eagle1" and config.hidden_size != target.hidden_size:
        raise CheckpointError(
            f"{where} has hidden size {config.hidden_size}, but an EAGLE-1/2 head must have its target's, "
            f"{target.hidden_size}: use the head made for this target"
        )
    if config.vocab_size != target.vocab_size:
        raise CheckpointError(
            f"{where} was made for a vocabulary of {config.vocab_size} tokens, "
            f"but this target's is {target.vocab_size}: use the head made for this target"
        )
    if config.draft_vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{where} has a draft vocabulary of {config.draft_vocab_size} tokens, more than the {config.vocab_size} "
            "of its target: the configuration is wrong"
        )
    for layer in config.aux_layers:
        if not 0 <= layer <= target.num_layers:
            raise CheckpointError(
                f"{where} reads the input of target layer {layer} (all: {list(config.aux_layers)}), but this target "
                f"has {target.num_layers} layers: use the head made for this target"
            )
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(
            f"{where} has {config.num_heads} query heads over {config.num_kv_heads} key heads: "
            "expected a whole number for each"
        )
    if config.head_dim % 2:
        raise CheckpointError(f"{where} has head_dim {config.head_dim}: rotary embedding needs an even number")
    if config.hidden_act not in ACT2FN:
        raise CheckpointError(
            f"{where} has hidden_act {shown(config.hidden_act)}: expected one that transformers knows"
        )


def check_tensors(config: DraftConfig, tensors: dict[str, torch.Tensor], target: TargetSpec, where: str) -> None:
    """Raise CheckpointError unless ``tensors`` are exactly ``config``'s: names, shapes, dtypes and the d2t table."""
    if config.num_layers > len(tensors):  # before a table is made for a number that a stranger chose
        raise CheckpointError(f"{where} has {len(tensors)} tensors for the {config.num_layers} layers in config.json")
    need, optional = expected_shapes(config)
    fc = tensors.get("fc.weight")
    if fc is not None and fc.dim() == 2 and fc.shape[1] != need["fc.weight"][1]:
        parts = 2 if config.kind == "eagle1" else max(1, len(config.aux_layers))
        raise CheckpointError(
            f"{where}: fc.weight takes {fc.shape[1]} features, but this target gives {parts} * {target.hidden_size} = "
            f"{need['fc.weight'][1]}: the head was made for another hidden size or other feature layers"
        )
    missing = sorted(name for name in need if name not in tensors)
    unexpected = sorted(name for name in tensors if name not in need and name not in optional)
    if missing or unexpected:
        said = [f"missing tensors: {listed(missing)}"] if missing else []
        said += [f"unexpected tensors: {listed(unexpected)}"] if unexpected else []
        raise CheckpointError(f"{where} does not hold an {config.kind} head: {'; '.join(said)}{_hint(config, missing)}")
    for name, shape in (need | optional).items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(tensors[name].shape)}, but {list(shape)} follows from its "
                "configuration and target: config.json and weights do not belong together"
            )
    for name, tensor in tensors.items():
        if name != "d2t" and tensor.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{where}: {name} has dtype {_name(tensor.dtype)}, expected one of "
                f"{', '.join(_name(d) for d in FLOAT_DTYPES)}: quantised heads are not supported, save it in bfloat16"
            )


def check_d2t(d2t: torch.Tensor, draft_vocab_size: int, vocab_size: int, where: str) -> torch.Tensor:
    """``d2t`` as int64 offsets [draft_vocab_size]: each draft_id + d2t[draft_id] is checked to be a target id, once."""
    if d2t.dtype not in (torch.int64, torch.int32, torch.int16) or d2t.dim() != 1:
        raise CheckpointError(
            f"{where}: d2t is {_name(d2t.dtype)} {list(d2t.shape)}, expected int64 [{draft_vocab_size}]"
        )
    if len(d2t) != draft_vocab_size:
        raise CheckpointError(
            f"{where}: d2t has {len(d2t)} entries, but the draft vocabulary has {draft_vocab_size}: "
            "config.json and weights do not belong together"
        )
    d2t = d2t.to(torch.int64)
    ids = torch.arange(len(d2t))
    # Compared before adding, so that offsets near the ends of int64 cannot wrap around into range.
    outside = ((d2t < -ids) | (d2t >= vocab_size - ids)).nonzero().flatten()
    if len(outside):
        draft = int(outside[0])
        raise CheckpointError(
            f"{where}: d2t is out of range at {len(outside)} of {len(d2t)} tokens, first draft token {draft} + offset "
            f"{int(d2t[draft])} = {draft + int(d2t[draft])}, expected a token of the target in [0, {vocab_size})"
        )
    values, counts = (d2t + ids).unique(return_counts=True)
    if len(values) < len(d2t):
        raise CheckpointError(
            f"{where}: d2t maps {len(d2t)} draft tokens to {len(values)} target tokens, target token "
            f"{int(values[counts > 1][0])} more than once: expected each at most once"
        )
    return d2t


def check_t2d(t2d: torch.Tensor, d2t: torch.Tensor, vocab_size: int, where: str) -> None:
    """``t2d`` [vocab_size] must be true at exactly the target tokens that ``d2t`` (checked) reaches."""
    if tuple(t2d.shape) != (vocab_size,):
        raise CheckpointError(f"{where}: t2d has shape {list(t2d.shape)}, expected [{vocab_size}]")
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    mask[d2t + torch.arange(len(d2t))] = True
    differing = int((t2d.to(torch.bool) != mask).sum())
    if differing:
        raise CheckpointError(
            f"{where}: t2d marks {int(t2d.to(torch.bool).sum())} target tokens, d2t reaches {len(d2t)}, and they "
            f"differ at {differing} tokens: the vocabulary tables contradict each other"
        )


def _hint(config: DraftConfig, missing: list[str]) -> str:
    if "fc.bias" in missing:
        return ' (fc has a bias unless config.json says "bias": false)'
    if config.hidden_size != config.target_hidden_size and {"embed_tokens.weight", "lm_head.weight"} & set(missing):
        return (
            f" (the target's own cannot serve: it is {config.target_hidden_size} wide, the head {config.hidden_size})"
        )
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
