# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Block pool and radix tree by themselves, for tests and measurements."""

from libc.stdint cimport int32_t
from libc.stdlib cimport free, malloc

import numpy as np

from zllm.native.block_pool cimport (
    BLOCK_SIZE,
    Pool,
    pool_free,
    pool_init,
    pool_reference,
    pool_release,
)
from zllm.native.radix_tree cimport (
    Match,
    Salt,
    Tree,
    tree_free,
    tree_init,
    tree_insert,
    tree_match,
    tree_take,
)


cdef class PrefixCache:
    """The prefix cache without a scheduler; see prefix_cache.pyi."""

    cdef Pool pool
    cdef Tree tree
    cdef int32_t* path

    def __cinit__(self, int32_t num_blocks):
        if (pool_init(&self.pool, num_blocks) < 0 or tree_init(&self.tree, &self.pool) < 0):
            raise MemoryError(f"no memory for the books of {num_blocks} blocks")
        self.path = <int32_t*> malloc(num_blocks * sizeof(int32_t))
        if self.path == NULL:
            raise MemoryError(f"no memory for a path of {num_blocks} blocks")

    def __dealloc__(self):
        free(self.path)
        tree_free(&self.tree)
        pool_free(&self.pool)

    @property
    def num_empty(self):
        return self.pool.num_empty

    @property
    def num_idle(self):
        return self.pool.num_idle

    @property
    def num_evictions(self):
        return self.tree.num_evictions

    def take(self, int32_t count):
        """Take blocks, evicting where none is empty."""
        blocks = np.empty(count, np.int32)
        cdef int32_t[::1] out = blocks
        cdef int32_t i
        with nogil:
            for i in range(count):
                out[i] = tree_take(&self.tree)
        return blocks

    def release(self, const int32_t[::1] blocks):
        """Give a reference of each block back, the last block first."""
        cdef Py_ssize_t i
        with nogil:
            for i in range(blocks.shape[0] - 1, -1, -1):
                pool_release(&self.pool, blocks[i])

    def match(self, const int32_t[::1] tokens):
        """How many of the first tokens are cached."""
        cdef Match match
        cdef Salt salt
        salt.low = 0
        salt.high = 0
        with nogil:
            match = tree_match(&self.tree, salt, &tokens[0], <int32_t> tokens.shape[0], self.path)
        return match.num_blocks * BLOCK_SIZE + match.partial_tokens

    def insert(self, const int32_t[::1] tokens):
        """Cache all whole blocks of the tokens; nobody references them afterwards."""
        cdef int32_t count = <int32_t> (tokens.shape[0] // BLOCK_SIZE)
        cdef int32_t added = 0
        cdef int32_t i, block, cached
        cdef Salt salt
        salt.low = 0
        salt.high = 0
        with nogil:
            cached = tree_match(&self.tree, salt, &tokens[0], count * BLOCK_SIZE,
                                self.path).num_blocks
            for i in range(cached):
                pool_reference(&self.pool, self.path[i])
            for i in range(cached, count):
                block = tree_take(&self.tree)
                if block == 0:
                    break
                self.path[i] = tree_insert(&self.tree, salt, self.path[i - 1] if i else 0, block,
                                           &tokens[i * BLOCK_SIZE])
                added += 1
            for i in range(cached + added - 1, -1, -1):
                pool_release(&self.pool, self.path[i])
        return added
