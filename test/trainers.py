"""Trainers that push weights to instances: processes with a group of torch's beside the default one, or one of vLLM's.

As a script it does what the lines of its standard input say, one after the other, and answers each with a line.
"""

import contextlib
import datetime
import json
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import torch
import torch.distributed as dist
import zmq
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
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def tell(self, what, **more):
        """Have it do something; it need not be waited for."""
        self.process.stdin.write(json.dumps([what, more]) + "\n")
        self.process.stdin.flush()

    def join(self, size, name="weight_update_group"):
        """Begin to wait for the other members of a group. One without a name is one of vLLM's."""
        self.port, self.size, self.name = free_port(), size, name
        self.tell("join", port=self.port, rank=0, size=size, name=name)

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

    _group, _meets = None, False

    def join(self, port, rank, size, name):
        """As SGLang's and OpenRLHF's trainers make a group, or as vLLM does for devices without NCCL."""
        timeout = datetime.timedelta(seconds=TIMEOUT_S)
        if self._group is not None and not self._meets:
            dist.destroy_process_group(self._group)
        self._meets = not name
        if name:
            helper = dist.distributed_c10d._new_process_group_helper
            store, rank, size = next(dist.rendezvous(f"tcp://127.0.0.1:{port}", rank, size, timeout=timeout))
            store = dist.PrefixStore(name, store)
            self._group, _ = helper(size, rank, [], dist.Backend("gloo"), store, group_name=name, timeout=timeout)
            dist.distributed_c10d._world.pg_group_ranks[self._group] = {one: one for one in range(size)}
            return
        store = dist.TCPStore("127.0.0.1", port, size, rank == 0, timeout)
        store = dist.PrefixStore(f"tcp://127.0.0.1:{port}", store)
        self._group = dist.ProcessGroup(store, rank, size)
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
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
            dist.broadcast(part, group_src=0, group=self._group)
            if self._meets:
                dist.barrier(group=self._group)

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
        except (dist.DistError, RuntimeError, zmq.ZMQError) as error:
            answer = "failed: " + str(error).split("\n")[0]
        print(answer, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "python"))
    main()
