"""Prompts of a wanted length out of real text: the package's own prompts, one after another, inside the chat template."""

from __future__ import annotations

from collections.abc import Callable

from eagle.errors import InvalidInputError

Encode = Callable[[str], list[int]]
"""A user's message → token ids with the chat template around them."""


def padded_prompts(encode: Encode, texts: list[str], length: int, count: int) -> list[list[int]]:
    """``count`` prompts of exactly ``length`` tokens each. Prompt i ends with text i, whole where it fits, after as much
    of the texts before it as is needed.

    Raises what `check_prefix` raises.
    """
    head, tail = check_prefix(encode, length)
    room = length - len(head) - len(tail)
    end = -len(tail) if tail else None
    prompts = []
    for index in range(count):
        order = [texts[(index - back) % len(texts)] for back in range(len(texts))]  # the nearest first
        taken, body = 1, encode(order[0])[len(head) : end]
        while len(body) < room:
            # Several texts a time: each round encodes anew, as tokens depend on what stands before them.
            taken += max(1, taken * (room - len(body)) // max(1, len(body)))
            words = "\n\n".join(order[back % len(order)] for back in reversed(range(taken)))
            body = encode(words)[len(head) : end]
        prompts.append([*head, *body[len(body) - room :], *tail])
    return prompts


def check_prefix(encode: Encode, length: int) -> tuple[list[int], list[int]]:
    """The chat template's part of a prompt, before and after the text. Raises InvalidInputError where it is as long as
    ``length``."""
    head, tail = _template(encode)
    if length <= len(head) + len(tail):
        raise InvalidInputError(
            f"a prefix of {length} tokens has no room for text: the chat template takes {len(head) + len(tail)}; "
            f"give at least {len(head) + len(tail) + 1}"
        )
    return head, tail


def _template(encode: Encode) -> tuple[list[int], list[int]]:
    """What the template puts before and after any text: what the encodings of two unlike texts share."""
    one, other = encode("Alpha 7"), encode("zinc?")
    shortest = min(len(one), len(other)) - 1
    head = next((at for at in range(shortest) if one[at] != other[at]), shortest)
    tail = next((at for at in range(shortest - head) if one[-1 - at] != other[-1 - at]), shortest - head)
    return one[:head], one[len(one) - tail :]
