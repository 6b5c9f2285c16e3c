# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Construction of the block pool; its O(1) operations are inline in block_pool.pxd."""

from libc.stdlib cimport calloc, free


cdef int pool_init(Pool* pool, int32_t num_blocks) noexcept nogil:
    """Every block but 0 is empty, the lowest on top. -1 when memory ran out."""
    cdef int32_t block
    pool.num_blocks = num_blocks
    pool.num_empty = 0
    pool.num_idle = 0
    pool.empty = 0
    pool.oldest = 0
    pool.newest = 0
    pool.num_returned = 0
    pool.refs = <int32_t*> calloc(num_blocks, sizeof(int32_t))
    pool.prev = <int32_t*> calloc(num_blocks, sizeof(int32_t))
    pool.next = <int32_t*> calloc(num_blocks, sizeof(int32_t))
    pool.cached = <uint8_t*> calloc(num_blocks, sizeof(uint8_t))
    if not (pool.refs and pool.prev and pool.next and pool.cached):
        pool_free(pool)
        return -1
    for block in range(num_blocks - 1, 0, -1):
        pool_push_empty(pool, block)
    return 0


cdef void pool_free(Pool* pool) noexcept nogil:
    free(pool.refs)
    free(pool.prev)
    free(pool.next)
    free(pool.cached)
    pool.refs = NULL
    pool.prev = NULL
    pool.next = NULL
    pool.cached = NULL
