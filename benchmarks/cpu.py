"""Speed on the CPU against Hugging Face transformers, on a random Qwen3 of 100M parameters.

    python benchmarks/cpu.py [--json FILE]

Prints two ratios from one run, ours over theirs, in tokens a second:

    decode     one request: the faster quartile of the gaps between its tokens
    batch      16 requests at once, against `generate` on one after another, prompts included

Both run in float32 with as many threads as torch takes, in turns; the best round counts, as the
faster gaps do, because whatever else the machine does only slows a run down. Greedy; the tokens
must agree, or the comparison is void.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.generation.streamers import BaseStreamer

from zllm.runtime.config import EngineConfig
from zllm.runtime.engine import Engine
from zllm.runtime.messages import AddRequest, Sampling, Stopping

VOCAB = 32_000
BATCH = 16


def make_model(folder: Path) -> Qwen3ForCausalLM:
    """A random model of 100M parameters, also saved to `folder`."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    model.train(False)
    model.save_pretrained(folder)
    return model


@dataclass(frozen=True)
class Run:
    seconds: float
    outputs: list[list[int]]
    """The new tokens of each prompt."""
    times: list[float]
    """When tokens came, prompt by prompt or step by step."""

    def decode_rate(self) -> float:
        """Tokens a second of one request, after its first token."""
        return float(1.0 / np.quantile(np.diff(self.times), 0.25))


class _Clock(BaseStreamer):
    """Notes when `generate` has a token. Its first call is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to note."""


class Theirs:
    """transformers' `generate`, one request at a time."""

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        self.model = model

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], count: int) -> Run:
        outputs = []
        times: list[float] = []
        start = time.perf_counter()
        for prompt in prompts:
            tokens = torch.tensor([prompt])
            clock = _Clock()
            model: Any = self.model
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=count,
                do_sample=False,
                streamer=clock,
            )
            times += clock.times[1:]
            outputs.append(out[0, len(prompt) :].tolist())
        return Run(time.perf_counter() - start, outputs, times)


class Ours:
    """The engine in this process, prefix caching off: every run computes everything."""

    def __init__(self, folder: Path) -> None:
        config = EngineConfig(
            model=folder,
            device="cpu",
            dtype="float32",
            max_num_seqs=BATCH,
            num_kv_blocks=1024,
            enable_prefix_caching=False,
        )
        self.engine = Engine(config)
        self.next_id = 0

    def run(self, prompts: list[list[int]], count: int) -> Run:
        first = self.next_id
        self.next_id += len(prompts)
        outputs: list[list[int]] = [[] for _ in prompts]
        times = []
        start = time.perf_counter()
        for index, prompt in enumerate(prompts):
            self.engine.add(
                AddRequest(
                    first + index,
                    np.array(prompt, np.int32).tobytes(),
                    Sampling(temperature=0.0),
                    Stopping(max_tokens=count),
                )
            )
        while self.engine.has_work():
            output = self.engine.step()
            if output is None:
                continue
            times.append(time.perf_counter())
            ids = np.frombuffer(output.request_ids, np.int64)
            tokens = np.frombuffer(output.tokens, np.int32)
            for request_id, token in zip(ids.tolist(), tokens.tolist(), strict=True):
                outputs[request_id - first].append(token)
        return Run(time.perf_counter() - start, outputs, times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=7, help="of the single request")
    parser.add_argument("--batch-rounds", type=int, default=2, help=f"of {BATCH} requests")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each request")
    options = parser.parse_args()

    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, VOCAB, 64).tolist() for _ in range(BATCH)]
    with tempfile.TemporaryDirectory() as folder:
        theirs = Theirs(make_model(Path(folder)))
        ours = Ours(Path(folder))
    for side in (theirs, ours):
        side.run(prompts[:1], 8)

    rates: dict[str, list[float]] = {"ours": [], "theirs": [], "ours_all": [], "theirs_all": []}
    same = True
    for _ in range(options.rounds):
        a, b = ours.run(prompts[:1], options.tokens), theirs.run(prompts[:1], options.tokens)
        rates["ours"].append(a.decode_rate())
        rates["theirs"].append(b.decode_rate())
        same = same and a.outputs == b.outputs
    total = BATCH * options.tokens
    for _ in range(options.batch_rounds):
        a, b = ours.run(prompts, options.tokens), theirs.run(prompts, options.tokens)
        rates["ours_all"].append(total / a.seconds)
        rates["theirs_all"].append(total / b.seconds)
        same = same and a.outputs == b.outputs

    best = {name: max(values) for name, values in rates.items()}
    figures = {
        "threads": torch.get_num_threads(),
        "decode_tokens_per_s": best["ours"],
        "decode_tokens_per_s_transformers": best["theirs"],
        "decode_ratio": best["ours"] / best["theirs"],
        "batch_tokens_per_s": best["ours_all"],
        "batch_tokens_per_s_transformers": best["theirs_all"],
        "batch_ratio": best["ours_all"] / best["theirs_all"],
        "same_tokens": same,
    }
    print(f"random Qwen3, 100M parameters, float32, {figures['threads']} threads, greedy")
    for name, label in (("decode", "1 request, decode"), ("batch", f"{BATCH} requests at once")):
        print(
            f"  {label:22} {figures[f'{name}_tokens_per_s']:8.1f} tok/s   transformers "
            f"{figures[f'{name}_tokens_per_s_transformers']:8.1f} tok/s   ratio "
            f"{figures[f'{name}_ratio']:.2f}"
        )
    if not same:
        print("  the tokens differ: the comparison is void")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
