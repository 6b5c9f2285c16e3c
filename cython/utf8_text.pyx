# cython: language_level=3, boundscheck=False, wraparound=False
"""Token ids to text; see utf8_text.pyi."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8Stateful


cdef class Utf8Text:
    def __init__(self, list tokens, bint strip_leading_space):
        self._tokens = tokens
        self._rest = b""
        self._strip_next = strip_leading_space

    cpdef str extend(self, object token_ids):
        cdef list pieces = [self._rest]
        cdef Py_ssize_t token_id, known = len(self._tokens)
        for token_id in token_ids:
            if 0 <= token_id < known:
                pieces.append(self._tokens[token_id])
        cdef bytes data = b"".join(pieces)
        # Python before 3.11.5 does not say how much of plain ASCII it used: all of it (gh-99612).
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data), used = size
        cdef str text = PyUnicode_DecodeUTF8Stateful(
            PyBytes_AS_STRING(data), size, "replace", &used
        )
        self._rest = data[used:] if used < size else b""
        return self._stripped(text)

    cpdef str flush(self):
        cdef bytes rest = self._rest
        self._rest = b""
        return self._stripped(rest.decode("utf-8", "replace"))

    cdef str _stripped(self, str text):
        if self._strip_next and text:
            self._strip_next = False
            return text.removeprefix(" ")
        return text
