"""Owns the bridge between a service in a proto file and grpc for a client; server/intake.py has the server's."""

from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import ServiceDescriptor

FLEET_SERVICE = "ramet.fleet.FleetService"  # ours, beside ModelExpress's: its messages are JSON
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
