"""Owns the name of a trainer's run that was given none: all its ranks have the same, and no other run has it."""

import functools
import secrets

import torch.distributed as dist

KEY = "ramet/trainer_run"


def run_name() -> str:
    """The name of the run whose ranks are torch.distributed's default group now; else one of this process alone.

    It is agreed on in the group's store, so that no rank waits for another.
    """
    if not dist.is_available() or not dist.is_initialized():
        return _own_name()
    store = dist.distributed_c10d._get_default_store()
    name: bytes = store.compare_set(KEY, "", _own_name())
    return name.decode()


@functools.cache
def _own_name() -> str:
    return secrets.token_hex(8)
