from zllm.native.utf8_text cimport Utf8Text


cdef class Delta:
    cdef readonly str text
    cdef readonly list token_ids
    cdef readonly list logprobs
    cdef readonly object finish


cdef class Pending:
    cdef public Utf8Text plain
    cdef public list undigested
    cdef public Py_ssize_t num_pending
    cdef public Py_ssize_t min_tokens
    cdef public bint over
    cdef public Py_ssize_t completion_tokens
    cdef public list taken
    cdef public object waiter

    cpdef bint due(self)
    cpdef wake(self)
    cpdef Delta gather(self)


cdef object without_frames(object error)
