"""Two checkpoints of one model, and what servers say while they change from one to the other."""

import contextlib
import threading
from pathlib import Path

import httpx
import random_models as rm

PROMPT = rm.random_prompts([23])[0]
NUM_TOKENS = 8
GREEDY = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
SEED = "--remote-instance-weight-loader-start-seed-via-transfer-engine"
SMALL = ("--max-total-tokens", "2048", "--max-running-requests", "8", "--engine-info-bootstrap-port", "0")
NAMES = ("old", "new")
SCHEDULER = "ramet.srt.managers.scheduler_process"


class Case:
    """Two checkpoints of one model, and the tokens that each should give."""

    def __init__(self, folder: Path, **overrides):
        self.models = {
            name: rm.make_model(folder / name, "llama3", seed=seed, **overrides) for seed, name in enumerate(NAMES)
        }
        self.tokens = {name: rm.hf_greedy(path, [PROMPT], NUM_TOKENS)[0] for name, path in self.models.items()}


def post(server, path, /, **body):
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


def update(server, folder, **body):
    """The answer to a successful one."""
    answer = post(server, "/update_weights_from_disk", model_path=str(folder), **body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def tokens(server):
    answer = post(server, "/generate", input_ids=PROMPT, sampling_params=GREEDY)
    assert answer.status_code == 200, answer.text
    return answer.json()["output_ids"]


def versions(server):
    answer = httpx.get(f"{server.url}/weight_versions").json()
    return [(one["weight_version"], one["is_serving"]) for one in answer["versions"]]


def ranks_of(server):
    """Process ids of its ranks."""
    found = []
    for pid in server.children():
        with open(f"/proc/{pid}/cmdline") as file:
            if SCHEDULER in file.read():
                found.append(pid)
    return sorted(found)


def checksums(server):
    """What each rank has registered."""
    answers = [httpx.get(f"{server.url}/remote_instance_transfer_engine_info?rank={rank}") for rank in (0, 1)]
    return [answer.json()["manifest"]["checksums"]["values"] for answer in answers]


class Load:
    """Requests one after the other until the end, or the server's, each answer of which must be one version's.

    Args:
        num_switches: that there may be; a request that runs through one has tokens of both.
    """

    def __init__(self, server, allowed, num_switches=1):
        self.server, self.allowed, self.num_switches = server, allowed, num_switches
        self.seen = []
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        with contextlib.suppress(httpx.TransportError):
            while not self.ending.is_set():
                answer = post(self.server, "/generate", input_ids=PROMPT, sampling_params=GREEDY)
                if answer.status_code != 200:
                    return
                self.seen.append(answer.json()["output_ids"])

    def end(self):
        self.ending.set()
        self.thread.join()
        strange = [ids for ids in self.seen if ids not in self.allowed]
        assert len(strange) <= self.num_switches, strange
