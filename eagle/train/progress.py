"""Progress for people: a rich bar on a terminal, else a plain line every so often."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_SECONDS = 15.0


class Bar:
    """A bar from 0 to 1 with a status text; silent on ranks other than the first."""

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self.title, self.quiet = title, quiet
        self.began = self.last = time.monotonic()
        self.first: float | None = None
        self._rich: Progress | None = None
        if sys.stdout.isatty() and not quiet:
            self._rich = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[status]}"),
            )  # fmt: skip
            self._task = self._rich.add_task(title, total=1.0, status="")

    def __enter__(self) -> Bar:
        if self._rich:
            self._rich.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._rich:
            self._rich.stop()

    def update(self, fraction: float, status: str, *, force: bool = False) -> None:
        """Show ``fraction`` of the work done."""
        fraction = min(1.0, fraction)
        now = time.monotonic()
        if self.first is None:
            self.first = fraction
        if self.quiet:
            return
        if self._rich:
            self._rich.update(self._task, completed=fraction, status=status)
        elif force or now - self.last >= PLAIN_SECONDS:
            self.last = now
            speed = (fraction - self.first) / max(1e-9, now - self.began)
            left = f"{(1 - fraction) / speed:.0f} s left" if speed > 0 else "time left unknown"
            print(f"{self.title}: {fraction:.1%} · {status} · {left}", flush=True)
