"""Trainers that push weights to instances: processes with a group of torch's beside the default one, or one of vLLM's.

As a script it does what the lines of its standard input say, one after the other, and answers each with a line.
"""

import contextlib
import ctypes
import datetime
import json
import os
import pickle
import subprocess
import sys
import types
from multiprocessing.reduction import ForkingPickler
from unittest import mock

import torch
import torch.distributed as dist
import zmq
from ramet.srt.distributed import nccl_library
from ramet.srt.utils.net import listen_on
from safetensors.torch import load_file
from torch.multiprocessing.reductions import reduce_tensor

TIMEOUT_S = 60


def free_port():
    with listen_on("127.0.0.1", 0) as listener:
        return listener.getsockname()[1]


class Trainer:
    """One, which is rank 0 of its groups, one after the other. Use as a context."""

    def __init__(self):
        self.port, self.size, self.name = 0, 0, ""
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def tell(self, what, **more):
        """Have it do something; it need not be waited for."""
        self.process.stdin.write(json.dumps([what, more]) + "\n")
        self.process.stdin.flush()

    def join(self, size, name="weight_update_group", gpu=None):
        """Begin to wait for the other members of a group. One without a name is one of vLLM's; on a GPU it has NCCL."""
        self.port, self.size, self.name = free_port(), size, name
        self.tell("join", port=self.port, size=size, name=name, gpu=gpu)

    def send(self, path, names=None, **how):
        """Broadcast tensors of a safetensors file: one by one, or `flat`, in buckets of so many bytes."""
        self.tell("send", path=str(path), names=names, **how)

    def lend(self, path, sockets, buffer_nbytes, fault=""):
        """Show tensors of a safetensors file to one receiver at each socket, in a buffer."""
        self.tell("lend", path=str(path), sockets=sockets, buffer_nbytes=buffer_nbytes, fault=fault)

    def wait(self):
        """For the next answer; it is "" if it has ended."""
        return self.process.stdout.readline().strip()

    def kill(self):
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what it has not read
                pipe.close()


def describe(path, names=None):
    """What a trainer says of tensors in a request: names, dtypes and shapes."""
    tensors = load_file(path)
    names = names or list(tensors)
    dtypes = [str(tensors[name].dtype).removeprefix("torch.") for name in names]
    return names, dtypes, [list(tensors[name].shape) for name in names]


class _Member:
    """The trainer's side of a group."""

    _group, _is_torchs = None, False

    def join(self, port, size, name, gpu):
        """As SGLang's and OpenRLHF's trainers make a group, or as vLLM's do with NCCL, or without it."""
        timeout = datetime.timedelta(seconds=TIMEOUT_S)
        if self._group is not None and self._is_torchs:
            dist.destroy_process_group(self._group)
        self._device = torch.device("cpu" if gpu is None else f"cuda:{gpu}")
        if gpu is not None:
            torch.cuda.set_device(gpu)
        self._is_torchs = bool(name)
        if name:
            helper = dist.distributed_c10d._new_process_group_helper
            store, rank, size = next(dist.rendezvous(f"tcp://127.0.0.1:{port}", 0, size, timeout=timeout))
            store, backend = dist.PrefixStore(name, store), dist.Backend("gloo" if gpu is None else "nccl")
            self._group, _ = helper(size, rank, [], backend, store, group_name=name, timeout=timeout)
            dist.distributed_c10d._world.pg_group_ranks[self._group] = {one: one for one in range(size)}
            return
        store = dist.TCPStore("127.0.0.1", port, size, True, timeout)
        if gpu is not None:
            self._group = _NcclGroup(store, size)
            return
        store = dist.PrefixStore(f"tcp://127.0.0.1:{port}", store)
        self._group = dist.ProcessGroup(store, 0, size)
        gloo = dist.ProcessGroupGloo(store, 0, size, timeout=timeout)
        self._group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        self._group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)

    def send(self, path, names, flat=None, more=0, cast=None):
        """Args:
        flat: bytes after which a bucket ends, above which it may go by a tensor.
        more: bytes (or fewer) than there are to send with the first.
        """
        tensors = load_file(path)
        parts, bucket = [], []
        for name in names or list(tensors):
            bucket.append(tensors[name].contiguous().view(torch.uint8).view(-1))
            if flat is None or sum(map(len, bucket)) > flat:
                parts.append(torch.cat(bucket))
                bucket = []
        if bucket:
            parts.append(torch.cat(bucket))
        if more > 0:
            parts[0] = torch.cat([parts[0], torch.zeros(more, dtype=torch.uint8)])
        elif more < 0:
            parts[0] = parts[0][:more]
        for part in parts:
            if isinstance(self._group, _NcclGroup):
                self._group.broadcast(part.to(self._device))
                continue
            dist.broadcast(part.to(self._device), group_src=0, group=self._group)
            if not self._is_torchs:
                dist.barrier(group=self._group)
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def lend(self, path, sockets, buffer_nbytes, fault):
        """As checkpoint-engine does it. What goes wrong for one of the receivers ends it for all.

        Args:
            fault: "beyond": a tensor lies beyond the buffer; "exception": it gives up; "short": it ends with one None.
        """
        torch.multiprocessing.set_sharing_strategy("file_system")
        tensors = {name: tensor.contiguous().view(torch.uint8).view(-1) for name, tensor in load_file(path).items()}
        with contextlib.ExitStack() as stack:
            talks = [stack.enter_context(_Talk(socket, buffer_nbytes)) for socket in sockets]
            for talk in talks:
                talk.send(ForkingPickler.dumps(reduce_tensor(talk.buffer)))
            items, start = [], 0
            for name, tensor in load_file(path).items():
                nbytes = tensors[name].numel()
                if start + nbytes > buffer_nbytes:
                    _tell_all(talks, items)
                    items, start = [], 0
                for talk in talks:
                    talk.answer()
                    talk.buffer[start : start + nbytes] = tensors[name]
                items.append({"name": name, "shape": tensor.shape, "dtype": tensor.dtype, "offset": start})
                start += nbytes
            if fault == "beyond":
                items[-1]["offset"] = buffer_nbytes
            _tell_all(talks, RuntimeError("no more") if fault == "exception" else items)
            if fault != "exception":
                for _ in range(1 if fault == "short" else 2):
                    _tell_all(talks, None)
                for talk in talks:
                    talk.answer()


