"""Owns the tests of the agreement of vLLM's ranks on what they serve."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ramet_vllm.same_weights import MESSAGE_BYTES, Outcome, exchange, find_failure


@pytest.mark.parametrize(
    "outcome", [Outcome("default"), Outcome("Ausgabe-\u00e4"), Outcome(failure="ask failed: \u00fc")]
)
def test_an_outcome_survives_its_way(outcome):
    message = outcome.encode()
    assert message.shape == (MESSAGE_BYTES,)
    assert Outcome.decode(message) == outcome


def test_a_failure_of_any_length_is_one():
    found = Outcome.decode(Outcome(failure="\u00fc" * MESSAGE_BYTES).encode())
    assert found.failure.startswith("\u00fc\u00fc")


def test_ranks_have_one_version_or_none():
    assert find_failure([Outcome("7"), Outcome("7")]) == ""
    with pytest.raises(ValueError, match="rank 1 has loaded the weight version '8', and rank 0 '7'"):
        find_failure([Outcome("7"), Outcome("8")])
    assert find_failure([Outcome("7"), Outcome(failure="gone")]) == "rank 1: gone"
    assert find_failure([Outcome(failure="gone")]) == "gone"


def test_all_ranks_hear_of_all():
    """By the group that vLLM's ranks have."""
    store = torch.distributed.HashStore()
    said = [Outcome("7"), Outcome(failure="gone")]

    def meet(rank: int) -> list[Outcome]:
        return exchange(said[rank], torch.distributed.ProcessGroupGloo(store, rank, 2), 2)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(meet, (0, 1))) == [said, said]
    assert exchange(said[0], None, 1) == [said[0]]
