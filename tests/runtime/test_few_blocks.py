"""500 requests at once with a fraction of the blocks they want: every answer stays right."""

from __future__ import annotations

from typing import Any

import pytest

from zllm import LLM, SamplingParams
from zllm.runtime.tiny_tasks import held_out_tasks

TASKS = held_out_tasks(500)


def answers(**options: Any) -> tuple[list[str], dict[str, int | float]]:
    llm = LLM(device="cpu", max_num_seqs=500, **options)
    outputs = llm.chat(
        [[{"role": "user", "content": task.question}] for task in TASKS],
        SamplingParams(temperature=0.0, max_tokens=450),
    )
    llm.engine.scheduler.check()
    stats = llm.engine.scheduler.stats()
    llm.close()
    assert stats["blocks_free"] == stats["blocks_total"]
    return [output.outputs[0].text for output in outputs], stats


@pytest.fixture(scope="module")
def roomy() -> tuple[list[str], int]:
    """The answers where nobody gives way, and the blocks that they take together."""
    texts, stats = answers(num_kv_blocks=16_000, enable_prefix_caching=False)
    assert stats["preemptions"] == 0
    assert sum(text == task.answer for text, task in zip(texts, TASKS, strict=True)) >= 499
    # Every sequence holds one block for each 16 tokens, its prompt's included.
    tokens = stats["query_tokens"] + stats["generated_tokens"]
    return texts, int(tokens) // 16


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("swap_space_gib", [0.0, 0.25])
@pytest.mark.parametrize("share", [10, 40])
def test_every_answer_is_right_by_recompute_and_by_swap(
    share: int, swap_space_gib: float, caching: bool, roomy: tuple[list[str], int]
) -> None:
    """Admission is so careful that a tenth may do without preemption; a fortieth never does."""
    expected, wanted = roomy
    texts, stats = answers(
        num_kv_blocks=wanted // share, swap_space_gib=swap_space_gib, enable_prefix_caching=caching
    )
    assert texts == expected
    assert stats["preemptions"] > 0 or share == 10
    if share == 40:
        assert (stats["swaps_in"] > 0) == (swap_space_gib > 0)
