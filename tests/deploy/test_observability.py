"""The dashboard and the alerts ask for what a running server really exports."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import promql_parser as promql
import pytest
import yaml

from tests.deploy.promql import TARGET_LABELS, nodes, parse, rates, result_labels, selectors
from tests.service.harness import running
from tests.service.test_metrics import fake_nvml

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/zllm.json").read_text())
GROUPS = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(rule["alert"], rule["expr"]) for rule in RULES] + [
    (f"{panel['title']} {target['refId']}", target["expr"])
    for panel in PANELS
    for target in panel["targets"]
]


@dataclass
class Exported:
    """The series of a running server."""

    labels: dict[str, set[str]] = field(default_factory=dict)
    values: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    """By series and label."""
    counted: set[str] = field(default_factory=set)
    """Those that only grow."""


@pytest.fixture
async def exported(monkeypatch: pytest.MonkeyPatch) -> Exported:
    """After a request, on a GPU that the test pretends to have."""
    fake_nvml(monkeypatch)
    found = Exported()
    async with running() as server:
        server.engine_client.gpu = "GPU-1"
        stream = server.client.stream("abc", max_tokens=2)
        async for _ in stream:
            pass
        await server.until_idle()
        for family in server.server.metrics.registry.collect():
            for sample in family.samples:
                found.labels[sample.name] = set(sample.labels)
                for label, value in sample.labels.items():
                    found.values.setdefault((sample.name, label), set()).add(value)
                if family.type in ("counter", "histogram"):
                    found.counted.add(sample.name)
    # A server that has seen no other codes could still answer with each of gRPC's.
    found.values["zllm:rpc_requests_total", "code"] = {code.name for code in grpc.StatusCode}
    return found


@pytest.mark.parametrize(("where", "query"), QUERIES, ids=[where for where, _ in QUERIES])
def test_every_query_is_promql_about_series_and_labels_that_exist(
    where: str, query: str, exported: Exported
) -> None:
    expr = parse(query)
    for selector in selectors(expr):
        assert selector.name in exported.labels
        for matcher in selector.matchers.matchers:
            assert matcher.name in exported.labels[selector.name]
            if "$" not in matcher.value:
                known = exported.values[selector.name, matcher.name]
                assert set(matcher.value.split("|")) <= known
    assert set(rates(expr)) <= exported.counted, "a gauge has no rate"
    read = set().union(*(exported.labels[selector.name] for selector in selectors(expr)))
    for node in nodes(expr):
        if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            assert set(node.modifier.labels) <= read | TARGET_LABELS


def test_counters_are_only_read_by_their_rate(exported: Exported) -> None:
    for where, query in QUERIES:
        expr = parse(query)
        grown = {s.name for s in selectors(expr)} & exported.counted
        assert grown <= set(rates(expr)), where


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_an_alert_says_how_bad_it_is_and_only_names_labels_that_it_has(
    rule: dict[str, Any], exported: Exported
) -> None:
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"].keys() == {"severity"}
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "description"}
    assert promql.parse_duration(rule.get("for", "1m")).total_seconds() > 0
    text = " ".join(rule["annotations"].values())
    named = set(re.findall(r"\$labels\.(\w+)", text))
    assert named <= result_labels(parse(rule["expr"]), exported.labels)
    rest = re.sub(r"\{\{ \$(labels\.\w+|value( \| humanize\w*)?) \}\}", "", text)
    assert "{{" not in rest


def test_alerts_have_names_of_their_own() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    assert len({group["name"] for group in GROUPS}) == len(GROUPS)


def test_legends_name_labels_that_their_query_leaves(exported: Exported) -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert named, f"{panel['title']}: series would be told apart by nothing"
            assert named <= result_labels(parse(target["expr"]), exported.labels)


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [
        cell
        for panel in DASHBOARD["panels"]
        for place in [panel["gridPos"]]
        for cell in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        )
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_variables_are_declared_and_ask_for_what_exists(exported: Exported) -> None:
    declared = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)\}?", json.dumps(DASHBOARD["panels"])))
    assert used - {"__rate_interval"} <= declared.keys()
    asked = declared["model_name"]["query"]["query"]
    match = re.fullmatch(r"label_values\((\S+), (\w+)\)", asked)
    assert match is not None
    assert match[2] in exported.labels[match[1]]


def test_no_file_for_deployment_names_a_metric_that_is_not_there(exported: Exported) -> None:
    for path in DEPLOY.rglob("*"):
        if path.suffix in (".json", ".yaml", ".yml"):
            named = set(re.findall(r"\bzllm:[a-z]\w+", path.read_text()))
            assert named <= exported.labels.keys(), path
