"""The scheduler's part of weights that change: which version made which token, and what of the prefix cache is left."""

from collections.abc import Sequence

import pytest
import random_models as rm
from engine_harness import EngineHarness
from ramet.srt.batch.batch_plan import Pooling
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.managers.leader import OtherRanks
from ramet.srt.managers.role import READY_KEY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rm.make_model(tmp_path_factory.mktemp("model"), "llama3")


@pytest.fixture(params=[False, True], ids=["plain", "overlap"])
def engine(folder, request):
    return EngineHarness(folder, overlap=request.param, weight_version="v1")


def run_for(engine: EngineHarness, num_steps: int) -> None:
    for _ in range(num_steps):
        engine.step()


def test_each_token_counts_as_of_the_version_that_has_made_it(engine):
    (prompt,) = rm.random_prompts([9])
    expected = engine.generate([prompt], max_new_tokens=12)[0]
    assert expected.versions == [("v1", 0)]
    engine.channel.outputs.clear()
    engine.submit("a", prompt, max_new_tokens=12, stream=True)
    run_for(engine, 4)
    num_before = len(engine.results()["a"].token_ids)
    engine.scheduler.switch_weight_version("v2")
    assert not engine.scheduler.passes, "a pass of the old version is still under way"
    num_made = len(engine.results()["a"].token_ids)
    assert num_made - num_before in (0, 1)  # that of the pass under way, made before the switch
    run_for(engine, 2)
    engine.scheduler.switch_weight_version("v3")
    result = engine.run()["a"]
    assert result.token_ids == expected.token_ids  # the bytes are the same
    (first, start), (second, middle), (third, last) = result.versions
    assert (first, start, second, middle, third) == ("v1", 0, "v2", num_made, "v3")
    assert num_made < last < 12
    assert engine.generate([prompt], max_new_tokens=1)[0].versions == [("v3", 0)]


def test_a_switch_to_the_same_name_is_one_span(engine):
    engine.submit("a", rm.random_prompts([9])[0], max_new_tokens=8)
    run_for(engine, 3)
    engine.scheduler.switch_weight_version("v1")
    assert engine.run()["a"].versions == [("v1", 0)]


def test_an_answer_without_a_token_has_a_version(engine):
    prompts = rm.random_prompts([9])
    assert engine.generate(prompts, max_new_tokens=0)[0].versions == [("v1", 0)]


def test_an_embedding_has_the_version_that_has_made_it(tmp_path):
    engine = EngineHarness(rm.make_model(tmp_path, "llama3"), is_embedding=True, weight_version="v1")
    prompts = rm.random_prompts([9])
    assert engine.generate(prompts, pooling=Pooling())[0].versions == [("v1", 0)]
    engine.scheduler.switch_weight_version("v2")
    assert engine.generate(prompts, pooling=Pooling())[0].versions == [("v2", 0)]


def test_a_prefix_is_never_found_under_another_version(engine):
    (prompt,) = rm.random_prompts([40])
    engine.generate([prompt], max_new_tokens=4)
    assert engine.generate([prompt], max_new_tokens=4)[0].cached_tokens == 36
    engine.scheduler.switch_weight_version("v2")
    assert engine.scheduler.caches[0].tree.num_evictable_pages == 0
    assert engine.generate([prompt], max_new_tokens=4)[0].cached_tokens == 0
    assert engine.generate([prompt], max_new_tokens=4)[0].cached_tokens == 36


def test_nothing_is_shared_of_a_request_that_has_run_through_a_switch(engine):
    """Its first keys and values are the old version's, and those behind them follow on these."""
    (prompt,) = rm.random_prompts([40])
    engine.submit("a", prompt, max_new_tokens=24)
    run_for(engine, 6)
    engine.scheduler.switch_weight_version("v2")
    engine.submit("b", prompt, max_new_tokens=4)
    results = engine.run()
    assert results["b"].cached_tokens == 0 and results["b"].versions == [("v2", 0)]
    assert [version for version, _ in results["a"].versions] == ["v1", "v2"]
    whole = prompt + results["a"].token_ids
    assert engine.generate([whole], max_new_tokens=1)[0].cached_tokens == 40  # what b has made, and no more


def test_a_prompt_in_progress_is_shared_with_nobody_either(folder):
    engine = EngineHarness(folder, weight_version="v1", chunked_prefill_size=16)
    (prompt,) = rm.random_prompts([40])
    engine.submit("a", prompt, max_new_tokens=2)
    engine.step()
    engine.scheduler.switch_weight_version("v2")
    assert engine.run()["a"].versions == [("v2", 0)]
    assert engine.generate([prompt], max_new_tokens=1)[0].cached_tokens == 0


def test_pages_of_old_versions_come_back(folder):
    """Requests that share a prefix of the old version, and many switches while they run."""
    engine = EngineHarness(folder, weight_version="v0", max_total_tokens=512)
    (prompt,) = rm.random_prompts([40])
    engine.generate([prompt], max_new_tokens=1)
    for turn in range(6):
        for number in range(3):
            engine.submit(f"{turn}-{number}", prompt, max_new_tokens=16)
        run_for(engine, 3)
        engine.scheduler.switch_weight_version(f"v{turn}")
    engine.run()
    engine.scheduler.switch_weight_version("last")
    cache = engine.scheduler.caches[0]
    assert cache.allocator.num_free == cache.allocator.num_pages and not cache.tree.pages()


class Meeting:
    """Stands in for the rendezvous: what the other ranks have put there."""

    def __init__(self, **versions: str) -> None:
        self.versions = {int(rank.removeprefix("rank")): version for rank, version in versions.items()}

    def put(self, key: str, value: str) -> None:
        self.versions[int(key.removeprefix(f"{READY_KEY}/"))] = value

    def wait_all(self, key: str, ranks: Sequence[int]) -> list[str]:
        assert key == READY_KEY
        return [self.versions[rank] for rank in ranks]

    def get(self, key: str) -> str:
        return key


def others(meeting: Meeting) -> OtherRanks:
    """The other ranks of a replica of two, which is one of two, as world rank 0 meets them."""
    made = OtherRanks.__new__(OtherRanks)
    made._parallel, made._rendezvous = ParallelConfig(tp_size=2, dp_size=2), meeting
    return made


def test_ranks_that_have_loaded_several_versions_do_not_serve():
    meeting = Meeting(rank1="v1", rank2="v1")
    ranks = others(meeting)
    ranks.wait_for_followers("v1")
    assert len(ranks.meet_leaders("v1")) == 2 and meeting.versions[0] == "v1"
    with pytest.raises(ValueError, match=r"rank 1 has loaded the weight version 'v2', and rank 0 'v1'"):
        others(Meeting(rank1="v2", rank2="v1")).wait_for_followers("v1")
    with pytest.raises(ValueError, match=r"rank 2 has loaded the weight version 'v2', and rank 0 'v1'"):
        others(Meeting(rank1="v1", rank2="v2")).meet_leaders("v1")
