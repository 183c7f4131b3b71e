"""Adapters of real servers: loaded, named in requests and answers, unloaded while in use, cloned with their model."""

import socket
import threading

import httpx
import pytest
import ramet
import random_models as rm
from lora_adapters import make_adapter, merge_adapter
from server_process import Background, ServerProcess, is_running, wait_until

PROMPT = rm.random_prompts([23])[0]
NUM_TOKENS = 8
GREEDY = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
SEED = "--remote-instance-weight-loader-start-seed-via-transfer-engine"
SMALL = ("--max-total-tokens", "2048", "--max-running-requests", "8", "--engine-info-bootstrap-port", "0")


class Case:
    """A model, two adapters, and the tokens that each should give."""

    def __init__(self, folder):
        self.model = rm.make_model(folder / "model", "llama3", num_hidden_layers=4)
        self.weightless = rm.without_weights(self.model, folder / "weightless")
        self.adapters = {
            "one": make_adapter(folder / "one", self.model, seed=1),
            "two": make_adapter(folder / "two", self.model, seed=2, rank=20, targets=("q_proj", "down_proj")),
        }
        merged = {name: merge_adapter(self.model, path, folder / f"m{name}") for name, path in self.adapters.items()}
        self.tokens = {name: rm.hf_greedy(path, [PROMPT], NUM_TOKENS)[0] for name, path in merged.items()}
        self.tokens[None] = rm.hf_greedy(self.model, [PROMPT], NUM_TOKENS)[0]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def seed(case, tmp_path_factory):
    flags = ("--tp-size", "2", SEED, "--lora-paths", f"one={case.adapters['one']}", f"two={case.adapters['two']}")
    log = tmp_path_factory.mktemp("seed") / "log"
    with ServerProcess(case.model, log, *flags, *SMALL, fake=False) as server:
        yield server.wait_ready()


def generate(server, names):
    """Output ids with each adapter, all of one request, and the names in the answers."""
    body = {"input_ids": [PROMPT] * len(names), "lora_path": list(names), "sampling_params": GREEDY}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert [one["meta_info"].get("lora_name") for one in answer.json()] == list(names)
    return [one["output_ids"] for one in answer.json()]


def post(server, path, **body):
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


def model_names(server):
    return [card["id"] for card in httpx.get(f"{server.url}/v1/models").json()["data"]]


def check_tokens(case, server, names=(None, "one", "two", "one", None)):
    assert generate(server, names) == [case.tokens[name] for name in names]


def test_several_adapters_over_two_ranks(case, seed):
    for _ in range(2):  # with a warm prefix cache, too
        check_tokens(case, seed)


def test_attention_that_is_data_parallel(case, seed, tmp_path):
    """Each rank has other requests' attention, and the MLPs of all; the adapters are a seed's of another topology."""
    flags = ("--tp-size", "2", "--dp-size", "2", "--enable-dp-attention", "--max-lora-rank", "20")
    paths = ("--lora-paths", seed.url.replace("http", "instance"))
    with ServerProcess(case.model, tmp_path / "log", *flags, *paths, *SMALL, fake=False) as server:
        server.wait_ready()
        for _ in range(2):
            check_tokens(case, server)
            check_tokens(case, server, ("two", "one", None))
            check_tokens(case, server, ("two",))


def test_models_that_requests_can_name(case, seed):
    assert model_names(seed) == ["fake", "one", "two"]
    card = httpx.get(f"{seed.url}/v1/models/one").json()
    assert (card["parent"], card["root"]) == ("fake", str(case.adapters["one"]))
    expected = {None: "fake", "fake": "fake", "two": "two", "fake:two": "two"}
    message = [{"role": "user", "content": "hi"}]
    for model, name in expected.items():
        named = {} if model is None else {"model": model}
        more = {"temperature": 0, "max_tokens": 3}
        answers = [
            post(seed, "/v1/completions", prompt=PROMPT, **named, **more),
            post(seed, "/v1/chat/completions", messages=message, **named, **more),
            post(seed, "/v1/messages", messages=message, **{"model": model or "fake"}, **more),
            post(seed, "/v1/responses", input="hi", **named, temperature=0, max_output_tokens=3),
        ]
        assert [answer.json().get("model") for answer in answers] == [name] * 4
    found = post(seed, "/generate", input_ids=PROMPT, model="fake:one", sampling_params=GREEDY).json()
    assert (found["output_ids"], found["meta_info"]["lora_name"]) == (case.tokens["one"], "one")


