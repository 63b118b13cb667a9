"""What a .pt or .pt2 file is, told from its zip listing and opcodes: nothing is unpickled or run.

Refuses by name what a loader cannot take, and says what to do instead. Called by the repository,
which tells engines by content, and by the runtimes. No torch.
"""

from __future__ import annotations

import json
import pickletools
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_PICKLE_LIMIT_BYTES = 64 << 20  # a data.pkl holds structure, not weights
# What reading an archive raises that is cut off, damaged, encrypted, or made so that it cannot be
# read.
UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError),
    *(ValueError, TypeError, AttributeError, IndexError),
)


@dataclass(frozen=True, slots=True)
class Archive:
    """`kind`: torchscript, module, state_dict, exported, aoti or unknown.

    `class_name` of a pickled module, `device` that an AOTI package was compiled for and the
    `metadata` of its model: the compiler's facts and what whoever compiled it has added.
    """

    kind: str
    class_name: str = ""
    device: str = ""
    models: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


def inspect(path: Path) -> Archive:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            legacy = file.read(2)[:1] == b"\x80"  # torch.save before its zip format
        return Archive("module") if legacy else Archive("unknown")
    try:
        with zipfile.ZipFile(path) as archive:
            return _look(archive)
    except UNREADABLE:
        return Archive("unknown")


def _look(archive: zipfile.ZipFile) -> Archive:
    names = {name.partition("/")[2]: name for name in archive.namelist()}
    packages = [name for name in names if name.startswith("data/aotinductor/")]
    if packages:
        return _aoti(archive, names, packages)
    programs = [name for name in names if name.startswith("models/")]
    if programs:
        models = (name.split("/")[1].removesuffix(".json") for name in programs)
        return Archive("exported", models=tuple(sorted(models)))
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return Archive("torchscript")
    if "data.pkl" in names:
        return _pickled(archive, names["data.pkl"])
    return Archive("unknown")


def _aoti(archive: zipfile.ZipFile, names: dict[str, str], packages: list[str]) -> Archive:
    models = tuple(sorted({name.split("/")[2] for name in packages}))
    metadata: dict[str, str] = {}
    for name in packages:
        if name.endswith("_metadata.json"):
            metadata |= json.loads(archive.read(names[name]))
    device = metadata.get("AOTI_DEVICE_KEY", "")
    return Archive("aoti", device=device, models=models, metadata=metadata)


def _pickled(archive: zipfile.ZipFile, name: str) -> Archive:
    """A state dict names only torch's own functions; a module names its class."""
    if archive.getinfo(name).file_size > _PICKLE_LIMIT_BYTES:
        return Archive("unknown")
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(archive.read(name)):
        if opcode.name == "GLOBAL":
            module, _, attribute = str(argument).partition(" ")
        elif opcode.name == "STACK_GLOBAL":
            module, attribute = [*strings, "", ""][:2] if len(strings) < 2 else strings[-2:]
        else:
            if "UNICODE" in opcode.name:
                strings.append(str(argument))
            continue
        root = module.partition(".")[0]
        if root not in ("torch", "collections") or module.startswith("torch.nn.modules"):
            return Archive("module", class_name=f"{module}.{attribute}")
    return Archive("state_dict")


def refuse_torchscript(archive: Archive) -> str:
    """Why this is no TorchScript and what to do; "" when it is, or may be."""
    named = f" of class '{archive.class_name}'" if archive.class_name else ""
    return {
        "module": f"this is a pickled module{named} from torch.save(model), which is not loaded: "
        "unpickling runs code. Save torch.jit.script(model).save('model.pt'), or put the class "
        "into model.py with runtime: \"model.py\" and torch.save(model.state_dict(), 'model.pt')",
        "state_dict": "this is a state dict, not TorchScript (it has no constants.pkl). Put the "
        'class into model.py beside it and set runtime: "model.py", or save '
        "torch.jit.script(model).save('model.pt')",
        "aoti": 'this is an AOT Inductor package: set platform: "torch_aoti"',
        "exported": 'this is a program from torch.export.save: set platform: "torch_export"',
    }.get(archive.kind, "")


def refuse_aoti(archive: Archive) -> str:
    """Why this is no AOTI package with a model named 'model'; "" when it is."""
    if archive.kind == "aoti":
        if "model" in archive.models:
            return ""
        return f"the package holds no model named 'model', only {', '.join(archive.models)}"
    if archive.kind == "exported":
        return (
            "this is a program from torch.export.save, not an AOT Inductor package: set "
            'platform: "torch_export"'
        )
    if archive.kind == "torchscript":
        return 'this is TorchScript: set platform: "pytorch_libtorch"'
    if archive.kind in ("module", "state_dict"):
        return "this is a pickle from torch.save, not an AOT Inductor package, and is not loaded"
    return "this is not an AOT Inductor package (not readable as a .pt2 archive)"


def refuse_exported(archive: Archive) -> str:
    """Why this is no program from torch.export.save with a model named 'model'; "" when it is."""
    if archive.kind == "exported":
        if "model" in archive.models:
            return ""
        return f"the archive holds no program named 'model', only {', '.join(archive.models)}"
    if archive.kind == "aoti":
        return 'this is an AOT Inductor package: set platform: "torch_aoti"'
    if archive.kind == "torchscript":
        return 'this is TorchScript: set platform: "pytorch_libtorch"'
    if archive.kind in ("module", "state_dict"):
        return "this is a pickle from torch.save, not one from torch.export.save, and is not loaded"
    return "this is not a program from torch.export.save (not readable as a .pt2 archive)"
