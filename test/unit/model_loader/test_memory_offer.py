"""Which process offers an arena's memory, and how a GPU's is seen there, with stand-ins for Mooncake and the driver."""

import threading
from types import SimpleNamespace

import pytest
from fake_seeds import toy_arena
from ramet.srt.model_loader.arena.base import LentMemory
from ramet.srt.model_loader.transport import engine_process, memory_offer, mooncake_engine
from ramet.srt.model_loader.transport.engine_messages import OfferMemory
from ramet.srt.model_loader.transport.mooncake_engine import EngineMissingError
from ramet.srt.weights.errors import WeightTransferError


class Process:
    """Stands in for a transport process, whose engine refuses host memory."""

    name, address, session_id = "10.0.0.1", "10.0.0.1", "10.0.0.1:15000"

    def __init__(self, protocol):
        self.protocol, self.calls = protocol, []

    def offer_file(self, *_args):
        raise WeightTransferError("register", 0, self.name, "register_memory answers -1")

    def offer_gpu_memory(self, *args):
        self.calls.append(args)
        return 4096

    def watch(self, on_end):
        self.calls.append("watch")

    def ping(self, _timeout_s):
        return

    def kill(self):
        self.calls.append("kill")


class Engine:
    """Stands in for Mooncake's engine in this process."""

    port = 15007

    def __init__(self, start):
        self.start, self.registered = start, {}

    def register(self, address, nbytes):
        self.registered[address] = nbytes

    def unregister(self, address):
        del self.registered[address]


def test_memory_that_only_its_own_process_can_register_is_offered_from_there(monkeypatch, caplog):
    monkeypatch.setattr(memory_offer, "MooncakeEngine", Engine)
    monkeypatch.setattr(memory_offer, "_engines", {})
    arena, process = toy_arena(1), Process("rdma")
    offer = memory_offer.offer_memory(arena, process)
    assert set(process.calls) == {"kill"} and "register_memory answers -1" in caplog.text
    assert (offer.session_id, offer.address) == ("10.0.0.1:15007", arena.address)
    (engine,) = memory_offer._engines.values()
    assert engine.registered == {arena.address: arena.nbytes} and engine.start.address == "10.0.0.1"
    offer.close()
    assert engine.registered == {}


def test_a_gpu_s_memory_that_can_t_be_lent_is_offered_from_its_own_process(monkeypatch):
    monkeypatch.setattr(memory_offer, "MooncakeEngine", Engine)
    monkeypatch.setattr(memory_offer, "_engines", {})

    def refuse():
        raise OSError("the GPU's memory can't be lent")

    arena, process = toy_arena(1), Process("tcp")
    monkeypatch.setattr(arena, "share", refuse)
    monkeypatch.setattr(arena, "gpu_id", 0)
    assert memory_offer.offer_memory(arena, process).address == arena.address


def test_over_tcp_a_refusal_is_an_error():
    with pytest.raises(WeightTransferError, match="register_memory answers -1"):
        memory_offer.offer_memory(toy_arena(1), Process("tcp"))


def test_a_gpu_s_memory_goes_to_the_process_as_a_handle(monkeypatch):
    arena, process = toy_arena(1), Process("tcp")
    monkeypatch.setattr(arena, "share", lambda: LentMemory(b"handle", 512))
    offer = memory_offer.offer_memory(arena, process)
    assert offer.address == 4096 and process.calls == [(b"handle", 512, arena.nbytes, 0), "watch"]
    offer.close()
    assert process.calls[-1] == "kill"


def test_an_offer_that_has_ended_leaves_no_thread(monkeypatch):
    """An instance that changes its weights every few seconds offers as often."""
    arena, before = toy_arena(1), set(threading.enumerate())
    monkeypatch.setattr(arena, "share", lambda: LentMemory(b"handle", 512))
    memory_offer.offer_memory(arena, Process("tcp")).close()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()


def test_a_gpu_s_memory_is_seen_where_it_was_or_not_at_all(monkeypatch):
    monkeypatch.setattr(engine_process.cuda_driver, "open_memory", lambda handle: {b"handle": 1 << 40}[handle])
    request = OfferMemory(100, cuda_ipc_handle=b"handle", offset=512)
    assert engine_process._map_offered(request, []) == (1 << 40) + 512
    assert engine_process._map_offered(OfferMemory(100, (1 << 40) + 512, b"handle", 512), []) == (1 << 40) + 512
    with pytest.raises(OSError, match="is seen at 0x10000000200 now, and was at 0x1000"):
        engine_process._map_offered(OfferMemory(100, 4096, b"handle", 512), [])


def test_mooncake_s_cuda_builds_get_the_runtime_that_torch_has(monkeypatch, tmp_path):
    library = tmp_path / "nvidia" / "cu13" / "lib" / "libcudart.so.13"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"no library")
    monkeypatch.setattr(mooncake_engine.sys, "path", [str(tmp_path)])
    attempts = []

    def import_module(name):
        attempts.append(name)
        if len(attempts) == 1:
            raise ImportError("libcudart.so.13: cannot open shared object file")
        return SimpleNamespace(TransferEngine="engine")

    monkeypatch.setattr(mooncake_engine.importlib, "import_module", import_module)
    assert mooncake_engine._import_engine() == "engine" and attempts == ["mooncake.engine"] * 2
    monkeypatch.setattr(mooncake_engine.sys, "path", [])
    del attempts[:]
    with pytest.raises(EngineMissingError, match="Mooncake can't be used: libcudart"):
        mooncake_engine._import_engine()


def test_who_lacks_mooncake_is_told_where_it_comes_from(monkeypatch):
    def import_module(_name):
        raise ModuleNotFoundError("No module named 'mooncake'", name="mooncake")

    monkeypatch.setattr(mooncake_engine.importlib, "import_module", import_module)
    with pytest.raises(EngineMissingError, match=r"it is not installed; ramet\[cpu\], .* have it"):
        mooncake_engine._import_engine()