@pytest.mark.parametrize(
    "path, body, status, words",
    [
        ("/v1/completions", {"model": "three", "prompt": "a"}, 404, "serves 'fake' and the adapters one, two"),
        ("/generate", {"text": "a", "lora_path": "three"}, 404, "the adapter 'three' is not loaded"),
        ("/generate", {"text": ["a", "b"], "lora_path": ["one"]}, 400, "lora_path has 1 entries for 2 prompts"),
        ("/generate", {"text": "a", "model": "one", "lora_path": "two"}, 400, "lora_path something else"),
        ("/load_lora_adapter", {"lora_name": "one", "lora_path": "x"}, 400, "'one' is loaded already"),
        ("/load_lora_adapter", {"lora_name": "fake", "lora_path": "x"}, 400, "'fake' is the model itself"),
        ("/load_lora_adapter", {"lora_name": "x", "lora_path": "/none"}, 400, "path /none does not exist"),
        ("/v1/load_lora_adapter", {"lora_name": " ", "lora_path": "x"}, 400, "an adapter's name must have"),
        ("/load_lora_adapter", {"lora_name": "x", "lora_path": "instance://127.0.0.1:1"}, 400, "no adapters from"),
        ("/unload_lora_adapter", {"lora_name": "x"}, 404, "the adapter 'x' is not loaded"),
    ],
)
def test_what_is_refused(seed, path, body, status, words):
    answer = post(seed, path, **body)
    assert answer.status_code == status and words in answer.json()["error"]["message"]
    if path in ("/load_lora_adapter", "/unload_lora_adapter"):  # as SGLang's clients read it
        assert answer.json()["success"] is False and words in answer.json()["error_message"]
    assert model_names(seed) == ["fake", "one", "two"]


def test_weights_below_adapters_do_not_change(case, seed):
    answer = post(seed, "/update_weights_from_disk", model_path=str(case.model))
    assert answer.status_code == 400 and "adapters are loaded" in answer.json()["message"]
    check_tokens(case, seed)


def test_an_adapter_that_does_not_fit_leaves_nothing_behind(case, seed, tmp_path):
    folder = make_adapter(tmp_path / "wide", case.model, rank=21)
    answer = post(seed, "/load_lora_adapter", lora_name="wide", lora_path=str(folder))
    assert answer.status_code == 400 and "has the rank 21; --max-lora-rank is 20" in answer.text
    assert httpx.get(f"{seed.url}/remote_instance_transfer_engine_info?rank=0&role=lora:wide").status_code == 404
    check_tokens(case, seed)


def test_unloading_waits_for_those_who_use_it(case, seed):
    assert post(seed, "/v1/load_lora_adapter", lora_name="x", lora_path=str(case.adapters["one"])).status_code == 200
    params = {**GREEDY, "max_new_tokens": 150}
    stream = Background(seed.url, input_ids=PROMPT, lora_path="x", sampling_params=params)
    stream.begun.wait(30)
    answers = []
    unloading = threading.Thread(target=lambda: answers.append(post(seed, "/v1/unload_lora_adapter", lora_name="x")))
    unloading.start()
    wait_until(lambda: "x" not in model_names(seed), "the end of new requests")
    assert stream.thread.is_alive() and not answers
    refused = post(seed, "/generate", input_ids=PROMPT, lora_path="x")
    assert refused.status_code == 404 and "is being unloaded" in refused.text
    refused = post(seed, "/load_lora_adapter", lora_name="x", lora_path=str(case.adapters["one"]))
    assert refused.status_code == 400 and "is being unloaded: try again" in refused.text
    last = stream.join()[-2]
    unloading.join()
    assert '"completion_tokens":150' in last
    assert answers[0].text == "Success: LoRA adapter 'x' removed successfully."
    # Another one by the same name: nothing of the first is left in the prefix cache.
    assert post(seed, "/load_lora_adapter", lora_name="x", lora_path=str(case.adapters["two"])).json()["success"]
    assert generate(seed, ["x"]) == [case.tokens["two"]]
    assert post(seed, "/unload_lora_adapter", lora_name="x").json()["loaded_adapters"].keys() == {"one", "two"}


def clone_flags(seed, *more):
    prefix, host = "--remote-instance-weight-loader", seed.url.removeprefix("http://")
    source = (f"{prefix}-seed-instance-ip", host, f"{prefix}-fallback", "error")
    return ("--enable-lora", "--load-format", "remote_instance", *source, *SMALL, *more)


