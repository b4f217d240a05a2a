"""`eagle generate`: one prompt, one reply, and the figures."""

from __future__ import annotations

import json
import secrets
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eagle.commands.console import NEAR_TIES, OWN_MODULES, note, open_model
from eagle.commands.options import (
    MODEL_DEFAULT,
    TREE_DEFAULT,
    DraftDtypeOption,
    DraftOption,
    Dtype,
    DtypeOption,
    JsonOption,
    Kernels,
    KernelsOption,
    ModelOption,
    NewTokensOption,
    SeedOption,
    TargetDtypeOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    TreeOption,
    WeightDtype,
    check_flags,
    sampling_of,
)
from eagle.commands.reply import (
    NO_TEMPLATE,
    Reply,
    ReplySettings,
    check_fits,
    check_text,
    encode_prompt,
    has_template,
    read_stdin,
    reply_to,
    write,
)
from eagle.errors import InvalidInputError

if TYPE_CHECKING:
    from eagle.engine.loop import GenerationStats

WARM_UP_TOKENS = 4


def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The prompt, in quotes; '-' reads standard input.")],
    model: ModelOption = MODEL_DEFAULT,
    draft: DraftOption = None,
    max_new_tokens: NewTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = None,
    tree: TreeOption = TREE_DEFAULT,
    kernels: KernelsOption = Kernels.auto,
    dtype: DtypeOption = Dtype.auto,
    draft_dtype: DraftDtypeOption = WeightDtype.same,
    target_dtype: TargetDtypeOption = WeightDtype.same,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also decode plainly; print the speed-up and whether the outputs agree.")
    ] = False,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End the reply where this text is complete; may be repeated.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Leave out the chat template.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt with EAGLE speculative decoding."""
    check_one_argument(prompt, context.args)
    check_text(text := read_stdin() if prompt == "-" else prompt)
    check_flags(tree, kernels, max_new_tokens)
    sampling = sampling_of(temperature, top_p, top_k)
    if not all(stop or ()):
        raise InvalidInputError("--stop is empty; expected the text that ends the reply")
    if compare and not sampling.greedy and seed is None:
        seed = secrets.randbelow(1 << 31)  # both runs must draw the same numbers
    settings = ReplySettings(max_new_tokens, sampling, seed, tuple(stop or ()))

    loaded, notes = open_model(model, draft, tree, kernels, dtype, draft_dtype, target_dtype)
    tokenizer = loaded.get_tokenizer()
    if not raw and not has_template(tokenizer):
        raw = True
        notes.append(NO_TEMPLATE)
    if sampling.greedy and (top_k > 0 or 0 < top_p < 1):
        notes.append("--top-p and --top-k change nothing at temperature 0")
    ids = encode_prompt(tokenizer, text, raw=raw)
    check_fits(loaded, ids)
    note(*notes)
    if compare:
        # First passes pay for memory and library start-up; without this only EAGLE's would.
        for speculative in (True, False):
            reply_to(loaded, ids[:1], ReplySettings(WARM_UP_TOKENS, sampling, seed), speculative=speculative)

    reply = reply_to(loaded, ids, settings, (lambda piece: None) if as_json else write)
    plain = reply_to(loaded, ids, settings, speculative=False) if compare else None
    if as_json:
        print(json.dumps(figures(reply, plain), ensure_ascii=False))
        return
    write("" if reply.text.endswith("\n") else "\n")
    print(summary(reply.stats))
    if plain is not None:
        near_ties = loaded.library_products and loaded.base_model.dtype.itemsize == 2
        print(comparison(reply, plain, near_ties=near_ties))


def check_one_argument(prompt: str, more: list[str]) -> None:
    """Refuse a prompt that the shell handed over in pieces. Raises InvalidInputError with the command to type instead."""
    if not more:
        return
    text = " ".join((prompt, *more))
    quoted = shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'
    raise InvalidInputError(
        f"the prompt came as {len(more) + 1} arguments; several words need quotes around them: eagle generate "
        f"{'-- ' * text.startswith('-')}{quoted}"
    )


def figures(reply: Reply, plain: Reply | None = None) -> dict[str, Any]:
    """The JSON object: seconds include prefill, accept_length is tokens a target pass after prefill."""
    stats = reply.stats
    values = {
        "text": reply.text,
        "new_tokens": stats.new_tokens,
        "seconds": stats.seconds,
        "tokens_per_second": stats.tokens_per_second,
        "accept_length": stats.accept_length,
        "steps": stats.steps,
    }
    if plain is not None:
        values["plain_tokens_per_second"] = plain.stats.tokens_per_second
        values["speedup"] = speedup(reply, plain)
        values["identical"] = reply.tokens == plain.tokens
    return values


def summary(stats: GenerationStats) -> str:
    """A reply's figures in one line."""
    return (
        f"{stats.new_tokens} new tokens, {stats.seconds:.2f} s, {stats.tokens_per_second:.1f} tokens/s, "
        f"accept length {stats.accept_length:.2f}"
    )


def comparison(reply: Reply, plain: Reply, *, near_ties: bool = False) -> str:
    """What plain decoding of the same prompt gave. near_ties: whether they may fall either way."""
    line = (
        f"plain decoding: {plain.stats.tokens_per_second:.1f} tokens/s, "
        f"speed-up {speedup(reply, plain):.2f}x, identical: "
    )
    if reply.tokens == plain.tokens:
        return line + "yes"
    pairs = zip(reply.tokens, plain.tokens, strict=False)
    shorter = min(len(reply.tokens), len(plain.tokens))
    first = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), shorter)
    why = f"\n{NEAR_TIES.format(where=OWN_MODULES)}"
    return f"{line}no (first at new token {first + 1}){why * near_ties}"


def speedup(reply: Reply, plain: Reply) -> float:
    """Tokens/s over plain decoding's tokens/s."""
    return reply.stats.tokens_per_second / plain.stats.tokens_per_second
