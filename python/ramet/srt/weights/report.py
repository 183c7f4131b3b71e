"""Owns what comes of a load, and what is told of it and of a publication."""

from typing import NamedTuple, Protocol

import msgspec

from ramet.srt.utils.outside_json import Natural


class StandsStill(Exception):
    """An instance does not move, and is not to be called ready."""


class PublisherStats(msgspec.Struct, kw_only=True):
    """What a rank's ModelExpress publisher has done so far."""

    status: str  # what the server was last told: "", "INITIALIZING", "READY" or "STALE"
    num_publishes: int = 0
    num_heartbeats: int = 0
    num_lost: int = 0  # times that the server had lost the record and it was published again
    num_failures: int = 0  # calls that failed
    last_error: str = ""  # of the last call; "" when it succeeded


class LoadReport(msgspec.Struct, kw_only=True):
    """How one rank's arena was filled. Records at a metadata server hold it too, without transfer_seconds."""

    # checkpoint, local_map, local_copy, transfer_engine, nccl, dummy, tensors or delta; several joined by "+"
    source: str
    num_bytes: Natural
    seconds: float
    verified: bool = False  # content checksums were compared with the seed's
    weight_version: str = ""  # of what the arena holds; "" before that is known
    digest: str = ""  # of the checkpoint that every byte from instances was compared with; "" if it was not
    transfer_seconds: float = 0.0  # of `seconds`, those in which the bytes moved; 0 where it wasn't taken apart
    fallback_reason: str = ""  # why files were read where instances should have given the weights; empty otherwise
    # Who gave weights: addresses of seeds, or ModelExpress worker ids of their ranks; empty if all came from files.
    taken_from: tuple[str, ...] = ()
    instances: tuple[str, ...] = ()  # URLs of instances that had what was taken, as far as they have one
    taken_bytes: tuple[Natural, ...] = ()  # from each of them; what `num_bytes` has beyond these came from files


def summarize(report: LoadReport) -> str:
    """One line on a load: whence, how much, how fast, and who gave what."""
    given = zip(report.taken_from, report.taken_bytes, strict=True)
    return (
        f"from {report.source}: {report.num_bytes / 1e9:.3f} GB in {report.seconds:.2f} s, "
        f"{report.num_bytes / 1e9 / max(report.seconds, 1e-9):.2f} GB/s"
        + (", checksums verified" if report.verified else "")
        + (f", content as in {report.digest[:16]}…" if report.digest else "")
        + "".join(f"; {num_bytes / 1e9:.3f} GB from {giver}" for giver, num_bytes in given)
    )


class Claim(Protocol):
    """Keeps other instances from reading a model's files: they wait for weights from here."""

    def release(self) -> None:
        """Let another instance read the files. Idempotent."""
        ...


class LoadResult(NamedTuple):
    """What comes of a load."""

    report: LoadReport
    claim: Claim | None = None  # to be kept until others can take the weights from here
