"""What runs in the next step."""

from libc.stdint cimport int32_t

from zllm.native.books cimport Books, Step

cdef Step* plan_step(Books* books, double now) noexcept nogil
cdef void expire_waiting(Books* books, double now) noexcept nogil
