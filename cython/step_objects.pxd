"""A step as Python sees it: its plan when it begins, its events when it has ended."""

from libc.stdint cimport int32_t, int64_t

from zllm.native.books cimport Step
from zllm.native.packing cimport Packed
from zllm.native.retire cimport EventList, Started


cdef class Plan:
    cdef readonly int64_t step
    cdef readonly int32_t num_rows
    cdef readonly int32_t num_tokens
    cdef readonly int32_t num_decodes
    cdef readonly int32_t num_sampled
    cdef readonly int32_t num_words
    cdef readonly int32_t num_copies
    cdef readonly int32_t num_swap_out
    cdef readonly int32_t num_swap_in
    cdef readonly int32_t max_logprobs
    cdef readonly int32_t features


cdef class Events:
    cdef readonly object request_ids
    cdef readonly object sequences
    cdef readonly object tokens
    cdef readonly object finishes
    cdef readonly object rows
    cdef readonly list started


cdef Plan new_plan(const Step* step, const Packed* packed, int32_t num_swap_out,
                   int32_t num_swap_in)
cdef Events new_events(const EventList* found, const Started* started, int32_t num_started)
