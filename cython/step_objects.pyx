# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Makes the objects that the scheduler hands out of a step; see step_objects.pyi."""

import numpy as np


cdef class Plan:
    """One planned step. Its arena holds all that the device needs; these are the counts."""


cdef class Events:
    """What a commit found out: parallel arrays, one entry a token or a finish."""


cdef Plan new_plan(const Step* step, const Packed* packed, int32_t num_swap_out,
                   int32_t num_swap_in):
    """The swaps come apart: packing a step takes them off the books."""
    cdef Plan plan = Plan.__new__(Plan)
    plan.step = step.number
    plan.num_rows = step.num_rows
    plan.num_tokens = step.num_tokens
    plan.num_decodes = step.num_decodes
    plan.num_sampled = step.num_sampled
    plan.num_words = packed.num_words
    plan.num_copies = step.num_copies
    plan.num_swap_out = num_swap_out
    plan.num_swap_in = num_swap_in
    plan.max_logprobs = packed.max_logprobs
    plan.features = packed.features
    return plan


cdef Events new_events(const EventList* found, const Started* started, int32_t num_started):
    """Copies of the found events as numpy arrays."""
    cdef Events events = Events.__new__(Events)
    cdef Py_ssize_t n = found.count
    cdef int32_t i
    events.request_ids = array_of(found.request_ids, n * 8, "<i8")
    events.sequences = array_of(found.indices, n * 4, "<i4")
    events.tokens = array_of(found.tokens, n * 4, "<i4")
    events.finishes = array_of(found.finishes, n, "|u1")
    events.rows = array_of(found.rows, n * 4, "<i4")
    events.started = []
    for i in range(num_started):
        events.started.append((started[i].request_id, started[i].cached_tokens,
                               started[i].queued, started[i].prefill))
    return events


cdef object array_of(const void* data, Py_ssize_t size, str dtype):
    return np.frombuffer((<const char*> data)[:size], dtype)
