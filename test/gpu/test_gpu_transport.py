"""A GPU's weights between hosts: received by another process through pinned memory, and offered by one."""

import os
import sys
from pathlib import Path

import pytest
import torch
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.transport.memory_offer import MemoryOffer, start_offering_process
from ramet.srt.model_loader.transport.receivers import Receivers
from ramet.srt.utils import host_memory
from ramet.srt.weights.copy_op import CopyOp
from seed_process import DEFAULTS, make_manifest
from stranger import write_as_a_stranger

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmark"))
from bench_common import running  # noqa: E402 - its folder is made importable above


def copy_op(source, target, nbytes, num_rows=1, source_stride=0):
    return CopyOp(
        source=0,
        source_offset=source,
        target_offset=target,
        row_nbytes=nbytes,
        num_rows=num_rows,
        source_stride=source_stride,
        target_stride=nbytes,
    )


def test_what_another_process_receives_reaches_the_gpu():
    arena = allocate_arena(make_manifest(DEFAULTS), "cuda")
    arena.prepare_fill([(0, arena.nbytes)])
    window = arena.open_receive_window(1 << 20)
    assert window._memory.is_pinned()
    fds, sizes = zip(*window.files, strict=True)
    theirs = host_memory.view_memory(host_memory.map_files(fds, sizes), sum(sizes))
    for number in range(5):  # more than it has room for at once
        batch = [copy_op(0, 64 * number, 4), copy_op(0, 64 * number + 8, 2, num_rows=2, source_stride=3)]
        for start, sent in zip(window.place(batch), (b"four", b"ab-cd"), strict=True):
            theirs[start : start + len(sent)] = sent
        window.deliver(batch)
    window.finish()
    for number in range(5):
        start = 64 * number
        assert arena.gather([(start, start + 4), (start + 8, start + 12)]) == b"fourabcd"
    window.close()
    window.close()


def test_a_gpu_s_weights_are_read_from_another_process():
    pytest.importorskip("mooncake.engine")
    arena = allocate_arena(make_manifest(DEFAULTS), "cuda")
    content = torch.arange(arena.nbytes, device="cuda").to(torch.uint8)
    arena.buffer.copy_(content)
    torch.cuda.synchronize()
    offer = MemoryOffer(arena, start_offering_process("127.0.0.1", 0, arena.gpu_id))
    receivers = Receivers("127.0.0.1", 0)
    fd = host_memory.create_memfd("target", 1 << 20)
    try:
        process = receivers.get(offer.session_id)
        start = process.open_window([fd], [1 << 20])
        process.read(offer.session_id, [start], [offer.address], [1 << 20], 20)
        assert os.pread(fd, 1 << 20, 0) == bytes(content[: 1 << 20].cpu().numpy())
    finally:
        receivers.close()
        offer.close()
        os.close(fd)


def test_what_a_stranger_writes_to_a_gpu_s_weights_ends_the_seed():
    pytest.importorskip("mooncake.engine")
    flags = ["--device", "cuda", "--max-total-tokens", "8192", "--weights-check-interval", "1"]
    offer = "--remote-instance-weight-loader-start-seed-via-transfer-engine"
    with running(ROOT / "examples" / "demo_model", *flags, offer) as seed:
        info = seed.call("/remote_instance_transfer_engine_info?rank=0")
        session_id, weights = info["remote_instance_transfer_engine_info"]
        address = min(place[0] for place in weights.values())
        assert write_as_a_stranger(session_id, address) == 0  # nothing can refuse it
        assert seed.process.wait(20) == 1
        assert "have been changed in memory since they were offered" in seed.log_path.read_text()
