"""Owns the tests of taking weights from a seed with other parallel sizes, or the same ones, rank by rank."""

import asyncio
from types import SimpleNamespace

import msgspec
import packed_models as pm
import pytest
import random_models as rm
import sharded_models as sm
import toy_model as toy
from fp8_models import write_fp8
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.model_executor.rank_weights import find_own_head
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.checksums.entries import compute_checksums
from ramet.srt.model_loader.checksums.regions import RegionChecksums
from ramet.srt.model_loader.client.seeds_head import ask_whether_tied
from ramet.srt.model_loader.seed.control import ask_rank
from ramet.srt.utils.net import SeedAddress
from ramet.srt.weights.boxes import WeightRegion
from ramet.srt.weights.control_messages import WeightChecksumsReq, WeightControlError
from ramet.srt.weights.errors import WeightTransferError
from ramet.srt.weights.manifest import WeightBox, build_weight_manifest
from seed_server import SeedServer, load_all, take, write_random_model

DENSE = {  # grouped heads that are replicated at tp 4, a tied table that the last stage copies, a padded vocabulary
    "tp2-tp1": ({"tp_size": 2}, {}),
    "tp1-tp4": ({}, {"tp_size": 4}),
    "tp4-tp2pp2": ({"tp_size": 4}, {"tp_size": 2, "pp_size": 2}),
    "tp2pp2-tp4": ({"tp_size": 2, "pp_size": 2}, {"tp_size": 4}),
    "tp2-dp2tp2": ({"tp_size": 2}, {"tp_size": 2, "dp_size": 2}),
    "dp2tp2-tp1": ({"tp_size": 2, "dp_size": 2}, {}),
    "pp4-pp2": ({"pp_size": 4}, {"pp_size": 2}),
    "tp2pp2-same": ({"tp_size": 2, "pp_size": 2}, {"tp_size": 2, "pp_size": 2}),
}
EXPERTS = {
    "ep2-ep1": ({"tp_size": 2, "ep_size": 2}, {}),
    "ep1-ep2": ({}, {"tp_size": 2, "ep_size": 2}),
    "tp4ep2-tp2": ({"tp_size": 4, "ep_size": 2}, {"tp_size": 2}),
    "tp4ep2-tp4ep4": ({"tp_size": 4, "ep_size": 2}, {"tp_size": 4, "ep_size": 4}),
}


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("dense"), "llama3", dtype="bfloat16", num_hidden_layers=4)


@pytest.fixture(scope="module")
def experts_folder(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("experts"), "qwen3_moe", num_experts=8)


def check_pair(folder, seed_sizes, client_sizes, *modes, quantization=None):
    with SeedServer(load_all(folder, seed_sizes, quantization)) as server:
        for expected in load_all(folder, client_sizes, quantization):
            for mode in modes:
                arena, report = take(expected.manifest, server, local_mode=mode)
                assert arena.memory == expected.memory
                assert compute_checksums(arena.manifest, arena) == compute_checksums(arena.manifest, expected)
                assert report.verified and report.source == {"copy": "local_copy", "off": "transfer_engine"}[mode]


@pytest.mark.parametrize("pair", DENSE)
def test_a_client_of_another_topology_holds_what_a_load_from_disk_gives(dense_folder, pair):
    check_pair(dense_folder, *DENSE[pair], "copy", "off")


@pytest.mark.parametrize("pair", EXPERTS)
def test_experts_of_another_topology(experts_folder, pair):
    check_pair(experts_folder, *EXPERTS[pair], "copy", "off")


@pytest.mark.parametrize("pair", [({"tp_size": 2}, {}), ({}, {"tp_size": 2, "ep_size": 2})], ids=["tp2-tp1", "ep1-ep2"])
def test_fp8_experts_of_another_topology(experts_folder, pair):
    check_pair(experts_folder, *pair, "copy", quantization="fp8")


@pytest.mark.parametrize("pair", ["tp2-tp1", "tp1-tp4", "tp4-tp2pp2"])
def test_fp8_blocks_of_another_topology(dense_folder, tmp_path, pair):
    """The blocks are such that ranks cut them: two hold the scale of one."""
    check_pair(write_fp8(dense_folder, tmp_path, "blocks", block=(24, 40)), *DENSE[pair], "copy")


@pytest.mark.parametrize(("pair", "kind"), [("tp4ep2-tp2", "blocks"), ("ep2-ep1", "tensor")])
def test_fp8_experts_of_a_checkpoint_of_another_topology(experts_folder, tmp_path, pair, kind):
    check_pair(write_fp8(experts_folder, tmp_path, kind, block=(24, 40)), *EXPERTS[pair], "off")


@pytest.mark.parametrize(
    ("pair", "kind"),
    [("tp2-tp1", pm.gptq(desc_act=True)), ("tp2-tp1", pm.nvfp4("modelopt")), ("tp2-dp2tp2", pm.awq())],
    ids=["gptq", "nvfp4", "awq"],
)
def test_packed_weights_of_another_topology(dense_folder, tmp_path, pair, kind):
    """Ranks cut groups: two hold the scales and zeros of one."""
    folder, _ = pm.write(dense_folder, tmp_path / "packed", kind)
    check_pair(folder, *DENSE[pair], "copy")


