"""Owns the addresses at which the processes of one instance talk to each other."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PortArgs:
    """Addresses of the ZeroMQ sockets between one instance's processes (pyzmq address strings).

    Whoever reads a socket binds it. Where each scheduler reads, its SchedulerReady says.
    """

    tokenizer_ipc_name: str  # PULL at the tokenizer manager; from the detokenizer and the schedulers
    detokenizer_ipc_name: str  # PULL at the detokenizer; from the schedulers and the tokenizer manager
    tokenizer_fd: int | None = None  # listening socket behind the address, where that is TCP
    detokenizer_fd: int | None = None

    @classmethod
    def in_directory(cls, directory: str) -> "PortArgs":
        """Unix-socket addresses below `directory`, which only this user may enter."""
        return cls(tokenizer_ipc_name=f"ipc://{directory}/tokenizer", detokenizer_ipc_name=f"ipc://{directory}/detok")
