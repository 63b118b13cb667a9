"""/openapi.json: validators take it, it has every route, and what it says is so."""

from __future__ import annotations

import gzip
import json
import re

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from configs.model import ModelConfig, ModelInput
from deployments import openapi_schemas, openapi_settings
from deployments.http_routes import MODEL, MODEL_ROUTES, ROUTES, UNSUPPORTED
from deployments.openapi import STATUSES, OpenApi
from deployments.openapi_operations import COMMON, OPERATIONS, TAGS
from deployments.openapi_schemas import request
from deployments.types import ModelState

from .serving import LocalGate, Server, config, echo, tensor

X = [[1.0, -2.0, 3.0, 0.5]]
JSON = "application/json"
SCHEMAS = {**openapi_schemas.SCHEMAS, **openapi_settings.SCHEMAS}


@pytest.fixture(scope="module")
def server():
    return Server()


@pytest.fixture(scope="module")
def document(server):
    return server.ask("GET", "/openapi.json").json()


def schema_of(document, content):
    """The schema of a JSON body, which is kept among the components."""
    name = content["content"][JSON]["schema"]["$ref"].rpartition("/")[2]
    return document["components"]["schemas"][name]


def infer_schemas(document, path):
    """Of the request and of its answer."""
    operation = document["paths"][path]["post"]
    return (
        schema_of(document, operation["requestBody"]),
        schema_of(document, operation["responses"]["200"]),
    )


def takes(schema, instance):
    return Draft202012Validator(schema).is_valid(instance)


# --- the document ----------------------------------------


def test_validators_take_it(document):
    validate(document)
    assert document["info"]["title"] == "Manta (triton)"


def table():
    """Method and path of every route, as OpenAPI writes paths."""
    rows = [*((m, path) for m, path, _ in (*ROUTES, *UNSUPPORTED))]
    rows += [(m, model + path) for m, path, _ in MODEL_ROUTES for model in MODEL]
    return {
        (method, re.sub(r":\w+}", "}", path))
        for methods, path in rows
        for method in methods.split()
    }


def test_every_route_is_there_and_no_other_one(server, document):
    described = {
        (method.upper(), path)
        for path, item in document["paths"].items()
        for method in item
        if method != "parameters"
    }
    models = {
        ("POST", f"/v2/models/{name}{version}/infer")
        for name in server.gates
        for version in ("", "/versions/1")
    }
    assert described == table() | models


def operations(document):
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if method != "parameters":
                yield path, method, operation


def test_operations_have_names_of_their_own_and_tags_that_are_told(document):
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(ids)) == len(ids)
    assert {tag for _, _, one in operations(document) for tag in one["tags"]} <= set(TAGS)
    assert {entry["name"] for entry in document["tags"]} == set(TAGS)


def test_what_is_said_of_an_endpoint_is_told_elsewhere():
    """No status and no schema without a description, none that nobody uses."""
    statuses = set(COMMON)
    schemas = {"Error"}
    for operation in OPERATIONS.values():
        statuses |= {*operation.answers, *operation.errors}
        for content in (operation.body or {}, *operation.answers.values()):
            schemas |= {name for name in content.values() if name}
    assert statuses <= set(STATUSES)
    assert schemas == set(SCHEMAS)


def test_parameters_are_those_of_the_path(document):
    for path, item in document["paths"].items():
        names = [one["name"] for one in item.get("parameters", ())]
        assert names == re.findall(r"{(\w+)}", path)


# --- what the server answers is what the document says ---

BODIES = (b"", b"{", b"[]", b"{}", gzip.compress(b"{}"))
VALUES = (
    {"model": "linear", "version": "1"},
    {"model": "nobody", "version": "1"},
    {"model": "linear", "version": "9"},
    {"model": "linear", "version": "99999999999999999999"},
    {"model": "linear", "version": "x"},
)


def asked(path, values):
    return re.sub(r"{(\w+)}", lambda found: values.get(found[1], "r"), path)


