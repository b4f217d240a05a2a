"""`eagle train`: an EAGLE-3 head for a model. Defaults and checks are those of `eagle.train.options.TrainOptions`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from eagle.commands.console import quiet_libraries
from eagle.train.options import TrainOptions as Default


def train(
    model: Annotated[str, typer.Option("--model", "-m", help="The target: a name from 'eagle models' or a folder.")],
    out: Annotated[Path, typer.Option("--out", help="The head's folder; 'training' in it keeps data and checkpoints.")],
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Conversations, ShareGPT or OpenAI format. Default: the target writes them."),
    ] = Default.data,
    data_folder: Annotated[
        Path | None, typer.Option("--data-folder", help="Keep generated data here, to share them between runs.")
    ] = Default.data_folder,
    tokens: Annotated[int, typer.Option("--tokens", help="How many tokens the target writes.")] = Default.tokens,
    greedy_share: Annotated[
        float, typer.Option("--greedy-share", help="Share of answers drawn at temperature 0.")
    ] = Default.greedy_share,
    generate_rows: Annotated[
        int | None,
        typer.Option("--generate-rows", help="Conversations decoded together; by default 2048, on a CPU 16."),
    ] = Default.generate_rows,
    generate_only: Annotated[
        bool, typer.Option("--generate-only", help="Stop when the data are there.")
    ] = Default.generate_only,
    max_length: Annotated[
        int, typer.Option("--max-length", help="Longest conversation in tokens.")
    ] = Default.max_length,
    held_out: Annotated[int, typer.Option("--held-out", help="Conversations kept for measuring.")] = Default.held_out,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimiser steps. Default: 4,000.")] = Default.steps,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="Training time, instead of steps.")
    ] = Default.minutes,
    batch_tokens: Annotated[
        int, typer.Option("--batch-tokens", help="Tokens of one step on one GPU.")
    ] = Default.batch_tokens,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = Default.lr,
    warmup: Annotated[
        float, typer.Option("--warmup", help="Share of the run in which the rate rises.")
    ] = Default.warmup,
    clip: Annotated[float, typer.Option("--clip", help="Bound of the gradient's norm.")] = Default.clip,
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="Of AdamW.")] = Default.weight_decay,
    seed: Annotated[int, typer.Option("--seed", help="Of data and training.")] = Default.seed,
    draft_vocab: Annotated[
        int, typer.Option("--draft-vocab", help="Keep this many of the commonest tokens.")
    ] = Default.draft_vocab,
    intermediate_size: Annotated[
        int | None, typer.Option("--intermediate-size", help="Width of the head's MLP. Default: the target's.")
    ] = Default.intermediate_size,
    share_lm_head: Annotated[
        bool, typer.Option("--share-lm-head", help="Score with the target's output rows, frozen.")
    ] = Default.share_lm_head,
    omit_lm_head: Annotated[
        bool, typer.Option("--omit-lm-head", help="With --share-lm-head: do not store those rows.")
    ] = Default.omit_lm_head,
    ttt_steps: Annotated[int, typer.Option("--ttt-steps", help="Steps of training-time test.")] = Default.ttt_steps,
    attention: Annotated[str, typer.Option("--attention", help="auto, flash or dense.")] = Default.attention,
    compile_parts: Annotated[str, typer.Option("--compile", help="auto, on or off.")] = Default.compile,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = Default.device,
    checkpoint_seconds: Annotated[
        float, typer.Option("--checkpoint-seconds", help="Time between checkpoints.")
    ] = Default.checkpoint_seconds,
    evaluate_minutes: Annotated[
        float, typer.Option("--evaluate-minutes", help="Time between measurements.")
    ] = Default.evaluate_minutes,
    log_every: Annotated[int, typer.Option("--log-every", help="Steps between lines of the log.")] = Default.log_every,
    pause_after: Annotated[
        float | None, typer.Option("--pause-after", help="Stop with a checkpoint after this many seconds.")
    ] = Default.pause_after,
    name: Annotated[
        str, typer.Option("--name", help="The target's name on the model card. Default: what --model says.")
    ] = Default.name,
    profile: Annotated[
        int, typer.Option("--profile", help="First time this many steps, part by part.")
    ] = Default.profile,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew in a folder that exists.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run stopped.")] = False,
) -> None:
    """Train an EAGLE-3 head for a model, by self-distillation or on your own conversations."""
    options = Default(
        model=model,
        out=out,
        data=data,
        data_folder=data_folder,
        tokens=tokens,
        greedy_share=greedy_share,
        generate_rows=generate_rows,
        generate_only=generate_only,
        max_length=max_length,
        held_out=held_out,
        steps=steps,
        minutes=minutes,
        batch_tokens=batch_tokens,
        lr=lr,
        warmup=warmup,
        clip=clip,
        weight_decay=weight_decay,
        seed=seed,
        draft_vocab=draft_vocab,
        intermediate_size=intermediate_size,
        share_lm_head=share_lm_head,
        omit_lm_head=omit_lm_head,
        ttt_steps=ttt_steps,
        attention=attention,
        compile=compile_parts,
        device=device,
        checkpoint_seconds=checkpoint_seconds,
        evaluate_minutes=evaluate_minutes,
        log_every=log_every,
        pause_after=pause_after,
        name=name,
        profile=profile,
        overwrite=overwrite,
        resume=resume,
        command=recorded(sys.argv[1:]),
    )
    quiet_libraries()
    from eagle.train.run import train as run

    run(options)


def recorded(given: list[str]) -> str:
    """The command for the model card, without the flags that only say how a run was interrupted."""
    kept = given if given[:1] == ["train"] else ["train", *given]
    kept = [word for word, before in zip(kept, ["", *kept], strict=False) if "--pause-after" not in (word, before)]
    return shlex.join(["eagle", *(word for word in kept if word != "--resume")])
