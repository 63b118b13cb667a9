"""Positions of fields in protobuf text."""

from __future__ import annotations

from tritonclient.grpc import model_config_pb2 as pb

from configs.lines import field_before, field_lines, line_of, tokens

TEXT = """name: "m"  # platform: "comment"
input [
  { name: "a { [" data_type: TYPE_FP32
    dims: [ 1,
            -1 ] },
  {
    name: "b"
    dims: 3
    dims: 4
    reshape { shape: [ ] } }
]
output < name: 'o' >
instance_group { gpus: 0 } instance_group: {
  gpus: [ 0, 1 ] }
parameters: { key: "K" value: { string_value: "multi"
  "part" } }
parameters { key: "L" value { string_value: "1" } }
"""


def _lines(text):
    return field_lines(text, pb.ModelConfig.DESCRIPTOR)


def test_every_style_of_text_format_is_located():
    lines = _lines(TEXT)
    expected = {
        "name": 1,
        "input": 2,
        "input[0]": 3,
        "input[0].data_type": 3,
        "input[0].dims[0]": 4,
        "input[0].dims[1]": 5,
        "input[1]": 6,
        "input[1].name": 7,
        "input[1].dims[1]": 9,
        "input[1].reshape.shape": 10,
        "output[0].name": 12,
        "instance_group[1].gpus[1]": 14,
        'parameters["K"]': 15,
        'parameters["L"]': 17,
    }
    assert {path: lines.get(path) for path in expected} == expected
    assert "platform" not in lines


def test_a_field_that_is_not_written_is_at_the_one_around_it():
    lines = _lines(TEXT)
    assert line_of(lines, "input[1].data_type") == 6
    assert line_of(lines, "input[7].dims") == 2
    assert line_of(lines, "max_batch_size") is None
    assert line_of(lines, None) is None


def test_the_field_that_was_being_written():
    def before(line, column):
        return field_before(TEXT, pb.ModelConfig.DESCRIPTOR, line, column)

    assert before(1, 1) == before(1, 7) == "name"
    assert before(3, 19) == before(3, 30) == "input[0].data_type"
    assert before(5, 13) == "input[0].dims[1]"
    assert before(99, 1) is not None
    assert field_before("", pb.ModelConfig.DESCRIPTOR, 1, 1) is None


def test_broken_text_is_scanned_as_far_as_it_goes():
    assert _lines("input { name: 'x'")["input[0].name"] == 1
    for text in ("}}}]]", "a" + "{b" * 2000, "input [[[", "::::", '"open', "input: -"):
        assert isinstance(_lines(text), dict)
    assert [t.line for t in tokens("a\n# c\n\nb")] == [1, 4]
