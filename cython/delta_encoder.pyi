"""Deltas as the bytes of a message, without protobuf's class of it where they are plain."""

from collections.abc import Callable

from zllm.native.pending import Delta

class DeltaEncoder:
    """For messages of the shape of zllm.v1's StreamGenerateResponse with a `delta`. The bytes are
    those of SerializeToString."""

    def __init__(
        self,
        delta: int,
        text: int,
        token_ids: int,
        num_tokens: int,
        encode_rest: Callable[[Delta], bytes],
    ) -> None:
        """The fields' numbers, of which the last three ascend; 0 leaves a field out. `encode_rest`
        gets the deltas that hold more than these."""
    def __call__(self, delta: Delta) -> bytes: ...
