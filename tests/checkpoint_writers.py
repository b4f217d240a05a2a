"""Independent writers of each draft-checkpoint format, from a canonical state: what the tools themselves would save."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from eagle.model.checkpoints import DraftState, default_draft_config, random_draft
from eagle.model.draft_config import TargetSpec

TARGET = TargetSpec(hidden_size=24, vocab_size=53, num_layers=11)
DEFAULT = (2, 5, 8)  # inputs of layers 2, L // 2 and L - 3


def state(kind: str = "eagle3", seed: int = 0, *, embed=True, draft_vocab: int | None = 17, **fields) -> DraftState:
    """A random canonical head for TARGET whose norms and biases are random too, so that a mix-up shows."""
    fields = {"num_heads": 4, "num_kv_heads": 2, "intermediate_size": 35, **fields}
    vocab = draft_vocab if kind == "eagle3" else None
    config = default_draft_config(TARGET, kind=kind, draft_vocab_size=vocab, **fields)
    made = random_draft(config, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, tensor in made.tensors.items():
        if name != "d2t":
            made.tensors[name] = torch.randn(tensor.shape, generator=generator)
    if embed:
        made.tensors["embed_tokens.weight"] = torch.randn(53, config.hidden_size, generator=generator)
    if kind == "eagle3" and "lm_head.weight" not in made.tensors:
        made.tensors["lm_head.weight"] = torch.randn(config.draft_vocab_size, config.hidden_size, generator=generator)
    return made


def put(folder: Path, config: dict, tensors: dict, *, pickled: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


def sizes(s: DraftState) -> dict:
    c = s.config
    return {
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "num_hidden_layers": c.num_layers,
        "vocab_size": c.vocab_size,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "max_position_embeddings": c.max_position_embeddings,
        "hidden_act": "silu",
        "model_type": "llama",
    }


def with_t2d(s: DraftState) -> dict:
    tensors = dict(s.tensors)
    if "d2t" in tensors:
        t2d = [False] * s.config.vocab_size
        for draft, offset in enumerate(tensors["d2t"].tolist()):
            t2d[draft + offset] = True
        tensors["t2d"] = torch.tensor(t2d)
    return tensors


def midlayer(tensors: dict) -> dict:
    return {k.replace("layers.0.", "midlayer."): v for k, v in tensors.items()}


def drop(tensors: dict, *names: str) -> dict:
    return {k: v for k, v in tensors.items() if k not in names}


def safeailab_eagle1(s, folder, **extra):
    config = sizes(s) | {"architectures": ["LlamaForCausalLM"], "head_dim": 99, "bias": s.config.fc_bias} | extra
    if s.config.qkv_bias:
        config["qkv_bias"] = True
    return put(folder, config, s.tensors, pickled=True)


def safeailab_eagle3(s, folder, **extra):
    config = sizes(s) | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": s.config.draft_vocab_size}
    return put(folder, config | extra, midlayer(with_t2d(s)), pickled=True)


def specforge(s, folder, **extra):
    config = sizes(s) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": s.config.draft_vocab_size,
        "head_dim": s.config.head_dim,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [i - 1 for i in s.config.aux_layers]},
        "fc_norm": s.config.fc_norm,
        "norm_output": s.config.norm_output,
    }
    return put(folder, config | extra, midlayer(with_t2d(s)))


def speculators(s, folder, **extra):
    layer = {k: v for k, v in sizes(s).items() if k != "rope_theta"}
    layer |= {"head_dim": s.config.head_dim, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    config = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": layer,
        "draft_vocab_size": s.config.draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": list(s.config.aux_layers),
        "norm_before_residual": s.config.norm_before_residual,
        "norm_before_fc": s.config.norm_before_fc,
        "fc_norm": s.config.fc_norm,
        "norm_output": s.config.norm_output,
        "target_hidden_size": None,
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "a/b"}},
    }
    return put(folder, config | extra, with_t2d(s))


def angelslim(s, folder, **extra):
    config = sizes(s) | {
        "architectures": ["Eagle3LlamaForCausalLM"],
        "target_model_type": "qwen3",
        "head_dim": s.config.head_dim,
        "draft_vocab_size": s.config.draft_vocab_size,
    }
    if s.config.aux_layers != DEFAULT:
        config["eagle_aux_hidden_state_layer_ids"] = [i - 1 for i in s.config.aux_layers]
    return put(folder, config | extra, midlayer(with_t2d(s)))


def modelopt(s, folder, **extra):
    config = sizes(s) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": s.config.draft_vocab_size,
        "head_dim": s.config.head_dim,
        "eagle_config": {
            "use_aux_hidden_state": bool(s.config.aux_layers),
            "use_input_layernorm_in_first_layer": True,
            "use_last_layernorm": True,
            "eagle_aux_hidden_state_layer_ids": [i - 1 for i in s.config.aux_layers],
        },
    }
    return put(folder, config | extra, s.tensors)


def nemo(s, folder, **extra):
    config = sizes(s) | {"draft_vocab_size": s.config.draft_vocab_size, "head_dim": s.config.head_dim}
    inner = ("fc.", "layers.", "norm.", "embed_tokens.")
    tensors = {("model." + k if k.startswith(inner) else k): v for k, v in with_t2d(s).items()}
    return put(folder, config | extra, tensors)


EAGLE3_WRITERS = {
    "SafeAILab EAGLE-3": safeailab_eagle3,
    "SpecForge": specforge,
    "speculators": speculators,
    "AngelSlim": angelslim,
    "ModelOpt": modelopt,
    "NeMo": nemo,
}


def without(s: DraftState, *names: str) -> DraftState:
    return dataclasses.replace(s, tensors=drop(s.tensors, *names))
