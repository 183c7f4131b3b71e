"""What is to replace the weights that serve: files of the same model, an instance with what is wanted; or refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fp8_models
import msgspec
import pytest
import random_models as rm
import seed_process
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.configs.parallel_config import ParallelConfig
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.managers.weight_sources import find_files, find_listed
from ramet.srt.modelexpress.client.listed_version import Listed
from ramet.srt.modelexpress.client.seed_info import InfoAddress
from ramet.srt.server_args import ServerArgs
from ramet.srt.weights.manifest import WeightChecksums
from ramet.srt.weights.registration import SeedAnswer

DIGEST, REVISION = "d" * 64, "c0ffee"


def test_an_instance_that_quantises_takes_plain_files_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the instance knows of its model is what its files say."""
    old, new = (rm.make_model(tmp_path / str(seed), "qwen3", seed=seed, dtype="bfloat16") for seed in (0, 1))
    instance = Instance(ServerArgs(model_path=str(old), quantization="fp8"), 0.0)

    def stop(*_args: object, **_options: object) -> None:
        raise InterruptedError

    monkeypatch.setattr("ramet.srt.entrypoints.instance.ChildProcesses", stop)
    with pytest.raises(InterruptedError):
        instance.start()
    assert find_files(instance.model_config, str(new), None, None).model_path == str(new)
    quantised = fp8_models.write_fp8(new, tmp_path / "rows", "rows")
    other = rm.make_model(tmp_path / "other", "qwen3", dtype="bfloat16", rope_theta=7000.0)
    for folder in (quantised, other):
        with pytest.raises(ValueError, match="is another model than the one that serves"):
            find_files(instance.model_config, str(folder), None, None)


class LateRecords:
    """A search whose records say of one instance that it has whatever is wanted."""

    def __init__(self, *_: Any, may_give: bool) -> None:
        del may_give
        self.address = InfoAddress("10.0.0.1", 1, 0, "target", "http")

    def find(self, failed: Sequence[InfoAddress]) -> Listed:
        return Listed(instances=[one for one in [self.address] if one not in failed])

    def release(self, *, has_it: bool) -> None:
        assert not has_it


class SwitchingInstance:
    """One of two ranks, which has v2 from a question for rank 0 on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_before: int) -> None:
        self.num_before = num_before
        monkeypatch.setattr("ramet.srt.modelexpress.client.listed_version.VersionSearch", LateRecords)
        monkeypatch.setattr("ramet.srt.managers.weight_sources.fetch_seed_answer", self.answer)

    def answer(self, _server: Any, rank: int, _role: str, _timeout_s: float) -> SeedAnswer:
        self.num_before -= rank == 0
        is_new = self.num_before < 0
        manifest = msgspec.structs.replace(
            seed_process.make_manifest(seed_process.DEFAULTS),
            parallel=ParallelConfig(tp_size=2, tp_rank=rank),
            weight_version="v2" if is_new else "v1",
            revision="" if is_new else REVISION,
            checksums=WeightChecksums(algorithm="a", values=(str(is_new),) * 4, samples=(str(is_new),) * 4),
        )
        return SeedAnswer(
            rank=rank,
            remote_instance_transfer_engine_info=("a:1", {}),
            manifest=manifest,
            weights_digest="" if is_new else DIGEST,
        )


def find(wanted: str) -> Any:
    config = LoadConfig(modelexpress_url="mx:1", modelexpress_model_name="m")
    return find_listed(config, None, wanted, ("10.0.0.2", 1), None)


@pytest.mark.parametrize("wanted", ["v1", REVISION, DIGEST])
def test_a_listed_instance_that_has_something_else_by_now_is_refused(wanted: str, monkeypatch: Any) -> None:
    """Its record is late: it has switched before it is asked, or right after its answer."""
    SwitchingInstance(monkeypatch, num_before=0)
    with pytest.raises(ValueError, match=f"does not have '{wanted}' any more: it is 'v2' now"):
        find(wanted)
    SwitchingInstance(monkeypatch, num_before=1)
    found = find(wanted)
    assert found.version == "v1" and [one.values[0] for one in found.content] == ["False", "False"]
    assert not found.is_unchanged()
