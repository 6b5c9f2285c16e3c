"""A step's arena on its way to the device."""

from __future__ import annotations

import pytest
import torch

from zllm.cuda.upload import Upload
from zllm.errors import KernelError

pytestmark = pytest.mark.gpu


def _pair(words: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.randint(1, 1000, (words,), dtype=torch.int32).pin_memory()
    return source, torch.zeros(words, dtype=torch.int32, device="cuda")


def test_only_the_first_words_arrive_and_in_stream_order() -> None:
    source, target = _pair(100_000)
    upload = Upload(source, target)
    torch.cuda._sleep(1_000_000)  # the copy must wait for what the stream does before it
    target.fill_(-1)
    upload(60_000)
    assert torch.equal(target[:60_000].cpu(), source[:60_000])
    assert torch.all(target[60_000:] == -1)


def test_more_words_than_there_are_is_refused() -> None:
    with pytest.raises(KernelError, match="num_words is 11"):
        Upload(*_pair(10))(11)


def test_a_tensor_that_does_not_fit_is_named() -> None:
    source, target = _pair(10)
    with pytest.raises(KernelError, match="source is"):
        Upload(source.clone(), target)
    with pytest.raises(KernelError, match="target is"):
        Upload(source, target[:9])
