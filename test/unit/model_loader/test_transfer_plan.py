"""Owns the tests of the planner: executing a plan over bytes must equal direct slicing."""

import math

import msgspec
import numpy as np
import pytest
import toy_model as toy
from hypothesis import given, settings
from hypothesis import strategies as st
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.weights.boxes import intersect, region_volume, share_out, subtract
from ramet.srt.weights.copy_op import CopyOp
from ramet.srt.weights.manifest import WeightBox, WeightEntry, WeightManifest, align_up
from ramet.srt.weights.planner import ArenaSource, PlanError, TensorSource, plan, whole_tensor, zero_ranges


def make_manifest(tensors: list[tuple[str, tuple[int, ...], tuple[WeightBox, ...]]], alignment: int) -> WeightManifest:
    entries, offset = [], 0
    for name, shape, boxes in tensors:
        nbytes = 2 * math.prod(shape)
        entries.append(WeightEntry(name=name, dtype="int16", shape=shape, offset=offset, nbytes=nbytes, boxes=boxes))
        offset = align_up(offset + nbytes, alignment)
    return WeightManifest(
        model_name="m",
        revision="",
        dtype="int16",
        quantization="",
        role="target",
        parallel=ParallelConfig(),
        arena_nbytes=offset,
        entries=tuple(entries),
    )


def fill_directly(manifest: WeightManifest, checkpoint: dict[str, np.ndarray]) -> np.ndarray:
    memory = np.zeros(manifest.arena_nbytes, np.uint8)
    for entry in manifest.entries:
        view = memory[entry.offset : entry.offset + entry.nbytes].view(np.int16).reshape(entry.shape)
        for box in entry.boxes:
            source = checkpoint[box.checkpoint_name][(*(slice(a, b) for a, b in box.source), ...)]
            target = view[(*(slice(a, b) for a, b in box.target), ...)]
            target[...] = source.reshape(target.shape)
    return memory


def execute(ops: list[CopyOp] | tuple[CopyOp, ...], sources: list[np.ndarray], memory: np.ndarray) -> None:
    for op in ops:
        for row in range(op.num_rows):
            target, source = op.target_offset + row * op.target_stride, op.source_offset + row * op.source_stride
            memory[target : target + op.row_nbytes] = sources[op.source][source : source + op.row_nbytes]


@st.composite
def cuts(draw, extent: int) -> list[tuple[int, int]]:
    """A dimension cut into consecutive ranges."""
    points = sorted(draw(st.sets(st.integers(1, max(1, extent - 1)), max_size=3)) | {0, extent})
    return [(a, b) for a, b in zip(points, points[1:], strict=False) if a < b]


@st.composite
def layouts(draw, shapes: dict[str, tuple[int, ...]], whole: bool) -> WeightManifest:
    """A random arena over checkpoint tensors: cut along every dimension, stacked, padded, in any order."""
    tensors = []
    for name, shape in shapes.items():
        regions = [()]
        for extent in shape:
            regions = [(*r, c) for r in regions for c in draw(cuts(extent))]
        for i, region in enumerate(regions):
            if not whole and draw(st.booleans()):
                continue
            extents = tuple(b - a for a, b in region)
            pad = draw(st.sampled_from([0, 0, 1, 3]))
            axis = draw(st.integers(0, len(extents) - 1)) if extents else 0
            padded = tuple(n + (pad if d == axis else 0) for d, n in enumerate(extents))
            target = tuple((0, n) for n in extents)
            if draw(st.booleans()):  # as one layer of a stack
                depth, place = draw(st.sampled_from([(1, 0), (2, 1)]))
                padded, target = (depth, *padded), ((place, place + 1), *target)
            tensors.append((f"{name}.{i}", padded, (WeightBox(name, region, target),)))
    return make_manifest(draw(st.permutations(tensors)), draw(st.sampled_from([2, 16, 256])))


shapes_strategy = st.dictionaries(
    st.sampled_from(["a", "b", "c"]), st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=3
)


def make_checkpoint(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(1, 30000, shape, np.int16) for name, shape in shapes.items()}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_executing_a_plan_equals_direct_slicing(data):
    shapes = data.draw(shapes_strategy)
    checkpoint = make_checkpoint(shapes)
    target = data.draw(layouts(shapes, whole=True))
    seeds = [data.draw(layouts(shapes, whole=False)) for _ in range(data.draw(st.integers(0, 2)))]
    seeds.append(data.draw(layouts(shapes, whole=True)))
    sources = [ArenaSource(f"seed {i}", seed) for i, seed in enumerate(seeds)]
    max_op_nbytes = data.draw(st.sampled_from([2, 10, 1 << 20]))
    memories = [fill_directly(seed, checkpoint) for seed in seeds]
    expected = fill_directly(target, checkpoint)

    result = plan(target, sources, max_op_nbytes=max_op_nbytes)
    memory = np.full(target.arena_nbytes, 0xEE, np.uint8)
    for start, stop in zero_ranges(target):
        memory[start:stop] = 0
    execute(result.ops, memories, memory)
    assert np.array_equal(memory, expected)
    assert all(op.nbytes > 0 for op in result.ops)
    assert all(op.nbytes <= max_op_nbytes or (op.num_rows == 1) for op in result.ops)

    # Lose a source with some of its operations undone: the others finish them.
    lost = data.draw(st.integers(0, len(seeds) - 1))
    undone = [op for op in result.ops if op.source == lost and data.draw(st.booleans())]
    for op in undone:
        for row in range(op.num_rows):
            start = op.target_offset + row * op.target_stride
            memory[start : start + op.row_nbytes] = 0
    whole_sources = [sources[-1]]
    again = plan(target, whole_sources, max_op_nbytes=max_op_nbytes, unfinished=undone)
    execute(again.ops, [memories[-1]], memory)
    assert np.array_equal(memory, expected)
    assert undone or not again.ops