def test_fp8_blocks_are_mapped(dense_folder, tmp_path):
    folder = write_fp8(dense_folder, tmp_path, "blocks")
    (arena,) = load_all(folder, {})
    with SeedServer([arena]) as server:
        mapped, report = take(arena.manifest, server, local_mode="map")
        assert report.source == "local_map" and report.verified and mapped.memory == arena.memory


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({"block": (32, 32)}, {"block": (16, 16)}, "weight_block_rows is 32, not 16"),
        (
            {"is_plain": lambda name: "o_proj" in name, "modules_to_not_convert": ["o_proj"]},
            {},
            "type, .*o_proj.weight .bfloat16 in",
        ),
        ({}, None, "quantization is fp8, not none"),
    ],
    ids=["other blocks", "a plain layer", "not quantised"],
)
def test_a_seed_with_another_format_is_refused(dense_folder, tmp_path, theirs, ours, message):
    seed = load_all(write_fp8(dense_folder, tmp_path / "seed", "blocks", **theirs), {})
    folder = dense_folder if ours is None else write_fp8(dense_folder, tmp_path / "client", "blocks", **ours)
    (client,) = load_all(folder, {})
    with SeedServer(seed) as server, pytest.raises(WeightTransferError, match=message):
        take(client.manifest, server, local_mode="copy")


def test_a_seed_with_another_output_head_is_refused(dense_folder, tmp_path):
    """Its ranks say so, whichever is asked, and versions that say nothing show it by their tensors."""
    (tied,) = load_all(dense_folder, {})
    folder = rm.make_config(tmp_path, "llama3", dtype="bfloat16", num_hidden_layers=4, tie_word_embeddings=False)
    model = sm.build_model(folder, ParallelConfig())
    toy.save_checkpoint(folder, sm.random_checkpoint(sm.checkpoint_shapes([model])))
    (broken := tmp_path / "broken").mkdir()
    (broken / "adapter_model.safetensors").write_bytes(b"")
    for says in (True, False):
        own = load_all(folder, {"pp_size": 2} if says else {})
        for arena in own if not says else []:
            arena.manifest = msgspec.structs.replace(arena.manifest, is_tied=None)
        with SeedServer(own) as server:
            config = LoadConfig(load_format="remote_instance", seeds=(SeedAddress("127.0.0.1", server.port),))
            assert ask_whether_tied(config, "target") is False
            assert find_own_head(config, tied.manifest, "/nonexistent")
            assert find_own_head(config, tied.manifest, str(broken))
            assert not find_own_head(config, tied.manifest, str(dense_folder))  # the own files' word
            with pytest.raises(WeightTransferError, match="its output head is a matrix of its own"):
                take(tied.manifest, server, local_mode="copy")


def test_only_the_ranks_that_are_needed_are_asked(dense_folder):
    with SeedServer(load_all(dense_folder, {"tp_size": 4})) as server:
        manifests = [arena.manifest for arena in load_all(dense_folder, {"tp_size": 2})]
        take(manifests[1], server, local_mode="copy")
        assert server.asked == ["rank 1", "rank 2", "rank 3"] + ["/remote_instance_weight_checksums"] * 2
    with SeedServer(load_all(dense_folder, {"tp_size": 2})) as server:
        same = [arena.manifest for arena in load_all(dense_folder, {"tp_size": 2})]
        take(same[1], server, local_mode="copy")
        assert server.asked == ["rank 1"]


