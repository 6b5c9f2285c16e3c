"""Does the engine answer right on this machine? The embedded model, a few hundred questions.

python benchmarks/gpu/smoke.py [--device cuda] [--count 300] [engine options as key=value]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from zllm.runtime.chat_template import load_chat_template
from zllm.runtime.config import EngineConfig
from zllm.runtime.embedded import EMBEDDED_MODEL
from zllm.runtime.engine import Engine
from zllm.runtime.messages import AddRequest, Sampling, Stopping
from zllm.runtime.model_config import ModelConfig
from zllm.runtime.tiny_tasks import held_out_tasks
from zllm.runtime.tokenizer import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("options", nargs="*", help="fields of EngineConfig, e.g. dtype=float32")
    arguments = parser.parse_args()
    options: dict[str, Any] = {}
    for option in arguments.options:
        key, _, value = option.partition("=")
        options[key] = {"true": True, "false": False}.get(
            value, int(value) if value.isdigit() else value
        )
    engine = Engine(EngineConfig(model=EMBEDDED_MODEL, **options))
    print("\n".join(engine.ready().startup_report))
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    template = load_chat_template(EMBEDDED_MODEL)
    if template is None:
        raise SystemExit("the embedded model has no chat template")
    eos = ModelConfig.from_folder(EMBEDDED_MODEL).eos_token_ids
    tasks = held_out_tasks(arguments.count)
    answers: dict[int, list[int]] = {}
    for number, task in enumerate(tasks, 1):
        text = template.render([{"role": "user", "content": task.question}])
        ids = np.asarray(tokenizer.encode(text), np.int32)
        answers[number] = []
        engine.add(
            AddRequest(
                request_id=number,
                prompt=ids.tobytes(),
                sampling=Sampling(temperature=0.0),
                stopping=Stopping(max_tokens=128, eos_token_ids=eos),
            )
        )
    start, steps = time.perf_counter(), 0
    while engine.has_work():
        output = engine.step()
        steps += 1
        if output is None:
            continue
        ids = np.frombuffer(output.request_ids, np.int64).tolist()
        tokens = np.frombuffer(output.tokens, np.int32).tolist()
        for request, token in zip(ids, tokens, strict=True):
            if token >= 0 and token not in eos:
                answers[request].append(token)
    took = time.perf_counter() - start
    right = sum(
        tokenizer.decode(answers[number]).strip() == task.answer
        for number, task in enumerate(tasks, 1)
    )
    tokens_out = sum(map(len, answers.values()))
    print(f"{right}/{len(tasks)} right, {tokens_out} tokens, {steps} steps in {took:.2f} s")
    print(f"{engine.load()}; violations: {engine.check()}")


if __name__ == "__main__":
    main()
