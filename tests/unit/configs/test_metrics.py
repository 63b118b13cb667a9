"""--metrics-config and metric_tags: what is understood, and what is refused in which words."""

from __future__ import annotations

import pytest

from configs.errors import ConfigError
from configs.metrics import DEFAULT_QUANTILES, MetricsConfig, check_tags, parse
from configs.model import ModelConfig
from configs.pbtxt import parse as parse_pbtxt
from configs.pbtxt import to_json


def test_what_is_in_force_when_nothing_is_said():
    assert parse([]) == MetricsConfig()
    assert parse([]).counter_latencies
    assert parse([]).summary_quantiles == (0.5, 0.9, 0.95, 0.99, 0.999) == DEFAULT_QUANTILES


def test_entries_are_those_of_triton_and_the_last_one_counts():
    config = parse(
        [
            "counter_latencies=false",
            "summary_latencies=true",
            "histogram_latencies=1",
            "summary_quantiles=0.5:0.05,0.99:0.001",
            "histogram_latencies=False",
        ]
    )
    assert config == MetricsConfig(False, False, True, (0.5, 0.99))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("summary_latencies=perhaps", "is true or false, not 'perhaps'"),
        ("summary_latencies", "is true or false, not ''"),
        ("latencies=true", "unknown 'latencies=true'; there are counter_latencies"),
        ("summary_quantiles=0.5", "not '0.5'"),
        ("summary_quantiles=1.5:0.1", "not '1.5:0.1'"),
        ("summary_quantiles=0.5:nan", "not '0.5:nan'"),
        ("summary_quantiles=0.5:0.1,", "not ''"),
        ("summary_quantiles=" + ",".join(["0.5:0.1"] * 33), "more than 32"),
    ],
)
def test_refused(entry, reason):
    with pytest.raises(ValueError, match=reason):
        parse([entry])


@pytest.mark.parametrize("key", ["site", "a_1", "1"])
def test_tags_that_make_labels(key):
    check_tags(ModelConfig(metric_tags={key: "anything\n"}))


@pytest.mark.parametrize("key", ["", "_x", "a-b", "é", "a b", "a" * 65])
def test_tags_that_make_none(key):
    with pytest.raises(ConfigError, match="cannot be a label"):
        check_tags(ModelConfig(metric_tags={key: "x"}))


TEXT = """platform: 'pytorch_libtorch' max_batch_size: 1
input { name: 'x' data_type: TYPE_FP32 dims: 1 } output { name: 'y' data_type: TYPE_FP32 dims: 1 }
metric_tags { key: 'site' value: 'north' }"""


def test_tags_are_read_and_shown():
    config = parse_pbtxt(TEXT, "m/config.pbtxt", "m")
    assert config.metric_tags == to_json(config)["metric_tags"] == {"site": "north"}
    with pytest.raises(ConfigError, match=r"m/config.pbtxt:3: metric_tags"):
        parse_pbtxt(TEXT.replace("'site'", "'a site'"), "m/config.pbtxt", "m")
