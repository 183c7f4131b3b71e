"""Owns proving that one has a key to somebody who may be a stranger: the key itself is not shown."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection

SCHEME = "Ramet-Proof"
_PROOF = re.compile(r"([0-9a-f]{32}):([0-9a-f]{64})")


def make_proof(key: str, method: str, authority: str, target: str) -> str:
    """The value of an Authorization header that is good for this one request to this one server.

    Args:
        authority: host:port of the server, as its URL has it.
        target: path and query.
    """
    nonce = secrets.token_hex(16)
    return f"{SCHEME} {nonce}:{_mac(key, method, authority, target, nonce)}"


def is_proof(authorization: str, key: str, method: str, authorities: Collection[str], target: str) -> bool:
    """Whether a header proves, to the server that goes by one of these authorities, that its sender has the key."""
    scheme, _, value = authorization.partition(" ")
    match = _PROOF.fullmatch(value.strip())
    if scheme.lower() != SCHEME.lower() or match is None:
        return False
    macs = [_mac(key, method, authority, target, match[1]) for authority in authorities]
    return any([hmac.compare_digest(mac, match[2]) for mac in macs])


def _mac(key: str, method: str, authority: str, target: str, nonce: str) -> str:
    text = "\n".join((SCHEME, method.upper(), authority.lower(), target, nonce))
    return hmac.new(key.encode(), text.encode(), hashlib.sha256).hexdigest()
