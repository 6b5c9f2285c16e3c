"""The manifests: valid by Kubernetes' own schemas, and true to what the server does."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prometheus_client import generate_latest

from tests.service.harness import running
from zllm import cli
from zllm.clients.health import ask
from zllm.service.config import ServerConfig
from zllm.service.health import ALIVE, SERVICES
from zllm.service.listener import LAST_WRITES_S
from zllm.service.supervisor import STOP_S

FOLDER = Path(__file__).parents[2] / "deploy/kubernetes"


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return content


RESOURCES: list[str] = load("kustomization.yaml")["resources"]


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = load("deployment.yaml")["spec"]["template"]["spec"]
    return spec


def container() -> dict[str, Any]:
    (found,) = pod()["containers"]
    return dict(found)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> ServerConfig:
    """What the Deployment's arguments make of the server; its model stays where it is."""
    found: list[ServerConfig] = []
    monkeypatch.setattr(
        "zllm.service.serve.run", lambda server, *_, **__: found.append(server) or 0
    )
    _, *arguments = container()["args"]
    assert cli.main(["serve", *arguments]) == 0
    return found[0]


@pytest.mark.parametrize("name", RESOURCES)
@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_it_is_valid_by_kubernetes_schema(name: str, version: str) -> None:
    kubernetes_validate.validate(load(name), version, strict=True)


def test_the_schemas_refuse_what_they_must() -> None:
    broken = load("deployment.yaml")
    broken["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["grcp"] = {"port": 1}
    with pytest.raises(kubernetes_validate.ValidationError, match="grcp"):
        kubernetes_validate.validate(broken, "1.30", strict=True)


def test_every_manifest_is_applied_and_speaks_of_the_same_pods() -> None:
    others = {"kustomization.yaml", "prometheus-adapter.yaml"}
    assert {path.name for path in FOLDER.glob("*.yaml")} == {*RESOURCES, *others}
    labels = load("deployment.yaml")["spec"]["template"]["metadata"]["labels"]
    assert load("service.yaml")["spec"]["selector"] == labels
    assert load("deployment.yaml")["spec"]["selector"]["matchLabels"] == labels
    assert load("disruption.yaml")["spec"]["selector"]["matchLabels"] == labels
    assert load("network-policy.yaml")["spec"]["podSelector"]["matchLabels"] == labels
    target = load("autoscaling.yaml")["spec"]["scaleTargetRef"]
    assert target["name"] == load("deployment.yaml")["metadata"]["name"]


def test_the_ports_are_the_servers(server: ServerConfig) -> None:
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert ports == {"grpc": server.port, "metrics": server.metrics_port}
    annotations = load("deployment.yaml")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(server.metrics_port)
    rules = load("network-policy.yaml")["spec"]["ingress"]
    named = {port["port"] for rule in rules for port in rule["ports"]}
    assert (
        named == {port["targetPort"] for port in load("service.yaml")["spec"]["ports"]} == {*ports}
    )
    assert server.admin_host == "127.0.0.1"


def test_a_pod_gets_the_time_that_a_drain_takes(server: ServerConfig) -> None:
    ending = server.drain_delay + server.shutdown_grace + STOP_S + 2 * LAST_WRITES_S
    assert pod()["terminationGracePeriodSeconds"] > ending
    readiness = container()["readinessProbe"]
    # Every router that asks has heard NOT_SERVING before new work is refused.
    assert server.drain_delay > readiness["periodSeconds"] * readiness["failureThreshold"]
    # It drains by SIGTERM, in the right order; a hook would only hold that up.
    assert "lifecycle" not in container()


async def test_probes_ask_for_names_that_the_server_knows_and_liveness_outlives_a_drain() -> None:
    probes = {name: container()[name]["grpc"] for name in ("startupProbe", "readinessProbe")}
    alive = container()["livenessProbe"]["grpc"]["service"]
    assert {probe["service"] for probe in probes.values()} <= set(SERVICES)
    assert alive == ALIVE
    async with running() as harness:

        async def status(service: str) -> str:
            return await asyncio.to_thread(ask, harness.target, service)

        for probe in probes.values():
            assert await status(probe["service"]) == "SERVING"
        assert await status(alive) == "SERVING"
        await harness.server.drain(0.0)
        for probe in probes.values():
            assert await status(probe["service"]) == "NOT_SERVING"
        assert await status(alive) == "SERVING"


def test_it_needs_no_root_and_writes_to_its_volumes_alone() -> None:
    assert pod()["securityContext"]["runAsNonRoot"] is True
    context = container()["securityContext"]
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert {mount["name"] for mount in container()["volumeMounts"]} == {
        volume["name"] for volume in pod()["volumes"]
    }


async def test_it_scales_by_a_metric_that_the_server_exports() -> None:
    (metric,) = load("autoscaling.yaml")["spec"]["metrics"]
    (rule,) = load("prometheus-adapter.yaml")["rules"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    series = rule["seriesQuery"].partition("{")[0]
    async with running() as harness:
        exported = generate_latest(harness.server.metrics.registry).decode()
    assert f"\n{series}{{" in exported
