"""What follows from a step's sampled tokens."""

from libc.stdint cimport int32_t, int64_t, uint8_t

from zllm.native.books cimport Books, Step

cdef struct EventList:
    int32_t count
    int64_t* request_ids
    int32_t* indices
    int32_t* tokens
    uint8_t* finishes
    int32_t* rows

cdef struct Started:
    int64_t request_id
    int32_t cached_tokens
    double queued
    double prefill

cdef void drain_ended(Books* books, EventList* events) noexcept nogil
cdef int32_t retire_step(Books* books, Step* step, const int32_t* tokens, EventList* events,
                         Started* started, double now) noexcept nogil
