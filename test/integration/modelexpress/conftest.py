"""Owns what the tests in this folder find without importing it: a server, and a client of it."""

from modelexpress_harness import client, server

__all__ = ["client", "server"]
