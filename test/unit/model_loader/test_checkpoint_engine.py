"""The engine's side of checkpoint-engine's protocol: tensors that a sender shows in a buffer, and senders that fail."""

import pickle

import pytest
import torch
import zmq
from ramet.srt.model_loader.checkpoint_engine import receive_lent
from ramet.srt.model_loader.tensor_memory import CudaMemory, PickledTensor
from ramet.srt.utils.threads import run_beside
from safetensors.torch import load_file, save_file
from trainers import Trainer

TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file({"a": torch.randn(40, 30).bfloat16(), "b": torch.randn(7), "c": torch.randn(64, 9).half()}, path)
    return path


@pytest.fixture(scope="module")
def trainer():
    with Trainer() as trainer:
        yield trainer


@pytest.fixture
def socket(tmp_path):
    return f"ipc://{tmp_path}/socket"


def received(socket, timeout_s=TIMEOUT_S):
    return {name: tensor.clone() for name, tensor in receive_lent(socket, -1, timeout_s)}


@pytest.mark.parametrize(("buffer_nbytes", "fault"), [(1 << 16, ""), (2500, ""), (2500, "short")])
def test_all_that_was_shown_comes(trainer, weights, socket, buffer_nbytes, fault, monkeypatch):
    """In one list or several; a sender of an older kind ends with one None."""
    monkeypatch.setattr("ramet.srt.model_loader.checkpoint_engine.END_GRACE_S", 0.3 if fault else TIMEOUT_S)
    trainer.lend(weights, [socket], buffer_nbytes, fault)
    found = received(socket)
    assert trainer.wait() == "done"
    expected = load_file(weights)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_sender_that_gives_up_or_says_nonsense_is_an_error(trainer, weights, socket):
    trainer.lend(weights, [socket], 2500, "exception")
    with pytest.raises(OSError, match="the sender has given up: RuntimeError: no more"):
        received(socket)
    assert trainer.wait() == "done"
    trainer.lend(weights, [socket], 2500, "beyond")
    with pytest.raises(ValueError, match="c reaches beyond the sender's buffer of 2500 bytes"):
        received(socket)
    assert trainer.wait() == "failed: c reaches beyond the sender's buffer of 2500 bytes"


def test_a_sender_hears_of_a_tensor_that_was_refused(trainer, weights, socket):
    trainer.lend(weights, [socket], 2500)
    tensors = receive_lent(socket, -1, TIMEOUT_S)
    next(tensors)
    tensors.close()
    assert "a tensor was refused" in trainer.wait()


def test_a_sender_that_dies_or_is_silent_is_an_error(weights, socket):
    with Trainer() as trainer:
        trainer.lend(weights, [socket], 2500)
        tensors = receive_lent(socket, -1, TIMEOUT_S)
        next(tensors)
        trainer.kill()
        with pytest.raises(OSError, match="the sender has gone"):
            list(tensors)
    with pytest.raises(OSError, match=r"has said nothing within 0\.2 s"):
        received(socket, 0.2)
    with pytest.raises(ValueError, match="by ipc://"):
        received("tcp://127.0.0.1:1")


def told(socket, *messages):
    """What comes of some messages, and how the last one is answered."""
    context = zmq.Context()
    with context.socket(zmq.REQ) as sender:
        sender.bind(socket)
        receiving = run_beside(lambda: received(socket), "receive")
        for message in messages:
            sender.send(message)
            answer = sender.recv()
        sender.send(pickle.dumps(RuntimeError()))
        error = receiving.exception(TIMEOUT_S)
    context.term()
    return answer.decode(), str(error)


def test_nothing_but_data_is_read_of_messages(socket):
    flat, square = torch.zeros(64, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8)
    for message, words in (
        (pickle.dumps(print), "it names builtins.print"),
        (b"nonsense", "can't be read"),
        (pickle.dumps(flat), "came as a copy"),
        (pickle.dumps(square), "no flat tensor of uint8"),
        (pickle.dumps(None), "where a tensor belongs"),
    ):
        answer, error = told(socket, message)
        assert words in answer and words in error


def test_a_gpus_buffer_is_opened_on_the_rank_s_own_gpu(monkeypatch):
    """Whatever number the sender has for it; and not where the weights are on the host."""
    from ramet.srt.model_loader import checkpoint_engine

    memory = CudaMemory(device=7, handle=b"h", nbytes=64, offset_nbytes=0, counter=b"/torch_1_2", counter_place=0,
                        event=b"", has_event=False)  # fmt: skip
    handle = PickledTensor(memory, "uint8", 0, (64,), (1,))
    opened = []
    monkeypatch.setattr(CudaMemory, "open", lambda self, _: opened.append(self) or torch.zeros(64).untyped_storage())
    assert checkpoint_engine._open(handle, 3).shape == (64,) and opened[0].device == 3
    with pytest.raises(ValueError, match="the sender's buffer is on a GPU"):
        checkpoint_engine._open(handle, -1)
