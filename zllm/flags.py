"""Settings from the command line, the environment and a YAML file, for any config dataclass.

A field `max_model_len` is the flag `--max-model-len`, the variable `ZLLM_MAX_MODEL_LEN` and the
file's key `max-model-len` (or with underscores). The first that names it wins, in that order; the
dataclass's default comes last.
"""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from zllm.errors import ConfigError

ENV_PREFIX = "ZLLM_"
Config = TypeVar("Config")

HELP = {
    "served_model_name": "the name that requests use; default: the folder's or hub id's",
    "device": "where the model runs; auto takes a GPU where there is one",
    "dtype": "type of weights and activations; auto takes the model's own",
    "kv_cache_dtype": "type of the KV cache; auto takes the activations'",
    "max_model_len": "context in tokens; default: the model's own",
    "max_num_seqs": "sequences that run at once, at most",
    "max_num_batched_tokens": "tokens of one step, at most; default: 2048 on a CPU, 8192 on a GPU",
    "interactive": "somebody waits for single tokens; without it a GPU's steps may be longer",
    "num_kv_blocks": "fix the KV pool's size, in blocks of 16 tokens",
    "gpu_memory_utilization": "share of the GPU's memory to use, in (0, 1]",
    "memory_share": "part of the memory for models, in (0, 1]; default: even parts",
    "swap_space_gib": "pinned host memory for swapped-out sequences, in GiB",
    "enable_prefix_caching": "reuse the KV of prompts' common beginnings",
    "scheduling_policy": "which queued request starts next",
    "max_queued_requests": "requests that may wait, at most",
    "max_queued_tokens": "prompt tokens not in the prefix cache that may wait, at most",
    "enforce_eager": "never capture CUDA graphs",
    "seed": "seed of what the engine draws for itself",
    "load_format": "dummy draws random weights, for speed measurements",
    "host": "address to listen on",
    "port": "port to listen on; 0 takes a free one",
    "admin_host": "address of the operators' listener",
    "admin_port": "port of the operators' listener; 0 takes a free one",
    "log_format": "how the log on stderr is written",
    "log_level": "the least that is logged; a request's own line is info",
    "log_prompts": "log prompts and answers too",
    "stats_interval": "seconds between two lines on what the engines do, while they work; 0: none",
    "otlp_endpoint": "OTLP collector that gets traces, e.g. http://localhost:4317",
    "metrics": "serve Prometheus metrics",
    "metrics_host": "address of the metrics' listener",
    "metrics_port": "port of the metrics' listener; 0 takes a free one",
    "frontends": "service processes that share the port; for more than one core's streams",
    "reflection": "answer gRPC reflection; default: only on loopback",
    "tls_cert": "PEM file of the server's certificate chain; read anew when it changes",
    "tls_key": "PEM file of the certificate's key",
    "tls_client_ca": "PEM file of the authority whose certificates clients need",
    "api_keys": "YAML or JSON file of API keys and their limits; read anew when it changes",
    "insecure": "listen beyond loopback without TLS",
    "max_prompt_tokens": "tokens of a prompt, at most; 0: as many as the context takes",
    "max_connections": "connections of each listener, at most",
    "max_streams_per_connection": "calls open at once on a connection, at most",
    "max_metadata_bytes": "size of a call's metadata, at most",
    "max_message_bytes": "size of a request, at most",
    "queue_timeout": "seconds a request may wait to start; 0: for ever",
    "slo": "refuse at once a request whose first token would come after its deadline",
    "shutdown_grace": "seconds that running requests get to finish after SIGTERM or Drain",
    "drain_delay": "seconds between NOT_SERVING and refusing work, for routers to notice",
    "load_timeout": "seconds that a model gets to load",
    "model_root": "the folder that LoadModel is kept to; default: any",
    "max_restarts": "failures of an engine in a row, at most; one more gives its model up",
    "restart_backoff": "seconds before the first restart of the engine; doubled each time",
    "engine_timeout": "seconds of the engine's silence after which its requests fail",
}


