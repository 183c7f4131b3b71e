"""The ranks of a replica tell each other what came of a step beside their passes; the leader answers for all."""

import json

import msgspec
import pytest
import torch
import toy_model
from ramet.srt.configs.load_config import LoadConfig, LoadContext
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.configs.runner_config import WeightsConfig
from ramet.srt.model_executor import weight_update
from ramet.srt.model_executor.rank_weights import LoadedWeights, RankWeights
from ramet.srt.model_executor.step_outcome import StepOutcome
from ramet.srt.model_executor.weight_update import RankVersions
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.checkpoint.checkpoint_loader import CheckpointOpener
from ramet.srt.weights.report import LoadReport
from ramet.srt.weights.update_messages import OfferWeightsReq, SwitchWeightsReq

STEP = OfferWeightsReq(request_id="7", is_offered=True)
GOOD = StepOutcome(sources=("checkpoint",), num_bytes=5, seconds=2.0)


class Board:
    """What ranks say, without waiting."""

    def __init__(self, **said: StepOutcome) -> None:
        self.said = {f"weights/7/{rank[1:]}": json.dumps(msgspec.to_builtins(one)) for rank, one in said.items()}

    def announce(self, key: str, value: str) -> None:
        self.said[key] = value

    def await_announcement(self, key: str, timeout_s: float) -> str | None:
        return self.said.get(key)


class LostBoard(Board):
    def await_announcement(self, key: str, timeout_s: float) -> str | None:
        raise RuntimeError("connection reset")


def make_versions(board: Board, rank: int) -> RankVersions:
    parallel = ParallelConfig(tp_rank=rank, tp_size=3)
    manifest = msgspec.structs.replace(toy_model.make_manifest(toy_model.make_model()), parallel=parallel)
    config = WeightsConfig(
        name="toy", load=LoadConfig(), is_seed=False, host="", control_host=None, admin_api_key=None, is_published=False
    )
    arena = allocate_arena(manifest, "cpu")
    weights = RankWeights(config, LoadContext(board=board), manifest, arena, torch.device("cpu"))
    report = LoadReport(source="dummy", num_bytes=0, seconds=0.0)
    loaded = LoadedWeights(weights, report, None)
    return RankVersions(loaded, CheckpointOpener(lambda: None), memory=None)  # type: ignore[arg-type, return-value]


def outcome_of(board: Board, rank: int, own: StepOutcome, monkeypatch: pytest.MonkeyPatch) -> StepOutcome:
    versions = make_versions(board, rank)
    monkeypatch.setattr(versions, "_take", lambda _step: own)
    versions.follow(STEP)
    return versions.outcome()


def test_the_leader_answers_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(r1=GOOD, r2=StepOutcome(sources=("local_copy",), num_bytes=7, seconds=3.0))
    outcome = outcome_of(board, 0, GOOD, monkeypatch)
    assert outcome == StepOutcome(sources=("checkpoint", "local_copy"), num_bytes=17, seconds=3.0)


def test_each_reason_is_told_once_with_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(r1=StepOutcome(failure="no room"), r2=StepOutcome(failure="truncated"))
    outcome = outcome_of(board, 0, StepOutcome(failure="no room"), monkeypatch)
    assert outcome.failure == "rank 0, 1: no room; rank 2: truncated"


def test_a_rank_that_says_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = outcome_of(Board(r2=GOOD), 0, GOOD, monkeypatch)
    assert outcome.failure == f"rank 1: it has not ended within {weight_update.OTHERS_TIMEOUT_S:g} s"


def test_a_board_that_is_lost_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "connection reset" in outcome_of(LostBoard(), 0, GOOD, monkeypatch).failure


def test_the_others_only_tell_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board()
    assert outcome_of(board, 2, GOOD, monkeypatch) == GOOD
    assert msgspec.json.decode(board.said["weights/7/2"], type=StepOutcome) == GOOD


def test_offered_weights_and_numbers_that_are_not_staged_are_never_switched() -> None:
    versions = make_versions(Board(), 1)
    with pytest.raises(KeyError):
        versions.follow(SwitchWeightsReq(request_id="8", number=4, version="x"))
