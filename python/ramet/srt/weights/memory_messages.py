"""Owns what is said inside an instance that gives memory back and takes it again: which, and whence the weights come.

WIRE: the tags are SGLang's, of `/release_memory_occupation`. Its third, "cuda_graph", is of nothing that is given back
here: graphs stay, since to capture them anew takes longer than the rest of a wake, and none ever waits for them.
"""

from typing import Literal

import msgspec

from ramet.srt.weights.update_messages import FilesSource, InstanceSource

MemoryTag = Literal["weights", "kv_cache"]
MEMORY_TAGS: tuple[MemoryTag, ...] = ("weights", "kv_cache")
AskedTag = Literal["weights", "kv_cache", "cuda_graph"]  # in calls
ASKED_TAGS: tuple[AskedTag, ...] = (*MEMORY_TAGS, "cuda_graph")


class StartSource(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    """Weights from where those came from that the instance was started with."""


WakeSource = FilesSource | InstanceSource | StartSource


class ReleaseMemoryReq(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Give memory back, on all ranks. A replica's leader hands it on to its other ranks."""

    request_id: str
    tags: list[MemoryTag]
    keeps_copy: bool  # of the weights, in host memory


class ResumeMemoryReq(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Take memory again, with the weights that were in it. Handed on in the same way."""

    request_id: str
    tags: list[MemoryTag]
    sources: list[WakeSource] = []  # of the weights, where there is no copy in host memory: the first one first


MemoryStep = ReleaseMemoryReq | ResumeMemoryReq
