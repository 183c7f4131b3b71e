"""vLLM with the plugin of integrations/vllm: weights from an instance, and tokens that are those from the files."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import random_models as rm
from clients.client_run import kept_file
from clients.vllm_process import VllmProcess, extra
from server_process import ServerProcess

pytestmark = pytest.mark.timeout(1500)  # vLLM's processes take a minute to start, and several of them on a busy machine
KEY = "a-key-of-the-fleet"
MODELS = {  # sizes that vLLM's attention on a CPU knows
    "qwen3": {"hidden_size": 128, "head_dim": 32, "intermediate_size": 224},
    "qwen3_moe": {"hidden_size": 128, "head_dim": 32, "num_experts": 8, "moe_intermediate_size": 64},
}


class Seed:
    """A Ramet instance, its model, a folder without its weights, and the tokens that vLLM gives from its files."""

    def __init__(self, family: str, folder: Path):
        self.family = family
        self.model = rm.make_model(folder / family, family, dtype="bfloat16", **MODELS[family])
        self.bare = folder / "bare"
        shutil.copytree(self.model, self.bare, ignore=shutil.ignore_patterns(*rm.WEIGHT_FILES))
        self.server = ServerProcess(
            self.model, folder / "seed.log", "--device", "cpu", "--dtype", "bfloat16", "--served-model-name", family,
            "--api-key", KEY, "--engine-info-bootstrap-port", "0",
            "--remote-instance-weight-loader-start-seed-via-transfer-engine", fake=False,
        )  # fmt: skip
        self.key_file = folder / "key"
        self.key_file.write_text(KEY)
        self._expected: dict[int, list[list[int]]] = {}

    @property
    def address(self) -> str:
        return self.server.url.removeprefix("http://")

    def expected(self, tp_size: int) -> list[list[int]]:
        """From the files: with as many ranks, since sums of other parts are rounded in another way."""
        if tp_size not in self._expected:
            log = kept_file(f"vllm_{self.family}_files_{tp_size}.log")
            with VllmProcess(self.model, self.family, log, tp_size=tp_size) as plain:
                self._expected[tp_size] = plain.wait_ready().continuations()
        return self._expected[tp_size]

    def check(self, name: str, *flags: str, tp_size: int = 1) -> list[str]:
        """Start vLLM without files, and compare. Returns the ways by which each rank's weights came."""
        log = kept_file(f"vllm_{self.family}_{name}.log")
        with VllmProcess(self.bare, self.family, log, *flags, tp_size=tp_size) as server:
            found = server.wait_ready().continuations()
            sources = server.sources()
        assert found == self.expected(tp_size)
        return sources


@pytest.fixture(scope="module", params=MODELS)
def seed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seed]:
    one = Seed(request.param, tmp_path_factory.mktemp("seed"))
    with one.server:
        one.server.wait_ready()
        yield one


def test_from_the_same_host(seed: Seed, record_property: Callable[..., None]) -> None:
    record_property("client", "vllm_plugin")
    record_property("step", f"{seed.family}, same host")
    flags = extra(seed.address, api_key_file=str(seed.key_file), fallback="error")
    assert seed.check("local", *flags) == ["local_map" if seed.family == "qwen3" else "local_copy"]


def test_two_ranks_as_from_another_host(seed: Seed, record_property: Callable[..., None]) -> None:
    record_property("client", "vllm_plugin")
    record_property("step", f"{seed.family}, another host, two ranks")
    flags = extra(seed.address, api_key_file=str(seed.key_file), fallback="error", local_mode="off")
    assert seed.check("remote", *flags, tp_size=2) == ["transfer_engine"] * 2


def test_nothing_is_served_without_weights(seed: Seed, record_property: Callable[..., None]) -> None:
    """A seed that wants another key, and no files: an end that says both."""
    record_property("client", "vllm_plugin")
    record_property("step", f"{seed.family}, a seed that refuses")
    log = kept_file(f"vllm_{seed.family}_refused.log")
    with VllmProcess(seed.bare, seed.family, log, *extra(seed.address, timeout=5)) as server:
        assert server.wait_exit() != 0
        assert "no weights from the seed" in server.output and "HTTP 401" in server.output
        assert "Cannot find any model weights" in server.output
