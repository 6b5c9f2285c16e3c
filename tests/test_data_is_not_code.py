"""No pickle, no eval, nothing of a model's folder or of a message that runs as code."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.test_house import ROOT, imports_of

UNPICKLE = {
    "pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal",
    "multiprocessing.managers", "multiprocessing.reduction", "multiprocessing.Queue",
}  # fmt: skip
RUN = {
    "eval", "exec", "compile", "__import__", "os.system", "torch.load", "np.load", "numpy.load",
    "yaml.load", "yaml.full_load", "yaml.unsafe_load",
}  # fmt: skip
RUN_METHODS = {"from_pretrained"}
"""Of transformers, which may run a model folder's code."""
TRUST = {"trust_remote_code", "allow_pickle", "shell"}


def turned_into_code(source: str) -> Iterator[str]:
    """The imports and calls by which the source would run what it was given."""
    for module in imports_of(source):
        if any(module == name or module.startswith(f"{name}.") for name in UNPICKLE):
            yield module
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            trusted = {keyword.arg for keyword in node.keywords} & TRUST
            if called in RUN or called.rpartition(".")[2] in RUN_METHODS or trusted:
                yield called


@pytest.mark.parametrize("folder", ["zllm", "service", "runtime", "clients", "cuda"])
def test_no_data_is_ever_run_as_code(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {found}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for found in turned_into_code(path.read_text())
    ]
    assert not wrong


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from multiprocessing import managers",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "AutoConfig.from_pretrained(path)",
        "load(path, trust_remote_code=True)",
    ],
)
def test_the_check_sees_what_it_must(source: str) -> None:
    assert len(list(turned_into_code(source))) == 1
