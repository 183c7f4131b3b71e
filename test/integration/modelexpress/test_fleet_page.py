"""The fleet page in a real browser: what it shows, that it lives, in light and dark, and for those who cannot see."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
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
ROWS = "[...document.querySelectorAll('tbody')].map((body) => body.innerText.replace(/\\s+/g, ' '))"
TOTALS = "[...byId('totals').children].map((one) => [...one.children].map((part) => part.innerText))"


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


def publish_wave(client: ModelExpressClient) -> None:
    """A seed, a clone of it, and much later another one, whose seed has ended meanwhile."""
    now = time.time()
    first = {"instance": SEED, "host": "node-a", "started_at": 1.0, "load": FROM_FILES, "loaded_at": now - 200}
    client.publish(make_identity(), "seed", make_worker(**first))
    taken = msgspec.structs.replace(FROM_SEED, taken_from=("seed",), taken_bytes=(2_000_000_000,))
    clone = {"instance": CLIENT, "started_at": 2.0, "load": taken, "loaded_at": now - 197, "weight_version": "v2"}
    client.publish(make_identity(), "clone", make_worker(**clone))


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
    rows = await tab.evaluate(ROWS)
    assert rows[0].startswith("10.0.0.1:30000 version default metrics 0 cpu ● ready") and "42 %" in rows[0]
    assert "from files" in rows[0] and "2.00 GB 4.00 s 0.500 GB/s" in rows[0]
    assert "10.0.0.2:30000 host node-b version default metrics 0 cpu ● ready" in rows[1]
    assert "10.0.0.1:30000 rank 0, an instance that has gone over the network, checked" in rows[1]
    assert "2.00 GB 500 ms 4.00 GB/s" in rows[1]
    assert "revision 0123456789ab" in await tab.text()
    assert tab.problems == []


async def test_who_took_from_whom_over_time(server: ModelExpressServer, client: ModelExpressClient, tab: Tab) -> None:
    """Also of weights that were replaced meanwhile, and a wave of loads at a time."""
    publish_wave(client)
    await tab.open(server.http_url + "/")
    await tab.wait_for("document.querySelectorAll('.bars li').length === 2")
    first, second = await tab.evaluate("[...document.querySelectorAll('.bars li')].map((one) => one.innerText)")
    assert "10.0.0.1:30000" in first and "from files" in first and "2.00 GB · 4.00 s · 0.500 GB/s" in first
    assert "10.0.0.2:30000" in second and "← 10.0.0.1:30000 (2.00 GB)" in second
    assert "2.00 GB · 500 ms · 4.00 GB/s" in second and "over the network, checked · version v2" in second
    bars = await tab.evaluate("[...document.querySelectorAll('.bar')].map((bar) => [bar.style.left, bar.style.width])")
    lefts, widths = zip(*([float(text.rstrip("%")) for text in bar] for bar in bars), strict=True)
    assert lefts[0] == 0 and lefts[1] == pytest.approx(100 * 6.5 / 7, abs=0.1)
    assert widths == pytest.approx((100 * 4 / 7, 100 * 0.5 / 7), abs=0.1)
    assert await tab.evaluate("document.querySelectorAll('.links path').length") == 1
    client.publish(
        make_identity(),
        "clone",
        make_worker(instance=CLIENT, started_at=2.0, load=FROM_FILES, loaded_at=time.time(), weight_version="v3"),
    )
    await tab.wait_for("document.querySelector('#timeline').innerText.includes('1 load, 2.00 GB')")
    assert "version v3" in await tab.evaluate("byId('timeline').innerText")
    await tab.evaluate("document.querySelector('[aria-label=\"Earlier loads\"]').click()")
    assert "2 loads, 4.00 GB" in await tab.evaluate("byId('timeline').innerText")
    with urllib.request.urlopen(server.http_url + "/loads.json?after=2", timeout=10) as answer:
        (load,) = json.load(answer)["loads"]
    assert (load["instance"], load["weight_version"]) == (CLIENT, "v3")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(server.http_url + "/loads.json?after=-1", timeout=10)
    assert tab.problems == []


def test_the_ranks_of_all_nodes_are_one_instance(server: ModelExpressServer, client: ModelExpressClient) -> None:
    """Nodes start one after the other, and a replica has the same shard ranks as the others."""
    for world_rank, status in enumerate((2, 2, 1, 2)):
        worker = make_worker(status=status, instance=SEED, started_at=1.0 + world_rank, world_rank=world_rank)
        worker.worker_rank = world_rank % 2
        client.publish(make_identity(), f"w{world_rank}", worker)
    (instance,) = fetch_fleet(server)["models"][0]["instances"]
    assert sorted(worker["world_rank"] for worker in instance["workers"]) == [0, 1, 2, 3]
    assert (instance["status"], instance["started_at"]) == ("INITIALIZING", 1.0)


async def test_the_dead_do_not_count(server: ModelExpressServer, client: ModelExpressClient, tab: Tab) -> None:
    """Neither those that ended, nor those that missed their beats, nor who was there before at the same address."""
    publish_two(client)
    often = {"heartbeat_s": 3.0, "started_at": 3.0}
    client.publish(make_identity(), "mute", make_worker(age_s=11, instance="http://10.0.0.3:1", **often))
    client.publish(make_identity(), "late", make_worker(age_s=7, instance="http://10.0.0.4:1", **often))
    client.publish(make_identity(), "other", make_worker(age_s=30, instance="http://10.0.0.5:1"))  # says not how often
    before = make_worker(age_s=1, instance=CLIENT, started_at=1.0)  # killed a second ago, and started anew
    client.publish(make_identity(revision="0123456789abcdef"), "before", before)
    await tab.open(server.http_url + "/")
    await tab.wait_for("document.querySelector('.SILENT')")
    totals = dict(await tab.evaluate(TOTALS))
    assert (totals["instances"], totals["silent"], totals["ranks ready"]) == ("4", "1", "4 of 4")
    statuses = {one["name"]: one["status"] for model in fetch_fleet(server)["models"] for one in model["instances"]}
    assert statuses["http://10.0.0.3:1"] == "SILENT" and statuses["http://10.0.0.4:1"] == "READY"
    assert "1 stale: ended, asleep, or changing their weights" in await tab.text()


async def test_nothing_is_wider_than_the_page(server: ModelExpressServer, client: ModelExpressClient, tab: Tab) -> None:
    """At a desk, on a tablet and on a telephone, with names as long as they come."""
    publish_two(client)
    publish_wave(client)
    name = "organisation/" + "a-model-with-a-very-long-name-" * 4
    worker = make_worker(status=1, instance=f"http://{'a' * 60}.{'b' * 60}:30000", host="h" * 90, load=FROM_SEED)
    client.publish(make_identity(name, revision="f" * 40), "long", worker)
    await tab.open(server.http_url + "/")
    await tab.wait_for("document.querySelectorAll('tbody').length === 5")
    await tab.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    for width in (1280, 1051, 820, 390, 320):
        await tab.set_width(width)
        assert await tab.too_wide() == [], width


async def test_many_instances_are_drawn_as_they_are_asked_for(
    server: ModelExpressServer, client: ModelExpressClient, tab: Tab
) -> None:
    for index in range(60):
        client.publish(make_identity(), f"w{index}", make_worker(instance=f"http://10.0.0.{index}:1", host=f"n{index}"))
    await tab.open(server.http_url + "/")
    await tab.wait_for("document.querySelectorAll('tbody').length === 50")
    assert dict(await tab.evaluate(TOTALS))["instances"] == "60"
    await tab.evaluate("document.querySelector('.model .more').click()")
    assert await tab.evaluate("document.querySelectorAll('tbody').length") == 60
    assert await tab.evaluate("document.querySelector('.model .more')") is None


async def test_only_web_addresses_become_links(
    server: ModelExpressServer, client: ModelExpressClient, tab: Tab
) -> None:
    for index, name in enumerate(("javascript:alert(1)", "worker-7", "data:text/html,x", "https://10.0.0.1:3/")):
        client.publish(make_identity(), f"w{index}", make_worker(instance=name))
    await tab.open(server.http_url + "/")
    await tab.wait_for("document.querySelectorAll('tbody').length === 4")
    links = await tab.evaluate("[...document.querySelectorAll('tbody a')].map((link) => link.href)")
    assert links == ["https://10.0.0.1:3/metrics"]


async def test_it_lives(server: ModelExpressServer, client: ModelExpressClient, tab: Tab) -> None:
    await tab.open(server.http_url + "/")
    await tab.wait_for("document.body.innerText.includes('No instance has published anything yet')")
    source_id = publish_two(client)
    await tab.wait_for("document.querySelectorAll('tbody').length === 2")
    client.update_status(source_id, "seed", 0, p2p_pb2.SOURCE_STATUS_STALE)
    await tab.wait_for("document.querySelector('.stale-ones summary')?.innerText.startsWith('1 stale')")
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
    publish_wave(client)
    await tab.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    await tab.open(server.http_url + "/")
    await tab.wait_for("document.querySelectorAll('tbody').length === 8 && document.querySelector('.stale-ones')")
    await tab.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert await tab.evaluate("document.querySelectorAll('.bars li').length") == 2
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


SET = "document.querySelector('[aria-label=\"Set the version of org/model\"]').click()"
SAID = "document.querySelector('dialog [role=status]').innerText"


def targets(server: ModelExpressServer, token: str = "") -> list[dict[str, Any]]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(server.http_url + "/fleet/targets", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


async def fill(tab: Tab, version: str, share: int) -> None:
    """Type into the dialog as somebody does who has opened it, and send it."""
    assert await tab.evaluate("document.activeElement.name") == "version"
    await tab.send("Input.insertText", text=version)
    await tab.evaluate(f"document.querySelector('dialog [name=share]').value = '{share}'")
    for kind in ("rawKeyDown", "char", "keyUp"):
        await tab.send(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
        )


async def test_a_target_is_set_and_cleared(server: ModelExpressServer, client: ModelExpressClient, tab: Tab) -> None:
    publish_two(client)
    await tab.set_width(360)
    await tab.open(server.http_url + "/")
    await tab.wait_for("document.querySelectorAll('tbody').length === 2")
    await tab.evaluate(SET)
    assert await tab.too_wide() == []
    tree = (await tab.send("Accessibility.getFullAXTree"))["nodes"]
    names = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]}
    assert {("dialog", "Version of org/model"), ("button", "Set target"), ("button", "No target")} <= names
    assert any("Version that all instances shall serve" in name for _, name in names)
    await fill(tab, "", 50)
    assert await tab.evaluate("Boolean(document.querySelector('dialog :invalid'))") and targets(server) == []
    await fill(tab, "step-7", 50)
    await tab.wait_for(f"{SAID} === 'Target step-7: at least 50 % go on serving.'")
    (state,) = targets(server)
    assert (state["model"], state["target"]["version"], state["target"]["min_serving"]) == ("org/model", "step-7", 0.5)
    await tab.wait_for("!document.querySelector('dialog')")
    await tab.wait_for("document.querySelector('.head').innerText.includes('target step-7')")
    await tab.evaluate(SET)
    await tab.evaluate(
        "[...document.querySelectorAll('dialog button')].find((one) => one.innerText === 'No target').click()"
    )
    await tab.wait_for(f"{SAID} === 'There is no target any more.'")
    assert "version" not in targets(server)[0]["target"]
    await tab.wait_for("!document.querySelector('.head').innerText.includes('target')")
    assert tab.problems == []


async def test_who_may_not_set_a_target_is_told(tmp_path: Path, tab: Tab) -> None:
    """The page's token is the one that is needed, also when the server has another one by now."""
    token_file = tmp_path / "token"
    token_file.write_text("secret\n")
    with running_server(auth_token_file=str(token_file)) as server:
        with ModelExpressClient(server.address, environ={"MX_AUTH_TOKEN_PATH": str(token_file)}) as client:
            publish_two(client)
        await tab.open(server.http_url + "/")
        await tab.wait_for("byId('token')")
        await tab.evaluate("byId('token').value = 'secret'; byId('token').form.requestSubmit()")
        await tab.wait_for("document.querySelectorAll('tbody').length === 2")
        await tab.evaluate(SET)
        await fill(tab, "step-7", 75)
        await tab.wait_for(f"{SAID} === 'Target step-7: at least 75 % go on serving.'")
        await tab.wait_for("!document.querySelector('dialog')")
        await tab.evaluate(f"sessionStorage.setItem(TOKEN, 'old'); {SET}")
        await fill(tab, "step-8", 75)
        await tab.wait_for(f"{SAID} === 'Nothing has changed: a valid bearer token is required'")
        assert targets(server, "secret")[0]["target"]["version"] == "step-7"


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
