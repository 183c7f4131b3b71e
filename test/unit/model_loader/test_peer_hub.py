"""Those that take the same weights hear of each other, and of nobody else."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from ramet.srt.model_loader.transport import peer_hub
from ramet.srt.model_loader.transport.peer_hub import Listener, PeerHub
from ramet.srt.weights.peer_messages import Holds, Others, PeerLink, PeerOffer


class Heard(Listener):
    """Notes what it hears."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.holds, self.others, self.is_silent, self.end = Holds(), Others([]), False, ""

    def _note(self, **facts: object) -> None:
        with self.changed:
            self.__dict__.update(facts)
            self.changed.notify_all()

    def on_holds(self, holds: Holds) -> None:
        self._note(holds=holds)

    def on_others(self, others: Others) -> None:
        self._note(others=others)

    def on_silence(self, is_silent: bool) -> None:
        self._note(is_silent=is_silent)

    def on_end(self, reason: str) -> None:
        self._note(end=reason)

    def wait(self, holds: Callable[["Heard"], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: holds(self), 20), self.__dict__


@pytest.fixture
def make() -> Iterator[Callable[..., PeerHub]]:
    hubs: list[PeerHub] = []

    def make_hub(content: str = "content") -> PeerHub:
        hubs.append(PeerHub("127.0.0.1", content))
        return hubs[-1]

    yield make_hub
    for hub in hubs:
        hub.close()


def offer_of(hub: PeerHub, peer_id: str) -> PeerOffer:
    return PeerOffer(peer_id=peer_id, link=hub.link)


def test_takers_hear_what_there_is_and_who_else_takes(make: Callable[..., PeerHub]) -> None:
    seed, takers, heard = make(), [make(), make()], [Heard(), Heard()]
    seed.tell(Holds(b"\x01"))
    for hub, one in zip(takers, heard, strict=True):
        hub.follow(seed.link, one)
    heard[0].wait(lambda one: one.holds.has == b"\x01")
    assert heard[0].others.offers == []
    for index, hub in enumerate(takers):
        hub.offer(offer_of(hub, f"peer {index}"))
    for index, one in enumerate(heard):
        one.wait(lambda one: one.others.count == 2)
        assert [offer.peer_id for offer in one.others.offers] == [f"peer {1 - index}"]
    assert {one.others.index for one in heard} == {0, 1}
    seed.tell(Holds(is_whole=True))
    heard[1].wait(lambda one: one.holds.is_whole)
    takers[0].say_taken(heard[0], 5)
    takers[0].finish(heard[0])
    heard[1].wait(lambda one: one.others.count == 1)
    assert len(heard[1].others.offers) == 1, "who has all still gives"
    assert seed.num_given_bytes == 5
    takers[0].close()
    heard[1].wait(lambda one: not one.others.offers)
    seed.close()
    heard[1].wait(lambda one: bool(one.end))


@pytest.mark.parametrize("what", ["content", "token"])
def test_whoever_wants_other_weights_or_has_no_token_hears_nothing(make: Callable[..., PeerHub], what: str) -> None:
    seed, heard = make(), Heard()
    seed.tell(Holds(is_whole=True))
    link = seed.link if what == "content" else PeerLink(host=seed.link.host, port=seed.link.port, token="no")
    make("other" if what == "content" else "content").follow(link, heard)
    heard.wait(lambda one: bool(one.end))
    assert not heard.holds.is_whole and seed.num_takers == 0
    assert ("other weights" in heard.end) == (what == "content")


def test_garbage_ends_its_own_connection_only(make: Callable[..., PeerHub]) -> None:
    seed, heard = make(), Heard()
    make().follow(seed.link, heard)
    for garbage in (b"\xff" * 100, b"\x00\x00\x00\x05hello", b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection((seed.link.host, seed.link.port), 10) as stranger:
            stranger.sendall(garbage)
            stranger.shutdown(socket.SHUT_WR)
            stranger.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(10) == b""
    seed.tell(Holds(is_whole=True))
    heard.wait(lambda one: one.holds.is_whole)


def test_silence_is_heard_within_half_a_second_and_so_is_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peer_hub.SILENCE_S + peer_hub.BEAT_S < 0.5
    monkeypatch.setattr(peer_hub, "BEAT_S", 1.0)
    seed, taker, heard = PeerHub("127.0.0.1", "c"), PeerHub("127.0.0.1", "c"), Heard()
    try:
        taker.follow(seed.link, heard)
        heard.wait(lambda one: one.is_silent)
        heard.wait(lambda one: not one.is_silent)
        assert not heard.end
    finally:
        taker.close()
        seed.close()
