"""Each family over two ranks, its experts split or not, against transformers; and what a clone of another size gets."""

import functools

import pytest
import random_models as rm
import sharded_models as sm
import torch
from ramet.srt.configs.model_config import ModelConfig
from ramet.srt.model_loader.checkpoint.checkpoint_loader import CheckpointOpener
from ramet.srt.model_loader.checkpoint.describe_model import describe_whole_model
from ramet.srt.weights.planner import ArenaSource, plan, zero_ranges
from rank_threads import RankThreads, stage_logprobs

SEQUENCES = rm.random_prompts([5, 40, 150])
CHUNK = 64


@pytest.fixture(scope="module", params=[*rm.FAMILIES, *rm.COMPOSED])
def model(request, tmp_path_factory):
    folder = rm.make_model(tmp_path_factory.mktemp(request.param), request.param)
    return folder, rm.hf_logprobs(folder, SEQUENCES)


def test_two_ranks_give_the_log_probabilities_of_transformers(monkeypatch, model):
    folder, expected = model
    has_experts = ModelConfig.from_path(str(folder)).moe is not None
    for ep_size in (1, 2) if has_experts else (1,):
        ranks = RankThreads(monkeypatch, folder, 2, ep_size)
        for got, wanted in zip(ranks.logprobs(SEQUENCES, CHUNK), expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)


def test_a_stage_for_each_layer_gives_the_log_probabilities_of_transformers(monkeypatch, model):
    folder, expected = model
    got = stage_logprobs(monkeypatch, folder, 3, SEQUENCES[1])
    torch.testing.assert_close(got, expected[1], atol=1e-4, rtol=1e-5)


def test_a_clone_by_one_rank_of_two_has_the_bytes_of_a_load_from_disk(model):
    folder, _ = model
    seeds = [sm.make_manifest(sm.build_model(folder, parallel)) for parallel in sm.all_ranks(2, 1)]
    client = sm.make_manifest(sm.build_model(folder, sm.all_ranks(1)[0]))
    result = plan(client, [ArenaSource(f"rank {rank}", manifest) for rank, manifest in enumerate(seeds)])
    memory = bytearray(b"\xee" * client.arena_nbytes)
    for start, stop in zero_ranges(client):
        memory[start:stop] = bytes(stop - start)
    config = ModelConfig.from_path(str(folder))
    opener = CheckpointOpener(functools.partial(describe_whole_model, config, seeds[0]))
    arenas = [sm.load_from_disk(folder, manifest, opener).memory for manifest in seeds]
    sm.execute(result.ops, arenas, memoryview(memory))
    assert memory == sm.load_from_disk(folder, client, opener).memory[: client.arena_nbytes]
