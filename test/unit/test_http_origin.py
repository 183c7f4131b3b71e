"""Which requests a server without a key takes for a web page's."""

import pytest
from ramet.srt.utils.http_origin import OriginCheck


@pytest.mark.parametrize(
    ("bound", "allowed", "host", "origin", "is_taken"),
    [
        ("127.0.0.1", (), "127.0.0.1:30000", None, True),
        ("127.0.0.1", (), "localhost:30000", None, True),
        ("127.0.0.1", (), "app.localhost", None, True),
        ("127.0.0.1", (), "10.0.0.3", None, True),  # an address can't be made to mean another one
        ("::1", (), "[::1]:30000", None, True),
        ("127.0.0.1", (), None, None, True),  # HTTP/1.0
        ("127.0.0.1", (), "evil.example:30000", None, False),
        ("127.0.0.1", (), "localhost.evil.example", None, False),
        ("127.0.0.1", ("llm.example",), "LLM.example", None, True),
        ("0.0.0.0", (), "llm.example", None, True),  # on a network it may have any name
        ("127.0.0.1", (), "localhost:30000", "http://localhost:30000", True),
        ("127.0.0.1", (), "localhost:30000", "http://localhost:8080", False),
        ("127.0.0.1", (), "localhost:30000", "https://evil.example", False),
        ("127.0.0.1", (), "localhost:30000", "null", False),
        ("127.0.0.1", (), "localhost:30000", "http://[", False),
        ("0.0.0.0", (), "llm.example", "https://evil.example", False),
        ("0.0.0.0", ("chat.example",), "llm.example", "https://chat.example", True),
        ("127.0.0.1", ("*",), "evil.example", "https://evil.example", True),
    ],
)
def test_hosts_and_origins(
    bound: str, allowed: tuple[str, ...], host: str | None, origin: str | None, is_taken: bool
) -> None:
    assert (OriginCheck(bound, allowed).refusal(host, origin) is None) == is_taken


@pytest.mark.parametrize(
    ("fetch_site", "origin", "allowed", "is_taken"),
    [
        ("none", None, (), True),  # typed into the address line
        ("same-origin", None, (), True),
        ("same-origin", "https://llm.example", (), True),  # by way of a proxy that says Host: localhost:30000
        ("same-site", "https://llm.example", (), False),
        ("cross-site", None, (), False),  # <img src="http://localhost:30000/flush_cache">
        ("cross-site", "https://chat.example", ("chat.example",), True),
        ("cross-site", None, ("*",), True),
    ],
)
def test_what_browsers_say_of_a_page(
    fetch_site: str, origin: str | None, allowed: tuple[str, ...], is_taken: bool
) -> None:
    assert OriginCheck("127.0.0.1", allowed).refusal("evil.example", origin, "same-origin") or allowed == ("*",)
    assert (OriginCheck("127.0.0.1", allowed).refusal("localhost:30000", origin, fetch_site) is None) == is_taken
