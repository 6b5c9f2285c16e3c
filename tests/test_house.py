"""The house's rules: one-way imports, no shadowing packages, light clients."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "cython": {"zllm.errors", "zllm.native"},
    "cuda": {"zllm.errors", "zllm.cuda"},
    "runtime": {"zllm.errors", "zllm.native", "zllm.cuda", "zllm.runtime"},
    "service": {
        "zllm.errors", "zllm.v1", "zllm.runtime", "zllm.service",
        # What every token takes of the service's own is native (decision 038).
        "zllm.native.pending", "zllm.native.delta_encoder", "zllm.native.delta_writer",
    },
    "clients": {"zllm.errors", "zllm.v1", "zllm.clients"},
}  # fmt: skip
ENGINE_SIDE = {
    "zllm.runtime.engine", "zllm.runtime.llm", "zllm.runtime.model_runner", "zllm.runtime.loader",
    "zllm.runtime.torch_ops", "zllm.runtime.torch_runner", "zllm.runtime.model_config",
}  # fmt: skip
"""What the service reaches through the engine's process alone."""


def imports_of(source: str) -> Iterator[str]:
    """Every module that the source imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, "relative imports hide where things come from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(folder: str) -> Iterator[tuple[Path, str]]:
    for path in sorted((ROOT / folder).rglob("*.py*")):
        if path.suffix in (".py", ".pyi"):
            for module in imports_of(path.read_text()):
                if module == "zllm" or module.startswith("zllm."):
                    yield path.relative_to(ROOT), module


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_one_way(folder: str) -> None:
    allowed = MAY_IMPORT[folder]
    wrong = [
        f"{path}: {module}"
        for path, module in ours(folder)
        if not any(module == name or module.startswith(f"{name}.") for name in allowed)
    ]
    assert not wrong


def test_the_service_never_reaches_into_the_engine() -> None:
    wrong = [
        f"{path}: {module}"
        for path, module in ours("service")
        if any(module == name or module.startswith(f"{name}.") for name in ENGINE_SIDE)
    ]
    assert not wrong


def test_the_import_check_sees_what_it_must() -> None:
    source = "import zllm.service.x\ndef f():\n    from zllm.runtime import engine\n"
    assert list(imports_of(source)) == ["zllm.service.x", "zllm.runtime.engine"]


@pytest.mark.parametrize("folder", ["cuda", "cython"])
def test_no_package_shadows_the_cuda_and_cython_modules(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert not list((ROOT / folder).rglob("__init__.py*"))


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "from zllm import Client",
        "from zllm import AsyncClient",
        "import zllm.clients.bench",
        "import zllm; zllm.__version__",
        "import zllm.service.serve",
        "from zllm.cli import main\nmain(['serve', '--config', '/nonexistent'])",
    ],
)
def test_neither_clients_nor_service_load_torch(code: str) -> None:
    loaded = run(f"{code}\nimport sys\nprint('torch' in sys.modules)")
    assert loaded.splitlines()[-1] == "False"


def test_the_service_does_without_numpy() -> None:
    """It takes a tenth of a second to import, before the engine's process is started."""
    code = "import sys, zllm.service.serve, zllm.service.frontend_process"
    assert run(f"{code}\nprint('numpy' in sys.modules)") == "False"


def test_a_client_loads_neither_runtime_nor_service() -> None:
    heavy = (
        "[m for m in sys.modules if m.split('.')[:2] in (['zllm','runtime'],['zllm','service'])]"
    )
    assert run(f"from zllm import Client\nimport sys\nprint({heavy})") == "[]"


def test_the_face_has_its_names_and_no_others() -> None:
    import zllm
    from zllm.clients.client import Client
    from zllm.runtime.sampling_params import SamplingParams

    assert zllm.Client is Client
    assert zllm.SamplingParams is SamplingParams
    assert {"LLM", "Client", "SamplingParams"} <= set(dir(zllm))
    with pytest.raises(AttributeError, match="Nothing"):
        _ = zllm.Nothing
