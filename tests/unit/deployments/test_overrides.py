"""Load requests that bring a configuration and files: what is refused, written, and removed."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from configs.server import ServerSettings
from deployments.errors import (
    Internal,
    InvalidArgument,
    MantaError,
    Unavailable,
    Unsupported,
)
from deployments.overrides import Overrides, check, size_bytes
from deployments.types import Override

MODEL = "file:1/model.pt"


def settings(**more):
    return ServerSettings(model_repository=("m",), allow_file_override=True, **more)


def test_what_is_good():
    for parameters in ({}, {"config": "{}"}, {"config": "{}", MODEL: b"x", "file:labels.txt": b""}):
        check("m", parameters, settings())
    check("m", {"config": "{}"}, ServerSettings(model_repository=("m",)))
    assert size_bytes({"config": "{}", MODEL: b"xyz"}) == 5


@pytest.mark.parametrize(
    ("parameters", "error", "text"),
    [
        ({"x": 1}, InvalidArgument, "unrecognized load parameter 'x'"),
        ({"config": b"{}"}, InvalidArgument, "'config', expected string_param"),
        ({"config": 1}, InvalidArgument, "'config', expected string_param"),
        ({"config": "{}", MODEL: "text"}, InvalidArgument, "expected bytes_param"),
        ({MODEL: b""}, Internal, "failed to load 'm', failed to poll from model repository"),
        ({"config": "{}", "file:../x": b""}, InvalidArgument, "must not leave"),
        ({"config": "{}", "file:/etc/x": b""}, InvalidArgument, "must not leave"),
        ({"config": "{}", "file:": b""}, InvalidArgument, "must not leave"),
        ({"config": "{}", MODEL: bytes(101)}, InvalidArgument, "exceed the maximum allowed"),
        ({"config": " " * (5 << 20)}, InvalidArgument, "config is larger than"),
        (
            {"config": "{}", **{f"file:1/{k}": b"" for k in range(1025)}},
            InvalidArgument,
            "at most 1024 files",
        ),
    ],
)
def test_what_is_refused(parameters, error, text):
    with pytest.raises(MantaError, match=text) as caught:
        check("m", parameters, settings(max_file_override_bytes=100))
    assert type(caught.value) is error


def test_files_are_off_unless_they_are_enabled():
    with pytest.raises(Unsupported) as caught:
        check("m", {"config": "{}", MODEL: b"x"}, ServerSettings(model_repository=("m",)))
    assert str(caught.value) == (
        "File overrides are disabled. Start the server with '--allow-file-override=true' to enable."
    )


def run(work):
    return asyncio.run(work)


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def there(override):
    return Path(override.folder).is_dir()


def test_files_are_written_where_nobody_else_can_look(tmp_path):
    async def main():
        kept = Overrides(str(tmp_path))
        made = await kept.make("m", {"config": "{}", MODEL: b"weights", "file:labels.txt": b"cat"})
        assert Path(made.folder).parent == tmp_path and made.config == "{}"
        assert stat.S_IMODE(os.stat(made.folder).st_mode) == 0o700
        assert files(made.folder) == {"m/1/model.pt": b"weights", "m/labels.txt": b"cat"}
        other = await kept.make("m", {"config": "{}", MODEL: b"other"})
        assert other.folder != made.folder
        assert (await kept.make("m", {"config": "{}"})).folder == ""

    run(main())


@pytest.mark.parametrize(
    "paths", [("1", "1/model.pt"), ("1/model.pt", "1"), ("1/a", "1/a/b/c"), ("1/a/b", "1/a")]
)
def test_a_file_where_a_folder_must_be_leaves_nothing_behind(tmp_path, paths):
    parameters = {"config": "{}", **{f"file:{path}": b"" for path in paths}}
    with pytest.raises(InvalidArgument, match="has the path of another's folder"):
        run(Overrides(str(tmp_path)).make("m", parameters))
    assert not list(tmp_path.iterdir())


def test_paths_are_checked_where_they_are_written_too(tmp_path):
    """Whoever called, and whatever links there are."""
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    for folder in (inner, outer):
        folder.mkdir()
    for path in ("../../outer/x", "/tmp/x", "1/../../../outer/x"):
        with pytest.raises(InvalidArgument):
            run(Overrides(str(inner)).make("m", {"config": "{}", f"file:{path}": b"x"}))
    assert not list(inner.iterdir()) and not list(outer.iterdir())


def test_a_folder_that_cannot_be_written_is_not_named(tmp_path):
    gone = tmp_path / "gone"
    with pytest.raises(Unavailable) as caught:
        run(Overrides(str(gone)).make("m", {"config": "{}", MODEL: b"x"}))
    assert str(tmp_path) not in str(caught.value)


def test_a_folder_goes_with_its_last_holder(tmp_path):
    async def main():
        kept = Overrides(str(tmp_path))
        made = await kept.make("m", {"config": "{}", MODEL: b"x"})  # held by the load
        kept.hold(made.folder)  # by a generation
        await kept.put("m", made)
        await kept.release(made.folder)  # the load is over
        assert kept.of("m") == made and kept.of("other") is None
        await kept.put("m", Override('{"max_batch_size": 1}'))
        assert there(made)  # the generation is still served
        await kept.release(made.folder)
        assert not there(made)
        await kept.put("m", None)
        assert kept.of("m") is None

    run(main())


def test_the_same_override_again_keeps_its_folder(tmp_path):
    async def main():
        kept = Overrides(str(tmp_path))
        made = await kept.make("m", {"config": "{}", MODEL: b"x"})
        await kept.put("m", made)
        await kept.put("m", made)
        await kept.release(made.folder)
        assert there(made)
        await kept.put("m", None)
        assert not there(made)

    run(main())


def test_at_the_end_no_folder_stays_and_no_other_goes(tmp_path):
    (tmp_path / "others").mkdir()

    async def main():
        kept = Overrides(str(tmp_path))
        await kept.make("m", {"config": "{}", MODEL: b"x"})
        await kept.make("n", {"config": "{}", MODEL: b"x"})
        kept.hold(str(tmp_path / "others"))  # as a report of a replica might say
        await kept.close()

    run(main())
    assert [path.name for path in tmp_path.iterdir()] == ["others"]
