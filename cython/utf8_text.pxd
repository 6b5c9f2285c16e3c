cdef class Utf8Text:
    cdef list _tokens
    cdef bytes _rest
    cdef bint _strip_next

    cpdef str extend(self, object token_ids)
    cpdef str flush(self)
    cdef str _stripped(self, str text)
