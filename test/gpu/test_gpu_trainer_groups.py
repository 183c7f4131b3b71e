"""A rank's membership in trainers' NCCL groups, torch's and vLLM's, with a trainer on a second GPU that may die."""

import threading
import time

import pytest
import torch
from ramet.srt.distributed.nccl_receiver import NcclReceiver, StatelessReceiver
from ramet.srt.distributed.receiver_messages import Place
from safetensors.torch import load_file, save_file
from trainers import Trainer

TIMEOUT_S = 60.0

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file({"a": torch.randn(4000, 3000).bfloat16(), "b": torch.randn(7), "c": torch.randn(64, 9).half()}, path)
    return path


def join(trainer, name):
    device = torch.device("cuda:0")
    receiver = NcclReceiver(device) if name else StatelessReceiver(device)
    trainer.join(2, name, gpu=1)
    receiver.join(Place(host="127.0.0.1", port=trainer.port, rank=1, size=2, name=name, timeout_s=TIMEOUT_S))
    return receiver


@pytest.mark.parametrize("name", ["weight_update_group", ""])
def test_tensors_arrive_until_the_trainer_dies_and_the_next_one_is_met(weights, name):
    for _ in range(2):
        with Trainer() as trainer:
            receiver = join(trainer, name)
            trainer.send(weights)
            for tensor in load_file(weights).values():
                content = receiver.receive(tensor.nbytes, TIMEOUT_S)
                assert content.is_cuda and torch.equal(content.cpu(), tensor.view(torch.uint8).view(-1))
            assert trainer.wait() == "done"
            threading.Timer(0.5, trainer.process.kill).start()
            start = time.monotonic()
            with pytest.raises(OSError):
                receiver.receive(1 << 20, TIMEOUT_S)
            assert time.monotonic() - start < 20
            receiver.close()
    assert int(torch.ones(3, device="cuda:0").sum()) == 3  # the device and the process go on


@pytest.mark.parametrize("name", ["weight_update_group", ""])
def test_a_trainer_that_sends_nothing_is_given_up(weights, name):
    with Trainer() as trainer:
        receiver = join(trainer, name)
        trainer.send(weights, ["b"])
        receiver.receive(28, TIMEOUT_S)
        start = time.monotonic()
        with pytest.raises(OSError, match="no progress within 2 s"):
            receiver.receive(1 << 20, 2.0)
        assert time.monotonic() - start < 10
        receiver.close()
