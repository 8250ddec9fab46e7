"""What a run shows where it was started: live bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tasks.stage import progress_line

PLAIN_SECONDS = 10.0

# Into a file or a pipe, tables keep their width and lines are never broken.
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


class Display:
    """Start, progress and end of each stage."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._cached = 0
        self._started: dict[str, float] = {}
        self._quiet: set[str] = set()  # up to date: counted, not listed
        self._said: dict[str, float] = {}
        self._bars: dict[str, TaskID] = {}
        self._live = console.is_terminal
        self._progress = Progress(
            TextColumn("  [bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            refresh_per_second=4,
        )

    def __enter__(self) -> Display:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._progress.stop()
        if self._cached:
            console.print(f"  {self._cached} cached")

    def start(self, name: str, cached: bool) -> None:
        """A stage was submitted."""
        self._started[name] = self._said[name] = time.monotonic()
        if cached:
            self._quiet.add(name)
            return
        if self._live:
            self._bars[name] = self._progress.add_task(name, total=None, text="")
        else:
            console.print(f"  started   {name}")

    def update(self, progress: dict[str, dict[str, Any] | None]) -> None:
        """The running stages' latest words."""
        now = time.monotonic()
        for name, latest in progress.items():
            if not latest:
                continue
            text = escape(
                progress_line(
                    latest["done"], latest["total"], latest["unit"], latest["rate"], latest["latest"]
                )
            )
            if self._live:
                self._progress.update(
                    self._bars[name], completed=latest["done"], total=latest["total"], text=text
                )
            elif now - self._said[name] >= PLAIN_SECONDS:
                self._said[name] = now
                console.print(f"            {name}: {text}")

    def finish(self, name: str, state: str, message: str) -> None:
        """A stage is over."""
        self._done += 1
        if (bar := self._bars.pop(name, None)) is not None:
            self._progress.remove_task(bar)
        if state == "Cached":
            self._cached += 1
            if name in self._quiet:
                return
        count = f"[{self._done}/{self._total}]"
        style, word = {
            "Completed": ("green", "done"),
            "Cached": ("cyan", "cached"),
            "Failed": ("red", "failed"),
        }.get(state, ("yellow", state.lower()))
        seconds = time.monotonic() - self._started[name]
        text = escape(message) if state not in ("Completed", "Cached") else f"{seconds:.1f} s"
        console.print(f"  [{style}]{word:<9}[/] {name}  {text}  [dim]\\{count}[/]")
