"""Owns the page that shows the API's description: one file, without anything from elsewhere."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.responses import HTMLResponse, Response

PAGE = Path(__file__).with_name("docs.html")


def docs_response() -> Response:
    """The page. It may load the description from this server, run its own script, and nothing else."""
    html, policy = _page()
    return HTMLResponse(html, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})


@cache
def _page() -> tuple[str, str]:
    html = PAGE.read_text()
    script, style = (_hash(re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _hash(found: re.Match[str] | None) -> str:
    assert found is not None
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"
