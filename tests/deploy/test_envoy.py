"""The Envoy example, by its structure: there is no Envoy here to read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from google.protobuf.descriptor import FileDescriptor

from zllm.service.config import ServerConfig
from zllm.service.health import SERVICES
from zllm.v1 import generation_pb2, models_pb2

CONFIG = yaml.safe_load((Path(__file__).parents[2] / "deploy/envoy/envoy.yaml").read_text())
(LISTENER,) = CONFIG["static_resources"]["listeners"]
(CLUSTER,) = CONFIG["static_resources"]["clusters"]
(CHAIN,) = LISTENER["filter_chains"]
MANAGER = CHAIN["filters"][0]["typed_config"]
ROUTES = MANAGER["route_config"]["virtual_hosts"][0]["routes"]


def paths(*files: FileDescriptor) -> Iterator[str]:
    for file in files:
        for service in file.services_by_name.values():
            yield from (f"/{service.full_name}/{method.name}" for method in service.methods)


def route(path: str) -> dict[str, Any]:
    """The first that matches, as Envoy takes it."""
    return dict(next(r for r in ROUTES if path.startswith(r["match"]["prefix"])))


def test_every_public_rpc_has_a_route_to_the_cluster_without_a_time_limit() -> None:
    public = [*paths(generation_pb2.DESCRIPTOR, models_pb2.DESCRIPTOR)]
    assert len(public) == 6
    for path in public:
        found = route(path)["route"]
        assert found["cluster"] == CLUSTER["name"] == CLUSTER["load_assignment"]["cluster_name"]
        assert found["timeout"] == "0s"
    assert route("/grpc.health.v1.Health/Check")["route"]["cluster"] == CLUSTER["name"]


def test_both_sides_speak_http2_and_the_front_has_tls() -> None:
    assert MANAGER["codec_type"] == "HTTP2"
    assert CHAIN["transport_socket"]["typed_config"]["common_tls_context"]["alpn_protocols"] == [
        "h2"
    ]
    (options,) = CLUSTER["typed_extension_protocol_options"].values()
    assert "http2_protocol_options" in options["explicit_http_config"]


def test_it_lets_in_what_the_server_takes_and_asks_for_a_health_that_it_has() -> None:
    (endpoint,) = CLUSTER["load_assignment"]["endpoints"][0]["lb_endpoints"]
    server = ServerConfig()
    assert endpoint["endpoint"]["address"]["socket_address"]["port_value"] == server.port
    streams = MANAGER["http2_protocol_options"]["max_concurrent_streams"]
    assert streams == server.max_streams_per_connection
    (check,) = CLUSTER["health_checks"]
    assert check["grpc_health_check"]["service_name"] in SERVICES


def test_every_typed_part_names_its_type() -> None:
    def walk(node: Any) -> Iterator[dict[str, Any]]:
        if isinstance(node, dict):
            yield from (value for key, value in node.items() if key == "typed_config")
            for value in node.values():
                yield from walk(value)
        elif isinstance(node, list):
            for value in node:
                yield from walk(value)

    found = [*walk(CONFIG)]
    assert len(found) == 4
    assert all(part["@type"].startswith("type.googleapis.com/envoy.") for part in found)
