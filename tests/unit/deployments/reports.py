"""What a replica of the one version `m` 1 says of itself, in tests of those who hear it."""

from __future__ import annotations

from dataclasses import replace

from deployments.types import ReplicaReport
from tests import models

CONFIG = models.config({"x": [2]}, {"y": [2]})


def report(replica: str = "a", **changes: object) -> ReplicaReport:
    base = ReplicaReport(
        application="manta.m.1.7",
        deployment="m_0",
        replica_id=replica,
        node_id="n",
        pid=1,
        instances=1,
        device="cpu",
        fingerprint="h",
        config=CONFIG,
        loaded=True,
    )
    return replace(base, **changes)  # type: ignore[arg-type]
