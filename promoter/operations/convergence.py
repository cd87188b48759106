"""Will a copy that runs behind the guest's writes come to an end, and what if not?

An active commit copies in the background: what the guest writes meanwhile is copied again. It
ends only if the guest writes more slowly than QEMU copies. Whether it does shows in two windows
of a few seconds; if not, the guest's writes are slowed step by step, and only then stopped, for
a bounded moment. Pure: times and bytes are given.

Source: QEMU's ``query-jobs``: a mirror job's total grows with what has become dirty.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

WINDOW = 1.5
"""Seconds over which rates are measured."""
LEAST_LIMIT = 16 * 1024
"""The guest's writes are never slowed below this, in bytes per second."""
ENOUGH = 0.8
"""What is left must shrink to this part of itself within a window, or the guest must write no more
than half of what is copied, or its writes are slowed."""
ASSUMED_RATE = 32 * 1024 * 1024


@dataclass
class Convergence:
    """One copy on its way. ``limit`` is what the guest's writes are slowed to, in bytes/s."""

    limit: int | None = None
    copy_rate: float = 0.0
    dirty_rate: float = 0.0
    _fastest: float = 0.0
    _samples: deque[tuple[float, int, int]] = field(default_factory=deque)

    def add(self, at: float, done: int, total: int) -> None:
        """A look at the job, ``at`` seconds on any steady clock.

        QEMU copies in bursts when it is held down, and counts after each: a look that shows
        nothing new says nothing. Before the first scan of the image the total is 0.
        """
        if not total or (self._samples and self._samples[-1][1:] == (done, total)):
            return
        self._samples.append((at, done, total))
        while len(self._samples) > 2 and at - self._samples[1][0] >= WINDOW:
            self._samples.popleft()
        began, done_then, total_then = self._samples[0]
        if (time := at - began) > 0:
            self.copy_rate = (done - done_then) / time
            self.dirty_rate = max(0, total - total_then) / time
        if time >= WINDOW:
            self._fastest = max(self._fastest, self.copy_rate)

    @property
    def left(self) -> int:
        """Bytes that are still to be copied."""
        if not self._samples:
            return 0
        _, done, total = self._samples[-1]
        return total - done

    def fits(self, pause: float) -> bool:
        """Could what is left be copied in half a pause of so many seconds?"""
        return self.left <= (self._fastest or ASSUMED_RATE) * pause / 2

    def tighten(self) -> bool:
        """Set a lower ``limit`` if the copy gains too little on the guest; was it lowered?"""
        if not self._samples:
            return False
        began, done, total = self._samples[0]
        gains = self.left <= ENOUGH * (total - done) or self.dirty_rate <= self.copy_rate / 2
        if gains or self._samples[-1][0] - began < WINDOW:
            return False
        slower = min(self.limit or self.dirty_rate, self.dirty_rate or LEAST_LIMIT) / 2
        lowered = max(LEAST_LIMIT, int(min(slower, self._fastest or slower)))
        if self.limit is not None and lowered >= self.limit:
            return False
        self.limit = lowered
        self._samples = deque([self._samples[-1]])
        return True
