"""First user messages for self-distillation: own-written templates over what people ask an assistant.

A template's ``{slot}`` names are filled at random, which gives hundreds of thousands of distinct messages; a template
that ends in ``...``, or the beginning of a filled one, is continued by the model itself.
"""

from __future__ import annotations

import re

import numpy as np

from eagle.train.texts import FOLLOW_UPS, MANNERS, SLOTS, TEMPLATES

_NUMBERS = {
    "n": (12, 99),
    "m": (5, 60),
    "k": (2, 12),
    "d": (1, 28),
    "year": (1950, 2024),
    "p": (5, 60),
    "nn": (100, 900),
    "mm": (20, 900),
}
_FIXED = {
    "tone2": ["tired", "happy", "bored", "stressed", "lonely", "excited", "angry", "nervous"],
    "hundreds": ["100", "150", "200", "300"],
    "sq": [str(i * i) for i in range(2, 40)],
    "d2": ["a phone number", "a date", "an email address", "a postcode", "a URL", "a hexadecimal colour"],
}


def _options(text: str) -> list[str]:
    return [part for line in text.split("\n") for part in line.split("|") if part]


_TABLE = {name: _options(text) for name, text in SLOTS.items()} | _FIXED
_LINES = {category: _options(text) for category, text in TEMPLATES.items()}
_FOLLOW_UPS, _MANNERS = _options(FOLLOW_UPS), _options(MANNERS)
_SLOT = re.compile(r"\{(\w+?)\}")


def _fill(template: str, rng: np.random.Generator) -> str:
    used: set[str] = set()
    chosen: dict[str, str] = {}
    base, step = int(rng.integers(2, 9)), int(rng.integers(2, 9))

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in chosen:
            chosen[name] = draw(name)
        return chosen[name]

    def draw(name: str) -> str:
        if name in ("a2", "a3", "a4"):
            return str(base + step * int(name[1]))
        plain = "roletask" if name in ("roletask2", "Roletask") else name.rstrip("23") if name not in _TABLE else name
        if plain in _NUMBERS:
            low, high = _NUMBERS[plain]
            return str(int(rng.integers(low, high + 1)))
        options = _TABLE[plain]
        text = options[int(rng.integers(len(options)))]
        while text in used and len(options) > 3:
            text = options[int(rng.integers(len(options)))]
        used.add(text)
        text = _fill(text, rng) if "{" in text else text
        return text[0].upper() + text[1:] if name[0].isupper() else text

    return _SLOT.sub(value, template)


def _draw(lines: list[str], rng: np.random.Generator) -> tuple[str, bool]:
    text = _fill(lines[int(rng.integers(len(lines)))], rng)
    return (text[:-3], True) if text.endswith("...") else (text.replace("\\n", "\n"), False)


def _cut(text: str, rng: np.random.Generator) -> str:
    """The first 30 to 80 % of a message's words, at least two."""
    words = text.split(" ")
    return " ".join(words[: max(2, int(len(words) * rng.uniform(0.3, 0.8)))])


def first_message(rng: np.random.Generator, *, opening_share: float = 0.6) -> tuple[str, bool]:
    """Draw one first user message.

    Args:
        rng: the source of every choice.
        opening_share: the share of messages that the model is to continue: templates that end in ``...`` and, as
            often, the beginning of a whole message.

    Returns:
        The text, and whether it is only an opening.
    """
    lines = _LINES[list(_LINES)[int(rng.integers(len(_LINES)))]]
    opening = bool(rng.random() < opening_share)
    if opening and rng.random() < 0.5:
        return _draw([line for line in lines if line.endswith("...")], rng)
    text, _ = _draw([line for line in lines if not line.endswith("...")], rng)
    if opening:
        return _cut(text, rng), True
    if rng.random() < 0.4:
        text = f"{text} {_fill(_MANNERS[int(rng.integers(len(_MANNERS)))], rng)}"
    return text, False


def follow_up(rng: np.random.Generator) -> tuple[str, bool]:
    """Draw one later user message; see :func:`first_message` for what is returned."""
    return _draw(_FOLLOW_UPS, rng)
