"""A trainer's key: instances that find it at a metadata server prove to have it, and show it to nobody."""

from pathlib import Path

import published_weights as pw
import pytest
import random_models as rm
import sharded_models as sm
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.managers.published_sources import find_publication
from ramet.srt.utils.net import SeedAddress, split_address
from ramet.srt.weights.errors import WeightTransferError
from safetensors.torch import load_file


def config_with(key: str) -> LoadConfig:
    return LoadConfig(timeout_s=5.0, api_keys=(key,), shows_keys=False)


def test_a_listed_trainer_takes_a_proof_of_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = rm.make_model(tmp_path, "llama3", dtype="bfloat16")
    (parallel,) = sm.ranks_of()
    monkeypatch.setattr("ramet.srt.managers.published_sources.SETTLE_S", 0.0)
    with pw.published(load_file(folder / "model.safetensors"), api_key="key") as publishers:
        addresses = [SeedAddress(*split_address(publishers[0].address, ""))]
        found = find_publication(lambda: addresses, config_with("key"), None, version="step-1", is_listed=True)
        assert found.version == "step-1" and found.is_unchanged()
        stage, report = pw.take(folder, publishers, parallel, config=config_with("key"))
        assert report.verified
        pw.assert_as_from_files(folder, stage)
        with pytest.raises(ValueError, match="none of its ranks answers .*HTTP 401: the seed has other API keys"):
            find_publication(lambda: addresses, config_with("other"), None, version="step-1", is_listed=True)
        with pytest.raises(WeightTransferError, match="HTTP 401"):
            pw.take(folder, publishers, parallel, config=config_with("other"))
    with pytest.raises(ValueError, match="not listed any more"):
        find_publication(list, config_with("key"), None, version="step-1", is_listed=True)
