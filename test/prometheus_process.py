"""Starts a Prometheus that scrapes servers, and asks it what queries find."""

import contextlib
import json
import math
import re
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from modelexpress_harness import free_port, wait_until

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
SCRAPE_S = 0.5
RATE_INTERVAL = "5s"  # in place of Grafana's, as short as this scrapes


def dashboard_queries() -> set[str]:
    """Of all panels in deploy/grafana, for all models and instances."""
    panels = json.loads((DEPLOY / "grafana" / "ramet.json").read_text())["panels"]
    found = {target["expr"] for panel in panels for target in panel.get("targets", ())}
    filled = {re.sub(r"\$(model|instance)", ".*", query).replace("$__rate_interval", RATE_INTERVAL) for query in found}
    assert len(filled) > 30 and not any("$" in query for query in filled)
    return filled


def autoscaler_metric() -> dict[str, Any]:
    """Name and selector of the metric that the autoscaler asks for."""
    autoscaler = yaml.safe_load((DEPLOY / "kubernetes" / "autoscaler.yaml").read_text())
    return autoscaler["spec"]["metrics"][0]["external"]["metric"]


def scraped_labels() -> dict[str, str]:
    """What Kubernetes' service discovery adds to all that the autoscaler's own pods say."""
    return {"namespace": "default"} | autoscaler_metric()["selector"]["matchLabels"]


def autoscaler_query() -> str:
    """As prometheus-adapter makes it from its rule."""
    rules = yaml.safe_load((DEPLOY / "kubernetes" / "prometheus-adapter.yaml").read_text())["rules"]["external"]
    (rule,) = [rule for rule in rules if rule["name"]["as"] == autoscaler_metric()["name"]]
    (name,) = re.findall(r'__name__="([^"]+)"', rule["seriesQuery"])
    matchers = ",".join(f'{label}="{value}"' for label, value in scraped_labels().items())
    return rule["metricsQuery"].replace("<<.Series>>", name).replace("<<.LabelMatchers>>", matchers)


def alert_queries() -> list[str]:
    """Of the table at the end of docs/deploy.md."""
    text = (DEPLOY.parent / "docs" / "deploy.md").read_text()
    (table,) = re.findall(r"^\| expression \| means \|\n\|---\|---\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [re.match(r"\| `([^`|]+)` \| [^|]+ \|$", line)[1] for line in table.splitlines()]


class Prometheus:
    def __init__(self, url: str):
        self._url = url

    def find(self, query: str) -> list[float]:
        """The values that a query finds now. Those that are no numbers are left out: quantiles of nothing.

        Raises:
            AssertionError: if Prometheus does not take the query.
        """
        data = urllib.parse.urlencode({"query": query}).encode()
        try:
            with urllib.request.urlopen(f"{self._url}/api/v1/query", data, timeout=10) as answer:
                found = json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from error
        values = [float(series["value"][1]) for series in found]
        return [value for value in values if math.isfinite(value)]

    def answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self._url}/-/ready", timeout=2) as answer:
            return answer.status == 200
        return False


@contextlib.contextmanager
def running_prometheus(folder: Path, targets: Sequence[str]) -> Iterator[Prometheus]:
    """A Prometheus that scrapes these host:ports. Skips the test where there is none."""
    if shutil.which("prometheus") is None:
        pytest.skip("needs prometheus")
    jobs = [{"job_name": "ramet", "static_configs": [{"targets": list(targets), "labels": scraped_labels()}]}]
    config = {"global": {"scrape_interval": f"{SCRAPE_S * 1000:.0f}ms"}, "scrape_configs": jobs}
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        prometheus = Prometheus(f"http://{address}")
        wait_until(prometheus.answers, 30, "prometheus answering")
        yield prometheus
    finally:
        process.kill()
        process.wait(20)
