"""Switching how an `EaModel` runs its steps: captured or eager, target and head fused or module by module."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel

from eagle.engine.memory import allocator_line, check_room_for_copies, is_out_of_memory
from eagle.engine.session import Session
from eagle.engine.settings import EngineSettings
from eagle.errors import EagleError, OutOfMemoryError, UnsupportedModelError
from eagle.model.drafts import DraftModel
from eagle.model.fingerprint import Fingerprint
from eagle.model.fused_draft import FusedDraft
from eagle.model.fused_support import Unfusable
from eagle.model.fused_target import fuse_target
from eagle.model.target import Target


class EngineControl:
    """The part of `EaModel` that applies `EngineSettings`."""

    target: Target
    ea_layer: DraftModel
    _session: Session
    base_model: PreTrainedModel
    _unfusable: str | None
    _seen: Fingerprint | None

    @property
    def engine(self) -> EngineSettings:
        """How steps run; `configure_engine` changes it."""
        return self._session.settings

    @property
    def library_products(self) -> bool:
        """Whether a library computes the target's matrix products, whose sums depend on how many rows go together."""
        return self._session.library_products

    @property
    def captures_steps(self) -> bool:
        """Whether steps are replayed from a CUDA graph, as far as is known before the first one."""
        return self._session.replays

    def drop_captures(self) -> None:
        """Give back what was captured; the next generation captures anew. Not while a generation is open."""
        with self._session.exclusive():
            self._session.captures.drop()

    @property
    def engine_trouble(self) -> str | None:
        """Why the last attempt at fusing or capturing failed; None if it did not. Configuring again tries again."""
        captures = self._session.captures
        return self._unfusable or captures.step_reason or captures.prefill_reason

    @property
    def told(self) -> Callable[[str], None] | None:
        """Called with a line of text before something that takes seconds, such as a capture."""
        return self._session.told

    @told.setter
    def told(self, told: Callable[[str], None] | None) -> None:
        self._session.told = told

    def configure_engine(self, settings: EngineSettings) -> None:
        """Choose how steps run, between generations. `optimize_eagle_with_triton` does this for most users.

        Raises InvalidInputError while a generation of this thread is open (another thread's is waited for),
        UnsupportedModelError where ``settings.fused`` is "on" and the target can't be fused, and OutOfMemoryError where
        packing runs out of memory. The settings are then what they were.
        """
        with self._session.exclusive():
            before = self._session.settings
            try:
                draft = self._applied(settings)
            except BaseException:
                self._put_back(before)
                raise
            self._switch(settings, draft)

    def _refresh(self) -> None:
        """Fuse and capture anew where modules, hooks or weights are no longer those that were fused or captured. The
        caller has the session's turn."""
        settings = self._session.settings
        if settings == EngineSettings():
            return
        if self._seen is None or not self._seen.holds(self.base_model, self.ea_layer):
            self._seen = None  # until all is done: where it fails, the next generation begins here again
            self._switch(settings, self._applied(settings, anew=True))

    def _put_back(self, settings: EngineSettings) -> None:
        """Return to ``settings`` after a change that failed. What can't be fused again now is left to `_refresh`, which
        fuses it before the next generation or says why not."""
        try:
            self._switch(settings, self._apply(settings))
        except (EagleError, RuntimeError):
            self._session.configure(settings, self.ea_layer)
            self._seen = None

    def _applied(self, settings: EngineSettings, *, anew: bool = False) -> DraftModel | FusedDraft:
        """`_apply`, with an allocator's error as OutOfMemoryError; what was kept between calls then makes room."""
        try:
            return self._apply(settings, anew=anew)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._session.forget()
            raise OutOfMemoryError(
                f"packing the weights of target and head ran out of memory ({allocator_line(error)}); caches and captures "
                "have been given back: try again, or pass fused='off'"
            ) from error

    def _switch(self, settings: EngineSettings, draft: DraftModel | FusedDraft) -> None:
        self._session.configure(settings, draft)
        self._seen = Fingerprint(self.base_model, self.ea_layer)

    def _apply(self, settings: EngineSettings, *, anew: bool = False) -> DraftModel | FusedDraft:
        """Fuse or unfuse the target as asked, and return the head that goes with it."""
        current, before = self._session.draft, self._session.settings
        wanted_fused = settings.fused != "off"
        same = _weights(settings) == _weights(before)
        whole = (self.target.fused is not None) == wanted_fused
        usable = not isinstance(current, FusedDraft) or bool(current.layers)
        if same and whole and usable and not anew:
            return current
        if isinstance(current, FusedDraft):
            current.release()
        if anew or not wanted_fused:
            self.target.unfuse()
        self._unfusable = self._fuse(settings) if wanted_fused else None
        if settings.fused == "off" and settings.draft_dtype is None:
            return self.ea_layer
        return self._fused_draft(settings.draft_dtype, settings.fused == "on" or settings.draft_dtype is not None)

    def _fused_draft(self, dtype: str | None, required: bool) -> DraftModel | FusedDraft:
        try:
            return FusedDraft(self.ea_layer, dtype=dtype)
        except Unfusable as error:
            if required:
                raise UnsupportedModelError(f"the head can't be fused: {error}; leave fused at 'auto'") from error
            return self.ea_layer

    def _fuse(self, settings: EngineSettings) -> str | None:
        """Fuse the target. Returns why it can't be, where that is allowed."""
        if settings.target_dtype is not None and self.target.fused is None:
            check_room_for_copies(self.target, settings.target_dtype)
        try:
            fuse_target(self.target, settings.target_dtype)
        except Unfusable as error:
            if settings.target_dtype is not None:
                raise UnsupportedModelError(
                    f"target_dtype is {settings.target_dtype!r}, and the target can't be fused: {error}; leave it out"
                ) from error
            if settings.fused == "on":
                raise UnsupportedModelError(f"the target can't be fused: {error}; leave fused at 'auto'") from error
            return str(error)
        return None


def _weights(settings: EngineSettings) -> tuple[str | None, ...]:
    return settings.fused, settings.draft_dtype, settings.target_dtype
