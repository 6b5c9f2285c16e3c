"""The `zllm` command. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zllm
from zllm.errors import ConfigError, RequestError, ZllmError

if TYPE_CHECKING:
    from zllm.clients.credentials import Tls

DEFAULT_TARGET = "127.0.0.1:50051"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0; 1 for a failure that says why; 2 for wrong usage."""
    _open_standard_files()
    # gRPC's fork handlers only warn: what we start as a child execs at once.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    if sys.stdin is None:  # it was closed
        sys.stdin = io.StringIO()
    if isinstance(sys.stdin, io.TextIOWrapper):
        # As in arguments, so that what is no text is refused by name like theirs.
        sys.stdin.reconfigure(errors="surrogateescape")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an answer may hold what the terminal does not
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ZllmError, TimeoutError) as error:
        print(f"zllm: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, BrokenPipeError):
        return 130
    except OSError as error:  # what is printed cannot be written
        print(f"zllm: {error}", file=sys.stderr)
        return 1


def _open_standard_files() -> None:
    """What was closed by whoever started it would be the number of the next file that opens."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zllm", description="an LLM inference server over gRPC")
    parser.add_argument("--version", action="version", version=zllm.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_bench(commands)
    _add_health(commands)
    demo = commands.add_parser("demo", help="start the embedded model and watch it answer")
    demo.set_defaults(run=_demo)
    doctor = commands.add_parser("doctor", help="check this machine's GPU, drivers and kernels")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from zllm.flags import add_flags
    from zllm.runtime.config import EngineConfig
    from zllm.service.config import ServerConfig

    serve = commands.add_parser(
        "serve",
        help="serve one or more models",
        description="Serve models. Every flag may also be set as ZLLM_… in the environment or in "
        "a YAML file; the flag wins over the environment, and that over the file.",
    )
    serve.add_argument(
        "path", nargs="?", help="a folder or a hub id; left out, the embedded model is served"
    )
    serve.add_argument(
        "--model",
        action="append",
        metavar="[NAME=]PATH[,setting=value...]",
        help="the same with a name and settings of its own; repeated: several models",
    )
    add_flags(serve, ServerConfig, EngineConfig)
    serve.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    _end_at_a_signal()
    from zllm.flags import build, merge
    from zllm.model_arguments import engine_configs
    from zllm.runtime.config import EngineConfig
    from zllm.runtime.embedded import EMBEDDED_MODEL
    from zllm.service import serve
    from zllm.service.config import ServerConfig

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    if "path" in given:
        given["model"] = [given["path"], *given.get("model", [])]
    configs = (ServerConfig, EngineConfig)
    settings = merge(given, os.environ, arguments.config, configs, lists=["model"])
    server = build(ServerConfig, settings)
    models = engine_configs(settings.pop("model", []), settings)
    template = build(EngineConfig, settings, model=EMBEDDED_MODEL)
    return serve.run(server, models, template, version=zllm.__version__)


def _end_at_a_signal() -> None:
    """Until the server has handlers that end what it has started: a container's first process gets
    no signal that it does not ask for, and a model may be fetched for minutes. A name that is being
    looked up is waited for."""

    def end(*_: object) -> None:
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, end)


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = commands.add_parser("generate", help="stream one answer from a server")
    generate.add_argument("prompt", help="the text to go on with; - reads it from stdin")
    _add_sampling(generate)
    generate.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    from zllm.clients.client import Client

    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    with Client(arguments.target, **_access(arguments)) as client:
        for delta in client.stream(prompt, **_sampling(arguments)):
            print(delta.text, end="", flush=True)
    print()
    return 0


def _add_chat(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    chat = commands.add_parser("chat", help="talk with a model of a server")
    chat.add_argument("--system", default="", help="the system message")
    _add_sampling(chat)
    chat.set_defaults(run=_chat)


def _chat(arguments: argparse.Namespace) -> int:
    from zllm.clients.client import Client

    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    with Client(arguments.target, **_access(arguments)) as client:
        while True:
            try:
                turn = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return 0
            if not turn.strip():
                continue
            messages.append({"role": "user", "content": turn})
            try:
                answer = []
                for delta in client.chat(messages, **_sampling(arguments)):
                    answer.append(delta.text)
                    print(delta.text, end="", flush=True)
                print()
            except RequestError as error:
                # The conversation goes on without the turn that the server refused.
                print(f"zllm: {error}", file=sys.stderr)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": "".join(answer)})


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", default=DEFAULT_TARGET, help=f"default: {DEFAULT_TARGET}")
    parser.add_argument("--tls", action="store_true", help="implied by the three that follow")
    parser.add_argument("--tls-ca", default="", metavar="FILE", help="default: gRPC's own roots")
    parser.add_argument("--tls-cert", default="", metavar="FILE", help="the client's own")
    parser.add_argument("--tls-key", default="", metavar="FILE", help="of the client's certificate")


def _add_access(parser: argparse.ArgumentParser) -> None:
    _add_target(parser)
    # A key on the command line would be in every process list.
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="default: $ZLLM_API_KEY, where it is set"
    )


def _tls(arguments: argparse.Namespace) -> Tls | None:
    from zllm.clients.credentials import Tls

    files = (arguments.tls_ca, arguments.tls_cert, arguments.tls_key)
    encrypted = arguments.tls or any(files)
    return Tls(ca=files[0], cert=files[1], key=files[2]) if encrypted else None


def _access(arguments: argparse.Namespace) -> dict[str, Any]:
    """The clients' arguments that say who calls, and over what. Raises ConfigError."""
    key = os.environ.get("ZLLM_API_KEY", "")
    file: Path | None = arguments.api_key_file
    if file is not None:
        try:
            key = file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not text"
            raise ConfigError(f"--api-key-file {file}: {why}") from None
    return {"api_key": key, "tls": _tls(arguments)}


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    _add_access(parser)
    parser.add_argument("--model", help="default: the server's first")
    parser.add_argument("--max-tokens", type=int, help="default: to the end of the context")
    parser.add_argument("--temperature", type=float, help="0 is greedy; default: the model's")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="may be given repeatedly")


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")
    return {n: getattr(arguments, n) for n in names if getattr(arguments, n) is not None}


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser("bench", help="load a server and measure its latencies")
    _add_access(bench)
    bench.add_argument("--model", default="", help="default: the server's first")
    bench.add_argument("--num-requests", type=int, default=200)
    bench.add_argument("--concurrency", type=int, default=16, help="requests open at once, at most")
    bench.add_argument(
        "--rate", type=float, help="requests a second, Poisson; default: closed loop"
    )
    bench.add_argument("--input-len", type=int, default=128, help="random prompt tokens")
    bench.add_argument("--shared-len", type=int, default=0, help="of them, common to all requests")
    bench.add_argument("--output-len", type=int, default=64, help="tokens of every answer")
    bench.add_argument("--seed", type=int, default=0)
    bench.add_argument("--json", action="store_true", help="print one JSON object instead")
    bench.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    from zllm.clients.bench import Workload, run

    names = {field.name for field in fields(Workload)}
    given = {k: v for k, v in vars(arguments).items() if k in names}
    report = run(Workload(**given | _access(arguments)))
    if arguments.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name:24} {value:,.3f}" if isinstance(value, float) else f"{name:24} {value}")
    return 1 if report["failed"] else 0


def _add_health(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    health = commands.add_parser(
        "health",
        help="ask a server whether it serves",
        description="Ends with 0 where the server says SERVING and with 1 otherwise.",
    )
    _add_target(health)
    health.add_argument("--service", default="", help="of this name alone; default: the server")
    health.add_argument("--timeout", type=float, default=5.0, help="seconds; default: 5")
    health.set_defaults(run=_health)


def _health(arguments: argparse.Namespace) -> int:
    from zllm.clients.health import ask

    status = ask(
        arguments.target, arguments.service, tls=_tls(arguments), timeout=arguments.timeout
    )
    print(status)
    return 0 if status == "SERVING" else 1


def _demo(arguments: argparse.Namespace) -> int:
    from zllm.demo import main as demo

    return demo()


def _doctor(arguments: argparse.Namespace) -> int:
    from zllm.cuda.doctor import examine, render

    findings = examine()
    print(render(findings))
    return 1 if any(finding.problem for finding in findings) else 0