class _NcclGroup:
    """As vLLM's StatelessProcessGroup and PyNcclCommunicator together, rank 0."""

    def __init__(self, store, size):
        library, unique_id = nccl_library.load_library(), nccl_library._UniqueId()
        assert library.ncclGetUniqueId(ctypes.byref(unique_id)) == nccl_library.SUCCESS
        store.set("broadcast_from/0/0", pickled_unique_id(bytes(unique_id)))
        self._store = store  # others would see its end as this process's
        self._communicator = nccl_library.Communicator(library, bytes(unique_id), 0, size, TIMEOUT_S)
        one = torch.zeros(1, device="cuda")
        self._communicator.all_reduce(one.data_ptr(), 1, torch.cuda.current_stream().cuda_stream, TIMEOUT_S)
        torch.cuda.synchronize()

    def broadcast(self, part):
        stream = torch.cuda.current_stream().cuda_stream
        self._communicator.broadcast(part.data_ptr(), part.nbytes, 0, stream, TIMEOUT_S)
        torch.cuda.synchronize()


def pickled_unique_id(unique_id, name="ncclUniqueId"):
    """As vLLM's trainers put it into their store."""
    full = "vllm.distributed.device_communicators.pynccl_wrapper"
    kind = type(name, (ctypes.Structure,), {"_fields_": [("internal", ctypes.c_byte * len(unique_id))]})
    kind.__module__ = full
    parts = full.split(".")
    modules = {".".join(parts[: count + 1]): types.ModuleType("stand-in") for count in range(len(parts))}
    setattr(modules[full], name, kind)
    with mock.patch.dict(sys.modules, modules):
        return pickle.dumps(kind.from_buffer_copy(unique_id))


class _Talk:
    """With one receiver, which is told one thing after the other."""

    def __init__(self, address, buffer_nbytes):
        self.buffer = torch.empty(buffer_nbytes, dtype=torch.uint8)
        self._address, self._owed = address, False

    def __enter__(self):
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REQ)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.RCVTIMEO, TIMEOUT_S * 1000)
        self._socket.bind(self._address)
        return self

    def __exit__(self, *_):
        self._socket.close()
        self._context.term()

    def send(self, message):
        self.answer()
        self._socket.send(bytes(message))
        self._owed = True

    def answer(self):
        """Wait for what the last message has been answered with."""
        if self._owed:
            self._owed = False
            if words := self._socket.recv():
                self.send(pickle.dumps(RuntimeError("Some workers failed to update weights")))
                raise RuntimeError(words.decode())


def _tell_all(talks, value):
    for talk in talks:
        talk.send(pickle.dumps(value))


def main():
    member = _Member()
    for line in sys.stdin:
        what, more = json.loads(line)
        try:
            getattr(member, what)(**more)
            answer = "done"
        except (dist.DistError, OSError, RuntimeError, zmq.ZMQError) as error:
            answer = "failed: " + str(error).split("\n")[0]
        print(answer, flush=True)


if __name__ == "__main__":
    main()
