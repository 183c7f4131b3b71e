"""What the autoscaler's query and the alerts of docs/deploy.md find in made-up metrics, by Prometheus' own tool."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_process import DEPLOY, alert_queries, autoscaler_query
from ramet.srt.entrypoints.http.http_counts import HttpCounts
from ramet.srt.managers.metrics import Metrics
from ramet.srt.modelexpress.server.server_metrics import ServerMetrics

END_S, STEP_S = 600, 5
NUM_STEPS = END_S // STEP_S
PROBED = {"/health", "/health_generate", "/ping", "/ready", "/metrics"}
MODEL = 'model_name="m",instance="a"'
QUIET = f"1x{NUM_STEPS}"  # it says 1 all the time
BUSY = f"1+1x{NUM_STEPS}"  # one more at each step


def find(folder: Path, query: str, series: dict[str, str], expected: list[float]) -> None:
    """Assert that a query finds these values, without labels, at the end of what these series say."""
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool, of the package prometheus")
    samples = [{"labels": "{}", "value": value} for value in expected]
    case = {
        "interval": f"{STEP_S}s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": query, "eval_time": f"{END_S}s", "exp_samples": samples}],
    }
    file = folder / "case.yml"
    file.write_text(json.dumps({"rule_files": [], "evaluation_interval": f"{STEP_S}s", "tests": [case]}))
    result = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stdout + result.stderr


def test_queries_name_metrics_that_there_are() -> None:
    metrics = Metrics("m")
    metrics.registry.register(HttpCounts("m"))
    text = metrics.render().decode() + ServerMetrics().render().decode()
    made = set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE))
    named = {name for query in (autoscaler_query(), *alert_queries()) for name in re.findall(r"ramet[:_]\w+", query)}
    assert {re.sub("_bucket$", "", name) for name in named} <= made


# ---- the autoscaler ----


def queue(oldest: str, waited: tuple[str, str], labels: str = 'namespace="default",set="replicas"') -> dict[str, str]:
    """Two replicas, one of which has an empty queue.

    Args:
        oldest: how old the oldest request is that waits at the other one.
        waited: how many of those that were let in there had waited up to 30 s, and up to a minute.
    """
    found = {}
    for pod, age, (short, long) in (("a", oldest, waited), ("b", f"0x{NUM_STEPS}", (f"0x{NUM_STEPS}",) * 2)):
        found[f'ramet:queue_oldest_seconds{{{labels},pod="{pod}"}}'] = age
        for le, count in (("30", short), ("60", long), ("+Inf", long)):
            found[f'ramet:queue_time_seconds_bucket{{{labels},pod="{pod}",le="{le}"}}'] = count
    return found


NONE_LET_IN = (f"7x{NUM_STEPS}", f"7x{NUM_STEPS}")
LATE = (f"0x{NUM_STEPS}", BUSY)  # between 30 s and a minute, spread evenly: nine of ten up to 57 s
NOTHING_WAITS = f"0x{NUM_STEPS}"
WAITING = f"0+{STEP_S}x{NUM_STEPS}"


@pytest.mark.parametrize(
    ("series", "expected"),
    [
        pytest.param(queue(WAITING, NONE_LET_IN), [END_S], id="replicas are full, and no output comes"),
        pytest.param(queue(WAITING, LATE), [END_S], id="the oldest waits longer than those that were let in"),
        pytest.param(queue(NOTHING_WAITS, LATE), [57], id="nothing waits now, and those that were let in had to"),
        pytest.param(queue(NOTHING_WAITS, (BUSY, BUSY)), [27], id="a short wait"),
        pytest.param(queue(NOTHING_WAITS, NONE_LET_IN), [0], id="nothing comes"),
        pytest.param({}, [], id="nothing is scraped, which is no reason to end replicas"),
        pytest.param(
            queue(NOTHING_WAITS, NONE_LET_IN) | queue(WAITING, LATE, 'namespace="default",set="large"'),
            [0],
            id="another set's requests wait",
        ),
        pytest.param(
            queue(NOTHING_WAITS, NONE_LET_IN) | queue(WAITING, LATE, 'namespace="other",set="replicas"'),
            [0],
            id="another namespace's requests wait",
        ),
    ],
)
def test_the_autoscaler_goes_by_those_that_wait_and_those_that_had_to(
    tmp_path: Path, series: dict[str, str], expected: list[float]
) -> None:
    find(tmp_path, autoscaler_query(), series, expected)


# ---- alerts ----


def responses(endpoint: str, status_code: int) -> dict[str, str]:
    return {f'ramet:http_responses_total{{{MODEL},endpoint="{endpoint}",status_code="{status_code}"}}': BUSY}


HEALTHY = {
    f"ramet:queue_oldest_seconds{{{MODEL}}}": NOTHING_WAITS,
    f'ramet:queue_time_seconds_bucket{{{MODEL},le="1"}}': BUSY,
    f'ramet:queue_time_seconds_bucket{{{MODEL},le="+Inf"}}': BUSY,
    f'ramet:modelexpress_ready{{{MODEL},replica="0"}}': QUIET,
    "ramet_modelexpress_store_up": QUIET,
    f'ramet:weight_version{{{MODEL},weight_version="1"}}': QUIET,
    **responses("/v1/completions", 200),
}
LATE_ONES = {f'ramet:queue_time_seconds_bucket{{{MODEL},le="{le}"}}': f"0x{NUM_STEPS}" for le in ("1", "10")}
# What is said in the place of, or beside, what a healthy fleet says, by a part of the alert that comes of it.
TROUBLES = {
    "max by (model_name) (ramet:queue_oldest_seconds)": {f"ramet:queue_oldest_seconds{{{MODEL}}}": WAITING},
    "histogram_quantile": LATE_ONES,
    "http_responses_total": responses("/v1/completions", 503),
    "absent": None,
    "ramet:modelexpress_ready": {f'ramet:modelexpress_ready{{{MODEL},replica="1"}}': f"0x{NUM_STEPS}"},
    "ramet_modelexpress_store_up": {"ramet_modelexpress_store_up": f"0x{NUM_STEPS}"},
    "weight_version": {'ramet:weight_version{model_name="m",instance="b",weight_version="2"}': QUIET},
}


def probed_by_kubernetes() -> set[str]:
    texts = [path.read_text() for path in (DEPLOY / "kubernetes").glob("*.yaml")]
    nodes = [document for text in texts for document in yaml.safe_load_all(text)]
    paths = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            paths |= {node["httpGet"]["path"]} if "httpGet" in node else set()
            nodes += node.values()
        elif isinstance(node, list):
            nodes += node
    return paths


def test_probes_and_scrapes_that_fail_are_no_alert(tmp_path: Path) -> None:
    """Such answers are 503 in every start, pause and end."""
    assert {"/health", "/ready"} <= probed_by_kubernetes() <= PROBED
    series = dict(HEALTHY)
    for endpoint in PROBED:
        series |= responses(endpoint, 503)
    for alert in alert_queries():
        find(tmp_path, alert, series, [])


def test_every_alert_has_its_trouble(tmp_path: Path) -> None:
    alerts = {name: [alert for alert in alert_queries() if name in alert] for name in TROUBLES}
    assert sorted(alert for found in alerts.values() for alert in found) == sorted(alert_queries())
    for name, changes in TROUBLES.items():
        (alert,) = alerts[name]
        find(tmp_path, f"count({alert})", {} if changes is None else HEALTHY | changes, [1])
