"""Signals that come while a server's main process starts, before anything serves."""

import signal

import pytest
from ramet.srt.entrypoints import launch as launch_module
from ramet.srt.server_args import ServerArgs


class InterruptedInstance:
    """A signal comes when it starts, and `num_more` while it is being stopped."""

    num_more = 0
    calls: list[str] = []

    def __init__(self, *arguments: object):
        self.calls.clear()

    def start(self) -> None:
        signal.raise_signal(signal.SIGINT)

    def stop_processes(self) -> None:
        for _ in range(self.num_more):
            signal.raise_signal(signal.SIGINT)
        self.calls.append("stopped")

    def kill_processes(self) -> None:
        self.calls.append("killed")


@pytest.mark.parametrize("num_more, end", [(0, "stopped"), (1, "killed")])
def test_a_second_signal_kills_what_the_first_one_stops(
    monkeypatch: pytest.MonkeyPatch, num_more: int, end: str
) -> None:
    monkeypatch.setattr(launch_module, "Instance", InterruptedInstance)
    monkeypatch.setattr(launch_module, "configure_logging", lambda *arguments: None)
    monkeypatch.setattr(InterruptedInstance, "num_more", num_more)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert launch_module.launch(ServerArgs(model_path="a-model", port=0), 0.0) == 0
    assert InterruptedInstance.calls == [end]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
