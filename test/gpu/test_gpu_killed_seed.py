"""A seed that is killed while its GPU memory is being copied: the clone takes the next source, and answers rightly."""

import killed_seed
import pytest
import random_models as rm
import torch


@pytest.mark.parametrize("num_seeds, source", [(1, "checkpoint"), (2, "local_copy")])
def test_the_clone_takes_the_next_source(tmp_path, monkeypatch, caplog, num_seeds, source):
    pytest.importorskip("mooncake.engine", reason="Mooncake is not installed")
    folder = rm.make_model(tmp_path, "llama3", num_hidden_layers=2)
    last_gpu = str(torch.cuda.device_count() - 1)
    with killed_seed.seeds(folder, "cuda", num_seeds, "--base-gpu-id", last_gpu) as servers:
        expected = killed_seed.answers_of(servers[0])
        clone = killed_seed.clone_while_one_dies(monkeypatch, folder, "cuda", servers)
        report = clone.runner.load_report
        assert report.source == source, report
        assert "ended while its memory was copied" in report.fallback_reason + caplog.text
        assert killed_seed.tokens_of(clone) == expected
