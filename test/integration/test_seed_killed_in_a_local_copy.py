"""A seed that is killed while a clone copies its memory does no harm: host memory outlives it. test/gpu has GPUs."""

import killed_seed
import random_models as rm


def test_the_clone_has_its_weights_and_answers(tmp_path, monkeypatch):
    folder = rm.make_model(tmp_path, "llama3", num_hidden_layers=2)
    with killed_seed.seeds(folder, "cpu", 1) as servers:
        expected = killed_seed.answers_of(servers[0])
        clone = killed_seed.clone_while_one_dies(monkeypatch, folder, "cpu", servers)
    report = clone.runner.load_report
    assert report.source == "local_copy" and report.verified and not report.fallback_reason
    assert killed_seed.tokens_of(clone) == expected
