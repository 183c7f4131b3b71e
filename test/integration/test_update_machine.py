"""Whatever is done to an instance's weights, in whatever order: an answer is that of the version which it names.

A machine of rules drives real servers: an instance, and a peer that it may take weights from. What each version answers
is known beforehand: its tokens from transformers, its log-probabilities from a server that has never changed. A rule
more is a method more: it does something to the instance, and says in `serving` and `kept` what must be true then.
UPDATE_EXAMPLES=200 runs it for longer.
"""

import base64
import itertools
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import random_models as rm
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pickled_tensors import forked
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.model_loader.arena.allocate import allocate_arena
from ramet.srt.model_loader.arena.base import WeightArena
from ramet.srt.model_loader.delta_writer import write_delta
from ramet.srt.model_loader.loader import get_model_loader
from ramet.srt.model_loader.remote_instance_weight_loader_utils import SeedServer, fetch_seed_answer
from ramet.srt.utils.net import SeedAddress
from safetensors.torch import load_file
from server_process import Background, ServerProcess
from trainers import Trainer, describe
from updated_servers import SMALL

# Offered to processes of this host alone: an offer to others starts a process for each change.
OFFER = ("--load-format", "remote_instance", "--remote-instance-weight-loader-backend", "transfer_engine",
         "--remote-instance-weight-loader-seed-instance-ip", "127.0.0.1:9")  # fmt: skip
SAVER = ("--enable-memory-saver", "--enable-weights-cpu-backup")
CONTENTS = ("a", "b", "c")
NUM_TOKENS, LONG = 6, 300
PREFIX = rm.random_prompts([40])[0]
PROMPTS = [[*PREFIX, 17], [*PREFIX, 23], rm.random_prompts([19])[0]]
PAGE_SIZE = 16
TOLERANCE = 1e-3  # of log-probabilities: those of two versions are further from each other
SETTINGS = settings(
    max_examples=int(os.environ.get("UPDATE_EXAMPLES", "8")), stateful_step_count=14, deadline=None, derandomize=True,
    database=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck],
)  # fmt: skip


class Answer(NamedTuple):
    tokens: list[int]
    logprobs: list[float]


class Told(NamedTuple):
    """What the instance has said of an answer."""

    answer: Answer
    info: dict[str, Any]


def body_of(prompt: list[int], length: int = NUM_TOKENS) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": length, "ignore_eos": True}
    return {"input_ids": prompt, "sampling_params": params, "return_logprob": True}


def told_by(said: dict[str, Any]) -> Told:
    info = said["meta_info"]
    return Told(Answer(said["output_ids"], [one[0] for one in info["output_token_logprobs"]]), info)


