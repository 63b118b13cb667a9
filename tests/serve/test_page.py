"""The page in headless Chromium, /openapi.json, and who may change a server: of a real server.

Nothing here runs an asyncio loop of its own: Playwright's runs in this thread.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from openapi_spec_validator import validate
from PIL import Image

from tests import models
from tests.serve import repository
from tests.serve.clients import rows
from tests.serve.conftest import BROKEN
from tests.serve.server import Server, wait_for

EVIL = "http://evil.example"
MARKUP = "<img src=x onerror=alert(1)>"


def post(server: Server, path: str, **options: Any) -> httpx.Response:
    return httpx.post(f"http://{server.http}{path}", timeout=120, **options)


# --- documents and the guard, without a browser -------------------------------------------------


def test_openapi_tells_of_what_is_loaded(server: Server) -> None:
    reply = server.get("/openapi.json")
    assert reply.status_code == 200
    document = reply.json()
    validate(document)
    assert document["info"]["title"] == "Manta (triton)"
    assert "/v2/models/mlp/versions/1/infer" in document["paths"]
    assert not [path for path in document["paths"] if any(name in path for name in BROKEN)]
    asks = document["components"]["schemas"]["mlp.1.request"]
    answer = post(server, "/v2/models/mlp/infer", json=asks["examples"][0]).json()
    with torch.inference_mode():
        expected = repository.mlp()(torch.zeros(1, 8)).numpy()
    np.testing.assert_allclose([answer["outputs"][0]["data"]], expected, atol=1e-5)


@pytest.mark.parametrize("path", ["/", "/openapi.json"])
def test_documents_over_a_real_connection(server: Server, path: str) -> None:
    with httpx.Client(base_url=f"http://{server.http}", timeout=60) as client:
        whole = client.get(path)
        head = client.head(path)
        again = client.get(path, headers={"if-none-match": whole.headers["etag"]})
        assert (whole.status_code, head.status_code, again.status_code) == (200, 200, 304)
        assert len(whole.content) == int(head.headers["content-length"])
        assert (head.content, again.content) == (b"", b"")
        assert client.get("/v2/health/live").status_code == 200  # on the same connection


def test_pages_of_other_sites_change_nothing(server: Server) -> None:
    """The name under which a page was opened helps it nothing: DNS rebinding."""
    load = "/v2/repository/models/spare/load"

    def spare() -> list[Any]:
        """Others may be on their way out."""
        return [m for m in post(server, "/v2/repository/index").json() if m["name"] == "spare"]

    def settled() -> list[Any]:
        """And so may versions of this one that others have loaded."""
        found = spare()
        return [] if "UNLOADING" in {entry.get("state") for entry in found} else found

    before = wait_for(settled, 90, "spare is not being unloaded")
    for headers in (
        {"origin": EVIL},
        {"origin": "null"},
        {"origin": EVIL, "host": "evil.example"},
    ):
        reply = post(server, load, headers=headers)
        assert reply.status_code == 403 and "may not change this server" in reply.json()["error"]
    assert spare() == before
    for headers in ({}, {"origin": f"http://{server.http}"}):
        assert post(server, load, headers=headers).status_code == 200
    assert post(server, "/v2/repository/models/spare/unload").status_code == 200


# --- the page -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def playground(server: Server, models_root: Path) -> Iterator[None]:
    """Models that give back what they get, whatever it is."""
    shapes = {"page_int64": ("TYPE_INT64", "-1"), "page_half": ("TYPE_FP16", "-1")}
    shapes |= {"page_brain": ("TYPE_BF16", "-1"), "page_image": ("TYPE_UINT8", "3, -1, -1")}
    for name, (data_type, dims) in shapes.items():
        models.save_torchscript(models.identity(), models_root, name)
        one = repository.tensor("x", dims, data_type)
        two = repository.tensor("OUTPUT__0", dims, data_type)
        note = repository.parameter("NOTE", MARKUP)
        repository.write_config(models_root, name, repository.config([one], [two], more=note))
        reply = post(server, f"/v2/repository/models/{name}/load")
        assert reply.status_code == 200, reply.text
    yield
    for name in shapes:
        post(server, f"/v2/repository/models/{name}/unload")
        shutil.rmtree(models_root / name)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no Chromium: Debian's package is called chromium")
    api = pytest.importorskip("playwright.sync_api")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    quiet += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with api.sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=chromium, args=quiet, timeout=120_000)
        yield one
        one.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The page, opened. What the browser complains of (a broken policy, say) is a failure."""
    context = browser.new_context()
    context.set_default_timeout(60_000)
    one = context.new_page()
    complaints: list[str] = []

    def listen(message: Any) -> None:
        # The status of an answer that is an error is no complaint.
        if message.type in ("error", "warning") and "Failed to load" not in message.text:
            complaints.append(message.text)

    one.on("console", listen)
    one.on("pageerror", lambda error: complaints.append(str(error)))
    one.goto(f"http://{server.http}/")
    yield one
    context.close()
    assert complaints == []


