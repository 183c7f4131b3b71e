"""The fleet page in a real browser: what it shows, that it lives, in light and dark, and for those who cannot see."""

import json
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from browser import Tab, open_browser
from modelexpress_harness import make_identity, make_worker, running_server
from ramet.srt.modelexpress.client.client import ModelExpressClient
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.server.server import ModelExpressServer
from ramet.srt.modelexpress.source_identity import CLAIM_PARAMETER
from ramet.srt.weights.report import LoadReport

SEED, CLIENT = "http://10.0.0.1:30000", "http://10.0.0.2:30000"
EVIL = "<img src=x onerror=alert(1)>"
FROM_FILES = LoadReport(source="checkpoint", num_bytes=2_000_000_000, seconds=4.0)
FROM_SEED = LoadReport(
    source="transfer_engine",
    num_bytes=2_000_000_000,
    seconds=0.5,
    verified=True,
    taken_from=("seed", "gone"),
    taken_bytes=(1_500_000_000,),
)


@pytest.fixture
async def tab(tmp_path: Path) -> AsyncIterator[Tab]:
    async with open_browser(tmp_path / "profile") as opened:
        yield opened


def publish_two(client: ModelExpressClient) -> str:
    """A seed that read its files, and a client that took its weights from it."""
    identity = make_identity(revision="0123456789abcdef")
    client.publish(identity, "client", make_worker(instance=CLIENT, host="node-b", started_at=2.0, load=FROM_SEED))
    source_id = client.publish(identity, "seed", make_worker(instance=SEED, started_at=1.0, load=FROM_FILES))
    client.update_status(source_id, "seed", 0, p2p_pb2.SOURCE_STATUS_READY, load=0.42)
    return source_id


def fetch_fleet(server: ModelExpressServer) -> dict[str, Any]:
    with urllib.request.urlopen(server.http_url + "/fleet.json", timeout=10) as answer:
        return json.load(answer)


def test_the_same_as_json(server: ModelExpressServer, client: ModelExpressClient) -> None:
    publish_two(client)
    claim = make_identity("org/other")
    claim.extra_parameters[CLAIM_PARAMETER] = "files"
    client.publish(claim, "claimant", make_worker(0, status=1, instance="http://10.0.0.3:30000"))
    client.publish(make_identity("org/old"), "silent", make_worker(age_s=95))
    fleet = fetch_fleet(server)
    assert [model["model_name"] for model in fleet["models"]] == ["org/model", "org/old"]
    assert fleet["models"][1]["instances"][0]["workers"][0]["status"] == "SILENT"
    assert [(claim["model_name"], claim["instance"]) for claim in fleet["claims"]] == [
        ("org/other", "http://10.0.0.3:30000")
    ]
    seed, grown = fleet["models"][0]["instances"]
    assert (seed["name"], grown["name"], grown["host"]) == (SEED, CLIENT, "node-b")
    assert seed["workers"][0]["load"] == pytest.approx(0.42)
    taking = grown["workers"][0]["taking"]
    assert taking["gb_per_s"] == 4.0 and taking["verified"]
    assert taking["taken_from"] == [
        {"worker_id": "seed", "instance": SEED, "worker_rank": 0, "num_bytes": 1_500_000_000},
        {"worker_id": "gone", "instance": "", "worker_rank": None, "num_bytes": None},
    ]


async def test_who_took_from_whom(server: ModelExpressServer, client: ModelExpressClient, tab: Tab) -> None:
    publish_two(client)
    await tab.open(server.http_url + "/")
    await tab.wait_for("document.querySelectorAll('tbody').length === 2")
    rows = await tab.evaluate(
        "[...document.querySelectorAll('tbody')].map(body => body.innerText.replace(/\\s+/g, ' '))"
    )
    assert rows[0].startswith("10.0.0.1:30000 0 cpu ● ready") and "42 %" in rows[0]
    assert "files" in rows[0] and "2.00 GB 4.00 s 0.500 GB/s" in rows[0]
    assert "10.0.0.2:30000 node-b 0 cpu ● ready" in rows[1]
    assert "10.0.0.1:30000 rank 0, an instance that has gone over the network, checked" in rows[1]
    assert "2.00 GB 500 ms 4.00 GB/s" in rows[1]
    assert "revision 0123456789ab" in await tab.text()
    assert tab.problems == []


