"""A checkpoint of random weights in a model's real shapes, to measure how fast one loads.

    python benchmarks/random_checkpoint.py benchmarks/models/qwen3-8b FOLDER [--device cuda]

bf16, in safetensors files of about 2 GB with an index, under the names of Hugging Face's files.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from zllm.runtime.loader import dummy_weights
from zllm.runtime.model_config import ModelConfig
from zllm.runtime.models.registry import model_class

SHARD_BYTES = 2 * 10**9


def write_checkpoint(model: Path, folder: Path, device: torch.device) -> int:
    """Write `model`'s config.json and random weights to `folder`; returns their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(model / "config.json", folder)
    config = ModelConfig.from_folder(model)
    shard: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    total = in_shard = shards = 0

    def flush() -> None:
        nonlocal in_shard, shards
        file = f"model-{shards:05d}.safetensors"
        save_file(shard, folder / file)
        names.update(dict.fromkeys(shard, file))
        shard.clear()
        in_shard, shards = 0, shards + 1

    for index, parameter in enumerate(model_class(config).parameters(config)):
        (weight,) = dummy_weights(
            [parameter], torch.bfloat16, device, std=config.initializer_range, seed=index
        ).values()
        parts = weight.cpu().split([rows for _, rows in parameter.sources])
        shard.update(
            zip((name for name, _ in parameter.sources), (p.clone() for p in parts), strict=True)
        )
        size = weight.numel() * weight.itemsize
        total, in_shard = total + size, in_shard + size
        if in_shard >= SHARD_BYTES:
            flush()
    if shard:
        flush()
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": names}))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    size = write_checkpoint(options.model, options.folder, torch.device(options.device))
    print(f"{size / 1e9:.2f} GB in {options.folder}")


if __name__ == "__main__":
    main()
