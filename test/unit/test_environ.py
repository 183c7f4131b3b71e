"""Owns the tests of what environment variables decide."""

from ramet.srt.model_loader.transport import mooncake_engine


def test_the_protocol_is_what_the_environment_says_or_what_the_machine_has(monkeypatch, tmp_path):
    monkeypatch.setenv("MOONCAKE_PROTOCOL", "rdma")
    assert mooncake_engine.choose_protocol() == "rdma"
    monkeypatch.setenv("MOONCAKE_PROTOCOL", "")
    monkeypatch.setattr(mooncake_engine, "RDMA_DEVICES", str(tmp_path / "none"))
    assert mooncake_engine.choose_protocol() == "tcp"
    monkeypatch.setattr(mooncake_engine, "RDMA_DEVICES", str(tmp_path))
    assert mooncake_engine.choose_protocol() == "tcp"
    (tmp_path / "mlx5_0").mkdir()
    assert mooncake_engine.choose_protocol() == "rdma"
