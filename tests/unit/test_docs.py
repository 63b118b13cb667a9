"""The table of the PyTorch backend's rows: whole, and each proof is a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "pytorch-backend.md"
VERDICTS = {"same", "better", "different", "same, better"}

ROWS = """path choice; default files; field name; dir sniffing; allowed platforms;
cc_model_filenames; input naming; output naming; sequence, state, control; dict input; input count;
optional inputs; outputs allowed; output dims; output dtype; output index; response order;
AOTI names; RESULT; AOTI inputs; AOTI run checks; AOTI batching; AOTI sequence; types; scalars;
zero-size; ragged; bool params; INFERENCE_MODE; cuDNN, JIT flags; thread counts; AOTI params;
NUM_THREADS etc.; torch.compile; python class; default group; KIND_MODEL; strings; split error;
error scope; statistics; weight sharing; cache cleaning; state; init hook"""


def table() -> list[list[str]]:
    """The cells of each row."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[0] != "Triton"]


def functions(module: Path) -> set[str]:
    tree = ast.parse(module.read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in tree.body if isinstance(node, kinds)}


def test_every_row_is_there_once_with_a_verdict() -> None:
    features = [row[0] for row in table()]
    assert sorted(features) == sorted(" ".join(row.split()) for row in ROWS.split(";"))
    assert all(len(row) == 4 and row[1] in VERDICTS and row[2] for row in table())


def test_every_proof_is_a_test_that_exists() -> None:
    for row in table():
        proofs = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row[3])
        assert proofs and len(proofs) == row[3].count("::"), row
        for module, name in proofs:
            assert name in functions(TESTS / module), f"{row[0]}: {module}::{name}"


# --- docs/operations.md --------------------------------------------------------------------------

OPERATIONS = TESTS.parent / "docs" / "operations.md"
DIES = """a replica, of several; all replicas of a model; a replica hangs; Manta's Controller;
the fork server of a node; Serve's controller; Serve's proxy; the HAProxy of a Router;
the only Router; a Router, of two; a worker node; the head node (GCS), without Redis;
SIGTERM to `manta serve`"""
NAMED = r"`tests/([\w/]+\.py)::(test_\w+)`"


def failures() -> dict[str, list[str]]:
    """The other cells of each row, by what dies."""
    _, _, part = OPERATIONS.read_text().partition("| what dies |")
    lines = [line for line in part.splitlines()[2:] if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_every_failure_has_its_row_and_every_row_a_test() -> None:
    rows = failures()
    assert list(rows) == [" ".join(name.split()) for name in DIES.split(";")]
    for name, cells in rows.items():
        sees, lost, _, test = cells
        if name != "Serve's proxy":  # there is none
            assert sees and lost and re.search(NAMED, test), name


def test_every_test_that_operations_names_exists() -> None:
    named = re.findall(NAMED, OPERATIONS.read_text())
    assert len(named) > len(failures()) - 2
    for module, name in named:
        assert name in functions(TESTS / module), f"{module}::{name}"
