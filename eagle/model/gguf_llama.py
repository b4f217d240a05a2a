"""A Llama in a GGUF file → a Hugging Face folder in bfloat16.

GGUF stores what llama.cpp needs; three things differ from Hugging Face and are undone here: weights may be quantised
(``gguf`` dequantises them), the rows of q and k are interleaved for llama.cpp's RoPE, and the tokenizer is a list of
tokens and merges with a pre-tokenizer named by llama.cpp. Only the plain Llama layout is known; anything else raises.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, TokenType, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from eagle.errors import CheckpointError

_GLOBAL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf_llama(gguf: Path, folder: Path, advance: Callable[[float], None] = lambda fraction: None) -> None:
    """Write config, generation config, tokenizer and ``model.safetensors`` (bfloat16) of ``gguf`` into ``folder``.

    ``advance`` is called with the fraction done, from 0 to 1.

    Raises:
        CheckpointError: the file is no GGUF, or not a plain Llama with a byte-level BPE tokenizer.
    """
    try:
        reader = GGUFReader(gguf)
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{gguf} cannot be read as GGUF ({error}); expected a llama.cpp model file") from error
    config = _config(reader, gguf)
    _write_json(folder / "config.json", config)
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", special)
    _write_tokenizer(reader, config, folder, gguf)

    tensors: dict[str, torch.Tensor] = {}
    for done, tensor in enumerate(reader.tensors, start=1):
        # `dequantize` returns float32 in row-major [out, in], whatever the storage type.
        weight = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith("attn_q.weight"):
            weight = _uninterleave(weight, config["num_attention_heads"])
        elif tensor.name.endswith("attn_k.weight"):
            weight = _uninterleave(weight, config["num_key_value_heads"])
        name = _hf_name(tensor.name, gguf)
        tensors[name] = torch.from_numpy(np.array(weight, dtype=np.float32)).to(torch.bfloat16)
        advance(0.9 * done / len(reader.tensors))
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors writes 0600: nobody else could use a shared cache
    advance(1.0)


def _hf_name(name: str, gguf: Path) -> str:
    if name in _GLOBAL_TENSORS:
        return _GLOBAL_TENSORS[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in _LAYER_TENSORS:
        raise CheckpointError(f"{gguf} holds the tensor {name!r}, which a plain Llama has not; it cannot be converted")
    return f"model.layers.{match[1]}.{_LAYER_TENSORS[match[2]]}.weight"


def _uninterleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads · head_dim, in] from llama.cpp's order (pairs side by side) to Hugging Face's (halves apart)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(reader: GGUFReader, gguf: Path) -> dict[str, Any]:
    """The fields of ``LlamaConfig`` that the GGUF metadata determine."""

    def field(key: str, default: Any = None) -> Any:
        found = reader.get_field(key)
        if found is None and default is None:
            raise CheckpointError(f"{gguf} has no {key!r} in its metadata; expected a GGUF file of a Llama")
        return default if found is None else found.contents()

    if (architecture := field("general.architecture")) != "llama":
        raise CheckpointError(f"{gguf} holds a {architecture!r} model; only Llama can be converted")
    if reader.get_field("llama.rope.scaling.type") is not None:
        raise CheckpointError(f"{gguf} scales its RoPE; only plain RoPE can be converted")
    heads = field("llama.attention.head_count")
    eps = np.float32(field("llama.attention.layer_norm_rms_epsilon"))
    eos = field("tokenizer.ggml.eos_token_id")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(reader.fields["tokenizer.ggml.tokens"].data),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("llama.attention.head_count_kv", heads),
        "head_dim": field("llama.rope.dimension_count", field("llama.embedding_length") // heads),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": field("llama.context_length"),
        # The shortest decimal of the float32 that is stored: 1e-05, not 9.999999747378752e-06.
        "rms_norm_eps": float(str(eps)),
        "rope_theta": field("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": field("tokenizer.ggml.padding_token_id", eos),
        "dtype": "bfloat16",
        "use_cache": True,
    }


def _write_tokenizer(reader: GGUFReader, config: dict[str, Any], folder: Path, gguf: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    model = reader.fields["tokenizer.ggml.model"].contents()
    flavour = reader.fields["tokenizer.ggml.pre"].contents()
    if (model, flavour) != ("gpt2", "smollm"):
        raise CheckpointError(f"{gguf} has a {model}/{flavour} tokenizer; only gpt2/smollm can be converted")
    tokens: list[str] = reader.fields["tokenizer.ggml.tokens"].contents()
    types: list[int] = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ", 1)) for merge in reader.fields["tokenizer.ggml.merges"].contents()]

    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    # llama.cpp's "smollm": every digit stands alone, the rest is split as in GPT-2.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == TokenType.CONTROL
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    unknown = reader.get_field("tokenizer.ggml.unknown_token_id")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",  # taken as it is: no class rebuilds the pre-tokenizer
            "model_max_length": config["max_position_embeddings"],
            "bos_token": tokens[config["bos_token_id"]],
            "eos_token": tokens[config["eos_token_id"]],
            "pad_token": tokens[config["pad_token_id"]],
            "unk_token": None if unknown is None else tokens[unknown.contents()],
            "clean_up_tokenization_spaces": False,
        },
    )
    if (template := reader.get_field("tokenizer.chat_template")) is not None:
        (folder / "chat_template.jinja").write_text(template.contents(), encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
