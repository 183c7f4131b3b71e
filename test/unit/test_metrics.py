"""What /metrics says that no running server is needed for."""

from ramet.srt.managers.metrics import Metrics
from ramet.srt.weights.report import LoadReport


def test_what_each_seed_gave_of_a_load_that_files_completed() -> None:
    metrics = Metrics("m")
    report = LoadReport(
        source="transfer_engine+checkpoint",
        num_bytes=10,
        seconds=1.0,
        verified=True,
        taken_from=("a:1", "b:2"),
        taken_bytes=(4, 3),
    )
    metrics.observe_load(1, report)
    lines = metrics.render().decode().splitlines()
    assert 'ramet:weight_load_bytes{model_name="m",rank="1",source="transfer_engine+checkpoint"} 10.0' in lines
    assert 'ramet:weight_load_taken_bytes{model_name="m",rank="1",seed="a:1"} 4.0' in lines
    assert 'ramet:weight_load_taken_bytes{model_name="m",rank="1",seed="b:2"} 3.0' in lines
