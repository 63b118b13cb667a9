"""Names of models and paths of files, as clients may give them: every form of a way out."""

from __future__ import annotations

import pytest

from deployments.errors import InvalidArgument
from deployments.names import check_file_path, check_model_name


@pytest.mark.parametrize(
    "name", ["model123", "model.version1", "...", "..my_model", "model..1", "größe", "a-b_c"]
)
def test_good_names(name):
    check_model_name(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "cannot be empty"),
        (" ", "cannot be empty"),
        *(
            (name, "must not contain path traversal characters")
            for name in ("..", ".", "../x", "a/../b", "../../etc/passwd", "m/..", "/etc/passwd",
                         "m/sub", "m/", " ..", ".. ", "a\\b")
        ),
        *((name, "must consist of") for name in ("%2e%2e%2f", "a\0b", "a\r\nb", "a b", "a\n")),
        ("x" * 256, "longer than 255 bytes"),
    ],
)  # fmt: skip
def test_bad_names(name, reason):
    with pytest.raises(InvalidArgument, match=reason):
        check_model_name(name)


@pytest.mark.parametrize(
    "path",
    ["1/model.pt", "labels.txt", "warmup/a b", "1/größe", "1/..x", "1/...", "a/" * 31 + "b"],
)
def test_good_paths(path):
    check_file_path(path)


@pytest.mark.parametrize(
    "path",
    ["", ".", "..", "/etc/passwd", "../x", "1/../../x", "1/..", "1/", "1//x", "./x"]
    + ["1\\..\\x", "a\0b", "a\r\nb", "1/ .. /x", "\ud800", "a/" * 32 + "b"],
)
def test_bad_paths(path):
    with pytest.raises(InvalidArgument, match="must be relative and must not leave the model's"):
        check_file_path(path)


def test_a_path_of_long_names_is_told_so_and_not_repeated():
    with pytest.raises(InvalidArgument, match="longer than 255 bytes") as caught:
        check_file_path("1/" + "x" * 5000)
    assert len(str(caught.value)) < 400
