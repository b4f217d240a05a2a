"""What a run needs before its first step: the target, its backends, the data and the head."""

from __future__ import annotations

import gc
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from eagle.errors import TrainingError, UnsupportedModelError
from eagle.model.checkpoints import default_draft_config
from eagle.model.draft_config import DraftConfig, TargetSpec
from eagle.train import distributed
from eagle.train.attention import check_flash
from eagle.train.corpus import write_shard
from eagle.train.dialogues import read_dialogues
from eagle.train.generate import Sampler
from eagle.train.options import TrainOptions
from eagle.train.progress import Bar
from eagle.train.selfchat import ChatSettings, SelfChat, data_settings, settings_match, write_conversations
from eagle.train.target import Target, check_decode
from eagle.train.template import chat_pieces

GPU_ROWS, CPU_ROWS = 2048, 16
MANY_TOKENS = 200_000
"""From which on writing them takes a CPU hours."""


def say(text: str) -> None:
    """Print a line, on the first process only."""
    if distributed.first():
        print(text, flush=True)


def check_cache_fits(target: Target, rows: int, slots: int) -> None:
    """Refuse a batch of conversations whose cache is larger than the memory that is free.

    Raises:
        TrainingError: with both sizes.
    """
    need = target.cache_bytes(rows, slots)
    if target.device.type == "cuda":
        free = torch.cuda.mem_get_info(target.device)[0]
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if need > free:
        raise TrainingError(
            f"the cache of {rows} conversations of {slots} tokens takes {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB "
            "are free: lower --generate-rows or --max-length"
        )


def training_device(asked: str) -> str:
    """The device of ``--device``. Raises TrainingError for a GPU that is not there."""
    if asked == "auto":
        return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    count, number = torch.cuda.device_count(), int(asked.partition(":")[2] or 0)
    if asked != "cpu" and number >= count:
        raise TrainingError(f"device is {asked}, but torch sees {count} GPUs: give another --device, auto or cpu")
    return asked


def load_target(options: TrainOptions) -> tuple[Target, Any]:
    """The frozen target and its tokenizer; bf16 on a GPU, fp32 on the CPU."""
    device = training_device(options.device)
    folder = Path(options.model).expanduser()
    if not (folder / "config.json").is_file():
        from eagle.model.hub import ensure_local
        from eagle.model.locate import locate

        folder = ensure_local(locate(options.model).base)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    config = AutoConfig.from_pretrained(folder)
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
        if str(method).rpartition(".")[2].lower() != "gguf" or not list(folder.glob("*.safetensors")):
            raise UnsupportedModelError(
                f"{folder} is quantised ({method}), but a head is trained against plain weights: give those"
            )
        say(f"{folder} was converted from GGUF; its plain weights are used")
        del config.quantization_config
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype).to(device)
    return Target(model), AutoTokenizer.from_pretrained(folder)


def end_tokens(target: Target, tokenizer: Any) -> set[int]:
    """Tokens that end an answer, by the generation configuration and the tokenizer."""
    ends = target.model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return {int(token) for token in (*ends, tokenizer.eos_token_id) if token is not None}


def choose_backends(options: TrainOptions, target: Target, head: DraftConfig) -> tuple[str, str]:
    """Attention for training and for decoding: "flash" after a check against "dense", or "dense", as it says.

    Raises:
        TrainingError: flash attention was asked for and does not work here.
    """
    device, config = target.device, target.config
    if options.attention == "dense" or (options.attention == "auto" and device.type != "cuda"):
        say(f"attention: dense ({'asked for' if options.attention == 'dense' else 'no GPU'})")
        return "dense", "dense"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shapes = {
        (config.num_attention_heads, config.num_key_value_heads, head_dim),
        (head.num_heads, head.num_kv_heads, head.head_dim),
    }
    found = [problem for shape in sorted(shapes) if (problem := check_flash(*shape, device))]
    decode = check_decode(config.num_attention_heads, config.num_key_value_heads, head_dim, device)
    for what, problem in (("training", found[0] if found else None), ("decoding", decode)):
        if problem and options.attention == "flash":
            raise TrainingError(f"flash attention does not work for {what} here ({problem}): use --attention dense")
        say(f"attention for {what}: {f'dense, as flash fails its check ({problem})' if problem else 'flash, checked'}")
    return "dense" if found else "flash", "dense" if decode else "flash"


