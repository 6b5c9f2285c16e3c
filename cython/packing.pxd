"""Writes a planned step into its arena."""

from libc.stdint cimport int32_t, int64_t

from zllm.native.books cimport Books, Limits, Step

cdef struct Packed:
    int32_t num_words
    int32_t max_logprobs
    int32_t features

cdef int64_t arena_words(const Limits* limits) noexcept nogil
cdef Packed pack_step(Books* books, Step* step, int32_t* arena) noexcept nogil
