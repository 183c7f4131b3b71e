"""A recording: which passes are in it, where it goes, what is refused, and that tokens are the same."""

import gzip
import json

import pytest
import random_models as rm
import torch
from engine_harness import EngineHarness
from ramet.srt.managers.io_struct import ProfileReqOutput, StartProfileReqInput, StopProfileReqInput
from ramet.srt.managers.rank_profiler import RankProfiler

PROMPT = rm.random_prompts([9])[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rm.make_model(tmp_path_factory.mktemp("model"), "llama3")


@pytest.fixture(params=[False, True], ids=["plain", "overlap"])
def engine(folder, request):
    return EngineHarness(folder, overlap=request.param)


def start_message(output_dir, num_steps=None, activities=("CPU", "GPU"), profile_id="id", **options):
    return StartProfileReqInput(
        request_id="start",
        profile_id=profile_id,
        output_dir=str(output_dir),
        num_steps=num_steps,
        activities=list(activities),
        **{"with_stack": False, "record_shapes": False} | options,
    )


def start(engine, *args, **options) -> ProfileReqOutput:
    return ask(engine, start_message(*args, **options))


def stop(engine) -> ProfileReqOutput:
    return ask(engine, StopProfileReqInput(request_id="stop"))


def ask(engine, message) -> ProfileReqOutput:
    engine.send(message)
    engine.step()
    return engine.channel.replies.pop()


def events_in(path):
    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


def marks_in(path):
    marks = [event for event in events_in(path) if event.get("cat") == "user_annotation"]
    return [mark["name"] for mark in sorted(marks, key=lambda mark: mark["ts"])]


def test_as_many_passes_as_were_asked_for(engine, tmp_path):
    expected = engine.generate([PROMPT, PROMPT[::-1]], max_new_tokens=6)
    engine.scheduler.flush_caches()
    reply = start(engine, tmp_path / "new" / "folder", num_steps=4)
    assert reply.success and reply.request_id == "start" and "for 4 passes" in reply.message
    found = engine.generate([PROMPT, PROMPT[::-1]], max_new_tokens=6)
    assert [result.token_ids for result in found] == [result.token_ids for result in expected]
    (trace,) = (tmp_path / "new" / "folder").iterdir()
    assert trace.name == "id-rank-0.trace.json.gz"
    names = marks_in(trace)
    assert [name for name in names if "pass" in name] == ["prefill_pass[2]", *["decode_pass[2]"] * 3]
    assert names.count("wait_for_result") == (2 if engine.scheduler.config.overlap else 3)  # the last one is not in it
    assert not stop(engine).success


@pytest.mark.parametrize("with_stack", [False, True])
def test_until_it_is_stopped(engine, tmp_path, with_stack):
    assert start(engine, tmp_path, with_stack=with_stack, record_shapes=with_stack).success
    engine.generate([PROMPT], max_new_tokens=3)
    assert not list(tmp_path.iterdir())
    reply = stop(engine)
    assert reply.success and "3 passes" in reply.message
    events = events_in(tmp_path / "id-rank-0.trace.json.gz")
    assert any(event.get("cat") == "python_function" for event in events) == with_stack
    assert any("Input Dims" in event.get("args", {}) for event in events) == with_stack
    engine.generate([PROMPT], max_new_tokens=3)
    assert start(engine, tmp_path, num_steps=1, profile_id="second").success
    engine.generate([PROMPT], max_new_tokens=3)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_refused_changes_nothing(folder, tmp_path):
    engine = EngineHarness(folder)
    (tmp_path / "file").touch()
    for options, words in (
        ({"output_dir": tmp_path / "file"}, "output_dir: no file can be written there"),
        ({"output_dir": tmp_path / "file" / "folder"}, "output_dir: no file can be written there"),
        ({"output_dir": "/a\0b"}, "output_dir: no file can be written there"),
        ({"output_dir": tmp_path, "activities": ["GPU"]}, "runs on a CPU"),
    ):
        reply = start(engine, **options)
        assert not reply.success and words in reply.message and "\n" not in reply.message
    assert not stop(engine).success
    assert start(engine, tmp_path / "traces").success
    reply = start(engine, tmp_path / "traces", profile_id="second")
    assert not reply.success and "already" in reply.message
    engine.generate([PROMPT], max_new_tokens=2)
    assert stop(engine).success
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["id-rank-0.trace.json.gz"]


def test_a_trace_that_can_not_be_written_leaves_the_rank_serving(folder, tmp_path):
    engine = EngineHarness(folder)
    for num_steps in (None, 2):
        assert start(engine, tmp_path / "traces", num_steps).success
        (tmp_path / "traces").rmdir()
        (tmp_path / "traces").touch()
        assert len(engine.generate([PROMPT], max_new_tokens=4)[0].token_ids) == 4
        assert not stop(engine).success
        (tmp_path / "traces").unlink()
    assert start(engine, tmp_path / "traces").success and stop(engine).success


def test_what_is_sent_beside_a_pass_ends_within_the_recording(tmp_path):
    ends = []
    profiler = RankProfiler(3, torch.device("cpu"), lambda: ends.append(torch.autograd._profiler_enabled()))
    profiler.start(start_message(tmp_path))
    profiler.stop()
    assert ends == [True] and (tmp_path / "id-rank-3.trace.json.gz").is_file()
