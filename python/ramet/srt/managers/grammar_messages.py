"""Owns what a scheduler and its grammar processes say to each other, and how that lies in a stream of bytes."""

from collections.abc import Iterator

import msgspec

from ramet.srt.sampling.constraint import Constraint

LENGTH_BYTES = 4
FORK, KILL = b"F", b"K"  # to the nursery, in packets: with a socket beside it; with a process id behind it


class NurseryConfig(msgspec.Struct, kw_only=True):
    """What the nursery gets first, as JSON."""

    tokenizer_path: str
    vocab_size: int
    eos_ids: list[int]
    parent_pid: int


class Compile(msgspec.Struct, array_like=True, tag=True):
    """Which constraint a process is there for, from now on."""

    constraint: Constraint


class Open(msgspec.Struct, array_like=True, tag=True):
    """Begin a sequence, which has these output tokens already. A State answers."""

    sequence: int
    token_ids: list[int]


class Step(msgspec.Struct, array_like=True, tag=True):
    """A sequence has got a token. A State answers."""

    sequence: int
    token_id: int
    wants_mask: bool  # False: it was the last one, whatever the constraint says


class Close(msgspec.Struct, array_like=True, tag=True):
    """A sequence has ended. Nothing answers."""

    sequence: int


class Hello(msgspec.Struct, array_like=True, tag=True):
    """What a process says first."""

    pid: int
    thread_id: int  # the kernel's, of the thread that does the work


class State(msgspec.Struct, array_like=True, tag=True):
    """Where a sequence stands: the answers come in the order of what they answer."""

    sequence: int
    cpu_s: float  # of the process: what this answer took
    total_cpu_s: float  # of the process, up to this answer
    mask: bytes = b""  # see Grammar.mask; empty where none was wanted or there is none
    is_terminated: bool = False
    error: str | None = None  # why it can't go on, in one line


Order = Compile | Open | Step | Close
Answer = Hello | State

encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode


def frame(message: Order | Answer) -> bytes:
    """The message with its length before it."""
    body = encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


class FrameReader:
    """Cuts a stream into messages."""

    def __init__(self) -> None:
        self._data = bytearray()

    def push(self, data: bytes) -> Iterator[bytes]:
        """The messages that are complete with `data`."""
        self._data += data
        place = 0
        while len(self._data) - place >= LENGTH_BYTES:
            end = place + LENGTH_BYTES + int.from_bytes(self._data[place : place + LENGTH_BYTES], "little")
            if end > len(self._data):
                break
            yield bytes(self._data[place + LENGTH_BYTES : end])
            place = end
        del self._data[:place]
