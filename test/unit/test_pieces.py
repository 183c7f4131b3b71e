"""Who takes which piece of weights next, and from whom."""

import seed_process
from ramet.srt.weights.peer_messages import from_bits, to_bits
from ramet.srt.weights.pieces import MAX_PIECE_BYTES, Giver, PieceBoard, cut_into_pieces


def board(count: int, *givers: Giver, own_id: str = "me") -> PieceBoard:
    made = PieceBoard([100] * count, own_id)
    made.givers = list(givers)
    return made


def test_pieces_are_runs_of_whole_tensors_that_hold_everything() -> None:
    shapes = {f"t{i}": [300_000 + 1000 * i] for i in range(40)} | {"empty": [0], "large": [(MAX_PIECE_BYTES >> 2) + 9]}
    manifest = seed_process.make_manifest(seed_process.DEFAULTS | {"shapes": shapes})
    pieces = cut_into_pieces(manifest)
    entries = [entry.name for piece in pieces for entry in piece.entries]
    assert sorted(entries) == sorted(set(shapes) - {"empty"})
    assert all(a.stop <= b.start for a, b in zip(pieces, pieces[1:], strict=False))
    for piece in pieces:
        assert piece.start == piece.entries[0].offset
        assert piece.stop == piece.entries[-1].offset + piece.entries[-1].nbytes
        assert len(piece.entries) == 1 or piece.nbytes <= MAX_PIECE_BYTES
    assert len(pieces) > 10


def test_those_that_take_together_bring_each_piece_once() -> None:
    boards = [board(40, Giver(is_whole=True), own_id=f"peer {index}") for index in range(4)]
    for index, one in enumerate(boards):
        one.index, one.count = index, len(boards)
        one.givers += [Giver() for _ in range(3)]
    shares = []
    for one in boards:
        share = set()
        for _ in range(40):
            piece = one.pick(one.givers[0], idle_s=0.0)
            if piece is None or one._dice("", piece) % 4 != one.index:
                break
            share.add(piece)
        shares.append(share)
    assert set().union(*shares) == set(range(40)) and sum(map(len, shares)) == 40


def test_what_another_one_brings_is_waited_for_but_not_for_ever() -> None:
    seed, peer = Giver(is_whole=True), Giver(awaits={0}, has={1})
    one = board(2, seed, peer)
    assert one.pick(seed, idle_s=0.0) is None
    assert one.pick(peer, idle_s=0.0) == 1
    assert one.pick(seed, idle_s=0.0) is None
    assert one.pick(seed, idle_s=one.patience_s + 0.01) == 0


def test_what_one_that_has_gone_was_to_bring_is_taken_at_once() -> None:
    seed, peer = Giver(is_whole=True), Giver(awaits={0, 1})
    one = board(2, seed, peer)
    assert one.pick(seed, idle_s=0.0) is None
    peer.is_usable = False
    assert {one.pick(seed, idle_s=0.0), one.pick(seed, idle_s=0.0)} == {0, 1}


def test_what_is_on_this_host_does_not_come_over_the_network() -> None:
    far, near = Giver(has={0, 1, 2}), Giver(is_local=True, has={0}, awaits={1})
    one = board(3, far, near)
    assert one.pick(far, idle_s=0.0) == 2
    assert one.pick(far, idle_s=0.0) is None
    assert one.pick(near, idle_s=0.0) == 0
    near.is_whole = True
    assert one.pick(far, idle_s=one.patience_s + 1) is None and one.pick(near, idle_s=0.0) == 1


def test_the_rarest_piece_of_another_one_comes_first() -> None:
    one = board(3, Giver(has={0, 1, 2}), Giver(has={0, 2}), Giver(has={0}))
    assert one.pick(one.givers[0], idle_s=0.0) == 1
    assert one.pick(one.givers[0], idle_s=0.0) == 2


def test_pieces_that_did_not_come_are_taken_again() -> None:
    seed = Giver(is_whole=True)
    one = board(1, seed)
    assert one.pick(seed, idle_s=0.0) == 0 and not one.is_done and one.pick(seed, idle_s=0.0) is None
    one.put_back(0)
    assert one.pick(seed, idle_s=0.0) == 0
    one.done(0, 0.5)
    assert one.is_done and one.has == {0} and one.patience_s == 1.5


def test_it_is_hopeless_when_nobody_has_what_is_missing() -> None:
    seed, peer = Giver(is_whole=True), Giver(has={0})
    one = board(2, seed, peer)
    assert not one.is_hopeless()
    seed.is_usable = False
    assert one.is_hopeless()
    peer.awaits = {1}
    assert not one.is_hopeless()


def test_sets_of_numbers_as_bits() -> None:
    for numbers in (set(), {0}, {7, 8, 95}):
        assert from_bits(to_bits(numbers), 96) == numbers
    assert from_bits(b"\xff\xff", 3) == {0, 1, 2}
