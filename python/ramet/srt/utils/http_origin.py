"""Owns whether a request may be a web page's doing: a page in a browser can call servers that only it reaches."""

import ipaddress
import re
import socket
from collections.abc import Collection

from ramet.srt.utils.net import is_loopback

ANY_HOST = "*"
OTHER_SITE = "this server takes no requests from pages of other sites ({} header); see --allowed-hosts"


class OriginCheck:
    """For a server that asks for no key. Where a key is needed nothing else is: no page has it.

    A page of another site is known by its Origin header. One whose name was made to mean this host's address (DNS
    rebinding) is its own origin; its name stands in the Host header, where a server on loopback expects only its own.
    """

    def __init__(
        self, bound_host: str, allowed_hosts: Collection[str] = (), allowed_origins: Collection[str] = ()
    ) -> None:
        """
        Args:
            bound_host: address that the server listens on.
            allowed_hosts: further names by which it may be called; "*" is all, and allows pages of every site.
            allowed_origins: sites whose pages may call it and read its answers; "*" is all.
        """
        self._any = ANY_HOST in allowed_hosts
        self._any_page = self._any or ANY_HOST in allowed_origins
        self._origins = frozenset(origin.lower() for origin in allowed_origins)
        self._names: frozenset[str] | None = None
        self._allowed = frozenset(name.lower() for name in allowed_hosts)
        if is_loopback(bound_host):
            self._names = self._allowed | {bound_host.lower(), "localhost", socket.gethostname().lower()}

    def refusal(self, host: str | None, origin: str | None, fetch_site: str | None = None) -> str | None:
        """Why a request with these headers is refused, or None.

        Args:
            fetch_site: Sec-Fetch-Site, which no page can set. Browsers send it for pictures and links too, which have
                no Origin; and it tells a page's own server from others where a proxy has changed Host.
        """
        if self._any:
            return None
        if fetch_site == "cross-site" and origin is None:
            return OTHER_SITE.format("Sec-Fetch-Site")
        is_page = origin is not None and fetch_site != "same-origin"
        if is_page and not (self._is_named(origin or "") or self._is_own(origin or "", host or "")):
            return OTHER_SITE.format("Origin")
        if host and self._names is not None and not self._is_known(_hostname(host)):
            return "this server does not know itself by that name (Host header); see --allowed-hosts"
        return None

    def may_read(self, origin: str) -> bool:
        """Whether pages of this origin may read answers: the operator has named it, or all."""
        name = _hostname(origin.partition("://")[2])
        return self._is_named(origin) or (name != "" and name in self._allowed)

    def _is_named(self, origin: str) -> bool:
        """Whether pages of this origin may do everything."""
        return self._any_page or origin.lower() in self._origins

    def _is_own(self, origin: str, host: str) -> bool:
        netloc = origin.partition("://")[2].lower()
        return netloc != "" and (netloc == host.lower() or _hostname(netloc) in self._allowed)

    def _is_known(self, name: str) -> bool:
        if self._names is None or name in self._names or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True  # addresses can't be made to mean others


def is_host_name(text: str) -> bool:
    """Whether this is a name or an address alone, without scheme, port, path or brackets."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return re.fullmatch(r"[\w.-]+", text) is not None
    return True


def _hostname(netloc: str) -> str:
    """The name or address in "name:port", without brackets."""
    if netloc.startswith("["):
        return netloc[1:].partition("]")[0].lower()
    return netloc.partition(":")[0].lower()
