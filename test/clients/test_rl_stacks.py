"""Stacks of reinforcement learning as clients: their rollouts, and their weight sync as far as a CPU has it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import random_models as rm
from clients.client_run import ClientRun, run_driver
from server_process import ServerProcess

PROMPTS = [list(range(10, 30)), list(range(40, 47))]  # as the drivers have them
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {name: rm.make_model(root / name, "llama3", seed=seed) for seed, name in enumerate(("old", "new"))}
    for folder in found.values():
        rm.write_tokenizer(folder)
    return found


@pytest.fixture(scope="module")
def known(models: dict[str, Path]) -> dict[str, list[list[int]]]:
    """What transformers goes on with after each prompt."""
    return {name: rm.hf_greedy(folder, PROMPTS, NUM_TOKENS) for name, folder in models.items()}


@pytest.fixture
def trained(models: dict[str, Path], tmp_path: Path) -> Iterator[ServerProcess]:
    """A server that begins with the old weights."""
    flags = ("--enable-memory-saver", "--max-total-tokens", "4096", "--engine-info-bootstrap-port", "0")
    with ServerProcess(models["old"], tmp_path / "server.log", "--device", "cpu", *flags, fake=False) as process:
        yield process.wait_ready()


def test_verl(
    trained: ServerProcess,
    models: dict[str, Path],
    known: dict[str, list[list[int]]],
    record_property: Callable[..., None],
) -> None:
    record_property("client", "verl_rollout")
    record_property("step", "rollouts and weight sync")
    run = run_driver("verl_rollout.py", "rl", trained.url, RL_WEIGHTS=str(models["new"] / "model.safetensors"))
    assert run.saw("rollout") == known["old"][0]
    saw = run.saw("weight_sync")
    assert saw["before"]["output_ids"] == known["old"][0] and saw["at_once"] == [known["old"][0]] * 8
    assert [one[1] for one in saw["before"]["meta_info"]["output_token_logprobs"]] == known["old"][0]
    assert saw["megabytes"] > 1  # more than one bucket, also where nothing serves that could stay
    assert saw["after"] == saw["after_sleep"] == known["new"][0]
    assert len(saw["models"]["data"]) == 1


@pytest.fixture(scope="module")
def trl(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClientRun]:
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ("--device", "cpu", "--max-total-tokens", "4096", "--engine-info-bootstrap-port", "0")
    with ServerProcess(models["old"], log, *flags, fake=False) as process:
        yield run_driver("trl_client.py", "rl", process.wait_ready().url)


def generate(saw: Any, tokens: list[list[int]]) -> None:
    assert saw["prompt_ids"] == PROMPTS and saw["completion_ids"] == tokens
    assert saw["logprob_token_ids"] == [[[one] for one in answer] for answer in tokens]


def generate_several(saw: Any, tokens: list[list[int]]) -> None:
    assert saw["completion_ids"] == [tokens[0][:4]] * 3 + [tokens[1][:4]] * 3
    assert all(place == sorted(place, reverse=True) for answer in saw["logprobs"] for place in answer)


def chat(saw: Any, tokens: list[list[int]]) -> None:
    assert [len(one) for one in saw["completion_ids"]] == [NUM_TOKENS] * 2 and all(saw["prompt_ids"])


def score(saw: Any, tokens: list[list[int]]) -> None:
    """The likeliest token is the one that was said."""
    assert saw["actual_token_ids"] == [[[one] for one in answer] for answer in tokens]
    assert [[place[:1] for place in answer] for answer in saw["logprobs"]] == saw["actual_logprobs"]


def score_unlikely(saw: Any, tokens: list[list[int]]) -> None:
    """Whatever its rank, the token itself is told beside the likeliest ones, which stand first."""
    assert saw["actual_token_ids"] == [[[one] for one in prompt[2:]] for prompt in PROMPTS]
    places = [place for answer in saw["logprobs"] for place in answer]
    assert all(len(place) == 3 and place == sorted(place, reverse=True) for place in places)
    actual = [value for answer in saw["actual_logprobs"] for (value,) in answer]
    assert any(value < place[-1] for value, place in zip(actual, places, strict=True))


def server(saw: Any, tokens: list[list[int]]) -> None:
    assert saw["world_size"] == 1 and saw["info"]["weight_transfer_config"] is not None


def control(saw: Any, tokens: list[list[int]]) -> None:
    assert saw["dtype"] == "torch.float32" and saw["max_model_len"] > 0 and saw["world_size"] == 1


STEPS = {one.__name__: one for one in (generate, generate_several, chat, score, score_unlikely, server, control)}


@pytest.mark.parametrize("step", STEPS)
def test_trl(
    step: str, trl: ClientRun, known: dict[str, list[list[int]]], record_property: Callable[..., None]
) -> None:
    record_property("client", "trl_client")
    record_property("step", step)
    STEPS[step](trl.saw(step), known["old"])
