"""Owns how a proto file becomes Python classes: in a descriptor pool that nobody else uses.

Messages of the same full name may exist once in protobuf's default pool. The published `modelexpress` package puts its
p2p.proto there; ours stays out of its way. The classes are made from the descriptor at import, so any protobuf
runtime from 4.22 on will do, whichever version of protoc wrote the descriptor.
"""

import base64
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper


def decode_descriptor(encoded: str) -> bytes:
    """The serialized FileDescriptorProto in a generated module's text."""
    return base64.b64decode(encoded)


def export_file(encoded: str, namespace: dict[str, Any]) -> FileDescriptor:
    """Put a file's messages, enums and enum values into `namespace`, as a generated module has them.

    Args:
        encoded: a serialized FileDescriptorProto in base64; its imports must be empty.
        namespace: the module's globals.
    """
    pool = descriptor_pool.DescriptorPool()
    proto = descriptor_pb2.FileDescriptorProto.FromString(decode_descriptor(encoded))
    pool.AddSerializedFile(proto.SerializeToString())
    file = pool.FindFileByName(proto.name)
    for name, descriptor in file.message_types_by_name.items():
        namespace[name] = message_factory.GetMessageClass(descriptor)
    for name, enum in file.enum_types_by_name.items():
        namespace[name] = EnumTypeWrapper(enum)
        for value in enum.values:
            namespace[value.name] = value.number
    return file
