"""Who makes room when blocks run out, and how."""

from libc.stdint cimport int32_t

from zllm.native.books cimport Books, Step
from zllm.native.sequence cimport Sequence

cdef int32_t coming_blocks(const Books* books) noexcept nogil
cdef bint fills_pool_alone(Books* books, const Sequence* seq) noexcept nogil
cdef Sequence* oldest_running(const Books* books) noexcept nogil
cdef bint preempt_one(Books* books, const Step* step) noexcept nogil
cdef void settle_preempted(Books* books) noexcept nogil
