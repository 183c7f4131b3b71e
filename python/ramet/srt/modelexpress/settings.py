"""Owns what a user can say about ModelExpress: the --modelexpress-config value and the MX_* environment variables."""

import math
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from ramet.srt.modelexpress.tokens import TokenFile

INTERVAL_VARIABLE = "MX_HEARTBEAT_INTERVAL_SECS"
HEARTBEAT_INTERVAL_S = 30.0
LIVE_INTERVAL_S = 3.0  # of the rank whose beats show how busy its replica is, and whether it is there
PACKAGES = ("grpc", "google.protobuf")


def check_installed() -> None:
    """Raise ValueError where what ModelExpress needs is not installed."""
    try:
        for name in PACKAGES:
            import_module(name)
    except ImportError as error:
        raise ValueError(f"ModelExpress can't be used ({error}): install ramet[modelexpress]") from error


def check_environment(environ: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError, with the variable's name, if what the environment says to an instance can't be used."""
    env_seconds(INTERVAL_VARIABLE, HEARTBEAT_INTERVAL_S, environ)
    open_token_file(environ)
    if path := environ.get("MX_TLS_CA_PATH"):
        try:
            Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"MX_TLS_CA_PATH: cannot read the certificates: {error}") from None


def open_token_file(environ: Mapping[str, str] = os.environ) -> TokenFile | None:
    """The file that MX_AUTH_TOKEN_PATH names; None if it is not set.

    Raises:
        ValueError: if the file can't be read or holds no token; the message names the variable.
    """
    if not (path := environ.get("MX_AUTH_TOKEN_PATH")):
        return None
    try:
        return TokenFile(path)
    except ValueError as error:
        raise ValueError(f"MX_AUTH_TOKEN_PATH: {error}") from None


def heartbeat_interval_s(shows_load: bool) -> float:
    """How often a rank's record is renewed while it is READY.

    Args:
        shows_load: whether the rank stands for its replica at the metadata server.
    """
    return env_seconds(INTERVAL_VARIABLE, LIVE_INTERVAL_S if shows_load else HEARTBEAT_INTERVAL_S)


def env_seconds(name: str, default: float, environ: Mapping[str, str] = os.environ) -> float:
    """A duration from the environment.

    Raises:
        ValueError: if it is set to something else than a number above 0.
    """
    text = environ.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"the environment variable {name} must be a number of seconds above 0; got {text!r}")
    return value
