"""A replica of one rank that gives its memory back and takes it again: the same weights or none, in any case."""

import os
import shutil

import psutil
import pytest
import random_models as rm
from lora_adapters import make_adapter
from ramet.srt.utils import host_memory
from ramet.srt.weights.update_messages import DropWeightsReq, FilesSource, InstanceSource
from safetensors.torch import load_file, save_file
from sleeping_engine import START, Sleeper
from updated_engine import PROMPTS


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: rm.make_model(folder / name, "llama3", seed=seed) for seed, name in enumerate(("old", "new"))}


@pytest.fixture(scope="module")
def shared(models):
    return Sleeper(models["old"], enable_memory_saver=True)


@pytest.fixture
def sleeper(shared):
    """In a pause, awake before and after."""
    before = shared.checksums()
    expected = shared.tokens()
    shared.pause()
    yield shared
    assert shared.resume().success
    assert shared.checksums() == before
    shared.go_on()
    assert shared.tokens() == expected


def test_memory_is_given_back_and_the_weights_come_from_files(sleeper):
    address, nbytes = sleeper.arena.address, sleeper.arena.nbytes
    reply = sleeper.release()
    assert reply.success and reply.num_bytes >= nbytes and sleeper.arena.is_put_away
    assert host_memory.resident_file_nbytes(sleeper.arena.own_fd) == 0
    with pytest.raises(RuntimeError, match="given back"):
        sleeper.checksums()
    assert sleeper.release().num_bytes == 0  # once more changes nothing
    reply = sleeper.resume()
    assert reply.success and reply.source == "checkpoint" and reply.num_bytes > 0 and reply.seconds > 0
    assert sleeper.arena.address == address
    assert sleeper.resume().num_bytes == 0


def test_tags_come_and_go_one_by_one(sleeper):
    pool = sleeper.engine.runner.kv_pool
    sleeper.release("kv_cache")
    assert pool.is_put_away and not sleeper.arena.is_put_away
    sleeper.release("weights")
    assert sleeper.arena.is_put_away
    assert sleeper.resume("kv_cache").success and not pool.is_put_away and sleeper.arena.is_put_away
    assert sleeper.release("weights").num_bytes == 0


def test_a_copy_in_host_memory_is_nearest_and_is_compared_too(sleeper):
    sleeper.release(keeps_copy=True)
    reply = sleeper.resume(sources=[])
    assert reply.success and reply.source == "host_memory"
    sleeper.release(keeps_copy=True)
    with open(sleeper.arena._copy.own_fd, "r+b", closefd=False) as file:
        file.write(b"garbage")
    reply = sleeper.resume(sources=[])
    assert not reply.success and "the copy in host memory: other weights than before" in reply.message
    assert sleeper.arena.is_put_away
    assert sleeper.resume().source == "checkpoint"


def test_the_next_source_is_asked_where_one_is_gone(sleeper):
    """An instance that has the weights: test/integration/test_sleep.py."""
    gone = InstanceSource(host="127.0.0.1", port=1)
    sleeper.release()
    reply = sleeper.resume(sources=[gone])
    assert not reply.success and "127.0.0.1:1" in reply.message and sleeper.arena.is_put_away
    assert sleeper.resume(sources=[gone, *START]).source == "checkpoint"


def test_files_that_are_gone_cut_or_others_wake_nobody(sleeper, models, tmp_path):
    sleeper.release()
    cut, other, path = tmp_path / "cut", models["new"], models["old"] / "model.safetensors"
    shutil.copytree(models["old"], cut)
    data = path.read_bytes()
    (cut / "model.safetensors").write_bytes(data[:-5])
    for folder, words in ((cut, "cut"), (other, "other weights than before"), (tmp_path / "none", "none")):
        reply = sleeper.resume(sources=[FilesSource(path=str(folder))])
        assert not reply.success and words in reply.message and sleeper.arena.is_put_away
    hidden = path.rename(tmp_path / "hidden")
    reply = sleeper.resume()
    assert not reply.success and "where they came from at the start" in reply.message
    weights = load_file(hidden)
    name = next(iter(weights))
    weights[name].view(-1)[0] += 1
    save_file(weights, path)
    reply = sleeper.resume()
    assert not reply.success and "other weights than before" in reply.message and sleeper.arena.is_put_away
    os.replace(hidden, path)
    assert sleeper.resume().success


