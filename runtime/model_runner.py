"""What the engine asks of a device: launch a step, and later collect its tokens."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from zllm.errors import ConfigError, InvariantError
from zllm.native.step_objects import Plan
from zllm.runtime.config import EngineConfig
from zllm.runtime.messages import TokenLogprobs
from zllm.runtime.model_config import ModelConfig

Ticket = Any
"""A launched step, opaque to everyone but the runner that launched it."""


class StepResult(NamedTuple):
    """What a step sampled, by row of the step. Rows that do not sample hold zeros."""

    tokens: npt.NDArray[np.int32]
    """[R]; -1 where the logits were not finite."""
    logprobs: npt.NDArray[np.float32] | None = None
    """[R]; None, like the rest, where no row asked for any."""
    ranks: npt.NDArray[np.int32] | None = None
    """[R]; 1 is the most likely."""
    top_ids: npt.NDArray[np.int32] | None = None
    """[R, N] best first."""
    top_logprobs: npt.NDArray[np.float32] | None = None
    """[R, N]."""

    def token_logprobs(self, row: int, num_top: int) -> TokenLogprobs:
        """One row's log-probabilities, in a step in which some row asked for them."""
        if (
            self.logprobs is None
            or self.ranks is None
            or self.top_ids is None
            or self.top_logprobs is None
        ):
            raise InvariantError("log-probabilities are wanted of a step that computed none")
        return TokenLogprobs(
            float(self.logprobs[row]),
            int(self.ranks[row]),
            self.top_ids[row, :num_top].tolist(),
            self.top_logprobs[row, :num_top].tolist(),
        )


class ModelRunner(Protocol):
    """One model on one device."""

    model_config: ModelConfig
    max_model_len: int
    max_num_batched_tokens: int
    num_kv_blocks: int
    """Block 0, which is never handed out, included."""
    num_host_blocks: int
    swap_cost: float
    """Tokens that are computed in the time in which one block goes to the host and back."""
    gpu: str
    """The GPU's UUID, as NVML writes it; empty: none."""
    report: list[str]
    """Lines for the operator."""
    arenas: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]
    """Where the scheduler packs steps, in turns (cython/arena.pxd)."""

    def allocate_arenas(self, num_words: int) -> None:
        """Make the arenas; the scheduler knows their size once it knows the pool's."""
        ...

    def launch(self, plan: Plan, arena_index: int) -> Ticket:
        """Start the step that `arenas[arena_index]` describes, after all launched before it."""
        ...

    def collect(self, ticket: Ticket) -> StepResult:
        """Wait for a step's tokens. Steps are collected in the order of their launch."""
        ...

    def close(self) -> None:
        """Release the device's memory."""
        ...


def spread_rows(
    values: npt.NDArray[Any], num_rows: int, rows: npt.NDArray[np.intp] | None
) -> npt.NDArray[Any]:
    """[S, ...] -> [num_rows, ...]: sampled rows to their places in the step, zeros elsewhere.
    `rows` None: all of them sample."""
    if rows is None or len(rows) == num_rows:
        return values
    out = np.zeros((num_rows, *values.shape[1:]), values.dtype)
    out[rows] = values
    return out


def make_runner(config: EngineConfig) -> ModelRunner:
    """The runner of the config's device. Raises ConfigError, ModelLoadError."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        from zllm.runtime.torch_runner import TorchRunner

        return TorchRunner(config)
    if not torch.cuda.is_available():
        raise ConfigError(
            "device is 'cuda', and torch finds no GPU that it can use: `zllm doctor` says what is "
            "missing; 'cpu' serves without one"
        )
    from zllm.runtime.cuda_runner import CudaRunner

    return CudaRunner(config)
