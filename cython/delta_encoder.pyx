# cython: language_level=3, boundscheck=False, wraparound=False
"""Plain deltas as bytes of the wire; see delta_encoder.pyi."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

from zllm.native.pending cimport Delta

# Wire types of protobuf.
cdef enum:
    VARINT = 0
    LENGTH_DELIMITED = 2


cdef class DeltaEncoder:
    cdef uint64_t delta, text, token_ids, num_tokens
    cdef object encode_rest

    def __init__(self, int delta, int text, int token_ids, int num_tokens, object encode_rest):
        self.delta = delta << 3 | LENGTH_DELIMITED
        self.text = text << 3 | LENGTH_DELIMITED if text else 0
        self.token_ids = token_ids << 3 | LENGTH_DELIMITED if token_ids else 0
        self.num_tokens = num_tokens << 3 | VARINT
        self.encode_rest = encode_rest

    def __call__(self, Delta delta):
        if delta.finish is not None or delta.logprobs:
            return self.encode_rest(delta)
        cdef Py_ssize_t count = len(delta.token_ids), text_size = 0, ids_size = 0, size = 0
        cdef const char* text = NULL
        cdef uint64_t token_id
        if self.text:
            text = PyUnicode_AsUTF8AndSize(delta.text, &text_size)
        if self.token_ids:
            for token_id in delta.token_ids:
                ids_size += varint_size(token_id)
        # proto3 leaves out what is empty or 0.
        if text_size:
            size += varint_size(self.text) + varint_size(text_size) + text_size
        if ids_size:
            size += varint_size(self.token_ids) + varint_size(ids_size) + ids_size
        if count:
            size += varint_size(self.num_tokens) + varint_size(count)
        cdef bytes message = PyBytes_FromStringAndSize(
            NULL, varint_size(self.delta) + varint_size(size) + size
        )
        cdef uint8_t* at = <uint8_t*> PyBytes_AS_STRING(message)
        at = put_varint(put_varint(at, self.delta), size)
        if text_size:
            at = put_varint(put_varint(at, self.text), text_size)
            memcpy(at, text, text_size)
            at += text_size
        if ids_size:
            at = put_varint(put_varint(at, self.token_ids), ids_size)
            for token_id in delta.token_ids:
                at = put_varint(at, token_id)
        if count:
            put_varint(put_varint(at, self.num_tokens), count)
        return message


cdef inline Py_ssize_t varint_size(uint64_t value) noexcept:
    cdef Py_ssize_t size = 1
    while value >= 128:
        value >>= 7
        size += 1
    return size


cdef inline uint8_t* put_varint(uint8_t* at, uint64_t value) noexcept:
    while value >= 128:
        at[0] = <uint8_t> (value | 128)
        value >>= 7
        at += 1
    at[0] = <uint8_t> value
    return at + 1