@pytest.mark.parametrize("closing", [False, True])
def test_every_status_is_described(closing):
    server = Server(model_control_mode="explicit")
    document = server.ask("GET", "/openapi.json").json()
    server.publish(closing=closing)
    seen = set()
    for path, method, operation in operations(document):
        if path.startswith("/v2/models/echo_"):
            continue  # each like any other
        for values in VALUES if "{" in path else VALUES[:1]:
            for body in BODIES if method == "post" else BODIES[:1]:
                headers = {"content-encoding": "gzip"} if body == BODIES[-1] else {}
                sent = {"content": body, "headers": headers}
                reply = server.ask(method.upper(), asked(path, values), **sent)
                told = operation["responses"].get(str(reply.status_code))
                assert told, f"{method} {path} {values} {body!r}: {reply.status_code}"
                seen.add(reply.status_code)
                if "$ref" in told:
                    name = told["$ref"].rpartition("/")[2]
                    told = document["components"]["responses"][name]
                kind = reply.headers.get("content-type", "").partition(";")[0]
                assert (kind in told.get("content", {})) or not reply.content
    assert seen >= ({200, 404, 500, 503} if closing else {200, 400, 404, 500, 501})


def test_answers_are_as_described(server, document):
    """Those that this server gives in whole."""
    for path, name in {
        "/v2": "ServerMetadata",
        "/v2/models/linear": "ModelMetadata",
        "/v2/models/linear/config": "ModelConfig",
        "/-/routes": "ServeRoutes",
        "/v2/models/stats": "Statistics",
    }.items():
        answer = server.ask("GET", path).json()
        assert takes(SCHEMAS[name], answer), path
    assert takes(SCHEMAS["RepositoryIndex"], server.ask("POST", "/v2/repository/index").json())
    assert takes(SCHEMAS["Error"], server.ask("GET", "/v2/nothing").json())
    assert not takes(SCHEMAS["ServerMetadata"], {"name": "triton"})


# --- models ----------------------------------------


def test_the_examples_run_and_their_answers_are_as_described(server, document):
    ran = 0
    for name in server.gates:
        path = f"/v2/models/{name}/infer"
        asks, answers = infer_schemas(document, path)
        Draft202012Validator.check_schema(asks)
        for example in asks.get("examples", ()):
            assert takes(asks, example) and takes(SCHEMAS["InferRequest"], example)
            reply = server.ask("POST", path, json=example)
            if name in ("failing", "crashing", "full"):
                continue
            assert reply.status_code == 200, reply.text
            assert takes(answers, reply.json()) and takes(SCHEMAS["InferResponse"], reply.json())
            ran += 1
    assert ran >= 14


def good():
    entry = {"name": "INPUT__0", "datatype": "FP32", "shape": [1, 4], "data": X}
    return {"inputs": [entry]}


def changed(**entry):
    body = good()
    body["inputs"][0].update(entry)
    return body


WRONG = [
    {},
    {"inputs": []},
    {"inputs": [*good()["inputs"], *good()["inputs"]]},
    changed(name="x"),
    changed(datatype="INT32"),
    changed(shape=[1, 3]),
    changed(shape=[4]),
    changed(shape=[9, 4]),
    changed(shape=[0, 4]),
    changed(shape=[1.5, 4]),
    changed(data=["a"]),
    {**good(), "outputs": [{"name": "x"}]},
    {**good(), "outputs": [{}]},
    {**good(), "id": 7},
    {**good(), "parameters": {"x": []}},
]


def test_a_models_schema_takes_what_the_server_takes_and_refuses_what_it_refuses(server, document):
    asks, _ = infer_schemas(document, "/v2/models/linear/versions/1/infer")
    assert asks["properties"]["inputs"]["items"]["anyOf"][0]["properties"]["shape"]["x-shape"] == [
        -1,
        4,
    ]
    right = [
        good(),
        changed(data=X[0]),
        changed(shape=[2, 4], data=[X, X]),
        {**good(), "id": "a", "outputs": [{"name": "OUTPUT__0"}], "parameters": {"own": True}},
    ]
    for bodies, status in ((right, True), (WRONG, False)):
        for body in bodies:
            assert takes(asks, body) == status, body
            reply = server.ask("POST", "/v2/models/linear/infer", json=body)
            assert reply.is_success == status, (body, reply.text)


