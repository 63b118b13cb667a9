"""Whether an archive of torch.export.save may be loaded: it must be data, and no code of its own.

torch.export.load unpickles, evaluates expressions and looks functions up by what the archive says.
Here every such text is looked at first, and what would need more than torch's own operators is
refused by name. Called by `exported.py`.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from configs.errors import ConfigError

_PROGRAM = "models/model.json"
_SAMPLE = "data/sample_inputs/model.pt"
_PAYLOADS = re.compile(r"data/(weights|constants)/model_\1_config\.json")
_PICKLED = re.compile(r"data/(weights|constants)/(.+\.pt|(custom|opaque)_obj_.*)")
_PLAIN = re.compile(r"(weight|tensor)_\d+")
_PARTS = re.compile(
    rf"{re.escape(_PROGRAM)}|{re.escape(_SAMPLE)}|{_PAYLOADS.pattern}"
    rf"|data/(weights|constants)/{_PLAIN.pattern}"
    r"|extra/.*|archive_format|archive_version|byteorder|version|\.\w+|\.data/\w+"
)

_OPERATOR = re.compile(
    r"torch\.ops\.(?!load_|import_|loaded_|_(?!quantized\.))(?!\w*__)\w+(\.(?!_?_?\w*__)\w+){1,2}"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_"
    r"|xor|lshift|rshift|getitem|index)"
    r"|math\.(?!_)\w+"
    r"|torch\.(sym_(int|float|max|min|not|sum|ite|sqrt)|_sym_sqrt)"
)
_REFUSED_OPERATORS = ("torch.ops.aten.from_file", "torch.ops.aten.save", "torch.ops.aten.load")
_NAME = re.compile(r"[A-Za-z_]\w*")
_PATH = re.compile(r"""[^'"\\\n\r(){}]*""")
_TREES = ("in_spec", "out_spec")
_NAMED = ("name", "forward_arg_names")
_PATHS = ("parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name", "fqn")

# What expressions of sizes may be made of.
_FUNCTIONS = frozenset(
    """Symbol Integer Float Rational Add Mul Pow Mod PythonMod FloorDiv CleanDiv CeilDiv
    ModularIndexing Where Max Min Eq Ne Lt Le Gt Ge And Or Not Piecewise ExprCondPair Abs
    IntTrueDiv FloatTrueDiv PowByNatural FloatPow LShift RShift CeilToInt FloorToInt TruncToFloat
    TruncToInt RoundToInt RoundDecimal ToFloat Identity IsNonOverlappingAndDenseIndicator
    OpaqueUnaryFn_sqrt floor ceiling sqrt max min abs int float""".split()
)
_CONSTANTS = frozenset("true false oo int_oo inf L math".split())
_OF_TENSORS = frozenset(("size", "stride", "storage_offset", "dim"))


def check(path: Path, where: str) -> None:
    """Raises ConfigError, whose file is `where`.

    The archive is read with torch's own reader: another one may find other records in it.
    """
    try:
        reason = _older(path) or _told(torch._C.PyTorchFileReader(str(path)))
    except (ValueError, AttributeError, TypeError, RuntimeError, zipfile.BadZipFile):
        reason = "the archive cannot be read"
    if reason:
        raise ConfigError(f"this program is not loaded: {reason}", file=where)


def _older(path: Path) -> str:
    """Where torch does not find what it looks for, it tries the form that it once had."""
    with zipfile.ZipFile(path) as archive:
        if "version" in archive.namelist():
            return "it has the form of torch 2.7, whose parts are pickles"
    return ""


def _told(reader: Any) -> str:
    """The first thing that is more than data; torch loads whatever program an archive holds."""
    for name in reader.get_all_records():
        if _PICKLED.fullmatch(name):
            return f"'{name}' is a pickle, and unpickling runs code"
        if not _PARTS.fullmatch(name):
            return f"'{name[:80]}' in it is not part of the program 'model'"
        if _PAYLOADS.fullmatch(name):
            for weight, facts in json.loads(reader.get_record(name)).get("config", {}).items():
                if facts.get("use_pickle") or not _PLAIN.fullmatch(facts["path_name"]):
                    return f"'{weight}' is a pickle, and unpickling runs code"
        if name == _SAMPLE:
            try:
                torch.load(io.BytesIO(reader.get_record(name)), weights_only=True)
            except Exception:  # whatever the unpickler finds: torch would go on without limits
                return "its sample inputs hold more than plain tensors; unpickling runs code"
    return next(_texts(json.loads(reader.get_record(_PROGRAM))), "")


def _texts(document: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with each text of the description that torch evaluates or looks up."""
    for guard in document.get("guards_code") or ():
        if not _harmless(guard, tensors=True):
            yield f"its guard '{guard[:80]}' is more than a comparison of sizes"
    for symbol in document.get("range_constraints") or {}:
        if not _harmless(symbol, tensors=False):
            yield f"its range of '{symbol[:80]}' is not that of a size"
    for key, value in _walk(document):
        if key == "expr_str" and not _harmless(value, tensors=False):
            yield f"its size '{str(value)[:80]}' is no expression of sizes"
        elif key in ("target", "as_operator") and not _is_operator(value):
            yield f"it calls '{str(value)[:80]}', which is none of torch's operators"
        elif key in _TREES and _imports(value):
            yield "the structure of its inputs or outputs names a module to import"
        elif key in _NAMED and not all(map(_is(_NAME), _strings(value))):
            yield f"'{str(value)[:80]}' is no name"
        elif key in _PATHS and not all(map(_is(_PATH), _strings(value))):
            yield f"'{str(value)[:80]}' is no name"


def _walk(node: Any) -> Iterator[tuple[str, Any]]:
    pending = [node]
    while pending:
        one = pending.pop()
        if isinstance(one, Mapping):
            yield from one.items()
            pending += one.values()
        elif isinstance(one, list):
            pending += one


def _imports(tree: Any) -> bool:
    """Whether a key in a structure is an Enum's, whose module torch would import."""
    contexts = [v for key, v in _walk(json.loads(tree) if tree else None) if key == "context"]
    for context in contexts:
        try:
            found = json.loads(context)
        except (TypeError, ValueError):
            continue  # torch reads it as JSON, or by a type's own reader
        if any(key == "__enum__" for key, _ in _walk(found)):
            return True
    return False


def _strings(value: Any) -> list[str]:
    listed = value if isinstance(value, list) else [value]
    return [one for one in listed if isinstance(one, str) and one]


def _is(pattern: re.Pattern[str]) -> Callable[[str], bool]:
    return lambda text: pattern.fullmatch(text) is not None


def _is_operator(target: Any) -> bool:
    text = str(target)
    return _OPERATOR.fullmatch(text) is not None and not text.startswith(_REFUSED_OPERATORS)


def _harmless(text: Any, tensors: bool) -> bool:
    """Whether evaluating `text` can do no more than arithmetic. `tensors`: L['x'].size() is one."""
    try:
        tree = ast.parse(str(text).strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(_plain(node, tensors) for node in ast.walk(tree))


def _plain(node: ast.AST, tensors: bool) -> bool:
    match node:
        case ast.Name():
            symbol = re.fullmatch(r"[a-z]{1,2}\d+", node.id) is not None
            return symbol or node.id in _FUNCTIONS or node.id in _CONSTANTS
        case ast.Constant():
            if isinstance(node.value, str):
                return re.fullmatch(r"[\w. :/-]*", node.value) is not None
            return isinstance(node.value, int | float)
        case ast.Attribute():
            of_math = isinstance(node.value, ast.Name) and node.value.id == "math"
            return tensors and (node.attr in _OF_TENSORS or of_math) and node.attr[0] != "_"
        case ast.Subscript():
            return tensors
        case ast.Call():
            return isinstance(node.func, ast.Name | ast.Attribute)
        case ast.Pow():
            return False  # 9**9**9**9
        case (
            ast.Expression() | ast.Load() | ast.BinOp() | ast.UnaryOp() | ast.BoolOp()
            | ast.Compare() | ast.IfExp() | ast.keyword() | ast.operator() | ast.unaryop()
            | ast.boolop() | ast.cmpop()
        ):  # fmt: skip
            return True
    return False
