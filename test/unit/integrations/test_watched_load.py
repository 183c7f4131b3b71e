"""Owns the tests of watching a model's loading: views as regions, what is noted, and all that is refused."""

import pytest
import torch
from ramet_vllm.views import NoRegion, locate_view
from ramet_vllm.watched_load import CannotMap, CheckpointTensor, Placed, watch_load

VIEWS = {  # of a tensor of 6 x 4 x 5
    "all": (lambda t: t, ((0, 6), (0, 4), (0, 5))),
    "rows": (lambda t: t.narrow(0, 2, 3), ((2, 5), (0, 4), (0, 5))),
    "columns": (lambda t: t[..., 1:4], ((0, 6), (0, 4), (1, 4))),
    "one matrix": (lambda t: t[5], ((5, 6), (0, 4), (0, 5))),
    "one row of it": (lambda t: t[5, 2], ((5, 6), (2, 3), (0, 5))),
    "one number": (lambda t: t[5, 2, 1], ((5, 6), (2, 3), (1, 2))),
    "a corner": (lambda t: t[1:3, 2:, 3:], ((1, 3), (2, 4), (3, 5))),
    "flat": (lambda t: t.view(-1), ((0, 6), (0, 4), (0, 5))),
    "matrices below each other": (lambda t: t[2:4].reshape(8, 5), ((2, 4), (0, 4), (0, 5))),
    "with a dimension more": (lambda t: t[3].unsqueeze(0), ((3, 4), (0, 4), (0, 5))),
    "chunk": (lambda t: t.chunk(3, 0)[1], ((2, 4), (0, 4), (0, 5))),
}
NO_VIEWS = {
    "turned round": lambda t: t.transpose(1, 2),
    "in steps": lambda t: t[::2],
    "repeated": lambda t: t[:1].expand(3, 4, 5),
    "across rows": lambda t: t.view(-1)[3:9],
}


@pytest.mark.parametrize("case", VIEWS)
def test_a_view_is_a_region(case):
    make, region = VIEWS[case]
    whole = torch.arange(120).view(6, 4, 5)
    view = make(whole)
    found = locate_view(view.storage_offset(), view.shape, view.stride(), whole.shape)
    assert found == region
    assert torch.equal(whole[tuple(slice(*one) for one in found)].flatten(), view.flatten())


@pytest.mark.parametrize("case", NO_VIEWS)
def test_what_is_no_region_is_refused(case):
    view = NO_VIEWS[case](torch.arange(120).view(6, 4, 5))
    with pytest.raises(NoRegion):
        locate_view(view.storage_offset(), view.shape, view.stride(), (6, 4, 5))


def watched(load, tensors=(("w", (6, 4)),), targets=None, **options) -> Placed:
    """What `load` does with tensors of a checkpoint and the targets `p` (10 x 4) and the buffer `b`."""
    targets = targets or {"p": torch.full((10, 4), 7.0), "b": torch.tensor([1, 0])}
    offered = [CheckpointTensor(name, "float32", shape) for name, shape in tensors]
    before = {name: target.clone() for name, target in targets.items()}
    placed = watch_load(lambda given: load(targets, dict(given)), targets, offered, **options)
    assert all(torch.equal(before[name], target) for name, target in targets.items())  # nothing was written
    return placed


def test_a_fused_and_padded_load_is_noted_and_nothing_is_written():
    def load(targets, given):
        rows = given["w"].narrow(0, 3, 3).contiguous().to("cpu")
        targets["p"].data[:3].copy_(rows)
        targets["p"].data[3:9] = given["v"]
        targets["p"][9:].data.fill_(0)

    placed = watched(load, [("w", (6, 4)), ("v", (6, 4))])
    assert [(box.checkpoint_name, box.source, box.target) for box in placed.boxes["p"]] == [
        ("w", ((3, 6), (0, 4)), ((0, 3), (0, 4))),
        ("v", ((0, 6), (0, 4)), ((3, 9), (0, 4))),
    ]
    assert placed.zeros == {"p": [((9, 10), (0, 4))]}


def test_a_buffer_may_be_looked_up():
    """As the map from experts to a rank's own is."""

    def load(targets, given):
        if targets["b"][0].item() == 1:
            targets["p"].data[:6].copy_(given["w"])

    assert list(watched(load, readable=["b"]).boxes) == ["p"]
    with pytest.raises(CannotMap, match="computes with b"):
        watched(load)


REFUSED = {
    "a sum": (lambda t, g: t["p"].data[:6].copy_(g["w"] + 1), "computes with w"),
    "another type": (lambda t, g: t["p"].data[:6].copy_(g["w"].to(torch.bfloat16)), "computes with w"),
    "a number looked at": (lambda t, g: g["w"][0, 0].item(), "does not take w: RuntimeError"),
    "turned round": (lambda t, g: t["p"].data[:4].copy_(g["w"].t()[:, :4]), "as slices: it is turned round"),
    "another shape": (lambda t, g: t["p"].data[:6].view(4, 6).copy_(g["w"].view(4, 6)), "into p as slices"),
    "repeated rows": (lambda t, g: t["p"].data[:6].copy_(g["w"][:1]), "another shape"),
    "put together": (lambda t, g: t["p"].data.copy_(torch.cat([g["w"], g["w"][:4]])), "computes with w"),
    "ones": (lambda t, g: t["p"].data.fill_(1), "computes with p"),
    "arithmetic in place": (lambda t, g: t["p"].data.mul_(2), "computes with p"),
    "a weight looked at": (lambda t, g: t["p"].data.sum(), "computes with p"),
    "cleared afterwards": (lambda t, g: (t["p"].data[:6].copy_(g["w"]), t["p"].data.zero_()), "cleared after"),
    "something of its own": (lambda t, g: torch.empty(6, 4).copy_(g["w"]), "computes with w"),
    "an error": (lambda t, g: g["nothing"], "KeyError: 'nothing'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_more_than_a_copy_is_refused(case):
    load, message = REFUSED[case]
    with pytest.raises(CannotMap, match=message):
        watched(load)


def test_tensors_that_share_memory_are_refused():
    one = torch.zeros(10, 4)
    with pytest.raises(CannotMap, match="p and q of the model share memory|q and p of the model share memory"):
        watched(lambda t, g: None, targets={"p": one, "q": one[:2]})


def test_a_table_that_layers_share_may_be_looked_up_and_not_be_loaded():
    one = torch.ones(10, 4)
    tables = {"b": one, "c": one[:2], "p": torch.ones(10, 4)}

    def look_up(targets, given):
        targets["p"].data[:6].copy_(given["w"][: int(targets["c"].sum())])

    assert list(watched(look_up, targets=tables, readable=["b", "c"]).boxes) == ["p"]
    with pytest.raises(CannotMap, match="w goes into b, whose memory others"):
        watched(lambda t, g: t["b"][:6].copy_(g["w"]), targets=tables, readable=["b", "c"])
