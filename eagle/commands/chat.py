"""`eagle chat`: a conversation that keeps the cache of what has already been said."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eagle.commands.console import note, open_model
from eagle.commands.generate import summary
from eagle.commands.options import (
    MODEL_DEFAULT,
    TREE_DEFAULT,
    DraftDtypeOption,
    DraftOption,
    Dtype,
    DtypeOption,
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
    Reply,
    ReplySettings,
    check_text,
    decode,
    encode,
    has_template,
    render,
    reply_to,
    write,
)
from eagle.errors import InvalidInputError, OutOfMemoryError

if TYPE_CHECKING:
    from eagle.model.ea_model import EaModel

LEAVE = "/quit, /exit or Ctrl-D ends the chat"
HELP = f"/reset forgets the conversation · /stats shows figures · /help · Ctrl-C stops a reply · {LEAVE}"


class Conversation:
    """Messages, and the exact token ids that the model has seen and written for them."""

    def __init__(self, model: EaModel, settings: ReplySettings, system: str | None = None) -> None:
        self.model, self.settings, self.system = model, settings, system
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self._text, self._ids = "", []
        self.replies: list[Reply] = []

    def ask(self, text: str, emit: Any = write) -> Reply:
        """Answer ``text``. Raises InvalidInputError or OutOfMemoryError and leaves the conversation as it was, if it can't
        be answered."""
        messages = [*self.messages, {"role": "user", "content": check_text(text)}]
        prompt, ids = self.prompt(messages)
        reply = reply_to(self.model, ids, self.settings, emit, reuse_prefix=True, keep_interrupted=True)
        self.messages = [*messages, {"role": "assistant", "content": reply.text}]
        self._text = prompt + decode(self.model.get_tokenizer(), reply.tokens, special=True)
        self._ids = ids + reply.tokens
        self.replies.append(reply)
        return reply

    def prompt(self, messages: list[dict[str, str]]) -> tuple[str, list[int]]:
        """The rendered conversation and its ids.

        Where it continues the text so far, the tokens so far are kept: encoding a reply's text again may split it
        otherwise than the model wrote it, and the cache would be of no use. Where the template rewrites what was said,
        all of it is encoded, and the cache serves as far as the tokens agree.
        """
        tokenizer = self.model.get_tokenizer()
        text = render(tokenizer, messages)
        if self._text and text.startswith(self._text):
            return text, self._ids + encode(tokenizer, text[len(self._text) :])
        return text, encode(tokenizer, text)

    def stats(self) -> str:
        """Figures of the last reply and of the conversation."""
        if not self.replies:
            return "nothing has been said yet"
        last = self.replies[-1].stats
        lengths = [length for reply in self.replies for length in reply.stats.accept_lengths]
        mean = sum(lengths) / len(lengths) if lengths else 1.0
        return (
            f"last reply: {summary(last)}, {last.reused_tokens} of {last.prompt_tokens} prompt tokens from the cache\n"
            f"conversation: {len(self.replies)} replies, {len(self._ids)} tokens, accept length {mean:.2f}"
        )


def chat(
    model: ModelOption = MODEL_DEFAULT,
    draft: DraftOption = None,
    max_new_tokens: NewTokensOption = 512,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = None,
    tree: TreeOption = TREE_DEFAULT,
    kernels: KernelsOption = Kernels.auto,
    dtype: DtypeOption = Dtype.auto,
    draft_dtype: DraftDtypeOption = WeightDtype.same,
    target_dtype: TargetDtypeOption = WeightDtype.same,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
) -> None:
    """Talk with a model; type /help inside."""
    check_flags(tree, kernels, max_new_tokens)
    settings = ReplySettings(max_new_tokens, sampling_of(temperature, top_p, top_k), seed)
    loaded, notes = open_model(model, draft, tree, kernels, dtype, draft_dtype, target_dtype)
    if not has_template(loaded.get_tokenizer()):
        raise InvalidInputError(f"the model {model} has no chat template, which a chat needs; use eagle generate --raw")
    note(*notes)
    conversation = Conversation(loaded, settings, system)
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):  # absent on Windows
            import readline  # noqa: F401 - line editing for input()
        print(HELP)
    while (line := read_line(interactive)) is not None:
        if line.strip() in ("/quit", "/exit"):
            break
        if line.strip():
            answer(conversation, line.strip())


def answer(conversation: Conversation, line: str) -> None:
    """Obey a command, or reply to a message. A message that can't be answered is reported; the chat goes on."""
    if line == "/reset":
        conversation.reset()
        print("the conversation is forgotten")
    elif line == "/stats":
        print(conversation.stats())
    elif line == "/help":
        print(HELP)
    elif line.startswith("/") and " " not in line and "/" not in line[1:]:
        print(f"unknown command {line}; {HELP}")
    else:
        try:
            reply = conversation.ask(line)
        except (InvalidInputError, OutOfMemoryError) as error:
            print(f"error: {error}; /reset starts afresh", file=sys.stderr, flush=True)
            return
        write("" if reply.text.endswith("\n") else "\n")
        if reply.interrupted:
            print("(stopped)")


def read_line(interactive: bool) -> str | None:
    """The next line, or None at the end of input. Ctrl-C at the prompt only says how to leave."""
    while True:
        try:
            if interactive:
                return input("> ")
            line = sys.stdin.readline()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            if not interactive:
                raise
            print(f"\n{LEAVE}")
            continue
        except UnicodeDecodeError as error:
            raise InvalidInputError(f"standard input is not valid {error.encoding} text") from None
        return line.rstrip("\r\n") if line else None
