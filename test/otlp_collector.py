"""An OpenTelemetry collector: takes spans by gRPC and by HTTP, with the published messages, and keeps them."""

import http.server
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from server_process import wait_until


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Both servers; `spans` are in the order in which they came."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces", self.path
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.keep(trace_service_pb2.ExportTraceServiceRequest.FromString(body))
                answer = trace_service_pb2.ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        self._grpc = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._grpc)
        self.grpc_port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http_port = self._http.server_address[1]

    def Export(self, request: Any, _context: Any) -> Any:
        self.keep(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def keep(self, request: Any) -> None:
        for resource in request.resource_spans:
            self.services |= {
                one.value.string_value for one in resource.resource.attributes if one.key == "service.name"
            }
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def wait_for(self, name: str, number: int = 1) -> list[Any]:
        """The spans of a name, once there are so many."""

        def found() -> list[Any]:
            spans = [span for span in self.spans if span.name == name]
            return spans if len(spans) >= number else []

        return wait_until(found, f"{number} spans {name}", 20)

    def children(self, span: Any, name: str) -> list[Any]:
        """The spans of a name below another, once there is one."""

        def found() -> list[Any]:
            return [one for one in self.spans if one.parent_span_id == span.span_id and one.name == name]

        return wait_until(found, f"a span {name} below {span.name}", 20)

    def __enter__(self) -> "Collector":
        self._grpc.start()
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._grpc.stop(1).wait()
        self._http.shutdown()
        self._thread.join(10)
        self._http.server_close()


def attributes(span: Any) -> dict[str, Any]:
    """Of a span, as Python values."""

    def value(one: Any) -> Any:
        kind = one.WhichOneof("value")
        return [value(each) for each in one.array_value.values] if kind == "array_value" else getattr(one, kind)

    return {one.key: value(one.value) for one in span.attributes}
