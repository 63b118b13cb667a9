"""What `manta serve` shows of a Controller, which here only answers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from cluster.foreground import say, show, where
from configs.server import ServerSettings


class Method:
    """As a method of a handle."""

    def __init__(self, answer: Any) -> None:
        self.remote = answer


class Controller:
    """Tells `told` and logs `logged`; `failed` once it has started. Cannot the first time."""

    def __init__(self, told: list[str], logged: list[str], failed: bool = False) -> None:
        self.told, self.logged, self.failed = told, logged, failed
        self.asked, self.closed = 0, False
        self.messages, self.log_lines = Method(self._messages), Method(self._log_lines)
        self.started, self.close = Method(self._started), Method(self._close)

    async def _messages(self, seen: int) -> tuple[int, tuple[str, ...]]:
        self.asked += 1
        if self.asked == 1:
            raise RuntimeError("it is starting")
        return len(self.told), tuple(self.told[seen:])

    async def _log_lines(self, seen: int) -> tuple[int, tuple[str, ...]]:
        return len(self.logged), tuple(self.logged[seen:])

    async def _started(self) -> tuple[bool, bool]:
        return True, self.failed

    async def _close(self) -> None:
        self.closed = True

    def done(self) -> bool:
        return self.asked >= 4


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("START_POLL_S", "MESSAGES_S"):
        monkeypatch.setattr(f"cluster.foreground.{name}", 0.0)


def settings(**more: Any) -> ServerSettings:
    return ServerSettings(model_repository=("m",), **more)


def run(controller: Controller, **more: Any) -> int:
    return asyncio.run(show(controller, settings(**more), controller.done))


def test_each_line_is_shown_once_where_it_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    controller = Controller(["model 'm' version 1 is READY"], ["I1125 one", "W1125 two"])
    assert run(controller) == 0 and controller.closed
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "manta: model 'm' version 1 is READY",
        "manta: ready on http 127.0.0.1:8000, grpc 127.0.0.1:8001, metrics 127.0.0.1:8002",
    ]
    assert shown.err.splitlines() == ["I1125 one", "W1125 two"]


@pytest.mark.parametrize(("stays", "code"), [(True, 0), (False, 1)])
def test_a_failed_start_ends_it_unless_it_need_not(stays: bool, code: int, capsys) -> None:
    controller = Controller([], [], failed=True)
    assert run(controller, exit_on_error=not stays) == code
    shown = capsys.readouterr()
    assert ("failed to load all models" in shown.err) is not stays
    assert ("ready on" in shown.out) is stays


@pytest.mark.parametrize("form", ["default", "json"])
def test_what_it_says_has_the_form_of_the_log(form: str, capsys) -> None:
    say(settings(log_format=form), "ready on http")
    said = capsys.readouterr().out
    if form == "json":
        assert json.loads(said)["message"] == "ready on http"
    else:
        assert said == "manta: ready on http\n"


def test_only_ports_that_are_open_are_named() -> None:
    assert where(settings(allow_grpc=False, allow_metrics=False)) == "ready on http 127.0.0.1:8000"
