"""What `manta serve --help` prints: every option under tritonserver's headings, and its kind.

The options themselves are data of `flags`. Called by `cli`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping

from .flags import FLAGS, MEANINGLESS, REFUSED

WIDTH, INDENT = 100, 8
OWN = "Manta"
# tritonserver's headings, in its order: whole names, and beginnings of names that end in "-".
GROUPS: Mapping[str, tuple[str, ...]] = {
    "Server": ("id", "exit-timeout-secs"),
    "Logging": ("log-",),
    "Model Repository": (
        "model-store",
        "model-repository",
        "exit-on-error",
        "disable-auto-complete-config",
        "strict-model-config",
        "strict-readiness",
        "model-control-mode",
        "repository-poll-secs",
        "load-model",
        "model-load-thread-count",
        "model-load-retry-count",
        "model-namespacing",
        "model-config-name",
    ),
    "HTTP": ("allow-http", "http-", "reuse-http-port"),
    "GRPC": ("allow-grpc", "grpc-", "reuse-grpc-port"),
    "Sagemaker": ("allow-sagemaker", "sagemaker-"),
    "Vertex": ("allow-vertex-ai", "vertex-ai-"),
    "Metrics": ("allow-metrics", "allow-gpu-metrics", "allow-cpu-metrics", "metrics-"),
    "Tracing": ("trace-",),
    "Backend": ("backend-",),
    "Repository Agent": ("repoagent-",),
    "Response Cache": ("cache-", "response-cache-"),
    "Rate Limiter": ("rate-limit", "rate-limit-"),
    "Memory/Device Management": (
        "pinned-memory-pool-byte-size",
        "cuda-",
        "enable-peer-access",
        "min-supported-compute-capability",
        "buffer-manager-thread-count",
        "host-policy",
        "model-load-gpu-limit",
        "allow-client-shm",
    ),
}
# These begin like tritonserver's and are ours.
OURS = ("http-lane", "grpc-lane")
HEAD = """\
usage: manta serve [--option=value | --option value] ...

Options are tritonserver's, unless they stand under "Manta". Those marked (no effect) are accepted
and warned of once: what they set is not there. Those marked (refused) end the command, but for
values that ask for nothing."""


def usage() -> str:
    described = {name: flag.help for name, flag in FLAGS.items()}
    described |= {name: f"(no effect) {reason}" for name, reason in MEANINGLESS.items()}
    for name, refused in REFUSED.items():
        values = " or ".join(value or "an empty value" for value in refused.nothing)
        but = f"; {values} is accepted" if values else ""
        described[name] = f"(refused) {refused.reason}{but}"
    lines = [HEAD]
    for title in (*GROUPS, OWN):
        names = [name for name in described if group(name) == title]
        lines += ["", f"{title}:", *_entries(names, described)]
    return "\n".join(lines)


def group(name: str) -> str:
    """The heading of an option."""
    if name not in OURS:
        for title, members in GROUPS.items():
            if any(_belongs(name, member) for member in members):
                return title
    return OWN


def _belongs(name: str, member: str) -> bool:
    return name.startswith(member) if member.endswith("-") else name == member


def _entries(names: list[str], described: Mapping[str, str]) -> Iterator[str]:
    for name in names:
        yield f"  --{name}"
        yield textwrap.fill(
            described[name], WIDTH, initial_indent=" " * INDENT, subsequent_indent=" " * INDENT
        )
