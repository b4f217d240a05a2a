"""A tiny random target with a tokenizer and a head, as folders on disk."""

from __future__ import annotations

from pathlib import Path

from tiny import tiny_draft_config, tiny_target
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eagle.model.checkpoints import random_draft, save_draft

SPECIAL = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte, so that a character may take several, and three special tokens."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        additional_special_tokens=[SPECIAL[1]],
    )
    wrapped.chat_template = template
    return wrapped


def save_pair(folder: Path, *, template: str | None = TEMPLATE, context: int = 512, tokenizer: bool = True) -> Path:
    """Write ``folder/target`` and ``folder/head``, random; ``folder`` itself then names the pair."""
    words = byte_tokenizer(template)
    target = tiny_target(
        vocab_size=len(words), eos_token_id=words.eos_token_id, bos_token_id=0, max_position_embeddings=context
    )
    target.save_pretrained(folder / "target")
    if tokenizer:
        words.save_pretrained(folder / "target")
    save_draft(random_draft(tiny_draft_config(target, draft_vocab_size=60), seed=1), folder / "head")
    return folder
