"""Writes deploy/grafana/ramet.json, the Grafana dashboard, from the panels below. Grafana's form is long; this is not.

    python scripts/make_dashboard.py

A test asks each query of a real Prometheus that scrapes real instances (test/integration/modelexpress/test_engine.py).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

PATH = Path(__file__).parent.parent / "deploy" / "grafana" / "ramet.json"
WIDTH, HEIGHT, COLUMNS = 8, 8, 3
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
LABELS = 'model_name=~"$model",instance=~"$instance"'
NO_PROBES = 'endpoint!~"/health.*|/ping|/ready|/metrics"'


class Query(NamedTuple):
    expression: str
    legend: str = ""


class Panel(NamedTuple):
    title: str
    unit: str  # by Grafana's name for it
    queries: list[Query]
    is_table: bool = False


def gauge(name: str, legend: str = "{{instance}}") -> Query:
    return Query(f"ramet:{name}{{{LABELS}}}", legend)


def rate(name: str, by: str, legend: str, *more: str) -> Query:
    labels = ",".join([LABELS, *more])
    return Query(f"sum by ({by}) (rate(ramet:{name}_total{{{labels}}}[$__rate_interval]))", legend)


def quantiles(name: str, shares: tuple[float, ...] = (0.5, 0.9, 0.99)) -> list[Query]:
    buckets = f"sum by (le) (rate(ramet:{name}_bucket{{{LABELS}}}[$__rate_interval]))"
    return [Query(f"histogram_quantile({share}, {buckets})", f"p{share * 100:g}") for share in shares]


# Of the metadata server, which has neither models nor instances as labels.
SERVER_BUCKETS = "sum by (method, le) (rate(ramet_modelexpress_call_seconds_bucket[$__rate_interval]))"
ROWS: dict[str, list[Panel]] = {
    "Requests": [
        Panel("Answers by status", "reqps", [rate("http_responses", "status_code", "{{status_code}}", NO_PROBES)]),
        Panel("Requests under way", "short", [gauge("http_requests_active")]),
        Panel(
            "Sequences",
            "reqps",
            [rate("num_requests", "model_name", "finished"), rate("num_aborted_requests", "model_name", "aborted")],
        ),
        Panel("Time in the queue", "s", quantiles("queue_time_seconds")),
        Panel("Time to the first token", "s", quantiles("time_to_first_token_seconds")),
        Panel("Whole request", "s", quantiles("e2e_request_latency_seconds")),
        Panel("Between two tokens", "s", quantiles("inter_token_latency_seconds")),
        Panel("Time per output token", "s", quantiles("time_per_output_token_seconds")),
        Panel(
            "Tokens",
            "short",
            [
                rate("prompt_tokens", "model_name", "prompt, a second"),
                rate("cached_tokens", "model_name", "of those from the cache"),
                rate("generation_tokens", "model_name", "output, a second"),
            ],
        ),
        Panel("Prompt length in tokens", "short", quantiles("prompt_tokens_histogram", (0.5, 0.99))),
        Panel("Output length in tokens", "short", quantiles("generation_tokens_histogram", (0.5, 0.99))),
        Panel("Output tokens a second", "short", [gauge("gen_throughput")]),
    ],
    "Instances": [
        Panel("Requests that are computed", "short", [gauge("num_running_reqs")]),
        Panel("Requests that wait", "short", [gauge("num_queue_reqs")]),
        Panel("For how long the oldest waits", "s", [gauge("queue_oldest_seconds")]),
        Panel("Requests put back for lack of cache", "short", [gauge("num_retracted_reqs")]),
        Panel("KV cache held by requests", "percentunit", [gauge("token_usage")]),
        Panel(
            "KV cache in tokens",
            "short",
            [
                gauge("max_total_num_tokens", "{{instance}} all"),
                gauge("num_used_tokens", "{{instance}} held by requests"),
                gauge("num_prefix_cache_tokens", "{{instance}} held by prefixes"),
            ],
        ),
        Panel("Prompt tokens from the cache", "percentunit", [gauge("cache_hit_rate")]),
        Panel(
            "States of linear layers",
            "short",
            [
                gauge("state_slots", "{{instance}} all"),
                gauge("state_slots_used", "{{instance}} held by requests"),
                gauge("state_snapshots", "{{instance}} snapshots of prefixes"),
            ],
        ),
        Panel(
            "Snapshots of states, a second",
            "short",
            [
                Query(f"rate(ramet:state_snapshot_hits{{{LABELS}}}[$__rate_interval])", "{{instance}} used"),
                Query(f"rate(ramet:state_snapshot_evictions{{{LABELS}}}[$__rate_interval])", "{{instance}} given up"),
            ],
        ),
    ],
    "Weights": [
        Panel("Version that is served", "short", [gauge("weight_version", "{{instance}} {{weight_version}}")], True),
        Panel("Launch to ready", "s", [gauge("startup_seconds")]),
        Panel("Time to load", "s", [gauge("weight_load_seconds", "{{instance}} rank {{rank}} {{source}}")]),
        Panel("Bytes loaded", "bytes", [gauge("weight_load_bytes", "{{instance}} rank {{rank}} {{source}}")]),
        Panel("Bytes taken, by seed", "bytes", [gauge("weight_load_taken_bytes", "{{instance}} from {{seed}}")]),
        Panel(
            "Rate of loads",
            "Bps",
            [Query(f"ramet:weight_load_bytes{{{LABELS}}} / ramet:weight_load_seconds{{{LABELS}}}", "{{instance}}")],
        ),
        Panel("Listed as ready", "short", [gauge("modelexpress_ready")]),
        Panel(
            "Heartbeats that the metadata server took, a second",
            "short",
            [Query(f"rate(ramet:modelexpress_heartbeats{{{LABELS}}}[$__rate_interval])", "{{instance}}")],
        ),
        Panel(
            "Trouble with the metadata server",
            "short",
            [
                gauge("modelexpress_failures", "{{instance}} failed calls"),
                gauge("modelexpress_lost_records", "{{instance}} lost records"),
            ],
        ),
    ],
    "Metadata server": [
        Panel("Records by status", "short", [Query("sum by (status) (ramet_modelexpress_workers)", "{{status}}")]),
        Panel(
            "Calls",
            "reqps",
            [
                Query(
                    "sum by (method, outcome) (rate(ramet_modelexpress_calls_total[$__rate_interval]))",
                    "{{method}} {{outcome}}",
                )
            ],
        ),
        Panel("Calls, p99", "s", [Query(f"histogram_quantile(0.99, {SERVER_BUCKETS})", "{{method}}")]),
        Panel("Records can be read", "short", [Query("ramet_modelexpress_store_up", "{{instance}}")]),
        Panel(
            "Calls without a token", "short", [Query("ramet_modelexpress_unauthenticated_calls_total", "{{instance}}")]
        ),
        Panel(
            "Records marked stale, removed", "short", [Query("ramet_modelexpress_reaped_records_total", "{{action}}")]
        ),
    ],
}


def make_panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "table" if panel.is_table else "timeseries",
        "title": panel.title,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "expr": query.expression,
                "legendFormat": query.legend,
                "instant": panel.is_table,
                "format": "table" if panel.is_table else "time_series",
            }
            for index, query in enumerate(panel.queries)
        ],
    }


def make_panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    y = 0
    for title, panels in ROWS.items():
        found.append(
            {"id": len(found) + 1, "type": "row", "title": title, "collapsed": False, "panels": [],
             "gridPos": {"x": 0, "y": y, "w": WIDTH * COLUMNS, "h": 1}}
        )  # fmt: skip
        y += 1
        for index, panel in enumerate(panels):
            x = index % COLUMNS * WIDTH
            found.append(make_panel(panel, len(found) + 1, x, y + index // COLUMNS * HEIGHT))
        y += -(-len(panels) // COLUMNS) * HEIGHT
    return found


def make_variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def make_dashboard() -> dict[str, Any]:
    model = make_variable("model", "Model", "label_values(ramet:num_running_reqs, model_name)")
    instance = make_variable(
        "instance", "Instance", 'label_values(ramet:num_running_reqs{model_name=~"$model"}, instance)'
    )
    return {
        "uid": "ramet",
        "title": "Ramet",
        "description": "Made by scripts/make_dashboard.py. A test asks its queries of a Prometheus that scrapes "
        "instances; it has not been opened in Grafana.",
        "tags": ["ramet"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Source", "type": "datasource", "query": "prometheus"},
                model,
                instance,
            ]
        },
        "panels": make_panels(),
    }


def render() -> str:
    return json.dumps(make_dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    PATH.write_text(render())