@dataclass(frozen=True)
class Flag:
    """One field of a config: its names, and how a string becomes its value."""

    name: str
    kind: type
    choices: tuple[str, ...] = ()
    optional: bool = False

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()

    def read(self, value: Any, source: str) -> Any:
        """A value of the environment or the file, as the field's type. Raises ConfigError."""
        if value is None and self.optional:
            return None
        try:
            if not self._suits(value):
                raise ValueError
            converted = _READERS.get(self.kind, self.kind)(value)
        except (TypeError, ValueError):
            raise ConfigError(f"{source} is {value!r}: it must be {self._wanted}") from None
        if self.choices and converted not in self.choices:
            raise ConfigError(f"{source} is {value!r}: it must be one of {', '.join(self.choices)}")
        return converted

    def _suits(self, value: Any) -> bool:
        """Not so: what YAML makes of a slip, and a constructor would make something of."""
        if self.kind is str:
            return isinstance(value, (str, int, float)) and not isinstance(value, bool)
        if self.kind is int and isinstance(value, float):
            return value.is_integer()
        return not (self.kind in (int, float) and isinstance(value, bool))

    @property
    def _wanted(self) -> str:
        words = {
            bool: "true or false",
            int: "a whole number",
            float: "a number",
            list: "text or a list of texts",
        }
        return words.get(self.kind, "text")


def flags_of(*configs: type) -> list[Flag]:
    """The flags of these dataclasses, in their fields' order. Paths are arguments, not flags."""
    found = []
    for config in configs:
        hints = typing.get_type_hints(config)
        for field in fields(config):
            flag = _flag(field.name, hints[field.name])
            if flag.kind is not Path:
                found.append(flag)
    return found


def add_flags(parser: argparse.ArgumentParser, *configs: type) -> None:
    """Every flag, absent from the namespace unless given, and `--config FILE`."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML file of these settings")
    for config in configs:
        group = parser.add_argument_group(config.__name__)
        for flag in flags_of(config):
            if flag.kind is bool:
                group.add_argument(
                    flag.option,
                    action=argparse.BooleanOptionalAction,
                    default=argparse.SUPPRESS,
                    help=HELP[flag.name],
                )
            else:
                group.add_argument(
                    flag.option,
                    type=flag.kind,
                    choices=flag.choices or None,
                    default=argparse.SUPPRESS,
                    help=HELP[flag.name],
                )


def merge(
    given: Mapping[str, Any],
    environment: Mapping[str, str],
    file: Path | None,
    configs: Sequence[type],
    lists: Sequence[str] = (),
) -> dict[str, Any]:
    """Every setting that any source names. `lists` are further names, of one text or several."""
    known = {flag.name: flag for flag in flags_of(*configs)}
    known |= {name: Flag(name, list) for name in lists}
    merged: dict[str, Any] = {}
    if file is not None:
        for key, value in _read_file(file).items():
            name = str(key).replace("-", "_")
            if name not in known:
                raise ConfigError(f"{file}: {key!r} is no setting{_did_you_mean(name, known)}")
            merged[name] = known[name].read(value, f"{file}: {key}")
    for name, flag in known.items():
        if name not in given and flag.variable in environment:
            merged[name] = flag.read(environment[flag.variable], flag.variable)
    merged |= {name: value for name, value in given.items() if name in known}
    return merged


def build(config: type[Config], settings: Mapping[str, Any], **fixed: Any) -> Config:
    """The dataclass with those of the settings that are its fields."""
    names = {field.name for field in fields(config)}  # type: ignore[arg-type]
    return config(**{k: v for k, v in settings.items() if k in names} | fixed)


def _flag(name: str, hint: Any) -> Flag:
    options = [hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [part for part in typing.get_args(hint) if part is not type(None)]
    inner = options[0]
    optional = inner is not hint
    if typing.get_origin(inner) is Literal:
        return Flag(name, str, typing.get_args(inner), optional)
    return Flag(name, inner, (), optional)


def _to_bool(value: Any) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True}
    words |= {"0": False, "false": False, "no": False, "off": False}
    try:
        return words[str(value).lower()]
    except KeyError:
        raise ValueError(value) from None


def _to_list(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in values):
        raise ValueError(value)
    return [item for item in values if item]


_READERS: dict[type, Callable[[Any], Any]] = {bool: _to_bool, list: _to_list}


def _read_file(file: Path) -> dict[Any, Any]:
    try:
        content = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}") from None
    except Exception as error:  # the parser raises what a tag's or a date's reader does, too
        raise ConfigError(f"--config {file}: it is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {file}: it must hold `setting: value` lines")
    return content


def _did_you_mean(name: str, known: Mapping[str, Flag]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
