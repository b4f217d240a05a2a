"""A tiny random target with a tokenizer and a chat template, for the tests of training."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eagle.train.target import Target

TEMPLATE = (
    "{% for m in messages %}<|s|>{{ m['role'] }}\n{{ m['content'] }}<|e|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|s|>assistant\n{% endif %}"
)


def tiny_tokenizer(*, template: bool = True) -> PreTrainedTokenizerFast:
    """Bytes as tokens, after two special ones: <|s|> is 0 and <|e|>, the end of a turn, is 1."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|s|>": 0, "<|e|>": 1, **{character: i + 2 for i, character in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|e|>", additional_special_tokens=["<|s|>"])
    fast.chat_template = TEMPLATE if template else None
    return fast


def tiny_model(layers: int = 2, seed: int = 0, *, tied: bool = True) -> LlamaForCausalLM:
    """A random Llama with 258 tokens, width 32, 4 query and 2 key/value heads of 8."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, eos_token_id=1, bos_token_id=0,
        tie_word_embeddings=tied, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_target(layers: int = 2, seed: int = 0) -> Target:
    return Target(tiny_model(layers, seed))


def save_tiny(folder: Path, *, template: bool = True, layers: int = 2) -> Path:
    """A target's folder."""
    tiny_model(layers).save_pretrained(folder)
    tiny_tokenizer(template=template).save_pretrained(folder)
    return folder


def save_dialogues(path: Path, count: int = 40, seed: int = 0) -> Path:
    """Conversations with a pattern that can be learnt, half in each format."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for i in range(count):
        start = int(torch.randint(26, (1,), generator=generator))
        length = int(torch.randint(20, 50, (1,), generator=generator))
        answer = "".join(chr(97 + (start + k) % 26) for k in range(length))
        if i % 2:
            turns = [{"from": "human", "value": f"go {i}"}, {"from": "gpt", "value": answer}]
            lines.append(json.dumps({"conversations": turns}))
        else:
            turns = [{"role": "user", "content": f"go {i}"}, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n")
    return path
