"""Files that are to replace those that serve: of the same model, or refused."""

from pathlib import Path

import fp8_models
import pytest
import random_models as rm
from ramet.srt.entrypoints.instance import Instance
from ramet.srt.managers.weight_sources import find_files
from ramet.srt.server_args import ServerArgs


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
