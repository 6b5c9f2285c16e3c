"""The way of a waiting sequence into a row."""

from libc.stdint cimport int32_t

from zllm.native.books cimport Books, Step

cdef void admit_waiting(Books* books, Step* step, int32_t budget, double now) noexcept nogil