def test_clones_have_the_adapters_of_their_seeds(case, seed, tmp_path):
    """Over the network and on the host, from two ranks to one and to two stages; the last one without its seed."""
    over_network = ("--remote-instance-weight-loader-local-mode", "off", "--max-lora-rank", "20")
    with ServerProcess(case.weightless, tmp_path / "a", *clone_flags(seed, *over_network), fake=False) as first:
        first.wait_ready()
        assert "loaded the adapter two from nccl" in first.output and "content as in" in first.output
        check_tokens(case, first)
        stages = ("--pp-size", "2", "--max-lora-rank", "20")
        with ServerProcess(case.weightless, tmp_path / "b", *clone_flags(first, *stages), fake=False) as second:
            second.wait_ready()
            check_tokens(case, second)
            path = f"instance://{first.url.removeprefix('http://')}/one"
            assert post(second, "/load_lora_adapter", lora_name="again", lora_path=path).json()["success"]
            first.kill()
            check_tokens(case, second)
            assert generate(second, ["again"]) == [case.tokens["one"]]
            answer = post(second, "/load_lora_adapter", lora_name="late", lora_path=path)
            assert answer.status_code == 400 and "no adapters from the instance" in answer.text
            assert post(second, "/unload_lora_adapter", lora_name="one").json()["success"]
            check_tokens(case, second, [None, "two"])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--lora-paths", "one={dora}"], "--lora-paths one: {dora}/adapter_config.json: use_dora is not supported"),
        (["--lora-paths", "one={one}", "one={one}"], "each adapter needs a name of its own"),
        (["--lora-paths", "one={one}", "--max-lora-rank", "2"], "has the rank 6; --max-lora-rank is 2"),
        (["--max-loras", "2"], "--max-loras-per-batch needs --enable-lora"),
    ],
)
def test_starts_that_are_refused(case, tmp_path, flags, words):
    folders = {"one": case.adapters["one"], "dora": make_adapter(tmp_path / "dora", case.model, use_dora=True)}
    with ServerProcess(
        case.model, tmp_path / "log", *(flag.format(**folders) for flag in flags), *SMALL, fake=False
    ) as server:
        assert server.wait_exit() == 1
        assert words.format(**folders) in server.output


def test_who_may_load_adapters(case, tmp_path):
    with ServerProcess(case.model, tmp_path / "log", "--api-key", "k", "--admin-api-key", "admin") as server:
        server.wait_ready()
        for path in ("/load_lora_adapter", "/unload_lora_adapter"):
            for prefix in ("", "/v1"):
                body = {"lora_name": "a", "lora_path": "x"} if "unload" not in path else {"lora_name": "a"}
                url = f"{server.url}{prefix}{path}"
                assert httpx.post(url, json=body, headers={"Authorization": "Bearer k"}).status_code == 401
                answer = httpx.post(url, json=body, headers={"Authorization": "Bearer admin"})
                assert answer.status_code == 400 and "start it with --enable-lora" in answer.text


def test_the_engine_without_http(case):
    with ramet.Engine(model_path=str(case.model), lora_paths=(f"one={case.adapters['one']}",), max_lora_rank=20,
                      max_total_tokens=2048, served_model_name="base") as engine:  # fmt: skip
        engine.load_lora_adapter("two", str(case.adapters["two"]), pinned=True)
        for options in ({"lora_path": "two"}, {"model": "base:two"}, {"model": "two"}):
            assert (
                engine.generate(input_ids=PROMPT, sampling_params=GREEDY, **options)["output_ids"] == case.tokens["two"]
            )
        engine.unload_lora_adapter("two")
        with pytest.raises(ValueError, match="serves 'base' and the adapters one"):
            list(engine.generate(input_ids=PROMPT, model="two", stream=True))
        found = engine.generate(input_ids=[PROMPT] * 2, sampling_params=GREEDY, lora_path=[None, "one"])
        assert [one["output_ids"] for one in found] == [case.tokens[None], case.tokens["one"]]


def test_a_start_that_is_given_up_while_its_adapters_are_awaited(case, tmp_path):
    """Nobody answers at the address; SIGTERM ends the start at once, and with exit status 0 as any other start."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        path = f"one=instance://127.0.0.1:{silent.getsockname()[1]}"
        with ServerProcess(case.model, tmp_path / "log", "--lora-paths", path, *SMALL, fake=False) as server:
            silent.settimeout(60)
            connection, _ = silent.accept()
            with connection:
                children = server.children()
                server.signal()
                assert server.wait_exit(20) == 0
                assert not any(is_running(pid) for pid in children)
