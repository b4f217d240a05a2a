"""Turns at a model: one generation, or one change of how it runs, at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from eagle.errors import InvalidInputError


class Turns:
    """A lock that knows which thread drives the generation under way, so that no thread waits for itself.

    A generation may be handed from thread to thread: the one that drove it last is the one that has it open.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: threading.Thread | None = None
        self._generating = False

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Wait for the turn to generate. Raises InvalidInputError where this thread has a turn already."""
        self._refuse(nested=True)
        with self._lock, self._owned(generating=True):
            yield

    @contextmanager
    def change(self) -> Iterator[None]:
        """Wait for the turn to change something; may be nested. Raises InvalidInputError as `generation` does."""
        self._refuse(nested=False)
        if self._owner is threading.current_thread():
            yield
            return
        with self._lock, self._owned(generating=False):
            yield

    def driven_here(self) -> None:
        """Note that the generation under way goes on in this thread."""
        self._owner = threading.current_thread()

    def _refuse(self, *, nested: bool) -> None:
        if self._owner is threading.current_thread() and (self._generating or nested):
            what = "generation" if self._generating else "change"
            raise InvalidInputError(f"a {what} of this thread is still open on this model; finish or close it first")

    @contextmanager
    def _owned(self, *, generating: bool) -> Iterator[None]:
        self._generating, self._owner = generating, threading.current_thread()
        try:
            yield
        finally:
            self._generating, self._owner = False, None
