"""--trace-config: its entries, what contradicts, and the extra that spans need."""

from __future__ import annotations

import sys

import pytest

from configs import tracing
from configs.server import ServerSettings
from configs.tracing import TraceConfig, parse

FILE = "triton,file=/t/trace.json"


def test_nothing_is_traced_unless_asked() -> None:
    assert parse(()) == TraceConfig()
    assert TraceConfig().level == () and TraceConfig().mode == "triton"


def test_every_entry_sets_what_it_names() -> None:
    given = ["rate=100", "count=5", "level=TENSORS", FILE, "triton,log-frequency=7"]
    assert parse([*given, "level=timestamps"]) == TraceConfig(
        level=("TIMESTAMPS", "TENSORS"), rate=100, count=5, file="/t/trace.json", log_frequency=7
    )
    given = ["mode=opentelemetry", "level=on", "opentelemetry,url=http://c:4318/v1/traces"]
    given += ["opentelemetry,resource=service.name=a=b", "opentelemetry,resource=k="]
    given += ["opentelemetry,bsp_schedule_delay=100", "opentelemetry,bsp_max_queue_size=9"]
    found = parse([*given, "opentelemetry,bsp_max_export_batch_size=9"])
    assert (found.mode, found.level) == ("opentelemetry", ("TIMESTAMPS",))
    assert found.url == "http://c:4318/v1/traces"
    assert found.resource == {"service.name": "a=b", "k": ""}
    assert found.bsp == {
        "bsp_schedule_delay": 100,
        "bsp_max_queue_size": 9,
        "bsp_max_export_batch_size": 9,
    }


def test_the_last_of_two_counts_and_levels_add_up() -> None:
    assert parse(["rate=1", "rate=2"]).rate == 2
    assert parse([FILE, "level=min", "level=TENSORS"]).level == ("TIMESTAMPS", "TENSORS")
    assert parse(["level=OFF"]).level == parse(["level=false"]).level == ()


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        (["nonsense"], "unknown 'nonsense'"),
        (["speed=1"], "unknown 'speed=1'; there are level, rate, count, mode, triton,file"),
        (["file=/x"], "unknown 'file=/x'"),
        (["triton,rate=1"], "unknown 'triton,rate=1'"),
        (["opentelemetry,bsp_colour=1"], "unknown"),
        (["level=LOUD"], "invalid value for trace level option: LOUD"),
        (["level=OFF", "level=TENSORS"], "level OFF stands alone"),
        (["mode=zipkin"], "mode is triton or opentelemetry, not 'zipkin'"),
        (["rate=x"], "rate is a number from 0 to 4294967295, not 'x'"),
        (["rate=-1"], "rate is a number"),
        (["rate=4294967296"], "rate is a number"),
        (["rate=" + "9" * 5000], "rate is a number"),
        (["count=-2"], "count is a number from -1 to 2147483647, not '-2'"),
        (["triton,log-frequency=1.5"], "triton,log-frequency is a number"),
        (["opentelemetry,bsp_max_queue_size=0"], "bsp_max_queue_size is a number from 1"),
        (["opentelemetry,url=collector:4318"], "no URL of http or https"),
        (["opentelemetry,url=http://h:99999/"], "no URL of http or https"),
        (["opentelemetry,resource=novalue"], "is KEY=VALUE, not 'novalue'"),
        (["level=TIMESTAMPS"], "trace file name is not given"),
        ([FILE, "level=TIMESTAMPS", "rate=0"], "sample rate must be non-zero"),
        (["mode=opentelemetry", "level=TENSORS"], "TENSORS is not supported by mode opentelemetry"),
    ],
)
def test_what_is_wrong_is_told_by_name(entries: list[str], text: str) -> None:
    with pytest.raises(ValueError, match=r"^trace_config: ") as caught:
        parse(entries)
    assert text in str(caught.value)


def test_only_what_clients_send_along_may_be_traced_in_mode_opentelemetry() -> None:
    assert parse(["mode=opentelemetry", "level=TIMESTAMPS", "rate=0"]).rate == 0


def test_the_settings_take_them_and_refuse_others() -> None:
    assert ServerSettings(model_repository=("m",), trace_config=("rate=2",)).trace_config
    with pytest.raises(ValueError, match="unknown 'speed=1'"):
        ServerSettings(model_repository=("m",), trace_config=("speed=1",))
    contradiction = ("mode=opentelemetry", "opentelemetry,bsp_max_queue_size=10")
    with pytest.raises(ValueError, match="bsp_max_export_batch_size is above"):
        ServerSettings(model_repository=("m",), trace_config=contradiction)


@pytest.mark.parametrize("missing", [tracing.EXPORTER, "opentelemetry.exporter.otlp"])
def test_without_the_extra_the_mode_is_refused(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ServerSettings(model_repository=("m",), trace_config=("mode=opentelemetry",))  # it is there
    for name in [each for each in sys.modules if each.startswith(missing)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=r"needs the extra 'otel': pip install"):
        ServerSettings(model_repository=("m",), trace_config=("mode=opentelemetry",))
    ServerSettings(model_repository=("m",), trace_config=("mode=triton",))
