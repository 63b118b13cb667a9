from __future__ import annotations

from pathlib import Path

import pytest

from deployments.logbook import MAX_KEPT, Lines, Logbook


def test_lines_are_told_to_each_reader_once():
    lines = Lines()
    assert lines.since(0) == (0, ())
    lines.add("a")
    lines.add("b")
    assert lines.since(0) == (2, ("a", "b"))
    assert lines.since(1) == (2, ("b",))
    assert lines.since(2) == (2, ())


def test_only_the_last_lines_are_kept():
    lines = Lines()
    for number in range(MAX_KEPT + 3):
        lines.add(str(number))
    count, kept = lines.since(0)
    assert (count, len(kept), kept[0]) == (MAX_KEPT + 3, MAX_KEPT, "3")


def test_a_reader_of_an_earlier_one_starts_again():
    lines = Lines()
    lines.add("a")
    assert lines.since(7) == (1, ("a",))


def test_until_somebody_reads_lines_are_on_the_process_s_own_output(capfd):
    book = Logbook()
    book.write("early")
    assert capfd.readouterr().err == "early\n"
    assert book.since(0) == (1, ("early",))
    book.write("late")
    assert capfd.readouterr().err == ""
    assert book.since(1) == (2, ("late",))


def test_a_file_has_all_lines_and_is_added_to(tmp_path: Path, capfd):
    path = tmp_path / "manta.log"
    path.write_text("before\n")
    book = Logbook(str(path))
    book.write("é")
    assert path.read_text(encoding="utf-8") == "before\né\n"  # at once
    book.write("half \ud800 pair")
    book.close()
    assert path.read_text(encoding="utf-8").splitlines()[-1] == r"half \ud800 pair"
    assert book.since(0) == (0, ())
    assert capfd.readouterr().err == ""


def test_a_file_that_cannot_be_written_any_more_loses_no_line(tmp_path: Path, capfd):
    book = Logbook(str(tmp_path / "manta.log"))
    book.close()
    book.write("late")
    assert capfd.readouterr().err.startswith("late\nthe log file is not written: ")


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path):
    with pytest.raises(RuntimeError, match="log file '.*manta' cannot be written: Is a directory"):
        folder = tmp_path / "manta"
        folder.mkdir()
        Logbook(str(folder))
