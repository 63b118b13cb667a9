"""Queues filled by hand."""

from __future__ import annotations

from deployments.scheduler import BatchPolicy, Entry, Group

MS = 1_000_000


def limits(**changes):
    return BatchPolicy(
        **{
            "max_rows": 8,
            "merge": True,
            "preferred": (8,),
            "delay_ns": 0,
            "max_requests": 100,
            "max_queue_ns": 0,
            **changes,
        }
    )


def fill(scheduler, *rows, key="a", now=0):
    entries = [Entry(rows=count, key=key, queued_ns=now) for count in rows]
    for entry in entries:
        scheduler.add(entry)
    return entries


def take(scheduler, now=0) -> Group:
    step = scheduler.next(now)
    assert isinstance(step, Group), step
    return step


def rows_of(step):
    assert isinstance(step, Group), step
    return [entry.rows for entry in step.members]
