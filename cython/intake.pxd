"""From the arguments of a new request to its place in the books."""

from libc.stdint cimport int32_t, int64_t

from zllm.native.books cimport Books
from zllm.native.radix_tree cimport Salt
from zllm.native.sequence cimport Request

cdef int require_valid(const Books* books, int64_t prompt_len, int64_t max_tokens,
                       int64_t min_tokens, int64_t num_end_ids,
                       int64_t num_sequences) except -1
cdef Request* new_request(Books* books, const int32_t[::1] prompt, int64_t max_tokens,
                          int64_t min_tokens, const int32_t[::1] end_ids,
                          int32_t num_sequences) except NULL
cdef int32_t uncached_tokens(const Books* books, const Request* request) noexcept nogil
cdef void drop_request(Request* request) noexcept nogil
cdef void insert_request(Books* books, Request* request, int32_t uncached) noexcept nogil
cdef int32_t tenant_index(Books* books, dict tenants, str name) except -1
cdef Salt salt_of(str text)
cdef int32_t features_of(const Request* request) noexcept nogil
