"""Block pool and radix tree by themselves, for tests and measurements."""

import numpy as np
import numpy.typing as npt

class PrefixCache:
    def __init__(self, num_blocks: int) -> None: ...
    num_empty: int
    num_idle: int
    """Cached blocks that nobody references."""
    num_evictions: int
    def take(self, count: int) -> npt.NDArray[np.int32]:
        """Take blocks, evicting the least recently used leaves where none is empty; 0: none."""
    def release(self, blocks: npt.NDArray[np.int32]) -> None:
        """Give a reference of each block back, the last block first."""
    def match(self, tokens: npt.NDArray[np.int32]) -> int:
        """How many of the first tokens are cached."""
    def insert(self, tokens: npt.NDArray[np.int32]) -> int:
        """Cache all whole blocks of the tokens and reference none; returns how many were new."""
