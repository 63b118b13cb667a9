"""Which names a header pattern chooses."""

from __future__ import annotations

import pytest

from configs.patterns import header_pattern


@pytest.mark.parametrize(
    ("pattern", "name", "chosen"),
    [
        ("my_header.*", "my_header_1", True),
        ("MY_HEADER.*", "my_header_1", True),
        ("my_header.*", "MY_HEADER_1", True),
        ("header", "my_header_1", True),
        ("^header", "my_header_1", False),
        ("^x-", "X-Tenant", True),
        ("(?-i)MY_HEADER.*", "my_header_1", False),
        ("(?-i)my_header.*", "my_header_1", True),
        ("(?-i)^X-", "x-tenant", False),
        ("tenant|trace", "x-trace-id", True),
        ("tenant|trace", "accept", False),
    ],
)
def test_names_are_searched_whatever_their_case(pattern, name, chosen):
    found = header_pattern(pattern)
    assert found is not None
    assert (found.search(name) is not None) == chosen


def test_nothing_is_no_pattern():
    assert header_pattern("") is None


@pytest.mark.parametrize("pattern", ["(", "*", "[a", "a{2,1}", "(?-i)(", "\\"])
def test_what_is_no_pattern_says_so(pattern):
    with pytest.raises(ValueError, match="is no regular expression: ") as caught:
        header_pattern(pattern)
    assert f"'{pattern}'" in str(caught.value)
