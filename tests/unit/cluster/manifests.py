"""What the tests of manifests share: overlays, applied as Kustomize does, and strict schemas."""

from __future__ import annotations

import functools
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonpatch
import jsonschema
import yaml

ROOT = Path(__file__).parents[3]
CLUSTER = ROOT / "cluster"
OVERLAYS = ("dev", "gpu", "mig", "ha")
CRDS = {
    path.name.removesuffix(".yaml.xz").rpartition("-")[2]: path
    for path in sorted(Path(__file__).with_name("crds").glob("*.yaml.xz"))
}
# What `build` understands of a kustomization.yaml: anything else would be passed over in silence.
_KNOWN = {"apiVersion", "kind", "resources", "patches"}
_PATCH = {"path", "target"}


def build(folder: Path) -> list[dict[str, Any]]:
    """The documents of a kustomization: its resources, with its RFC 6902 patches applied."""
    index = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert index.keys() <= _KNOWN, f"{folder}: {index.keys() - _KNOWN}"
    documents: list[dict[str, Any]] = []
    for name in index["resources"]:
        path = (folder / name).resolve()
        if path.is_dir():
            # As Kustomize has it: no cycle, so an overlay never lies inside its base.
            assert path not in folder.resolve().parents
            documents += build(path)
        else:
            assert folder.resolve() in path.parents, f"{path} lies outside {folder}"
            documents += [d for d in yaml.safe_load_all(path.read_text()) if d]
    for patch in index.get("patches", []):
        assert patch.keys() == _PATCH
        operations = yaml.safe_load((folder / patch["path"]).read_text())
        places = [i for i, one in enumerate(documents) if _is(one, patch["target"])]
        assert len(places) == 1, f"{folder}: {patch['target']} is there {len(places)} times"
        documents[places[0]] = jsonpatch.apply_patch(documents[places[0]], operations)
    return documents


def _is(document: dict[str, Any], target: dict[str, str]) -> bool:
    group, _, version = document["apiVersion"].rpartition("/")
    facts = {
        "group": group,
        "version": version,
        "kind": document["kind"],
        "name": document["metadata"]["name"],
    }
    return all(facts[key] == value for key, value in target.items())


def rayservice(folder: Path) -> dict[str, Any]:
    [found] = [one for one in build(folder) if one["kind"] == "RayService"]
    return found


def groups(service: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and spec of the head and of each group of workers."""
    cluster = service["spec"]["rayClusterConfig"]
    yield "head", cluster["headGroupSpec"]
    for worker in cluster["workerGroupSpecs"]:
        yield worker["groupName"], worker


def container(group: dict[str, Any]) -> dict[str, Any]:
    [only] = group["template"]["spec"]["containers"]
    return dict(only)


def environment(one: dict[str, Any]) -> dict[str, str]:
    names = [entry["name"] for entry in one["env"]]
    assert len(names) == len(set(names))
    return {entry["name"]: entry["value"] for entry in one["env"]}


_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "k": 1e3, "M": 1e6, "G": 1e9, "m": 1e-3}


def quantity(text: str | int) -> float:
    """A quantity of Kubernetes, such as 500m or 2Gi, as a number."""
    for unit, factor in _UNITS.items():
        if str(text).endswith(unit):
            return float(str(text).removesuffix(unit)) * factor
    return float(text)


# --- schemas -------------------------------------------------------------------------------------


@functools.cache
def validator(version: str) -> jsonschema.Draft7Validator:
    """Of the CRD of this KubeRay release, strict: a field that it does not name is an error."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with lzma.open(CRDS[version]) as file:
        crd = yaml.load(file, Loader=loader)
    [v1] = [one for one in crd["spec"]["versions"] if one["name"] == "v1"]
    schema = strict(v1["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft7Validator(schema)


def errors(document: dict[str, Any], version: str) -> list[str]:
    found = validator(version).iter_errors(document)
    return [f"{'/'.join(map(str, one.absolute_path))}: {one.message[:200]}" for one in found]


def strict(schema: Any) -> Any:
    """A structural schema of Kubernetes as JSON Schema without room for unknown fields."""
    if not isinstance(schema, dict):
        return schema
    made = {k: v for k, v in schema.items() if not k.startswith("x-kubernetes-") and k != "format"}
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in made:
        made["properties"] = {name: strict(one) for name, one in made["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if key in made:
            made[key] = strict(made[key])
    for key in ("allOf", "anyOf", "oneOf"):
        if key in made:
            made[key] = [strict(one) for one in made[key]]
    if made.pop("nullable", False):
        return {"anyOf": [made, {"type": "null"}]}
    return made