async def test_it_lives(server: ModelExpressServer, client: ModelExpressClient, tab: Tab) -> None:
    await tab.open(server.http_url + "/")
    await tab.wait_for("document.body.innerText.includes('No instance has published anything yet')")
    source_id = publish_two(client)
    await tab.wait_for("document.querySelectorAll('tbody').length === 2")
    client.update_status(source_id, "seed", 0, p2p_pb2.SOURCE_STATUS_STALE)
    await tab.wait_for("document.querySelector('tbody').innerText.includes('stale')")
    await tab.evaluate("byId('filter-box').value = 'node-b'; byId('filter-box').dispatchEvent(new Event('input'))")
    assert await tab.evaluate("document.querySelectorAll('tbody').length") == 1
    await tab.evaluate("byId('filter-box').value = 'zzz'; byId('filter-box').dispatchEvent(new Event('input'))")
    assert "Nothing matches the filter" in await tab.text()
    server.close()
    await tab.wait_for("byId('live').innerText.startsWith('no answer from the server')")


async def test_names_from_the_network_are_text(
    server: ModelExpressServer, client: ModelExpressClient, tab: Tab
) -> None:
    facts = LoadReport(source=EVIL, num_bytes=1, seconds=0.0, fallback_reason=EVIL)
    client.publish(
        make_identity(EVIL, revision=EVIL, quantization=EVIL),
        EVIL,
        make_worker(instance=EVIL, host=EVIL, load=facts),
    )
    await tab.open(server.http_url + "/")
    await tab.wait_for("document.querySelectorAll('tbody').length === 1")
    assert await tab.evaluate("document.querySelectorAll('main img').length") == 0
    assert EVIL in await tab.text()
    assert tab.problems == []


CONTRAST = """
(() => {
  const parse = (color) => color.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = (color) => parse(color).map((c) => linear(c / 255)).reduce(
    (sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if (!color.endsWith(", 0)") && color !== "transparent") return color;
    }
    return "rgb(255, 255, 255)";
  };
  let worst = 99, where = "";
  for (const node of document.querySelectorAll("body *")) {
    if (![...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim())) continue;
    if (!node.getClientRects().length || node.closest("script, style, noscript")) continue;
    const pair = [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < worst) { worst = ratio; where = node.className + ":" + node.innerText; }
  }
  return [worst, where];
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_can_be_read(server: ModelExpressServer, client: ModelExpressClient, tab: Tab, scheme: str) -> None:
    """All text has a contrast of 4.5 to what is behind it, as WCAG AA asks, whatever the status."""
    publish_two(client)
    for status in range(4):
        client.publish(make_identity(), f"w{status}", make_worker(status=status, instance=f"i{status}"))
    client.publish(make_identity(), "silent", make_worker(age_s=95, instance="silent", load=FROM_FILES))
    await tab.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    await tab.open(server.http_url + "/")
    await tab.wait_for("document.querySelectorAll('tbody').length === 7")
    background = await tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(background) < 60) == (scheme == "dark")
    ratio, where = await tab.evaluate(CONTRAST)
    assert ratio >= 4.5, where


async def test_it_has_names_and_headers(server: ModelExpressServer, client: ModelExpressClient, tab: Tab) -> None:
    """What a screen reader gets: a captioned table with header cells, named controls, and nothing by colour alone."""
    publish_two(client)
    await tab.open(server.http_url + "/")
    await tab.wait_for("document.querySelectorAll('tbody').length === 2")
    tree = (await tab.send("Accessibility.getFullAXTree"))["nodes"]
    names = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]}
    assert ("searchbox", "Filter models and instances") in names
    assert ("heading", "Ramet fleet") in names and ("heading", "org/model") in names
    assert ("table", "Instances of org/model") in names
    assert {"Instance", "Status", "Weights from", "Rate"} <= {name for role, name in names if role == "columnheader"}
    assert [name for role, name in names if role == "rowheader" and "10.0.0.2:30000" in name]
    assert await tab.evaluate("document.documentElement.lang") == "en"
    await tab.send("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    assert await tab.evaluate("document.documentElement.scrollWidth <= 390")


async def test_a_token_is_asked_for(tmp_path: Path, tab: Tab) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("secret\n")
    with running_server(auth_token_file=str(token_file)) as server:
        environ = {"MX_AUTH_TOKEN_PATH": str(token_file)}
        with ModelExpressClient(server.address, environ=environ) as client:
            publish_two(client)
        await tab.open(server.http_url + "/")
        await tab.wait_for("byId('token')")
        assert "org/model" not in await tab.text()
        await tab.evaluate("byId('token').value = 'wrong'; byId('token').form.requestSubmit()")
        await tab.wait_for("document.body.innerText.includes('does not accept this token')")
        await tab.evaluate("byId('token').value = 'secret'; byId('token').form.requestSubmit()")
        await tab.wait_for("document.querySelectorAll('tbody').length === 2")
