"""Two processes with a GPU each: broadcasts over NCCL outside of the default group, and a peer that disappears."""

import os
import subprocess
import sys
import time

import pytest
import torch
from ramet.srt.distributed.pair_group import SENDER, PairGroup, listen, open_store

PEER = """
import os, signal, sys, time
import torch
from ramet.srt.distributed.pair_group import RECEIVER, PairGroup, connect

port, name, rounds, nbytes, how = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
device = torch.device("cuda:1")
memory = torch.zeros(nbytes, dtype=torch.uint8, device=device)
group = PairGroup(connect("127.0.0.1", port, 60), name, RECEIVER, device, "127.0.0.1", 60)
for number in range(rounds):
    group.broadcast(memory)
    assert int(memory[-1]) == number % 200 + 1 and int(memory.max()) == int(memory.min())
if how != "end":
    os.kill(os.getpid(), getattr(signal, how))
group.close()
print("received", flush=True)
"""

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


class Transfer:
    """A peer process and this side's group."""

    def __init__(self, name, rounds, nbytes=64 << 20, how="end", timeout_s=60.0):
        store = open_store(listen("127.0.0.1", 0), "127.0.0.1", 60)
        arguments = [str(store.port), name, str(rounds), str(nbytes), how]
        self.peer = subprocess.Popen(
            [sys.executable, "-c", PEER, *arguments], stdout=subprocess.PIPE, env={**os.environ}
        )
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device="cuda:0")
        self.group = PairGroup(store, name, SENDER, torch.device("cuda:0"), "127.0.0.1", 60)
        self.group.timeout_s = timeout_s

    def send(self, rounds):
        for number in range(rounds):
            self.memory.fill_(number % 200 + 1)
            torch.cuda.synchronize()
            self.group.broadcast(self.memory)

    def end(self):
        self.peer.kill() if self.peer.poll() is None else None
        self.peer.wait(30)


def test_broadcasts_arrive():
    transfer = Transfer("arrive", rounds=5)
    transfer.send(5)
    transfer.group.close()
    assert b"received" in transfer.peer.communicate(timeout=60)[0]


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_peer_that_disappears_is_an_error_and_the_next_is_served(how):
    transfer = Transfer(how, rounds=3, how=how, timeout_s=5.0)
    start = time.monotonic()
    with pytest.raises(OSError):
        transfer.send(10)
    assert time.monotonic() - start < 30
    transfer.group.close(failed=True)
    transfer.end()
    assert int(torch.ones(3, device="cuda:0").sum()) == 3  # the device and the process go on
    test_broadcasts_arrive()


def test_several_large_pieces_are_as_fast_as_one():
    nbytes, pieces = 8 << 30, 8
    transfer = Transfer("speed", rounds=0, nbytes=1)
    transfer.group.close()
    transfer.end()
    store = open_store(listen("127.0.0.1", 0), "127.0.0.1", 60)
    code = f"""
import sys, torch
from ramet.srt.distributed.pair_group import RECEIVER, PairGroup, connect
device = torch.device("cuda:1")
memory = torch.zeros({nbytes}, dtype=torch.uint8, device=device)
group = PairGroup(connect("127.0.0.1", {store.port}, 60), "speed2", RECEIVER, device, "127.0.0.1", 60)
for count in (1, 1, {pieces}, {pieces}):
    for part in memory.chunk(count):
        group.broadcast(part)
"""
    peer = subprocess.Popen([sys.executable, "-c", code])
    memory = torch.ones(nbytes, dtype=torch.uint8, device="cuda:0")
    torch.cuda.synchronize()
    group = PairGroup(store, "speed2", SENDER, torch.device("cuda:0"), "127.0.0.1", 60)
    seconds = []
    for count in (1, 1, pieces, pieces):
        start = time.perf_counter()
        for part in memory.chunk(count):
            group.broadcast(part)
        seconds.append(time.perf_counter() - start)
    peer.wait(60)
    group.close()
    print(f"{nbytes / 1e9:.1f} GB: " + ", ".join(f"{nbytes / s / 1e9:.0f} GB/s" for s in seconds))
    assert seconds[1] / seconds[3] > 0.7
