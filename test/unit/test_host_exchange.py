"""Ranks of one node add up over shared memory: the right numbers, the same everywhere, and an end when one is lost."""

import os
import subprocess
import sys
from pathlib import Path

import exchange_ranks
import pytest
from ramet.srt.distributed.node_memory import RANK_NBYTES, NodeMemory
from ramet.srt.layers.cpu_kernels import build

TIMEOUT_S = 120


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """Built once, for all ranks of all tests."""
    try:
        build.build()
    except build.NoCompilerError as error:
        pytest.skip(str(error))


def run(scenario: str, num_ranks: int, folder: Path) -> None:
    command = [sys.executable, exchange_ranks.__file__, scenario, str(num_ranks), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_all_ranks_get_what_one_process_computes(tmp_path: Path, num_ranks: int) -> None:
    run("check_values", num_ranks, tmp_path)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_many_operations_one_behind_the_other(tmp_path: Path, num_ranks: int) -> None:
    run("check_rounds", num_ranks, tmp_path)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_all_ranks_change_over_at_the_same_operation(tmp_path: Path, num_ranks: int) -> None:
    """With four, in the groups of data-parallel attention, too."""
    run("check_change", num_ranks, tmp_path)


def test_a_rank_without_kernels_keeps_all_at_what_they_had(tmp_path: Path) -> None:
    run("check_without", 2, tmp_path)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_killed_rank_is_an_error_at_once(tmp_path: Path, num_ranks: int) -> None:
    run("lose_last", num_ranks, tmp_path)


def test_a_rank_that_does_not_come_is_an_error_in_time(tmp_path: Path) -> None:
    run("wait_for_late", 3, tmp_path)


def test_ranks_at_different_operations_get_no_numbers(tmp_path: Path) -> None:
    run("differ", 2, tmp_path)


def test_nothing_has_a_name_or_takes_memory_before_it_is_used() -> None:
    before = sorted(os.listdir("/dev/shm"))
    fd = NodeMemory.create(2)
    try:
        assert sorted(os.listdir("/dev/shm")) == before
        assert os.fstat(fd).st_blocks == 0
    finally:
        os.close(fd)


def test_groups_have_pieces_of_their_own_and_those_of_several_nodes_none() -> None:
    fd = NodeMemory.create(4)
    try:
        memory = NodeMemory(fd, range(4, 8))
        pieces = [memory.cut(group) for group in ([4, 5, 6, 7], [0, 4], [4, 5], [6, 7], [4, 6], [5, 7])]
        assert pieces.pop(1) is None
        spans = [range(start, start + nbytes) for start, nbytes in filter(None, pieces)]
        assert [len(span) for span in spans] == [4 * RANK_NBYTES] + [2 * RANK_NBYTES] * 4
        assert all(one.stop <= other.start for one, other in zip(spans, spans[1:], strict=False))
        assert spans[-1].stop <= os.fstat(fd).st_size
    finally:
        os.close(fd)
