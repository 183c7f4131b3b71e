"""Owns the tests of the manifest, the arena and the checksums."""

import gc
import os
from pathlib import Path

import msgspec
import pytest
import torch
import toy_model as toy
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.checksums.entries import compute_checksums, with_checksums
from ramet.srt.model_loader.client.verification import expected_checksums, find_mismatches
from ramet.srt.model_loader.loader import DummyModelLoader
from ramet.srt.utils import host_memory
from ramet.srt.weights.copy_op import CopyOp
from ramet.srt.weights.manifest import WeightBox, WeightManifest, check_manifest, layout_digest


@pytest.fixture
def manifest():
    return toy.make_manifest(toy.make_model())


def test_entries_are_aligned_in_parameter_order_and_tied_ones_are_aliases(manifest):
    assert [e.name for e in manifest.entries][:2] == ["embed", "qkv"]
    assert manifest.entries[0].aliases == ("lm_head",)
    assert all(e.offset % 256 == 0 for e in manifest.entries)
    assert check_manifest(manifest) is manifest


def received(text):
    """What a peer makes of a manifest in JSON."""
    return check_manifest(msgspec.json.decode(text, type=WeightManifest))


def test_a_manifest_survives_both_encodings(manifest):
    manifest = with_checksums(manifest, compute_checksums(manifest, allocate_arena(manifest, "cpu")))
    assert received(msgspec.json.encode(manifest)) == manifest
    packed = msgspec.msgpack.decode(msgspec.msgpack.encode(manifest), type=WeightManifest)
    assert check_manifest(packed) == manifest


def test_a_manifest_that_lies_is_refused(manifest):
    def change(**fields):
        first = msgspec.structs.replace(manifest.entries[0], **fields)
        return msgspec.structs.replace(manifest, entries=(first, *manifest.entries[1:]))

    for fields in ({"offset": 256}, {"offset": 10**9}, {"nbytes": 4}, {"shape": (1, 2)}, {"dtype": "float12"}):
        with pytest.raises(ValueError, match="embed|qkv|dtype"):
            received(msgspec.json.encode(change(**fields)))
    with pytest.raises(ValueError, match="box"):
        check_manifest(change(boxes=(WeightBox("x", ((0, 200), (0, 32)), ((0, 200), (0, 32))),)))
    for text in (b"", b"{}", b"[1]", b"null", b'{"entries": 3}'):
        with pytest.raises(ValueError):
            received(text)


def test_the_layout_digest_depends_on_the_slices_not_on_the_name(manifest):
    renamed = msgspec.structs.replace(manifest, model_name="other")
    assert layout_digest(renamed) == layout_digest(manifest)
    digests = {layout_digest(toy.make_manifest(toy.make_model(2, r), 2, r)) for r in range(2)}
    assert len(digests | {layout_digest(manifest)}) == 3


def test_a_parameter_without_boxes_is_named():
    model = toy.make_model()
    del model.norm.boxes
    with pytest.raises(ValueError, match="norm has no boxes"):
        toy.make_manifest(model)


def test_bound_parameters_are_views_that_outlive_the_arena(manifest):
    model = toy.make_model()
    arena = allocate_arena(manifest, "cpu")
    arena.bind(model)
    assert model.embed is model.lm_head and model.embed.boxes
    for entry in manifest.entries:
        parameter = model.get_parameter(entry.name)
        assert not parameter.requires_grad and parameter.device.type == "cpu"
        assert entry.nbytes == 0 or parameter.data_ptr() == arena.address + entry.offset
    arena.memory[:4] = b"\x00\x00\x80\x3f"
    del arena
    gc.collect()
    assert model.embed[0, 0] == 1.0
    model.embed[1, 1] = 2.0


