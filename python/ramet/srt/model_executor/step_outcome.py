"""Owns what comes of a step that ranks take while weights change, and putting together what several say."""

import msgspec

from ramet.srt.weights.update_messages import OTHER_TENSORS


class StepOutcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """What came of a step on some ranks."""

    failure: str = ""
    sources: tuple[str, ...] = ()
    num_bytes: int = 0
    seconds: float = 0.0
    transfer_s: float = 0.0
    in_host_memory: bool = False
    lacks_memory: bool = False
    lacks: str = ""  # names of tensors that have not come, if the weights are to be whole
    received: str = ""  # a digest of the tensors that have come or the files, which must be the same on all ranks


def together(outcomes: dict[int, StepOutcome]) -> StepOutcome:
    """What came of a step on several ranks; all reasons are told once."""
    failures: dict[str, list[str]] = {}
    for rank, outcome in outcomes.items():
        if outcome.failure:
            failures.setdefault(outcome.failure, []).append(str(rank))
    words = [f"rank {', '.join(ranks)}: {failure}" for failure, ranks in failures.items()]
    received = {outcome.received for outcome in outcomes.values()}
    if not words and len(received) > 1:
        words.append(OTHER_TENSORS)
    return StepOutcome(
        failure="; ".join(words),
        sources=tuple(sorted({source for outcome in outcomes.values() for source in outcome.sources})),
        num_bytes=sum(outcome.num_bytes for outcome in outcomes.values()),
        seconds=max(outcome.seconds for outcome in outcomes.values()),
        transfer_s=max(outcome.transfer_s for outcome in outcomes.values()),
        in_host_memory=any(outcome.in_host_memory for outcome in outcomes.values()),
        lacks_memory=bool(failures) and all(outcome.lacks_memory for outcome in outcomes.values() if outcome.failure),
        lacks=next((outcome.lacks for outcome in outcomes.values() if outcome.lacks), ""),
        received=min(received),
    )
