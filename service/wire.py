"""Turns request bytes into messages, and bytes that are none into an error with a field's path.

protobuf refuses a string that is not UTF-8 without saying which. The same message is then read
through a twin of its descriptor, in which every string is bytes, to find the field.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from zllm.errors import InvalidRequest

Parsed = Message | InvalidRequest


def parser(message_type: type[Message]) -> Callable[[bytes], Parsed]:
    """A request deserializer that returns its error instead of raising it: gRPC would answer
    INTERNAL where the sender is at fault."""

    def parse(data: bytes) -> Parsed:
        try:
            return message_type.FromString(data)
        except DecodeError:
            return _explain(message_type, data)

    return parse


def _explain(message_type: type[Message], data: bytes) -> InvalidRequest:
    pool = descriptor_pool.DescriptorPool()
    _add_bytes_twin(pool, message_type.DESCRIPTOR.file)
    twin = message_factory.GetMessageClass(
        pool.FindMessageTypeByName(message_type.DESCRIPTOR.full_name)
    )
    try:
        message = twin.FromString(data)
    except DecodeError:
        return InvalidRequest("request", f"these bytes are not a {message_type.DESCRIPTOR.name}")
    path = _first_broken_string(message, message_type.DESCRIPTOR)
    return InvalidRequest(path or "request", "the string is not valid UTF-8")


def _add_bytes_twin(pool: descriptor_pool.DescriptorPool, file: Any) -> None:
    for dependency in file.dependencies:
        try:
            pool.FindFileByName(dependency.name)
        except KeyError:
            _add_bytes_twin(pool, dependency)
    proto = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(proto)
    del proto.service[:]
    messages = list(proto.message_type)
    while messages:
        message = messages.pop()
        messages.extend(message.nested_type)
        for field in message.field:
            # A map's key cannot be bytes.
            is_key = message.options.map_entry and field.name == "key"
            if field.type == FieldDescriptor.TYPE_STRING and not is_key:
                field.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
                field.ClearField("default_value")
    pool.Add(proto)


def _first_broken_string(message: Message, original: Any) -> str | None:
    for twin_field, value in message.ListFields():
        field = original.fields_by_name[twin_field.name]
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        values = list(value) if field.is_repeated else [value]
        for index, item in enumerate(values):
            path = f"{field.name}[{index}]" if field.is_repeated else field.name
            if field.message_type is not None:
                inner = _first_broken_string(item, field.message_type)
                if inner is not None:
                    return f"{path}.{inner}"
            elif field.type == FieldDescriptor.TYPE_STRING and not _is_utf8(item):
                return path
    return None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