def head_config(options: TrainOptions, target: Target) -> DraftConfig:
    """The head's sizes: the target's, but for the flags."""
    config = target.config
    if getattr(config, "num_key_value_heads", None) is None:
        raise UnsupportedModelError(
            f"{type(config).__name__} names no num_key_value_heads: a Llama-like target is needed"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    vocab = target.head.shape[0]
    return default_draft_config(
        TargetSpec(config.hidden_size, vocab, len(target.decoder.layers)),
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None),
        intermediate_size=options.intermediate_size or config.intermediate_size,
        draft_vocab_size=min(options.draft_vocab, vocab),
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0),
        max_position_embeddings=config.max_position_embeddings,
        aux_layers=target.aux_layers,
    )


def prepare_data(
    options: TrainOptions, target: Target, tokenizer: Any, folder: Path, backend: str, deadline: float | None
) -> bool:
    """Make sure that ``folder`` holds the corpus; returns False where the time ran out before."""
    ends = end_tokens(target, tokenizer)
    if options.data is not None:
        if distributed.first():
            conversations, left_out = read_dialogues(options.data, tokenizer, frozenset(ends))
            settings_match(folder, {"source": str(options.data)})  # after a file that can't be read has said so
            if left_out:
                say(left_out)
            write_shard(folder / "shard-00000.npz", conversations)
        distributed.barrier()
        return True
    pieces = chat_pieces(tokenizer, ends)
    settings = ChatSettings(
        seed=options.seed,
        greedy_share=options.greedy_share,
        max_length=options.max_length,
        shard_size=min(2048, max(16, options.tokens // 4000)),
    )
    if distributed.first():
        settings_match(folder, data_settings(settings, options.model))
    distributed.barrier()
    complete_mark = folder / "complete.json"
    if complete_mark.is_file() and json.loads(complete_mark.read_text()) >= options.tokens:
        say(f"data: those in {folder}")
        return True
    rows = options.generate_rows or (GPU_ROWS if target.device.type == "cuda" else CPU_ROWS)
    check_cache_fits(target, rows, options.max_length)
    training_backend, target.backend = target.backend, backend
    sampler = Sampler(
        target, rows=rows, slots=options.max_length, stop=pieces.stop,
        capture=target.device.type == "cuda",
    )  # fmt: skip
    goal = options.tokens // distributed.world()
    if target.device.type == "cpu" and options.tokens >= MANY_TOKENS:
        say(
            f"data: a CPU is slow at writing {options.tokens:,} tokens; --tokens asks for fewer, --data takes your own file"
        )
    with Bar("writing conversations", quiet=not distributed.first()) as bar:
        total = write_conversations(
            sampler,
            SelfChat(tokenizer, pieces, settings),
            folder,
            options.tokens,
            report=lambda done, count, rate: bar.update(
                done / goal, f"{done:,} tokens · {count:,} conversations · {rate:,.0f} tokens/s sampled"
            ),
            should_pause=lambda: deadline is not None and time.monotonic() > deadline,
            rank=distributed.rank(),
            world=distributed.world(),
        )
    rate = sampler.decoded / max(1e-9, time.monotonic() - bar.began)
    say(f"data: {total:,} tokens on this process, {sampler.decoded:,} sampled at {rate:,.0f} tokens/s")
    target.backend = training_backend
    del sampler
    gc.collect()
    if target.device.type == "cuda":
        torch.cuda.empty_cache()
    # The estimate of what is under way may end the writing a little early.
    complete = all(distributed.gather(total >= 0.9 * goal))
    if complete and distributed.first():
        complete_mark.write_text(json.dumps(options.tokens))
    distributed.barrier()
    return complete
