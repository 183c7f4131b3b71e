"""Owns runs of lm-eval over small tasks, by the server or by transformers, and what each document got."""

import json
import shutil
from pathlib import Path
from typing import Any

from clients.client_run import kept_file, run_program
from clients.environments import python_of

SENTENCES = [
    "A ramet is one plant of a clonal colony.",
    "It grows out of a plant that is a ramet.",
    "By rhizomes: bamboo, mint, ginger and many grasses.",
    "Plants that clone themselves need no seeds.",
]
DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    "ramet_choice": [
        {"query": "A ramet is one plant of a", "choices": [" clonal colony", " big town", " seven"], "answer": 0},
        {"query": "Mint and bamboo spread by", "choices": [" rhizomes", " rain", " stones that roll"], "answer": 0},
        {"query": "A genet is", "choices": [" the whole colony", " one", " ä ö ü", " \n\n", " a"], "answer": 0},
    ],
    "ramet_rolling": [{"text": " ".join(SENTENCES[start:])} for start in range(len(SENTENCES))],
    "ramet_generate": [
        {"query": f"Question: What is a {word}?\nAnswer:", "target": ""} for word in ("ramet", "genet", "fern")
    ],
}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "ramet_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "ramet_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "ramet_generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": ["\n", ","], "max_gen_toks": 24, "do_sample": False, "temperature": 0},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path) -> None:
    """The tasks as lm-eval reads them, each with its documents beside it."""
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS[name]))
        whole = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            **task,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML


def run_lm_eval(
    model: str, model_args: str, tasks: list[str], folder: Path, name: str, *flags: str
) -> dict[str, list[Any]]:
    """For each task the answers to its requests, document by document.

    A log-likelihood is [sum, whether greedy], a rolling one a sum, a generation a text.

    Args:
        folder: where the tasks are.
        name: under which the output is kept.
    """
    python = python_of("lm_eval")
    output = kept_file(f"lm_eval_{name}")
    shutil.rmtree(output, ignore_errors=True)
    command = [
        python.parent / "lm-eval", "run", "--model", model, "--model_args", model_args, "--tasks", ",".join(tasks),
        "--include_path", folder, "--output_path", output, "--log_samples", *flags,
    ]  # fmt: skip
    result = run_program(command, f"lm_eval_{name}", 240, HF_DATASETS_CACHE=str(folder / "cache"), HF_HOME=str(folder))
    assert result.returncode == 0, result.stderr[-2000:]
    answers: dict[str, list[Any]] = {}
    for task in tasks:
        [file] = output.rglob(f"samples_{task}_*.jsonl")
        samples = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda one: one["doc_id"])
        answers[task] = [one["filtered_resps"] for one in samples]
    return answers
