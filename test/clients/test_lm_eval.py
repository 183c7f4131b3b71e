"""lm-eval through the server: log-likelihoods and greedy texts equal those that it computes with transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clients.conftest import PlainAnswers
from clients.lm_eval_run import TASKS, run_lm_eval, write_tasks
from server_process import MODEL_NAME, ServerProcess

TOLERANCE = 1e-3  # of a sum over up to 60 tokens, in float32
LIKELIHOODS = ["ramet_choice", "ramet_rolling"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(model: Path, tasks: Path) -> dict[str, list[Any]]:
    """What transformers computes: a row of sums, whether greedy, texts."""
    arguments = f"pretrained={model},dtype=float32"
    return run_lm_eval("hf", arguments, list(TASKS), tasks, "transformers", "--device", "cpu")


def ask(server: ServerProcess, model: Path, options: str = "") -> str:
    return (
        f"model={MODEL_NAME},base_url={server.url}/v1/completions,tokenizer={model},tokenizer_backend=huggingface,"
        f"num_concurrent=4,max_retries=1{options}"
    )


@pytest.mark.parametrize("kind", ["prompts as ids", "prompts as texts", "batches"])
def test_likelihoods(
    kind: str, server: ServerProcess, model: Path, tasks: Path, theirs: dict[str, list[Any]],
    record_property: Callable[..., None],
) -> None:  # fmt: skip
    record_property("client", "lm_eval")
    record_property("step", f"log-likelihoods, {kind}")
    options = {"prompts as texts": ",tokenized_requests=False"}.get(kind, "")
    flags = ["--batch_size", "3"] if kind == "batches" else []
    ours = run_lm_eval(
        "local-completions", ask(server, model, options), LIKELIHOODS, tasks, kind.replace(" ", "_"), *flags
    )
    for task in LIKELIHOODS:
        sums, expected = [[flat(answer) for answer in answers[task]] for answers in (ours, theirs)]
        assert len(sums) == len(expected)
        for mine, other in zip(sums, expected, strict=True):
            assert mine == pytest.approx(other, abs=TOLERANCE)


def test_generations(
    server: ServerProcess, model: Path, tasks: Path, theirs: dict[str, list[Any]], record_property: Callable[..., None]
) -> None:
    record_property("client", "lm_eval")
    record_property("step", "greedy texts")
    ours = run_lm_eval("local-completions", ask(server, model), ["ramet_generate"], tasks, "generations")
    assert ours["ramet_generate"] == theirs["ramet_generate"]


def test_chats(
    server: ServerProcess, model: Path, tasks: Path, plain: PlainAnswers, record_property: Callable[..., None]
) -> None:
    record_property("client", "lm_eval")
    record_property("step", "chats")
    arguments = f"model={MODEL_NAME},base_url={server.url}/v1/chat/completions,num_concurrent=2,max_retries=1"
    ours = run_lm_eval("local-chat-completions", arguments, ["ramet_generate"], tasks, "chats", "--apply_chat_template")
    assert all(answer[0] for answer in ours["ramet_generate"])


def flat(answer: Any) -> list[float]:
    """All numbers of an answer in a row; lm-eval writes some as text, and true and false among them."""
    if isinstance(answer, list):
        return [number for one in answer for number in flat(one)]
    return [float({"True": 1, "False": 0}.get(str(answer), answer))]
