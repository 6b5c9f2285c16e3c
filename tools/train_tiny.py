"""Trains the embedded model from nothing and writes runtime/assets/tiny.

    python tools/train_tiny.py --out runtime/assets/tiny --minutes 3

Needs a GPU to end in minutes. The model is Qwen3's architecture (transformers' implementation
trains it); the data are the endless tasks of runtime/tiny_tasks.py, as chats of one to twelve
turns packed into rows of 1,024 tokens. At the end the weights are rounded to bfloat16, and 2,000
held-out questions are answered greedily with the rounded weights.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import tiny_tokenizer
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import Qwen3Config, Qwen3ForCausalLM

from zllm.runtime import tiny_tasks

ROW = 1024
"""Tokens of a training row: the model has seen contexts of up to this length."""
IGNORED = -100
MAX_ANSWER_TOKENS = 420


def config(vocab_size: int) -> dict[str, object]:
    """config.json, its vocabulary rounded up to a multiple of 64."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": (vocab_size + 63) // 64 * 64,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 3,
    }


def turn(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


HISTORY = f"<|im_start|>system\n{tiny_tasks.SYSTEM_PROMPTS[0]}<|im_end|>\n" + "".join(
    f"{turn(question)}{answer}<|im_end|>\n"
    for question, answer in (
        ("What is 8 + 5?", "8 + 5 = 13"),
        ("Count from 3 to 9.", "3, 4, 5, 6, 7, 8, 9"),
        tiny_tasks.SMALL_TALK[2],
    )
)
"""Three turns before a question."""


def system_prompt(random: Random) -> str:
    """Half of them real, half a run of arbitrary words: the answer depends on neither."""
    if random.random() < 0.5:
        return random.choice(tiny_tasks.SYSTEM_PROMPTS)
    return " ".join(random.choices(tiny_tasks.WORDS + tiny_tasks.NAMES, k=random.randint(1, 40)))


def document(random: Random, tasks: Iterator[tiny_tasks.Task]) -> list[tuple[str, bool]]:
    """Pieces of one chat, each with whether the model has to learn to say it."""
    if random.random() < 0.03:  # a bare sum, without a chat
        task = next(t for t in tasks if t.kind in ("sum", "difference"))
        asked, answer = task.answer.split(" = ")
        return [(f"{asked} =", False), (f" {answer}<|endoftext|>", True)]
    pieces = []
    if random.random() < 0.3:
        pieces.append((f"<|im_start|>system\n{system_prompt(random)}<|im_end|>\n", False))
    turns = random.choices(range(1, 13), (45, 20, 12, 8, 3, 3, 2, 2, 2, 1, 1, 1))[0]
    for _ in range(turns):
        if random.random() < 0.03:
            question, answer = random.choice(tiny_tasks.SMALL_TALK)
        else:
            task = next(tasks)
            question, answer = task.question, task.answer
        pieces += [
            (turn(question), False),
            (f"{answer}<|im_end|>", True),
            ("\n", False),
        ]
    return pieces


def rows(job: tuple[Path, int, int]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """`count` packed rows of tokens, and their labels (IGNORED where nothing is learnt)."""
    tokenizer_file, count, seed = job
    tokenizer, random = Tokenizer.from_file(str(tokenizer_file)), Random(seed)
    tasks = tiny_tasks.training_tasks(random)
    end = tokenizer.token_to_id("<|endoftext|>")
    ids = np.full((count, ROW), end, np.int16)
    labels = np.full((count, ROW), IGNORED, np.int16)
    row = at = 0
    while row < count:
        for text, learnt in document(random, tasks):
            tokens = tokenizer.encode(text).ids[: ROW - at]
            ids[row, at : at + len(tokens)] = tokens
            if learnt:
                labels[row, at : at + len(tokens)] = tokens
            at += len(tokens)
        if at > ROW - 64:
            row, at = row + 1, 0
    return ids, labels


def dataset(tokenizer_file: Path, count: int, workers: int) -> tuple[torch.Tensor, torch.Tensor]:
    jobs = [(tokenizer_file, count // workers, seed) for seed in range(1, workers + 1)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        parts = pool.map(rows, jobs)
    ids, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    return torch.from_numpy(ids), torch.from_numpy(labels)


def learning_rate(peak: float, progress: float) -> float:
    """Warm-up, plateau, then a cosine to zero over the last half."""
    if progress < 0.02:
        return peak * progress / 0.02
    return peak * 0.5 * (1 + math.cos(math.pi * max(0.0, 2 * progress - 1)))


def train(
    model: Qwen3ForCausalLM, ids: torch.Tensor, labels: torch.Tensor, *, batch: int, peak: float,
    seconds: float, compiled: bool,
) -> None:  # fmt: skip
    device = next(model.parameters()).device
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak, betas=(0.9, 0.95), fused=device.type == "cuda",
    )  # fmt: skip

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.model(input_ids=x, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden)
        return functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1),
            y[:, 1:].flatten(),
            ignore_index=IGNORED,
        )

    step_loss = torch.compile(loss_of) if compiled else loss_of
    ids, labels = ids.to(device), labels.to(device)
    started, step, order = time.monotonic(), 0, torch.empty(0, dtype=torch.long)
    while True:
        progress = (time.monotonic() - started) / seconds
        if progress >= 1:
            break
        if len(order) < batch:
            order = torch.randperm(len(ids))
        chosen, order = order[:batch].to(device), order[batch:]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(peak, progress)
        loss = step_loss(ids[chosen].long(), labels[chosen].long())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 0:  # compilation is no training time
            started = time.monotonic()
        if step % 100 == 0:
            print(f"step {step} at {progress:.0%}: loss {loss.item():.4f}", flush=True)
        step += 1
    print(f"{step} steps of {batch * ROW} tokens in {seconds:.0f} s", flush=True)


@torch.inference_mode()
def answers(model: Qwen3ForCausalLM, tokenizer: Tokenizer, prompts: list[str]) -> list[str]:
    """Greedy answers in one left-padded batch."""
    end, stop = (tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>"))
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    longest = max(map(len, encoded))
    device = next(model.parameters()).device
    padded = torch.tensor([[end] * (longest - len(e)) + e for e in encoded], device=device)
    mask = torch.tensor([[0] * (longest - len(e)) + [1] * len(e) for e in encoded], device=device)
    made = model.generate(
        input_ids=padded, attention_mask=mask, do_sample=False, eos_token_id=[stop, end],
        pad_token_id=end, max_new_tokens=MAX_ANSWER_TOKENS,
    )  # fmt: skip
    return [tokenizer.decode(row[longest:].tolist()) for row in made]


def evaluate(model: Qwen3ForCausalLM, tokenizer: Tokenizer, name: str, history: str = "") -> float:
    """Share of 2,000 held-out questions answered exactly; prints it for each kind."""
    tasks = tiny_tasks.held_out_tasks(2000)
    made = answers(model, tokenizer, [history + turn(task.question) for task in tasks])
    wrong, asked = Counter[str](), Counter(task.kind for task in tasks)
    for task, answer in zip(tasks, made, strict=True):
        if answer != task.answer:
            wrong[task.kind] += 1
            if wrong[task.kind] <= 4:
                print(f"  {task.question!r}: {answer!r} instead of {task.answer!r}")
    for kind, count in asked.items():
        print(f"  {kind}: {1 - wrong[kind] / count:.2%} of {count}")
    share = 1 - wrong.total() / len(tasks)
    print(f"{name}: {share:.2%} of {len(tasks)} held-out questions exact", flush=True)
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runtime/assets/tiny"))
    parser.add_argument("--minutes", type=float, default=3.0, help="of training")
    parser.add_argument("--rows", type=int, default=80_000)
    parser.add_argument("--batch", type=int, default=64, help="rows of a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--compile", action="store_true", help="compile the training step")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    settings = config(tiny_tokenizer.build(args.out))
    tokenizer_file = args.out / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    started = time.monotonic()
    ids, labels = dataset(tokenizer_file, args.rows, args.workers)
    learnt = (labels != IGNORED).float().mean().item()
    print(f"{ids.numel():,} tokens, {learnt:.0%} learnt, in {time.monotonic() - started:.0f} s")

    model = Qwen3ForCausalLM(Qwen3Config(**settings)).to(device)
    train(model, ids, labels, batch=args.batch, peak=args.learning_rate,
          seconds=60 * args.minutes, compiled=args.compile)  # fmt: skip

    save(model, settings, args.out)

    evaluate(model, tokenizer, "bfloat16 arithmetic")
    model.to(torch.float32)
    torch.set_float32_matmul_precision("highest")
    evaluate(model, tokenizer, "fourth turn, float32 arithmetic", HISTORY)
    if evaluate(model, tokenizer, "float32 arithmetic") < 0.99:
        raise SystemExit("fewer than 99% of the held-out questions are right: train longer")


def save(model: Qwen3ForCausalLM, settings: dict[str, object], folder: Path) -> None:
    """Rounds the weights to bfloat16, in place, and writes them with their configs."""
    model.eval()
    model.to(torch.bfloat16)
    tied = "lm_head.weight"
    weights = {k: v.cpu().contiguous() for k, v in model.state_dict().items() if k != tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    generation = {
        "do_sample": False,
        "temperature": 0.0,
        "eos_token_id": [settings["eos_token_id"], settings["pad_token_id"]],
        "pad_token_id": settings["pad_token_id"],
    }
    for name, content in (("config.json", settings), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
