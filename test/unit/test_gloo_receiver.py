"""A process that receives what a trainer broadcasts: torch's groups and vLLM's, and trainers that do something else."""

import functools
import os
import signal
import threading
import time

import pytest
import torch
from ramet.srt.distributed.gloo_receiver import GlooReceiver
from ramet.srt.distributed.receiver_messages import Place
from ramet.srt.utils.net import listen_on
from ramet.srt.utils.threads import run_beside
from safetensors.torch import load_file, save_file
from trainers import Trainer, free_port

TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file({"a": torch.randn(40, 30).bfloat16(), "b": torch.randn(7), "c": torch.randn(64, 9).half()}, path)
    return path, {name: tensor.view(torch.uint8).view(-1) for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def trainer():
    with Trainer() as trainer:
        yield trainer


def place(port, rank=1, size=2, name="group", timeout_s=TIMEOUT_S):
    return Place(host="127.0.0.1", port=port, rank=rank, size=size, name=name, timeout_s=timeout_s)


class Group:
    """A trainer, and all other members. Use as a context."""

    def __init__(self, trainer, size=2, name="group"):
        self.receivers = [GlooReceiver() for _ in range(1, size)]
        trainer.join(size, name)
        joined = self.each(lambda receiver, rank: receiver.join(place(trainer.port, rank, size, name)))
        assert joined == [None] * (size - 1) and trainer.wait() == "done"

    def each(self, work):
        """What comes of work that all do at once: results, or errors."""

        def run(rank, receiver):
            try:
                return work(receiver, rank)
            except OSError as error:
                return error

        futures = [run_beside(functools.partial(run, *one), "member") for one in enumerate(self.receivers, start=1)]
        return [future.result() for future in futures]

    def receive(self, nbytes, timeout_s=TIMEOUT_S):
        return self.each(lambda receiver, _: receiver.receive(nbytes, timeout_s))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for receiver in self.receivers:
            receiver.close()


@pytest.mark.parametrize(("name", "size"), [("weight_update_group", 3), ("", 2)])
def test_all_members_get_what_the_trainer_sends(trainer, weights, name, size):
    path, tensors = weights
    with Group(trainer, size, name) as group:
        trainer.send(path)
        for content in tensors.values():
            assert all(torch.equal(one, content) for one in group.receive(len(content)))
        assert trainer.wait() == "done"


@pytest.mark.parametrize(("more", "words"), [(-8, "fewer bytes"), (4, "more bytes")])
def test_other_sizes_than_announced_are_an_error_and_another_group_can_be_made(trainer, weights, more, words):
    """A message that is too large ends the process that receives it, and no other."""
    path, tensors = weights
    with Group(trainer) as group:
        trainer.send(path, ["a"], more=more)
        (error,) = group.receive(len(tensors["a"]))
        assert words in str(error)
        assert trainer.wait() == "done"


def test_a_trainer_that_sends_nothing_or_dies_is_an_error(weights):
    with Trainer() as trainer:
        with Group(trainer) as group:
            start = time.monotonic()
            (error,) = group.receive(100, 0.5)
            assert isinstance(error, OSError) and time.monotonic() - start < 5
        with Group(trainer) as group:
            threading.Timer(0.3, trainer.process.kill).start()
            (error,) = group.receive(100)
            assert isinstance(error, OSError) and "closed by peer" in str(error)


def test_nobody_waits_for_longer_than_was_said():
    with listen_on("127.0.0.1", 0) as mute:  # a store would answer
        strangers = [
            (place(mute.getsockname()[1], timeout_s=0.3), "no progress within 0.3 s"),
            (place(free_port(), timeout_s=0.3), "no trainer has listened at 127.0.0.1:"),
            (place(free_port()), "was left meanwhile"),
        ]
        receivers = [GlooReceiver() for _ in strangers]
        for receiver, (stranger, words) in zip(receivers, strangers, strict=True):
            if "left" in words:
                threading.Timer(0.3, receiver.close).start()
            with pytest.raises(OSError, match=words):
                receiver.join(stranger)
            receiver.close()
    with pytest.raises(OSError, match="was left meanwhile"):
        receivers[0].receive(8, 1.0)


def test_the_process_that_is_killed_is_named():
    receiver = GlooReceiver()
    threading.Timer(0.3, os.kill, (receiver.pid, signal.SIGKILL)).start()
    with pytest.raises(OSError, match="the receiver process was ended by SIGKILL"):
        receiver.join(place(free_port()))
    receiver.close()
