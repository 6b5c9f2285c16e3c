# cython: language_level=3
"""Writes a stream's deltas without a task's turns; see delta_writer.pyi."""

from contextvars import Context

from cpython.object cimport PyObject
from cpython.ref cimport Py_XDECREF

from zllm.native.pending cimport Delta, Pending, without_frames

cdef extern from "Python.h":
    ctypedef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT
    PySendResult PyIter_Send(object iterator, object value, PyObject** result) except PYGEN_ERROR

# Else asyncio copies the current context for every callback.
cdef object EMPTY_CONTEXT = Context()


cdef class DeltaWriter:
    cdef Pending stream
    cdef object encode, write, loop, end
    # The next message, the coroutine that writes the one before, and what that waits for.
    cdef object message, writing, waited
    cdef bint last

    def __init__(self, Pending stream, object encode, object write, object loop):
        self.stream = stream
        self.encode = encode
        self.write = write
        self.loop = loop
        self.end = loop.create_future()

    def start(self, Delta delta):
        self.set_result(delta)
        return self.end

    def close(self):
        if self.writing is not None:
            self.waited.cancel()
            self.writing.close()
        self.stream.waiter = None
        # A failure is told with the handler's frames, and so with this: a circle through `end`.
        self.stream = self.encode = self.write = self.writing = self.waited = self.end = None

    def done(self):
        return self.end.done()

    def set_result(self, Delta delta):
        self.last = delta.finish is not None
        self.message = self.encode(delta)
        self.loop.call_soon(self.begin, context=EMPTY_CONTEXT)

    def set_exception(self, object error):
        if not self.end.done():
            self.end.set_exception(error)

    def begin(self):
        if self.write is None:
            return  # closed meanwhile
        try:
            self.writing = self.write(self.message)
            self.step()
        except Exception as error:
            self.fail(error)

    def resume(self, object waited):
        if self.writing is None:
            return  # closed meanwhile
        try:
            self.step()
        except Exception as error:
            self.fail(error)

    cdef step(self):
        """The write's next part; after its last one, the next delta."""
        cdef PyObject* result = NULL
        cdef PySendResult how = PyIter_Send(self.writing, None, &result)
        if how == PYGEN_NEXT:
            self.waited = <object> result
            self.waited.add_done_callback(self.resume, context=EMPTY_CONTEXT)
        Py_XDECREF(result)
        if how == PYGEN_NEXT:
            return
        self.writing = self.waited = None
        if self.end.done():
            return  # cancelled, and close() is to come
        if self.last:
            self.end.set_result(None)
        elif self.stream.due():
            self.set_result(self.stream.gather())
        else:
            self.stream.waiter = self

    cdef fail(self, error):
        self.writing = self.waited = None
        self.set_exception(without_frames(error))