class Scene:
    """The servers, the checkpoints, and what is known of each of them."""

    def __init__(self, folder: Path):
        self.models = {name: rm.make_model(folder / name, "llama3", seed=seed) for seed, name in enumerate(CONTENTS)}
        self.broken = {
            "cut": self._cut(folder / "cut"),
            "strange": rm.make_model(folder / "strange", "llama3", rope_theta=7000.0),
            "gone": folder / "gone",
        }
        self.tensors = {name: load_file(path / "model.safetensors") for name, path in self.models.items()}
        self.tokens = {name: rm.hf_greedy(path, PROMPTS, NUM_TOKENS) for name, path in self.models.items()}
        self.deltas = {pair: str(folder / "-".join(pair)) for pair in itertools.permutations(CONTENTS, 2)}
        for (base, new), path in self.deltas.items():
            write_delta(path, self.tensors[base], self.tensors[new], by="xor" if base < new else "values")
        self.trainer = Trainer()
        self.is_in_group = False
        self.answers: dict[str, list[Answer]] = {}
        self.long: dict[str, list[int]] = {}
        self.checksums: dict[str, str] = {}
        self.servers: list[ServerProcess] = []
        self.folder = folder

    def _cut(self, folder: Path) -> Path:
        shutil.copytree(self.models["a"], folder)
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-40])
        return folder

    def start(self, name: str, content: str) -> httpx.Client:
        flags = ("--remote-instance-weight-loader-fallback", "disk", "--random-seed", "0", *OFFER, *SMALL, *SAVER)
        server = ServerProcess(self.models[content], self.folder / name, *flags, fake=False)
        self.servers.append(server)
        return httpx.Client(base_url=server.wait_ready().url, timeout=60)

    def learn(self, client: httpx.Client, content: str) -> None:
        """What a server that has `content` says. Its tokens must be those of transformers."""
        told = [told_by(client.post("/generate", json=body_of(prompt)).json()).answer for prompt in PROMPTS]
        assert [one.tokens for one in told] == self.tokens[content]
        self.answers[content] = told
        self.long[content] = client.post("/generate", json=body_of(PROMPTS[2], LONG)).json()["output_ids"]
        self.checksums[content] = client.post("/weights_checker").json()["per_engine_checksum"]

    def broadcast(self, content: str, *, is_flat: bool, stranger: str = "") -> httpx.Response:
        """What the server says to it, while a trainer sends it. A group that was left before is made again.

        Args:
            stranger: what the first tensor is called in its place.
        """
        if not self.is_in_group:
            self.trainer.join(2)
            place = {"master_address": "127.0.0.1", "master_port": self.trainer.port, "rank_offset": 1, "world_size": 2}
            answer = self.one.post("/init_weights_update_group", json=place | {"backend": "gloo"})
            assert answer.status_code == 200 and self.trainer.wait() == "done", answer.text
            self.is_in_group = True
        path = self.models[content] / "model.safetensors"
        names, dtypes, shapes = describe(path)
        body: dict[str, Any] = {"names": [stranger or names[0], *names[1:]], "dtypes": dtypes, "shapes": shapes}
        body["load_format"] = "flattened_bucket" if is_flat else None
        self.trainer.send(path, flat=1 << 40 if is_flat else None)
        answer = self.one.post("/update_weights_from_distributed", json=body)
        self.is_in_group = "is left" not in answer.text
        if self.is_in_group:
            assert self.trainer.wait() == "done"
        return answer

    def end(self) -> None:
        self.trainer.kill()
        for server in self.servers:
            server.close()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Scene(tmp_path_factory.mktemp("scene"))
    try:
        made.one, made.peer = made.start("one", "a"), made.start("peer", "b")
        made.learn(made.one, "a")
        made.learn(made.peer, "b")
        for content in CONTENTS[2:]:
            path = {"model_path": str(made.models[content])}
            assert made.peer.post("/update_weights_from_disk", json=path).status_code == 200
            made.learn(made.peer, content)
        for one, other in itertools.combinations(CONTENTS, 2):
            for mine, theirs in zip(made.answers[one], made.answers[other], strict=True):
                assert mine.tokens != theirs.tokens, "two versions can't be told from each other"
                assert mine.logprobs != pytest.approx(theirs.logprobs, abs=10 * TOLERANCE)
        yield made
    finally:
        made.end()