def eventually(locator: Any) -> Any:
    from playwright.sync_api import expect

    expect.set_options(timeout=60_000)
    return expect(locator)


def row(page: Any, name: str) -> Any:
    button = page.get_by_role("button", name=name, exact=True)
    return page.get_by_role("row").filter(has=button)


def choose(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()
    eventually(page.locator("#about")).not_to_be_empty()


def send(page: Any, data: str) -> None:
    page.get_by_label("Data", exact=False).first.fill(data)
    page.get_by_role("button", name="Infer", exact=True).click()
    eventually(page.locator("#progress")).to_contain_text("Answered")


def shown_as(page: Any, view: str) -> Any:
    page.get_by_label("Show as").select_option(view)
    return page.locator(".view")


def lines(page: Any) -> list[str]:
    text: str = shown_as(page, "text").locator("pre").inner_text()
    return text.split("\n")


def test_models_their_states_and_what_was_counted(page: Any, server: Server) -> None:
    eventually(page.locator("#health")).to_have_text("The server is ready.")
    eventually(page.locator("#server")).to_contain_text("triton")
    good, bad = row(page, "mlp"), row(page, "bad_field")
    eventually(good.locator(".state")).to_have_text("READY")
    eventually(good.locator(".version")).to_have_text("1")
    eventually(bad.locator(".state")).to_have_text("UNAVAILABLE")
    eventually(bad.locator(".reason")).to_contain_text("platfrm")
    body = {"inputs": [{"name": "INPUT__0", "datatype": "FP32", "shape": [1, 8], "data": [0] * 8}]}
    for _ in range(3):
        assert post(server, "/v2/models/mlp/infer", json=body).status_code == 200
    stats = server.get("/v2/models/mlp/stats").json()["model_stats"][0]
    count = stats["inference_stats"]["success"]["count"]
    assert count >= 3
    # By the page's own asking: it was open before.
    eventually(good.locator(".requests")).to_have_text(str(count))
    eventually(good.locator(".batch")).not_to_have_text("–")
    eventually(page.locator("#trouble")).to_be_empty()


def test_a_model_is_tried_by_keyboard(page: Any) -> None:
    page.get_by_role("button", name="mlp", exact=True).focus()
    page.keyboard.press("Enter")
    heading = page.get_by_role("heading", name="mlp, version 1")
    eventually(heading).to_be_focused()
    eventually(page.locator("#about")).to_contain_text("batches of up to 32 rows")
    x = rows(1, 8)
    page.keyboard.press("Tab")
    eventually(page.locator("summary")).to_be_focused()
    page.keyboard.press("Tab")
    eventually(page.get_by_label("Data")).to_be_focused()
    page.keyboard.press("Control+a")
    page.keyboard.insert_text(str(x.tolist()))
    page.keyboard.press("Tab")
    eventually(page.get_by_label("Shape")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    eventually(page.locator("#progress")).to_contain_text("Answered")
    with torch.inference_mode():
        expected = repository.mlp()(torch.from_numpy(x)).numpy()
    eventually(page.locator(".output h3")).to_have_text("OUTPUT__0 FP32 [1, 4]")
    eventually(page.get_by_label("Show as")).to_have_value("bar chart")
    for view in ("bar chart", "table"):
        cells = shown_as(page, view).locator("td.number").all_inner_texts()
        np.testing.assert_allclose([[float(cell) for cell in cells]], expected, rtol=1e-5)
    assert len(shown_as(page, "bar chart").locator(".bar").all()) == 4
    text = [[float(value) for value in line.split(", ")] for line in lines(page)]
    np.testing.assert_allclose(text, expected, rtol=1e-5)


def test_batches_and_empty_data(page: Any) -> None:
    choose(page, "mlp")
    x = rows(3, 8)
    send(page, str(x.ravel().tolist()))  # flat: the shape is worked out
    with torch.inference_mode():
        expected = repository.mlp()(torch.from_numpy(x)).numpy()
    eventually(page.locator(".output h3")).to_have_text("OUTPUT__0 FP32 [3, 4]")
    found = [[float(value) for value in line.split(", ")] for line in lines(page)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    page.get_by_label("Shape").fill("[2, 8]")
    send(page, "")  # zeros
    eventually(page.locator(".output h3")).to_have_text("OUTPUT__0 FP32 [2, 4]")


def test_strings(page: Any) -> None:
    choose(page, "strings")
    send(page, "Grüße\n" + MARKUP)
    assert lines(page) == ["Grüße!", MARKUP + "!"]
    send(page, '["a\\nb"]')
    assert lines(page) == ["a", "b!"]
    assert page.locator("img").count() == 0


def test_errors_are_told(page: Any) -> None:
    choose(page, "picky")
    alert = page.locator("#error")
    button = page.get_by_role("button", name="Infer", exact=True)
    for data, text in {
        "[1, 2, 3]": "x: 3 values do not fill the shape [1, 2]",
        "[1, two]": "x: the data is no array of values as in JSON",
        "[-1, 2]": "500: [request id: <id_unknown>]",
        "[1e999999, 2]": "",
    }.items():
        page.get_by_label("Data").fill(data)
        button.click()
        if text:
            eventually(alert).to_contain_text(text)
        else:
            eventually(page.locator("#progress")).to_contain_text("Answered")
            assert lines(page) == ["Infinity, 4"]
    row(page, "bad_name").get_by_role("button").click()
    eventually(alert).to_contain_text("Request for unknown model: 'bad_name'")
    eventually(page.get_by_role("button", name="Infer", exact=True)).to_be_hidden()


@pytest.mark.parametrize(
    ("model", "data", "answer"),
    [
        (
            "page_int64",
            "[9007199254740993, -9223372036854775808]",
            ["9007199254740993, -9223372036854775808"],
        ),
        (
            "page_half",
            "[1.5, -65504, 6e-8, 1e-9, 65520, NaN, 0.1]",
            ["1.5, -65504, 5.9605e-8, 0, Infinity, NaN, 0.099976"],
        ),
        ("page_brain", "[1.01, -3e38, -Infinity]", ["1.008, -3.004e+38, -Infinity"]),
    ],
)
def test_every_bit_arrives(
    page: Any, playground: None, model: str, data: str, answer: list[str]
) -> None:
    choose(page, model)
    send(page, data)
    assert lines(page) == answer


def test_an_integer_out_of_range_is_not_sent(page: Any, playground: None) -> None:
    choose(page, "page_int64")
    page.get_by_label("Data").fill("[9223372036854775808]")
    page.get_by_role("button", name="Infer", exact=True).click()
    eventually(page.locator("#error")).to_have_text("x: 9223372036854775808 is out of range")


def test_an_image_goes_in_and_comes_out(page: Any, playground: None) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    choose(page, "page_image")
    picture = {"name": "a.png", "mimeType": "image/png", "buffer": file.getvalue()}
    page.locator("input[type=file]").set_input_files(picture)
    page.get_by_role("button", name="Infer", exact=True).click()
    canvas = page.locator(".view canvas")
    eventually(page.get_by_label("Show as")).to_have_value("image")
    eventually(canvas).to_have_attribute("width", "8")
    eventually(canvas).to_have_attribute("aria-label", "OUTPUT__0 as an image")
    found = [[int(value) for value in line.split(", ")] for line in lines(page)]
    np.testing.assert_array_equal(found, pixels.transpose(2, 0, 1).reshape(18, 8))


def test_what_a_model_says_stays_text(page: Any, playground: None) -> None:
    choose(page, "page_image")
    page.get_by_text("Configuration", exact=True).click()
    eventually(page.locator("#config")).to_contain_text(MARKUP)
    assert page.locator("img").count() == 0


def test_a_model_has_an_address(page: Any, server: Server) -> None:
    page.goto(f"http://{server.http}/#/mlp/1")
    eventually(page.get_by_role("heading", name="mlp, version 1")).to_be_visible()
    page.goto(f"http://{server.http}/#/%E0%A4%A/1")
    eventually(page.locator("#model")).to_be_hidden()
    page.go_back()
    eventually(page.get_by_role("heading", name="mlp, version 1")).to_be_visible()


def test_light_and_dark(browser: Any, server: Server) -> None:
    for scheme, color in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 27)")):
        context = browser.new_context(color_scheme=scheme)
        one = context.new_page()
        one.goto(f"http://{server.http}/")
        eventually(one.locator("body")).to_have_css("background-color", color)
        context.close()


def test_it_asks_while_it_is_looked_at_and_not_told_to_stop(browser: Any, server: Server) -> None:
    """On a clock of the test's own; that the page is covered is told by its address."""
    url = f"http://{server.http}/"
    context = browser.new_context()
    covered = 'Object.defineProperty(document, "hidden", {get: () => location.hash === "#covered"})'
    context.add_init_script(covered)
    one = context.new_page()
    asked: list[str] = []
    one.on("request", lambda request: asked.append(request.url))
    one.clock.install()
    one.goto(url)

    def polls(tries: int) -> bool:
        """Within so many times of more than its pause."""
        eventually(row(one, "mlp")).to_be_visible()
        before = asked.count(f"{url}v2/repository/index")
        for _ in range(tries):
            one.clock.run_for(6_000)
            one.get_by_role("heading", name="Models").click()  # what was asked has been heard of
            if asked.count(f"{url}v2/repository/index") > before:
                return True
        return False

    assert polls(100)
    one.get_by_label("Update every 5 seconds").uncheck()
    assert not polls(4)
    one.get_by_label("Update every 5 seconds").check()
    assert polls(100)
    for address, wanted in (("#covered", False), ("#", True)):
        one.goto(url + address)
        one.locator("body").dispatch_event("visibilitychange")
        assert polls(100 if wanted else 4) == wanted
    context.close()
