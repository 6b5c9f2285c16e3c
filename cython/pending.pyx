# cython: language_level=3, boundscheck=False, wraparound=False
"""A step's tokens to their streams, and the streams' deltas; see pending.pyi."""

cimport cython
from libc.stdint cimport int32_t, int64_t, uint8_t

from zllm.errors import ZllmError


@cython.freelist(64)
cdef class Delta:
    def __init__(self, str text, list token_ids, list logprobs, object finish):
        self.text = text
        self.token_ids = token_ids
        self.logprobs = logprobs
        self.finish = finish


cdef class Pending:
    def __init__(self, Utf8Text plain, Py_ssize_t min_tokens):
        self.plain = plain
        self.min_tokens = min_tokens
        self.undigested = []

    cpdef bint due(self):
        return self.num_pending >= self.min_tokens or self.over

    cpdef wake(self):
        cdef object waiter = self.waiter
        self.waiter = None
        if waiter is None or waiter.done():
            return
        try:
            waiter.set_result(self.gather())
        except Exception as error:
            waiter.set_exception(without_frames(error))

    cpdef Delta gather(self):
        if self.plain is None:
            return self.gather_rest()
        cdef list tokens = self.undigested
        self.undigested = []
        self.num_pending = 0
        self.completion_tokens += len(tokens)
        cdef str text = self.plain.extend(tokens)
        if self.taken is not None:
            self.taken.append(text)
        return Delta(text, tokens, [], None)


cdef object without_frames(object error):
    """A stream's own error: the stream keeps it, and with frames it would keep the stream. Of what
    nobody foresaw the log is to have all frames."""
    return error.with_traceback(None) if isinstance(error, ZllmError) else error


def route(dict streams, bytes request_ids, bytes tokens, bytes finishes, dict logprobs):
    cdef Py_ssize_t count = len(finishes), index
    if len(request_ids) != count * sizeof(int64_t) or len(tokens) != count * sizeof(int32_t):
        raise ValueError("a step's arrays differ in length")
    cdef const int64_t* ids = <const int64_t*> <const char*> request_ids
    cdef const int32_t* values = <const int32_t*> <const char*> tokens
    cdef const uint8_t* ends = <const uint8_t*> <const char*> finishes
    cdef list stopped = []
    cdef Pending stream
    for index in range(count):
        request_id = ids[index]
        stream = streams.get(request_id)
        if stream is None:
            continue
        chosen = logprobs.get(index) if logprobs else None
        if stream.plain is not None and not ends[index] and chosen is None:
            stream.undigested.append(values[index])
            stream.num_pending += 1
            if stream.waiter is not None and stream.due():
                stream.wake()
        elif stream.push(values[index], ends[index], chosen):
            stopped.append(request_id)
            del streams[request_id]
        elif ends[index]:
            del streams[request_id]
    return stopped
