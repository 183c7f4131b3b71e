"""An engine without room for other weights beside those that serve, which is updated in place; and which sleeps."""

import os

import pytest
from ramet import Engine
from server_process import PYTHON_FOLDER, TEST_FOLDER
from updated_servers import GREEDY, PROMPT, Case


class LittleEngine(Engine):
    scheduler_module = "little_memory_scheduler"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def engine(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{PYTHON_FOLDER}{os.pathsep}{TEST_FOLDER}")
        patch.setenv("OMP_NUM_THREADS", "1")
        with LittleEngine(
            model_path=str(case.models["old"]),
            tp_size=2,
            max_total_tokens=2048,
            max_running_requests=8,
            enable_memory_saver=True,
        ) as engine:
            yield engine


def tokens(engine):
    return engine.generate(input_ids=PROMPT, sampling_params=GREEDY)["output_ids"]


def test_an_update_needs_leave_to_take_the_place_of_what_serves(case, engine):
    with pytest.raises(ValueError, match=r"rank 0, 1: the weights of rank|rank 0: the weights of rank"):
        engine.update_weights_from_disk(str(case.models["new"]))
    assert tokens(engine) == case.tokens["old"]
    stream = engine.generate(input_ids=PROMPT, sampling_params={**GREEDY, "max_new_tokens": 60}, stream=True)
    next(stream)
    answer = engine.update_weights_from_disk(str(case.models["new"]), mode="in_place", weight_version="new")
    assert answer["mode"] == "in_place" and answer["num_bytes"] > 0 and answer["pause_seconds"] > 0
    last = list(stream)[-1]
    assert len(last["output_ids"]) == 60, "requests go on with the new weights"
    assert [one["version"] for one in last["meta_info"]["weight_versions"]][-1] == "new"
    assert tokens(engine) == case.tokens["new"]
    assert [one["weight_version"] for one in engine.weight_versions()["versions"]] == ["new"]
    assert engine.update_weights_from_disk(str(case.models["old"]), mode="in_place")["mode"] == "in_place"
    assert tokens(engine) == case.tokens["old"]


def test_it_sleeps_and_wakes(case, engine):
    engine.release_memory_occupation(["weights"])
    engine.release_memory_occupation()
    with pytest.raises(ValueError, match="asleep"):
        engine.continue_generation()
    with pytest.raises(ValueError, match="tags must be of weights"):
        engine.resume_memory_occupation(["weight"])
    engine.resume_memory_occupation()
    assert tokens(engine) == case.tokens["old"]