class Updates(RuleBasedStateMachine):
    """The rules. `scene` is put in before it runs."""

    scene: Any

    def __init__(self) -> None:
        super().__init__()
        self.one: httpx.Client = self.scene.one
        self.count = 0
        self.is_paused = self.is_reset = False
        self.asked: list[list[int]] = []  # since the prefix cache was dropped
        self.held: list[tuple[Background, list[int]]] = []  # requests that a pause holds
        self.clones: list[tuple[WeightArena, tuple[str, ...]]] = []

    # -- What is done

    @initialize()
    def begin(self) -> None:
        for client, content in ((self.one, "a"), (self.scene.peer, "b")):
            path = {"model_path": str(self.scene.models[content]), "weight_version": "first"}
            assert client.post("/update_weights_from_disk", json=path).status_code == 200
        self.peer = "b"
        self.serving, self.kept = ("first", "a"), []
        versions = self.versions()
        if len(versions) > 1:  # of the example before
            self.kept = [(versions[1], None)]

    @rule(content=st.sampled_from(CONTENTS))
    def update_from_disk(self, content: str) -> None:
        self.update("/update_weights_from_disk", content, model_path=str(self.scene.models[content]))

    @rule()
    def update_from_instance(self) -> None:
        self.update("/update_weights_from_instance", self.peer, address=self.scene.peer.base_url.netloc.decode())

    @rule(content=st.sampled_from(CONTENTS), num_calls=st.integers(1, 2))
    def update_from_tensors(self, content: str, num_calls: int) -> None:
        names = sorted(self.scene.tensors[content])
        assert self.post("/begin_weight_update").status_code == 200
        for start in range(num_calls):
            part = [(name, self.scene.tensors[content][name]) for name in names[start::num_calls]]
            payload = [base64.b64encode(forked(part)).decode()]
            assert self.post("/update_weights_from_tensor", serialized_named_tensors=payload).status_code == 200
        self.update("/end_weight_update", content)

    @rule(content=st.sampled_from(CONTENTS))
    def update_by_delta(self, content: str) -> None:
        """On the base that it is of; what serves is no other one's, and nobody's while nothing may serve."""
        if (self.serving[1], content) in self.scene.deltas:
            self.update("/update_weights_delta", content, path=self.scene.deltas[self.serving[1], content])
            return
        base = next(base for base, new in self.scene.deltas if new == content)
        path = self.scene.deltas[base, content]
        self.refused(self.post("/update_weights_delta", path=path), makes_room=True)

    @rule(content=st.sampled_from(CONTENTS), is_flat=st.booleans(), in_session=st.booleans())
    def update_by_broadcast(self, content: str, *, is_flat: bool, in_session: bool) -> None:
        if in_session:
            assert self.post("/begin_weight_update").status_code == 200
            assert self.scene.broadcast(content, is_flat=is_flat).status_code == 200
            self.update("/end_weight_update", content)
            return
        answer = self.scene.broadcast(content, is_flat=is_flat)
        assert answer.status_code == 200 and answer.json()["source"] == "broadcast", answer.text
        self.note((answer.json()["weight_version"], content))

    @rule(content=st.sampled_from(CONTENTS), in_session=st.booleans())
    def a_broadcast_that_fails(self, content: str, *, in_session: bool) -> None:
        """The rest of it is received, and nothing comes of the session."""
        if in_session:
            assert self.post("/begin_weight_update").status_code == 200
        self.refused(self.scene.broadcast(content, is_flat=False, stranger="stranger"), makes_room=True)
        if in_session:
            assert self.post("/end_weight_update").status_code == 400

    @rule(content=st.sampled_from(CONTENTS))
    def a_broadcast_that_was_announced_by_nonsense(self, content: str) -> None:
        """What may have been sent with it is not taken for what is announced next: the group must be made again."""
        if not self.scene.is_in_group:
            return
        assert self.post("/update_weights_from_distributed", names=1).status_code == 400
        self.refused(self.scene.broadcast(content, is_flat=True), makes_room=True)
        assert not self.scene.is_in_group and self.scene.trainer.wait()

    @rule(content=st.sampled_from(CONTENTS))
    def peer_changes(self, content: str) -> None:
        path = {"model_path": str(self.scene.models[content])}
        assert self.scene.peer.post("/update_weights_from_disk", json=path).status_code == 200
        self.peer = content

    @rule(fault=st.sampled_from(["cut", "strange", "gone", "nobody", "digest", "name", "half"]))
    def an_update_that_fails(self, fault: str) -> None:
        path, body = "/update_weights_from_disk", {"model_path": str(self.scene.models["c"])}
        if fault == "nobody":
            path, body = "/update_weights_from_instance", {"address": "127.0.0.1:1"}
        elif fault == "digest":
            body["weights_digest"] = "0" * 64
        elif fault == "name":
            body["weight_version"] = "\n"
        elif fault == "half":
            path, body = "/end_weight_update", {}
        else:
            body = {"model_path": str(self.scene.broken[fault])}
        self.refused(self.post(path, **body), makes_room=fault in ("cut", "digest"))

    @rule()
    def roll_back(self) -> None:
        answer = self.post("/rollback_weights")
        if not self.kept:
            assert answer.status_code == 400
            return
        assert answer.status_code == 200 and answer.json()["weight_version"] == self.kept[0][0], answer.text
        back = self.kept.pop()
        if back[1] is None:  # of the example before: what it is, its checksum says
            told = self.post("/weights_checker").json()["per_engine_checksum"]
            back = back[0], next(name for name, one in self.scene.checksums.items() if one == told)
        self.note(back)

    @precondition(lambda self: not self.is_reset)
    @rule()
    def rename(self) -> None:
        name = self.new_name()
        answer = self.post("/update_weight_version", new_version=name, abort_all_requests=False)
        assert answer.status_code == 200
        self.serving = name, self.serving[1]
        self.asked.clear()

    @precondition(lambda self: not self.is_paused)
    @rule(mode=st.sampled_from(["abort", "retract", "in_place"]))
    def pause(self, mode: str) -> None:
        assert self.post("/pause_generation", mode=mode).status_code == 200
        self.is_paused = True

    @precondition(lambda self: self.is_paused)
    @rule()
    def go_on(self) -> None:
        assert self.post("/continue_generation").status_code == 200
        self.is_paused = False
        self.join_held()

    @rule()
    def reset(self) -> None:
        if self.is_reset:
            return
        assert self.post("/weights_checker", action="reset_tensors").json()["success"]
        self.kept, self.serving, self.is_reset = [self.serving], ("reset", None), True
        self.asked.clear()

    @precondition(lambda self: not self.is_reset)
    @rule(prompt=st.sampled_from(PROMPTS))
    def sleep_and_wake(self, prompt: list[int]) -> None:
        """The same weights serve afterwards, with nothing of the KV cache; there is no way back any more."""
        assert self.post("/release_memory_occupation").status_code == 200
        assert self.one.get("/is_sleeping").json()["is_sleeping"]
        held = Background(str(self.one.base_url), **body_of(prompt))
        assert self.one.get("/ready").status_code == 503
        assert self.post("/resume_memory_occupation").status_code == 200
        self.kept = []
        self.asked.clear()
        self.held.append((held, prompt))
        if not self.is_paused:
            self.join_held()

    # -- What is asked

    @rule(prompt=st.sampled_from(PROMPTS))
    def ask(self, prompt: list[int]) -> None:
        if self.is_paused:
            if len(self.held) < 4:
                self.held.append((Background(str(self.one.base_url), **body_of(prompt)), prompt))
            return
        answer = self.one.post("/generate", json=body_of(prompt))
        if self.is_reset:
            assert answer.status_code == 503
            return
        told = told_by(answer.json())
        most = max((shared_len(prompt, other) for other in self.asked), default=0)
        assert told.info["cached_tokens"] <= most, (told.info, "from a prefix of other weights")
        self.check(told, prompt)
        self.asked.append(prompt)

    @precondition(lambda self: not (self.is_paused or self.is_reset))
    @rule(content=st.sampled_from(CONTENTS))
    def ask_through_a_change(self, content: str) -> None:
        """What the first version has made is its own; the rest has some of its keys and values."""
        before = self.serving
        stream = Background(str(self.one.base_url), **body_of(PROMPTS[2], LONG))
        assert stream.begun.wait(30)
        self.update_from_disk(content)
        told = told_by(last_event(stream.join()))
        spans = told.info["weight_versions"]
        assert [span["version"] for span in spans] in ([before[0]], [before[0], self.serving[0]]), spans
        assert told.info["weight_version"] == spans[-1]["version"] and spans[-1]["end"] == LONG
        first = spans[0]["end"]
        assert told.answer.tokens[:first] == self.scene.long[before[1]][:first]

    @precondition(lambda self: not self.is_reset and len(self.clones) < 3)
    @rule()
    def clone(self) -> None:
        """This process maps the weights as a clone does, and keeps them whatever becomes of the instance."""
        address = SeedAddress("127.0.0.1", self.one.base_url.port)
        manifest = fetch_seed_answer(SeedServer(address), 0, "target", 30.0).manifest
        arena = allocate_arena(manifest, "cpu")
        config = LoadConfig(load_format="remote_instance", seeds=(address,), fallback="error")
        report = get_model_loader(config).load_weights(manifest, arena, "/nonexistent").report
        assert report.source == "local_map" and report.weight_version == self.serving[0]
        self.clones.append((arena, self.tensor_checksums()))

    # -- What is always true

    @invariant()
    def what_is_there_is_what_was_put_there(self) -> None:
        assert self.versions() == [self.serving[0], *(name for name, _ in self.kept)]
        if not self.is_reset:
            told = self.post("/weights_checker").json()
            assert told["per_engine_checksum"] == self.scene.checksums[self.serving[1]]
        status = 503 if self.is_paused or self.is_reset else 200
        assert self.one.get("/ready").status_code == status

    @invariant()
    def clones_keep_what_they_took(self) -> None:
        for arena, checksums in self.clones:
            assert arena.hash_entries(arena.manifest.entries) == checksums

    def teardown(self) -> None:
        if self.is_paused:
            self.go_on()
        if self.is_reset:
            self.update_from_disk("a")

    # -- Helpers

    def join_held(self) -> None:
        for held, prompt in self.held:
            said = held.join()
            if held.status == 200:  # else it had come while nothing could be served
                self.check(told_by(last_event(said)), prompt, may_be_aborted=True)
                self.asked.append(prompt)
        self.held.clear()

    def post(self, path: str, /, **body: Any) -> httpx.Response:
        return self.one.post(path, json=body)

    def refused(self, answer: httpx.Response, *, makes_room: bool) -> None:
        """What failed may have made room before the bytes were read: then there is no way back any more."""
        assert answer.status_code == 400, answer.text
        if makes_room and self.versions() == [self.serving[0]]:
            self.kept = []

    def new_name(self) -> str:
        self.count += 1
        return f"step-{self.count}"

    def update(self, path: str, content: str, /, **body: Any) -> None:
        """One that works."""
        name = self.new_name()
        if path == "/end_weight_update":
            answer = self.post(path)
            name = answer.json().get("weight_version", "")
        else:
            answer = self.post(path, weight_version=name, **body)
        assert answer.status_code == 200 and answer.json()["weight_version"] == name, answer.text
        self.note((name, content))

    def note(self, changed: tuple[str, str]) -> None:
        """Other weights serve, and those before them are kept, unless they were nobody's."""
        self.kept = [] if self.is_reset else [self.serving]
        self.serving, self.is_reset = changed, False
        self.asked.clear()

    def versions(self) -> list[str]:
        return [one["weight_version"] for one in self.one.get("/weight_versions").json()["versions"]]

    def tensor_checksums(self) -> tuple[str, ...]:
        """Of what serves now."""
        (rank,) = self.post("/weights_checker").json()["ranks"]
        return tuple(rank["checksums"].values())

    def check(self, told: Told, prompt: list[int], *, may_be_aborted: bool = False) -> None:
        """An answer that one version has made."""
        if may_be_aborted and told.info["finish_reason"]["type"] == "abort":
            return
        assert told.info["weight_version"] == self.serving[0]
        assert [span["version"] for span in told.info["weight_versions"]] == [self.serving[0]]
        expected = self.scene.answers[self.serving[1]][PROMPTS.index(prompt)]
        assert told.answer.tokens == expected.tokens
        assert told.answer.logprobs == pytest.approx(expected.logprobs, abs=TOLERANCE)


def last_event(lines: list[str]) -> dict[str, Any]:
    """The last event of a stream."""
    return httpx.Response(200, content=lines[-2]).json()


def shared_len(one: list[int], other: list[int]) -> int:
    return len(os.path.commonprefix([one, other])) // PAGE_SIZE * PAGE_SIZE


def test_every_answer_is_that_of_the_version_which_it_names(scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Updates.scene = scene
    monkeypatch.setattr(torch.multiprocessing, "get_sharing_strategy", lambda: "file_system")
    run_state_machine_as_test(Updates, settings=SETTINGS)