@given(st.data())
def test_subtracting_a_part_leaves_the_rest(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    ranges = [
        data.draw(st.integers(0, n - 1).flatmap(lambda a, n=n: st.tuples(st.just(a), st.integers(a + 1, n))))
        for n in shape
    ]
    region = tuple((0, n) for n in shape)
    hole = intersect(region, tuple(ranges))
    count = np.zeros(shape, int)
    for rest in subtract(region, hole):
        count[tuple(slice(a, b) for a, b in rest)] += 1
    assert count.max(initial=0) <= 1 and count.sum() == region_volume(region) - region_volume(hole)
    assert not count[tuple(slice(a, b) for a, b in hole)].any()


def test_a_region_is_shared_out_to_the_first_that_has_each_part():
    offers = iter([("a", ((0, 2), (0, 3))), ("b", ((1, 4), (0, 3))), ("c", ((0, 4), (0, 4))), ("asked too much", None)])
    parts, missing = share_out(((0, 4), (0, 4)), offers)
    count = np.zeros((4, 4), int)
    owners = np.full((4, 4), "")
    for owner, part in parts:
        place = tuple(slice(start, stop) for start, stop in part)
        count[place] += 1
        owners[place] = owner
    assert not missing and (count == 1).all()
    assert ["".join(row) for row in owners] == ["aaac", "aaac", "bbbc", "bbbc"]
    assert next(offers) == ("asked too much", None)
    assert share_out(((0, 4),), [("a", ((1, 3),))]) == ([("a", ((1, 3),))], [((0, 1),), ((3, 4),)])


def test_equal_layouts_become_one_range_across_alignment_gaps_and_padding():
    manifest = toy.make_manifest(toy.make_model())
    result = plan(manifest, [ArenaSource("seed", manifest)])
    # The tensor of odd size is followed by a gap, the embedding by rows of padding: still one range.
    (op,) = result.ops
    last = manifest.entries[-1]
    assert (op.source_offset, op.target_offset, op.row_nbytes) == (0, 0, last.offset + last.nbytes)


def test_gaps_are_not_merged_for_a_source_whose_gaps_are_unknown():
    manifest = toy.make_manifest(toy.make_model())
    known = ArenaSource("seed", manifest)
    unknown = TensorSource(name="seed", holdings=known.holdings)
    result = plan(manifest, [unknown])
    assert len(result.ops) > 1
    assert result.nbytes == sum(region_volume(box.target) * 4 for entry in manifest.entries for box in entry.boxes)


def test_equal_sources_share_the_work():
    manifest = toy.make_manifest(toy.make_model())
    sources = [ArenaSource(f"seed {i}", manifest) for i in range(3)]
    result = plan(manifest, sources, max_op_nbytes=1 << 10)
    shares = [sum(op.nbytes for op in result.of_source(i)) for i in range(3)]
    assert max(shares) - min(shares) <= 2 << 10
    assert sum(shares) == result.nbytes


def test_defect_9_no_zero_length_ranges_and_no_giant_operation():
    manifest = toy.make_manifest(toy.make_model())
    assert any(entry.nbytes == 0 for entry in manifest.entries)
    result = plan(manifest, [ArenaSource("seed", manifest)], max_op_nbytes=4096)
    assert all(0 < op.nbytes <= 4096 for op in result.ops)


def test_two_tensor_parallel_ranks_fill_one(tmp_path):
    target = toy.make_manifest(toy.make_model())
    ranks = [toy.make_manifest(toy.make_model(2, r), 2, r) for r in range(2)]
    result = plan(target, [ArenaSource(f"rank {r}", m) for r, m in enumerate(ranks)])
    assert {op.source for op in result.ops} == {0, 1}


def test_what_nobody_has_is_named():
    target = toy.make_manifest(toy.make_model())
    half = toy.make_manifest(toy.make_model(2, 0), 2, 0)
    with pytest.raises(PlanError, match=r"no source has embed \(model.embed_tokens.weight\[64:100, 0:32\]\)") as caught:
        plan(target, [ArenaSource("rank 0", half)])
    assert not caught.value.mismatches
    assert not any(name.startswith("norm") for name in caught.value.uncovered)


def test_defect_6_equal_sizes_do_not_hide_another_dtype():
    import torch

    target = toy.make_manifest(toy.make_model(dtype=torch.bfloat16))
    seed = toy.make_manifest(toy.make_model(dtype=torch.float16))
    assert [e.nbytes for e in target.entries] == [e.nbytes for e in seed.entries]
    with pytest.raises(PlanError, match=r"embed \(float16 in seed, bfloat16 here\)"):
        plan(target, [ArenaSource("seed", seed)])


def test_only_a_source_that_casts_gives_another_dtype():
    target = make_manifest([("t", (4,), (WeightBox("c", ((0, 4),), ((0, 4),)),))], 2)
    target = msgspec.structs.replace(target, entries=(msgspec.structs.replace(target.entries[0], dtype="bfloat16"),))
    holdings = {"c": [whole_tensor((4,), 100, "float32")]}
    (op,) = plan(target, [TensorSource(name="file", holdings=holdings, casts=True)]).ops
    assert (op.source_offset, op.row_nbytes, op.source_row_nbytes) == (100, 8, 16)
    with pytest.raises(PlanError, match="float32 in file"):
        plan(target, [TensorSource(name="file", holdings=holdings)])
