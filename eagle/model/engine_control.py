"""Switching how an `EaModel` runs its steps: captured or eager, target and head fused or module by module."""

from __future__ import annotations

from collections.abc import Callable

from eagle.engine.session import Session
from eagle.engine.settings import EngineSettings
from eagle.errors import EagleError, UnsupportedModelError
from eagle.model.drafts import DraftModel
from eagle.model.fused_draft import FusedDraft
from eagle.model.fused_support import Unfusable
from eagle.model.fused_target import fuse_target
from eagle.model.target import Target


class EngineControl:
    """The part of `EaModel` that applies `EngineSettings`."""

    target: Target
    ea_layer: DraftModel
    _session: Session
    _unfusable: str | None

    @property
    def engine(self) -> EngineSettings:
        """How steps run; `configure_engine` changes it."""
        return self._session.settings

    @property
    def told(self) -> Callable[[str], None] | None:
        """Called with a line of text before something that takes seconds, such as a capture."""
        return self._session.told

    @told.setter
    def told(self, told: Callable[[str], None] | None) -> None:
        self._session.told = told

    def configure_engine(self, settings: EngineSettings) -> None:
        """Choose how steps run, between generations. `optimize_eagle_with_triton` does this for most users.

        Raises InvalidInputError while a generation is open, and UnsupportedModelError where ``settings.fused`` is "on"
        and the target can't be fused.
        """
        self._session.refuse_nesting()
        before = self._session.settings
        try:
            draft = self._apply(settings)
        except EagleError:
            self._session.configure(before, self._apply(before))
            raise
        self._session.configure(settings, draft)

    def _apply(self, settings: EngineSettings) -> DraftModel | FusedDraft:
        """Fuse or unfuse the target as asked, and return the head that goes with it."""
        current, before = self._session.draft, self._session.settings
        same = (settings.fused, settings.draft_dtype) == (before.fused, before.draft_dtype)
        if same and self._weights_in_place():
            return current
        if isinstance(current, FusedDraft):
            current.release()
        self._unfusable = None
        if settings.fused == "off":
            self.target.unfuse()
        else:
            if self.target.fused is not None and not self.target.fused.intact():
                self.target.unfuse()
            self._unfusable = self._fuse(required=settings.fused == "on")
        if settings.fused == "off" and settings.draft_dtype is None:
            return self.ea_layer
        return self._fused_draft(settings.draft_dtype, settings.fused == "on" or settings.draft_dtype is not None)

    def _weights_in_place(self) -> bool:
        """Whether packed weights are still those of the modules: moving or casting a model ends that."""
        target, draft = self.target.fused, self._session.draft
        if isinstance(draft, FusedDraft) and not (draft.layers and draft.intact()):
            return False
        return target is None or target.intact()

    def _fused_draft(self, dtype: str | None, required: bool) -> DraftModel | FusedDraft:
        try:
            return FusedDraft(self.ea_layer, dtype=dtype)
        except Unfusable as error:
            if required:
                raise UnsupportedModelError(f"the head can't be fused: {error}; leave fused at 'auto'") from error
            return self.ea_layer

    def _fuse(self, required: bool) -> str | None:
        """Fuse the target. Returns why it can't be, where that is allowed."""
        try:
            fuse_target(self.target)
        except Unfusable as error:
            if required:
                raise UnsupportedModelError(f"the target can't be fused: {error}; leave fused at 'auto'") from error
            return str(error)
        return None
