"""From a text to token ids, and from token ids to text as they come."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eagle.errors import InvalidInputError

if TYPE_CHECKING:
    from eagle.engine.loop import GenerationStats
    from eagle.model.ea_model import EaModel
    from eagle.model.ops import Sampling

NO_TEMPLATE = "the model has no chat template: prompts go in as they stand, as with --raw"


class TextStream:
    """Decodes a growing list of token ids without ever emitting half a character.

    A piece is held back while its text ends in U+FFFD, the mark of an unfinished UTF-8 sequence. Each piece is the
    difference of two decodings that start at the same earlier token, so that tokenizers whose tokens depend on what
    stands before them (a leading space, say) keep their spacing.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # decoding starts here
        self._written = 0  # tokens before this one have been emitted

    def put(self, ids: list[int]) -> str:
        """The text that ``ids`` complete; may be empty."""
        self._ids += ids
        text = self._pending()
        if text.endswith("\ufffd"):
            return ""
        return self._emit(text)

    def end(self) -> str:
        """What was held back."""
        return self._emit(self._pending())

    def _pending(self) -> str:
        before = decode(self._tokenizer, self._ids[self._context : self._written])
        return decode(self._tokenizer, self._ids[self._context :])[len(before) :]

    def _emit(self, text: str) -> str:
        if text:
            self._context, self._written = self._written, len(self._ids)
        return text


@dataclass(frozen=True)
class ReplySettings:
    """How replies are generated."""

    max_new_tokens: int
    sampling: Sampling
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass
class Reply:
    """One generation: its token ids, its text without special tokens, and its figures."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    interrupted: bool = False
    stats: GenerationStats | None = None


def decode(tokenizer: Any, ids: list[int], *, special: bool = False) -> str:
    """The text of ``ids`` to the letter; special tokens only if asked for."""
    return tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)


def write(text: str) -> None:
    """Text to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def check_text(text: str) -> str:
    """``text`` if a tokenizer can take it. Raises InvalidInputError for an empty one and for bytes that are no UTF-8."""
    if not text.strip():
        raise InvalidInputError("the prompt is empty; expected some text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidInputError("the prompt is not valid UTF-8; convert it first") from None
    return text


def read_stdin() -> str:
    """All of standard input. Raises InvalidInputError where it is no text."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"standard input is not valid {error.encoding} text (byte {error.start})") from None


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The chat template around ``messages``, up to where the model's answer begins.

    Raises InvalidInputError where the template refuses them.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except (TemplateError, ValueError) as error:
        raise InvalidInputError(f"the model's chat template refuses the conversation: {error}") from error


def encode(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    """Token ids of ``text``; ``special`` lets the tokenizer add its own begin token."""
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def encode_prompt(tokenizer: Any, text: str, *, raw: bool = False) -> list[int]:
    """Token ids of one prompt: as a user's message in the chat template, or as it stands.

    Raises InvalidInputError for an empty prompt.
    """
    check_text(text)
    if raw:
        return encode(tokenizer, text, special=True)
    return encode(tokenizer, render(tokenizer, [{"role": "user", "content": text}]))


def check_fits(model: EaModel, ids: list[int]) -> None:
    """Refuse a prompt that the model's context does not hold. Raises InvalidInputError."""
    from eagle.model.inputs import token_budgets

    token_budgets([len(ids)], model.target.context_length, 1, None, 1)


def reply_to(
    model: EaModel,
    ids: list[int],
    settings: ReplySettings,
    emit: Callable[[str], None] = lambda text: None,
    *,
    speculative: bool = True,
    reuse_prefix: bool = False,
    keep_interrupted: bool = False,
) -> Reply:
    """Generate one reply to the prompt ``ids``, handing its text to ``emit`` as it comes.

    keep_interrupted: Ctrl-C ends the reply and returns what there is. Raises InvalidInputError.
    """
    tokenizer = model.get_tokenizer()
    from eagle.engine.loop import GenerationStats

    stats = GenerationStats()
    steps = model.stream(
        [ids],
        max_new_tokens=settings.max_new_tokens,
        sampling=settings.sampling,
        seed=settings.seed,
        stop_strings=settings.stop or None,
        speculative=speculative,
        reuse_prefix=reuse_prefix,
        stats=stats,
    )
    reply, stream = Reply(stats=stats), TextStream(tokenizer)
    try:
        for new in steps:
            reply.tokens += new[0]
            emit(stream.put(new[0]))
    except KeyboardInterrupt:
        if not keep_interrupted:
            raise
        reply.interrupted = True
    finally:
        steps.close()
    emit(stream.end())
    reply.text = decode(tokenizer, reply.tokens)
    return reply