def test_too_little_memory_leaves_it_asleep(sleeper, monkeypatch):
    sleeper.release()
    monkeypatch.setattr(host_memory, "available_memory_nbytes", lambda: 1000)
    reply = sleeper.resume()
    assert not reply.success and "are available" in reply.message and sleeper.arena.is_put_away
    monkeypatch.undo()


def test_an_update_takes_the_place_of_weights_that_are_asleep(sleeper, models):
    """With the memory of one arena; what was there comes back from its files, not from a copy of it."""
    sleeper.release("weights", keeps_copy=True)
    assert sleeper.stage(models["new"]).success and sleeper.switch().success
    assert not sleeper.arena.is_put_away
    assert sleeper.checksums() == Sleeper(models["new"]).checksums()
    sleeper.ask(DropWeightsReq(request_id="drop", number=0))
    assert not sleeper.versions._staged
    sleeper.release()
    sleeper.resume(sources=[FilesSource(path=str(models["new"]))])
    assert sleeper.checksums() == Sleeper(models["new"]).checksums()
    assert sleeper.stage(models["old"], 2).success and sleeper.switch(2, "default").success
    sleeper.ask(DropWeightsReq(request_id="drop", number=1))


def test_nothing_is_given_back_under_requests(shared):
    shared.engine.submit("one", PROMPTS[0], max_new_tokens=20)
    shared.engine.step()
    reply = shared.release()
    assert not reply.success and "pause" in reply.message and not shared.arena.is_put_away
    shared.pause("in_place")
    reply = shared.release()
    assert not reply.success and "requests hold keys and values" in reply.message
    assert not shared.arena.is_put_away
    shared.pause("retract")
    assert shared.release().success and shared.resume().success
    shared.go_on()
    expected = rm.hf_greedy(shared.engine.args.model_path, [PROMPTS[0]], 20)
    assert [shared.engine.run()["one"].token_ids] == expected


def test_adapters_stay_while_the_weights_below_them_go_and_come(models, tmp_path):
    adapter = make_adapter(tmp_path, models["old"])
    sleeper = Sleeper(models["old"], enable_memory_saver=True, enable_lora=True)
    assert sleeper.engine.load_adapter(1, adapter) == ""

    def tokens() -> list[list[int]]:
        return [one.token_ids for one in sleeper.engine.generate(PROMPTS, max_new_tokens=6, lora_id=1)]

    expected = tokens()
    assert expected != sleeper.tokens()
    sleeper.pause()
    assert sleeper.release().success and sleeper.resume().success
    sleeper.go_on()
    assert tokens() == expected


def test_without_the_flag_nothing_is_given_back(models):
    plain = Sleeper(models["old"])
    plain.pause()
    reply = plain.release("kv_cache")
    assert not reply.success and "--enable-memory-saver" in reply.message


def test_a_process_that_sleeps_is_small(tmp_path):
    """By the kernel's own account."""
    folder = rm.make_model(tmp_path, "llama3", hidden_size=512, intermediate_size=2048, vocab_size=8192)
    big = Sleeper(folder, enable_memory_saver=True, max_total_tokens=16384)
    big.engine.runner.kv_pool.buffer.fill_(0)
    big.pause()
    awake = psutil.Process().memory_info().rss
    reply = big.release()
    given = awake - psutil.Process().memory_info().rss
    assert reply.num_bytes > 50 << 20 and given > 0.95 * reply.num_bytes
    assert big.resume().success
