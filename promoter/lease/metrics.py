"""What Prometheus is told of an agent, counted since it was started.

prometheus_client is loaded by the agent alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from promoter.lease.record import Said

HANDOVERS = (0.025, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)  # seconds
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Metrics:
    """One agent's."""

    def __init__(self) -> None:
        # The library gives this function no types. When a process began to count says nothing here.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._held = Gauge(
            "promoter_leases_held",
            "Disks that this host holds, or lent.",
            registry=self._registry,
        )
        self._age = Gauge(
            "promoter_heartbeat_age_seconds",
            "For how long this host's heartbeat in a pool has not moved.",
            ["pool"],
            registry=self._registry,
        )
        self._requests = Counter(
            "promoter_release_requests",
            "Release requests that came over the network, by what they were answered at last.",
            ["outcome"],
            registry=self._registry,
        )
        self._refusals = Counter(
            "promoter_refusals",
            "Refusals, each of which is in the audit log, or counted there in a flood.",
            registry=self._registry,
        )
        self._handovers = Histogram(
            "promoter_handover_seconds",
            "From a request's arrival until the disk was closed and free for who had sent it.",
            buckets=HANDOVERS,
            registry=self._registry,
        )
        for said in Said:
            self._requests.labels(said)

    def answered(self, said: Said, seconds: float) -> None:
        """A host that asked for a disk has its answer, ``seconds`` later."""
        self._requests.labels(said).inc()
        if said is Said.RELEASED:
            self._handovers.observe(seconds)

    def refused(self) -> None:
        """Somebody was refused."""
        self._refusals.inc()

    def shown(self, held: Iterable[object], ages: Mapping[Path, float]) -> bytes:
        """As Prometheus reads it; ``ages`` are seconds, by pool."""
        self._held.set(sum(1 for _ in held))
        self._age.clear()
        for pool, seconds in ages.items():
            self._age.labels(str(pool)).set(seconds)
        return generate_latest(self._registry)
