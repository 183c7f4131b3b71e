"""Owns the bridge between a service in a proto file and grpc: callables for a client, handlers for a server."""

from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message

MAX_MESSAGE_BYTES = 100 * 1024 * 1024  # both ways, as the published clients and servers have it
MESSAGE_SIZE_OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]


def client_calls(channel: grpc.Channel, service: ServiceDescriptor) -> dict[str, Any]:
    """Method name -> the callable that makes the call on `channel`; unary methods only."""
    return {
        method.name: channel.unary_unary(
            f"/{service.full_name}/{method.name}",
            request_serializer=message_factory.GetMessageClass(method.input_type).SerializeToString,
            response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
        )
        for method in service.methods
    }


def server_handler(service: ServiceDescriptor, servicer: object) -> grpc.GenericRpcHandler:
    """A handler that gives each method of `service` to the method of `servicer` with the same name.

    That answers a message, or one that it has serialized already.
    """
    handlers = {}
    for method in service.methods:
        make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        handlers[method.name] = make(
            getattr(servicer, method.name),
            request_deserializer=message_factory.GetMessageClass(method.input_type).FromString,
            response_serializer=_serialize,
        )
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _serialize(answer: Message | bytes) -> bytes:
    return answer if isinstance(answer, bytes) else answer.SerializeToString()
