"""Whether the books balance."""

from zllm.native.books cimport Books

cdef int verify_books(Books* books) except -1