def test_binding_another_model_is_refused(manifest):
    with pytest.raises(ValueError, match="embed is .* bfloat16"):
        allocate_arena(manifest, "cpu").bind(toy.make_model(dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="no weight arena for the device 'tpu'"):
        allocate_arena(manifest, "tpu")


def filled_arena(manifest, byte=7):
    arena = allocate_arena(manifest, "cpu")
    arena.memory[:] = bytes([byte]) * arena.nbytes
    return arena


def test_mapping_replaces_the_memory_in_place_and_writes_stay_private(manifest):
    seed, client = filled_arena(manifest), filled_arena(manifest, 1)
    model = toy.make_model()
    client.bind(model)
    with pytest.raises(ValueError, match="not sealed"):
        client.map_seed_memory(seed.share().fd)
    seed.publish()
    client.map_seed_memory(seed.share().fd)
    assert client.share().fd != client.own_fd and bytes(client.memory[:3]) == b"\7\7\7"
    assert host_memory.resident_file_nbytes(client.own_fd) == 0
    model.embed.zero_()
    assert seed.memory[0] == 7
    client.restore_own_memory()
    assert client.share().fd == client.own_fd and not any(client.memory[: manifest.arena_nbytes])
    client.memory[0] = 5
    assert model.embed.view(torch.uint8)[0, 0] == 5


def test_a_mapping_survives_the_seed(manifest):
    seed, client = filled_arena(manifest), allocate_arena(manifest, "cpu")
    seed.publish()
    client.map_seed_memory(seed.share().fd)
    del seed
    gc.collect()
    assert bytes(client.memory[:2]) == b"\7\7"
    second = allocate_arena(manifest, "cpu")
    second.map_seed_memory(client.share().fd)
    assert bytes(second.memory[:2]) == b"\7\7"


def test_a_part_that_nobody_reads_gives_its_memory_back(manifest):
    """The own memory; another arena's that is shown here stays as it is."""
    nbytes = manifest.arena_nbytes
    seed, own = filled_arena(manifest), filled_arena(manifest)
    seed.publish()
    own.drop_pages(1, nbytes)
    page = host_memory.PAGE_BYTES
    whole = nbytes // page * page
    assert whole > page and not any(own.memory[page:whole])
    assert bytes(own.memory[:page]) == bytes(seed.memory[:page])
    own.map_seed_memory(seed.share().fd)
    own.drop_pages(0, nbytes)
    assert bytes(own.memory[:nbytes]) == bytes(seed.memory[:nbytes])


def test_a_file_that_is_too_small_is_refused(manifest):
    fd = host_memory.create_memfd("small", 4096)
    host_memory.seal_for_sharing(fd)
    with pytest.raises(ValueError, match="holds 4096 bytes"):
        allocate_arena(manifest, "cpu").map_seed_memory(fd)
    os.close(fd)


def test_a_published_arena_is_immutable(manifest):
    arena = filled_arena(manifest)
    arena.publish()
    arena.publish()
    changes = (
        lambda: arena.open_receive_window(1),
        lambda: arena.map_seed_memory(arena.share().fd),
        lambda: arena.prepare_fill([]),
    )
    for change in (*changes, arena.drop_memory):
        with pytest.raises(RuntimeError, match="immutable"):
            change()
    with pytest.raises(PermissionError):
        os.pwrite(arena.share().fd, b"x", 0)


def test_an_abandoned_writer_cannot_reach_the_arena(manifest):
    arena = allocate_arena(manifest, "cpu")
    buffer = arena.open_receive_buffer()
    buffer.memory[0] = ord("a")
    assert arena.memory[0] == ord("a")
    buffer.cut_off()
    buffer.memory[0] = ord("b")
    assert arena.memory[0] == ord("a")
    buffer.close()


def test_another_process_receives_into_the_arena_through_files(manifest):
    """Single rows in their place, rows that come with what is between them behind the arena's end."""
    arena = allocate_arena(manifest, "cpu")
    window = arena.open_receive_window(1000)
    fds, sizes = zip(*window.files, strict=True)
    theirs = host_memory.view_memory(host_memory.map_files(fds, sizes), sum(sizes))
    single = CopyOp(
        source=0, source_offset=0, target_offset=64, row_nbytes=4, num_rows=1, source_stride=0, target_stride=0
    )
    rows = CopyOp(
        source=0, source_offset=0, target_offset=8, row_nbytes=2, num_rows=2, source_stride=3, target_stride=2
    )
    for start, sent in zip(window.place([single, rows]), (b"four", b"ab-cd"), strict=True):
        theirs[start : start + len(sent)] = sent
    window.deliver([single, rows])
    window.finish()
    assert bytes(arena.memory[64:68]) == b"four" and bytes(arena.memory[8:12]) == b"abcd"
    window.close()
    window.close()


def test_defect_13_mapping_and_refilling_hold_one_copy(manifest):
    arena = filled_arena(manifest)
    seed = filled_arena(manifest)
    seed.publish()
    arena.map_seed_memory(seed.share().fd)
    arena.restore_own_memory()
    assert host_memory.resident_file_nbytes(arena.share().fd) == 0


def test_too_little_memory_is_an_error_before_it_is_taken(manifest, monkeypatch):
    monkeypatch.setattr(host_memory, "available_memory_nbytes", lambda: 1000)
    arena = allocate_arena(manifest, "cpu")
    with pytest.raises(MemoryError, match="rank 0 need .* GB more memory"):
        arena.prepare_fill([])
    assert host_memory.resident_file_nbytes(arena.share().fd) == 0


def test_preparing_clears_what_the_source_will_not_write(manifest):
    arena = filled_arena(manifest)
    arena.prepare_fill([(1, 3)])
    assert bytes(arena.memory[:4]) == b"\7\0\0\7"


def test_available_memory_is_plausible():
    assert 1 << 20 < host_memory.available_memory_nbytes() < 1 << 50


def test_populating_takes_all_memory(manifest):
    arena = allocate_arena(manifest, "cpu")
    arena.populate()
    assert host_memory.resident_file_nbytes(arena.share().fd) == arena.nbytes


def test_checksums_name_the_tensor_that_differs(manifest):
    arena = filled_arena(manifest)
    seed = with_checksums(manifest, compute_checksums(manifest, arena))
    for samples_only in (False, True):
        expected = expected_checksums(arena, seed, samples_only=samples_only)
        assert len(expected) == len(manifest.entries)
        assert find_mismatches(manifest, arena, expected, samples_only=samples_only) == []
    qkv = manifest.entries[1]
    arena.memory[qkv.offset + 1] ^= 1
    assert find_mismatches(manifest, arena, expected_checksums(arena, seed)) == ["qkv"]


def test_unknown_checksum_algorithms_compare_nothing(manifest):
    arena = allocate_arena(manifest, "cpu")
    checksums = compute_checksums(manifest, arena)
    other = with_checksums(manifest, msgspec.structs.replace(checksums, algorithm="crc0"))
    assert expected_checksums(arena, other) == {}
    assert expected_checksums(arena, manifest) == {}


def test_made_up_weights_are_there_before_anybody_reads_them(manifest, monkeypatch):
    """Checksums are computed on another stream of a GPU than the weights."""
    arena = allocate_arena(manifest, "cpu")
    last = arena.tensor(manifest.entries[-1])
    complete = []
    monkeypatch.setattr(arena, "synchronize", lambda: complete.append(bool(last.any())))
    DummyModelLoader(0).load_weights(manifest, arena, "")
    assert complete == [True]


def test_staged_content_takes_the_place_of_what_was_there_and_back(manifest):
    """The model's views show it at once, and who has mapped the old content keeps that."""
    arena, model = filled_arena(manifest), toy.make_model()
    arena.bind(model)
    arena.publish()
    clone = allocate_arena(manifest, "cpu")
    clone.map_seed_memory(arena.share().fd)
    stage = arena.open_stage(msgspec.structs.replace(manifest, revision="two"))
    stage.prepare_fill([])
    stage.memory[:] = b"\1" * stage.nbytes
    stage.checksums = "of the new content"
    for number, other, revision, checksums in ((1, 7, "two", "of the new content"), (7, 1, "", None)):
        arena.exchange(stage)
        assert model.embed.view(torch.uint8)[0, 0] == number
        assert bytes(arena.memory) == bytes([number]) * arena.nbytes
        assert bytes(stage.memory) == bytes([other]) * arena.nbytes
        assert (arena.manifest.revision, arena.checksums) == (revision, checksums)
        assert arena.is_published == (number == 7) and stage.is_published == (number == 1)
        assert bytes(clone.memory[:9]) == b"\7" * 9
        clone.memory[8] = clone.memory[8]  # a page of its own, which must not differ either


def test_a_mapped_arena_can_be_exchanged_too(manifest):
    seed, client = filled_arena(manifest), allocate_arena(manifest, "cpu")
    seed.publish()
    client.map_seed_memory(seed.share().fd)
    stage = client.open_stage(manifest)
    stage.memory[:] = b"\1" * stage.nbytes
    client.exchange(stage)
    client.memory[0] = 2  # its own memory now
    assert seed.memory[0] == 7 and bytes(stage.memory[:2]) == b"\7\7"
    client.exchange(stage)
    assert bytes(client.memory[:2]) == b"\7\7" and bytes(stage.memory[:2]) == b"\2\1"


def test_an_exchange_that_the_kernel_refuses_changes_nothing(manifest, monkeypatch):
    arena = filled_arena(manifest)
    stage = arena.open_stage(manifest)
    stage.memory[:] = b"\1" * stage.nbytes
    real = host_memory.map_file_at

    def refuse(address, *args, **kwargs):
        if address == stage.address:
            raise OSError("no more mappings")
        real(address, *args, **kwargs)

    monkeypatch.setattr(host_memory, "map_file_at", refuse)
    with pytest.raises(OSError, match="no more"):
        arena.exchange(stage)
    assert bytes(arena.memory) == b"\7" * arena.nbytes and bytes(stage.memory) == b"\1" * arena.nbytes


def test_what_was_staged_gives_its_memory_and_files_back(manifest):
    arena = filled_arena(manifest)
    gc.collect()
    before = len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())
    for _ in range(5):
        stage = arena.open_stage(manifest)
        stage.memory[:] = b"\1" * stage.nbytes
        arena.exchange(stage)
        del stage
    gc.collect()
    assert (len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())) == before