@pytest.mark.parametrize(
    ("datatype", "right", "wrong"),
    [
        ("BOOL", [True], [1]),
        ("INT8", [-128, 127], [128]),
        ("UINT8", [255], [-1]),
        ("INT64", [-(2**63)], [2**63]),
        ("UINT64", [2**64 - 1], [2**64]),
        ("FP64", [1, 1.5], [True]),
        ("BYTES", ["a"], [1]),
    ],
)
def test_elements_are_of_their_datatype(datatype, right, wrong):
    one = ModelConfig(name="m", input=(ModelInput(name="X"),))
    entry = {"name": "X", "datatype": datatype, "shape": [-1]}
    schema = request(one, [entry], [])
    for data, valid in ((right, True), ([right], True), (wrong, False)):
        assert takes(schema, {"inputs": [{**entry, "shape": [len(data)], "data": data}]}) == valid


def test_half_precision_is_binary_only(document):
    asks, _ = infer_schemas(document, "/v2/models/echo_BF16/infer")
    entry = {"name": "X", "datatype": "BF16", "shape": [1, 2]}
    assert not takes(asks, {"inputs": [{**entry, "data": [1, 2]}]})
    assert takes(asks, {"inputs": [{**entry, "parameters": {"binary_data_size": 4}}]})
    assert "examples" not in asks


def test_optional_inputs_may_be_left_out():
    entries = [{"name": name, "datatype": "FP32", "shape": [1]} for name in ("a", "b")]
    inputs = (ModelInput(name="a"), ModelInput(name="b", optional=True))
    schema = request(ModelConfig(name="m", input=inputs), entries, [])
    first, second = ({**entry, "data": [0]} for entry in entries)
    for given, valid in (([first], True), ([first, second], True), ([second], False)):
        assert takes(schema, {"inputs": given}) == valid
    assert schema["examples"] == [{"inputs": [first]}]
    all_optional = ModelConfig(name="m", input=(ModelInput(name="a", optional=True),))
    Draft202012Validator.check_schema(request(all_optional, entries[:1], []))


def test_a_name_is_a_path_and_never_two_models_schema():
    names = ["a b", "a?b", "a_b", "ü", "{model}", "model"]
    server = Server()
    for name in names:
        one = config(name, [tensor("X", "TYPE_FP32", (1,))], [tensor("Y", "TYPE_FP32", (1,))])
        server.gates[name] = LocalGate(one, echo)
        server.versions.append(server.version(name))
    server.publish()
    document = server.ask("GET", "/openapi.json").json()
    validate(document)
    paths = ["a%20b", "a%3Fb", "a_b", "%C3%BC", "%7Bmodel%7D", "model"]
    for name, path in zip(names, paths, strict=True):
        asks, answers = infer_schemas(document, f"/v2/models/{path}/infer")
        reply = server.ask("POST", f"/v2/models/{path}/infer", json=asks["examples"][0])
        assert reply.json()["model_name"] == name
        assert answers["properties"]["model_name"] == {"const": name}
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(ids)) == len(ids)


def test_it_is_made_when_what_is_loaded_changes_and_not_before():
    server = Server()
    openapi = OpenApi(server.inference)
    first = openapi.document()
    server.publish()
    assert openapi.document() is first
    server.versions.append(server.version("linear", 2))
    server.publish()
    second = openapi.document()
    assert second.tag != first.tag
    document = json.loads(second.body)
    newest = document["paths"]["/v2/models/linear/infer"]["post"]
    assert newest["summary"] == "Run linear, version 2"
    for version in (1, 2):
        path = f"/v2/models/linear/versions/{version}/infer"
        answers = infer_schemas(document, path)[1]
        assert answers["properties"]["model_version"] == {"const": str(version)}
    server.versions.clear()
    server.publish()
    assert not [path for path in json.loads(openapi.document().body)["paths"] if "linear" in path]


@pytest.mark.parametrize(
    ("state", "there"),
    [(ModelState.READY, True), (ModelState.LOADING, True), (ModelState.UNAVAILABLE, False)],
)
def test_what_answers_is_there(state, there):
    """A version that loads anew is served by its old application."""
    server = Server()
    server.versions = [server.version("linear", 1, state)]
    server.publish()
    paths = json.loads(OpenApi(server.inference).document().body)["paths"]
    assert ("/v2/models/linear/versions/1/infer" in paths) == there
    reply = server.ask("POST", "/v2/models/linear/versions/1/infer", json=good())
    assert reply.is_success == there