def test_the_ranks_of_a_client_take_turns_over_the_replicas_of_a_seed(dense_folder):
    with SeedServer(load_all(dense_folder, {"tp_size": 2, "dp_size": 2})) as server:
        for expected in load_all(dense_folder, {"tp_size": 2}):
            take(expected.manifest, server, local_mode="copy")
        ranks = {int(line.split()[1]) for line in server.asked}
        assert len({rank // 2 for rank in ranks}) == 2


def test_a_rank_of_the_same_layout_is_mapped_and_others_are_copied(dense_folder):
    with SeedServer(load_all(dense_folder, {"tp_size": 2})) as server:
        (whole,) = load_all(dense_folder, {})
        half = load_all(dense_folder, {"tp_size": 2})[1]
        arena, report = take(half.manifest, server, local_mode="auto")
        assert report.source == "local_map" and report.verified and arena.memory == half.memory
        arena, report = take(whole.manifest, server, local_mode="map")
        assert report.source == "local_copy" and arena.memory == whole.memory


def test_a_rank_that_never_registers_is_named(dense_folder):
    (client,) = load_all(dense_folder, {})
    first_only = load_all(dense_folder, {"tp_size": 2})[:1]
    expected = "rank 1 of the target model has not"
    with SeedServer(first_only) as server, pytest.raises(WeightTransferError, match=expected):
        take(client.manifest, server, timeout_s=0.6)


@pytest.mark.parametrize("mode", ["copy", "off"])
def test_slices_that_are_not_what_the_seed_has_are_noticed(dense_folder, monkeypatch, mode):
    """The seed's answer and its memory differ by one bit, in a slice that no checksum of its manifest is of."""
    (client,) = load_all(dense_folder, {})
    arenas = load_all(dense_folder, {"tp_size": 2})
    with SeedServer(arenas) as server:
        entry = next(e for e in arenas[1].manifest.entries if "o_proj" in e.name)
        lie = arenas[1].memory[entry.offset]
        original = RegionChecksums.compute

        def compute(self, regions, num_threads=1):
            arenas[1].memory[entry.offset] = lie ^ (1 if self._arena is arenas[1] else 0)
            return original(self, regions, num_threads)

        monkeypatch.setattr(RegionChecksums, "compute", compute)
        with pytest.raises(WeightTransferError, match="verify failed .*o_proj"):
            take(client.manifest, server, local_mode=mode)


def test_a_seed_that_cannot_compute_checksums_of_slices_leaves_the_load_unverified(dense_folder, caplog):
    (client,) = load_all(dense_folder, {})
    with SeedServer(load_all(dense_folder, {"tp_size": 2}), hidden=["/remote_instance_weight_checksums"]) as server:
        arena, report = take(client.manifest, server, local_mode="copy")
    assert not report.verified and arena.memory == client.memory
    assert "could not be compared" in caplog.text


def test_slices_that_no_rank_has_are_refused(dense_folder):
    with SeedServer(load_all(dense_folder, {})) as server:
        address = server.bootstrap.control_address("target", 0)
        unknown = WeightChecksumsReq(regions=[WeightRegion("model.norm.weight", ((0, 129),))])
        reply = asyncio.run(ask_rank(address, unknown, 10))
        assert isinstance(reply, WeightControlError) and "model.norm.weight" in reply.message
        stranger = msgspec.structs.replace(address, token="wrong")
        with pytest.raises(OSError):
            asyncio.run(ask_rank(stranger, unknown, 10))
        assert address.token.encode() not in server.bootstrap.get_json("target", 0)


def quantised_manifest(weight_dtype, *, with_scale, part=None):
    """A matrix with a scale per row, as a loader makes them; `part` is one of two halves of the rows."""
    start, stop = {None: (0, 8), 0: (0, 4), 1: (4, 8)}[part]
    parameters = [("w", weight_dtype, (stop - start, 16)), ("w_scale", "float32", (stop - start, 1))]
    made = []
    for name, dtype, shape in parameters[: 2 if with_scale else 1]:
        box = WeightBox(name, ((start, stop), (0, shape[1])), ((0, shape[0]), (0, shape[1])))
        made.append((name, SimpleNamespace(shape=shape, dtype=dtype, boxes=(box,))))
    parallel = ParallelConfig() if part is None else ParallelConfig(tp_size=2, tp_rank=part)
    fields = {"model_name": "toy", "revision": "", "dtype": "bfloat16", "quantization": "fp8", "role": "target"}
    return build_weight_manifest(made, parallel=parallel, **fields)


def filled(manifest):
    """The arena of a manifest, with bytes that tell the slices of a tensor apart."""
    arena = allocate_arena(manifest, "cpu")
    for entry in manifest.entries:
        first = entry.boxes[0].source[0][0]
        for row in range(entry.shape[0]):
            nbytes = entry.nbytes // entry.shape[0]
            start = entry.offset + row * nbytes
            arena.memory[start : start + nbytes] = bytes([first + row + 1] * nbytes)
    return arena


@pytest.mark.parametrize("mode", ["copy", "off"])
def test_defect_8_quantised_weights_come_as_they_are_after_processing_or_not_at_all(mode):
    """What is offered is the final layout, scales included; a seed that has the one before is refused by name."""
    whole = filled(quantised_manifest("float8_e4m3fn", with_scale=True))
    halves = [filled(quantised_manifest("float8_e4m3fn", with_scale=True, part=part)) for part in (0, 1)]
    for seeds, clients in (([whole], [whole, *halves]), (halves, [whole, *halves])):
        with SeedServer(seeds) as server:
            for expected in clients:
                arena, report = take(expected.manifest, server, local_mode=mode)
                assert report.verified and arena.memory == expected.memory
    unprocessed = filled(quantised_manifest("bfloat16", with_scale=False))
    with (
        SeedServer([unprocessed]) as server,
        pytest.raises(WeightTransferError, match="bfloat16 in .*no source has w_s"),
    ):
        take(whole.manifest, server, local_mode=mode)


def test_a_rank_that_has_only_padding_of_a_table(tmp_path):
    """331 rows over 8 ranks in a table of 384: the last rank has none of them, from disk and from a seed."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 64, "num_hidden_layers": 1}
    folder = write_random_model(tmp_path, "llama3", **sizes)
    with SeedServer(load_all(folder, {})) as server:
        expected = load_all(folder, {"tp_size": 8})[7]
        assert not next(e for e in expected.manifest.entries if "embed_tokens" in e.name).boxes
        arena, report = take(expected.manifest, server, local_mode="copy")
        assert report.verified and arena.memory == expected.memory
