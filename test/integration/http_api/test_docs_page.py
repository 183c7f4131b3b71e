"""The page of the API in a browser: it shows every route, keeps to its own policy, and takes a key."""

import json
from pathlib import Path

from browser import open_browser
from server_process import ServerProcess

SHOWN = "document.querySelectorAll('#routes details').length > 20"


async def test_the_page_shows_every_route(server: ServerProcess, tmp_path: Path) -> None:
    async with open_browser(tmp_path) as tab:
        for path in ("/docs", "/docs/"):
            await tab.open(f"{server.url}{path}")
            await tab.wait_for(SHOWN)
        text = await tab.text()
        for path in ("/v1/chat/completions", "/generate", "/tokenize", "/v1/loads", "/health"):
            assert path in text
        await tab.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        text = await tab.text()
        assert "structured_outputs" in text and "messages" in text
        source = await tab.evaluate("document.getElementById('source').href")
        assert source == f"{server.url}/openapi.json"
        assert not [problem for problem in tab.problems if "favicon" not in problem], tab.problems


async def test_where_a_key_is_needed_the_page_takes_it(model: str, tmp_path: Path) -> None:
    with ServerProcess(Path(model), tmp_path / "server.log", "--api-key", "secret") as keyed:
        keyed.wait_ready()
        async with open_browser(tmp_path / "profile") as tab:
            await tab.open(f"{keyed.url}/docs")
            await tab.wait_for("document.getElementById('message').textContent.includes('Authorization')")
            await tab.evaluate(
                "(() => { const key = document.getElementById('key'); key.value = "
                f"{json.dumps('secret')}; key.dispatchEvent(new Event('change')); }})()"
            )
            await tab.wait_for(SHOWN)
            assert await tab.evaluate("document.getElementById('message').textContent") == ""


async def test_a_browser_lets_only_pages_of_named_sites_read(model: str, server: ServerProcess, tmp_path: Path) -> None:
    """The page of one server asks another: their ports make them different origins."""
    ask = """fetch(%s, {method: "POST", headers: {"Content-Type": "application/json", "X-Own": "1"},
        body: JSON.stringify({prompt: "a", max_tokens: 1})}).then(
            async (answer) => [answer.status, answer.headers.get("x-request-id"), (await answer.json()).object],
            () => "refused")"""
    with ServerProcess(Path(model), tmp_path / "server.log", "--allowed-hosts", "127.0.0.1") as open_server:
        open_server.wait_ready()
        async with open_browser(tmp_path / "profile") as tab:
            await tab.open(f"{server.url}/health")  # a page without a policy of its own
            status, request_id, kind = await tab.evaluate(ask % json.dumps(f"{open_server.url}/v1/completions"))
            assert (status, kind) == (200, "text_completion") and request_id
            await tab.open(f"{open_server.url}/health")
            assert await tab.evaluate(ask % json.dumps(f"{server.url}/v1/completions")) == "refused"
