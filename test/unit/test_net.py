"""How addresses are written and taken apart."""

import os
import socket

import pytest
from ramet.srt.utils.net import (
    address_family,
    choose_interface,
    format_address,
    format_url,
    host_from_here,
    is_loopback,
    is_own_address,
    local_address,
    reachable_host,
    split_address,
)


@pytest.mark.parametrize(
    ("host", "port", "address"),
    [("::1", 5, "[::1]:5"), ("10.0.0.1", 5, "10.0.0.1:5"), ("a.b", 80, "a.b:80"), ("fe80::2", "*", "[fe80::2]:*")],
)
def test_an_ipv6_address_gets_brackets(host: str, port: int | str, address: str) -> None:
    assert format_address(host, port) == address


def test_urls() -> None:
    assert format_url("::1", 5) == "http://[::1]:5"
    assert format_url("a", 5) == "http://a:5"


@pytest.mark.parametrize(
    ("address", "parts"), [("a:1", ("a", 1)), ("[::1]:65535", ("::1", 65535)), ("::1:7", ("::1", 7))]
)
def test_what_was_joined_is_split(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address, "--x") == parts


@pytest.mark.parametrize("address", ["", "a", ":1", "a:", "a:b", "a:0", "a:65536", "a:-1"])
def test_what_is_no_address_names_its_flag(address: str) -> None:
    with pytest.raises(ValueError, match="^--x must be host:port; got "):
        split_address(address, "--x")


def test_families() -> None:
    assert address_family("::") == socket.AF_INET6
    assert address_family("127.0.0.1") == address_family("localhost") == socket.AF_INET


def test_a_server_on_all_addresses_is_reached_at_one() -> None:
    assert [host_from_here(host) for host in ("0.0.0.0", "", "::", "10.0.0.1")] == ["127.0.0.1"] * 2 + [
        "::1",
        "10.0.0.1",
    ]
    assert reachable_host("10.0.0.1") == "10.0.0.1"
    assert reachable_host("0.0.0.0") not in ("0.0.0.0", "")
    assert reachable_host("::") != "::"


def test_loopback() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.3.2.1", "localhost", "::1"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "10.0.0.1", "::"))


def test_this_hosts_addresses_are_its_own() -> None:
    for host in ("127.0.0.1", "127.0.0.9", reachable_host("0.0.0.0")):
        assert is_own_address(host)
    for host in ("192.0.2.1", "2001:db8::1"):  # which are nobody's
        assert not is_own_address(host)


def test_the_address_that_a_peer_sees() -> None:
    assert local_address(None) == local_address("127.0.0.1:5") == "127.0.0.1"


def test_the_interface_of_a_name_or_an_address_is_chosen_for_the_named_backends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for backend in ("GLOO", "NCCL"):
        monkeypatch.setenv(f"{backend}_SOCKET_IFNAME", "")  # so that what is set below goes with the test
        monkeypatch.delenv(f"{backend}_SOCKET_IFNAME")
    choose_interface("localhost", ["NCCL"])
    assert os.environ["NCCL_SOCKET_IFNAME"] == "lo" and "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "mine")
    choose_interface("127.0.0.1")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "mine" and os.environ["GLOO_SOCKET_IFNAME"] == "lo"
