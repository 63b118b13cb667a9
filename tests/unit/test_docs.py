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
