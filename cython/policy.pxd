"""Which waiting sequence is admitted next."""

from libc.stdint cimport int64_t

from zllm.native.books cimport Books
from zllm.native.sequence cimport Sequence

cdef enum Policy:
    FCFS
    PRIORITY
    SJF
    LPM
    FAIR

cdef enum:
    QUANTUM = 4096          # tokens that a tenant may be served before others come first
    MATCH_WINDOW = 32       # sequences whose cached prefixes are compared

cdef Sequence* next_waiting(Books* books) noexcept nogil
