"""A limit on how fast something is copied, which may change while it is."""

from __future__ import annotations

import time

PAUSE = 0.2  # seconds, then ask again


class Pace:
    """At most ``rate`` bytes per second; 0 is no limit."""

    def __init__(self, rate: int = 0) -> None:
        self.rate = rate
        self.paused = False
        self._since: tuple[float, int] | None = None

    def pause(self) -> None:
        """Copy nothing until `go_on`."""
        self.paused = True

    def go_on(self) -> None:
        """Copy on at the same rate; the time that it stood still does not count."""
        self.paused = False
        self._since = None

    def change(self, rate: int) -> None:
        """From now on ``rate`` holds; what was copied before does not count."""
        self.rate = rate
        self._since = None

    def delay(self, done: int) -> float:
        """How many seconds to wait now that ``done`` bytes are copied."""
        if self.paused:
            return PAUSE
        now = time.monotonic()
        if self._since is None:
            self._since = (now, done)
        then, before = self._since
        return (done - before) / self.rate - (now - then) if self.rate else 0.0
