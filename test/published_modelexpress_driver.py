"""Runs in an environment that has a published modelexpress package: drives its client, its stubs and its threads.

The package's __init__ imports the engines' parts, which need torch; it is passed over, its modules are used as is.
"""

import importlib.util
import json
import sys
import time
import types
from concurrent import futures
from typing import Any


def expose_package() -> None:
    """Make modelexpress importable module by module, without running its __init__."""
    spec = importlib.util.find_spec("modelexpress")
    assert spec is not None
    package = types.ModuleType("modelexpress")
    package.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["modelexpress"] = package


def make_identity(p2p_pb2: Any, **values: Any) -> Any:
    return p2p_pb2.SourceIdentity(
        **{
            "mx_version": "0.7.0",
            "model_name": "org/model",
            "backend_framework": p2p_pb2.BACKEND_FRAMEWORK_SGLANG,
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "expert_parallel_size": 1,
            "dtype": "bfloat16",
        }
        | values
    )


def make_worker(p2p_pb2: Any, status: int) -> Any:
    """As upstream SGLang's first integration publishes it: no dtype, and no payload."""
    tensors = [p2p_pb2.TensorDescriptor(name=f"t{i}", addr=2**63 + i, size=16, device_id=0) for i in range(3)]
    return p2p_pb2.WorkerMetadata(
        worker_rank=0,
        transfer_engine_session_id="127.0.0.1:9",
        tensors=tensors,
        status=status,
        updated_at=round(time.time() * 1000),
    )


def call_everything(address: str) -> dict[str, Any]:
    from modelexpress import p2p_pb2
    from modelexpress.client import MxClient

    client = MxClient("http://" + address)
    identity = make_identity(p2p_pb2)
    source_id = client.publish_metadata(identity, make_worker(p2p_pb2, p2p_pb2.SOURCE_STATUS_INITIALIZING), "w1")
    result: dict[str, Any] = {"source_id": source_id}
    result["ready_before"] = len(client.list_sources(identity, p2p_pb2.SOURCE_STATUS_READY).instances)
    result["updated"] = client.update_status(source_id, "w1", 0, p2p_pb2.SOURCE_STATUS_READY)
    result["updated_unknown"] = client.update_status(source_id, "w2", 0, p2p_pb2.SOURCE_STATUS_READY)
    result["ready"] = [r.worker_id for r in client.list_sources(identity, p2p_pb2.SOURCE_STATUS_READY).instances]
    result["all"] = [r.model_name for r in client.list_sources().instances]
    found = client.get_metadata(source_id, "w1")
    result["found"] = found.found
    result["tensors"] = [[t.name, t.addr, t.size, t.dtype] for t in found.worker.tensors]
    result["session_id"] = found.worker.transfer_engine_session_id
    result["unknown"] = client.get_metadata(source_id, "w2").found
    try:
        client.publish_metadata(p2p_pb2.SourceIdentity(), make_worker(p2p_pb2, 0), "w1")
    except RuntimeError as error:
        result["error"] = str(error)
    client.close()
    return result


def read_record(address: str, source_id: str, worker_id: str) -> dict[str, Any]:
    from modelexpress import p2p_pb2
    from modelexpress.client import MxClient

    client = MxClient(address)
    refs = client.list_sources(status_filter=p2p_pb2.SOURCE_STATUS_READY).instances
    worker = client.get_metadata(source_id, worker_id).worker
    has_payload = "tensor_source" in p2p_pb2.WorkerMetadata.DESCRIPTOR.fields_by_name
    payload = worker.tensor_source.tensors if has_payload else []
    return {
        "listed": [ref.worker_id for ref in refs],
        "tensors": [[t.name, t.addr, t.size, t.dtype] for t in worker.tensors],
        "payload": [[t.name, t.addr, t.size, t.dtype] for t in payload],
        "kind": worker.WhichOneof("backend_metadata"),
        "endpoint": worker.metadata_endpoint,
    }


def compute_ids() -> None:
    """The source id of each identity, one per line, as JSON."""
    from modelexpress import p2p_pb2
    from modelexpress.metadata.source_id import compute_mx_source_id

    for line in sys.stdin:
        print(compute_mx_source_id(p2p_pb2.SourceIdentity(**json.loads(line))), flush=True)


def serve() -> None:
    """A server from the published package's own stubs, as simple as can be, until stdin ends."""
    import grpc
    from modelexpress import p2p_pb2, p2p_pb2_grpc

    class Service(p2p_pb2_grpc.P2pServiceServicer):
        def __init__(self) -> None:
            self.records: dict[tuple[str, str], Any] = {}

        def PublishMetadata(self, request: Any, _context: Any) -> Any:
            if not request.identity.model_name:
                return p2p_pb2.PublishMetadataResponse(success=False, message="identity.model_name is required")
            # The content does not matter to a client; what tells identities apart does.
            source_id = request.identity.SerializeToString(deterministic=True).hex()
            self.records[source_id, request.worker_id] = (request.identity, request.worker)
            return p2p_pb2.PublishMetadataResponse(success=True, mx_source_id=source_id, worker_id=request.worker_id)

        def ListSources(self, request: Any, _context: Any) -> Any:
            wanted = request.identity.SerializeToString(deterministic=True).hex()
            answer = p2p_pb2.ListSourcesResponse()
            for (source_id, worker_id), (identity, worker) in list(self.records.items()):
                if request.identity.model_name and source_id != wanted:
                    continue
                if not request.HasField("status_filter") or worker.status == request.status_filter:
                    answer.instances.add(
                        mx_source_id=source_id,
                        worker_id=worker_id,
                        model_name=identity.model_name,
                        worker_rank=worker.worker_rank,
                    )
            return answer

        def GetMetadata(self, request: Any, _context: Any) -> Any:
            record = self.records.get((request.mx_source_id, request.worker_id))
            return p2p_pb2.GetMetadataResponse(
                found=record is not None,
                worker=record[1] if record else None,
                mx_source_id=request.mx_source_id,
                worker_id=request.worker_id,
            )

        def UpdateStatus(self, request: Any, _context: Any) -> Any:
            record = self.records.get((request.mx_source_id, request.worker_id))
            if record is None:
                return p2p_pb2.UpdateStatusResponse(success=False, message="unknown")
            record[1].status, record[1].updated_at = request.status, round(time.time() * 1000)
            return p2p_pb2.UpdateStatusResponse(success=True)

    server = grpc.server(futures.ThreadPoolExecutor(8))
    p2p_pb2_grpc.add_P2pServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    sys.stdin.read()
    server.stop(0)


def keep_published(address: str) -> None:
    """The published package's own publisher thread, until stdin ends."""
    from modelexpress import p2p_pb2
    from modelexpress.client import MxClient
    from modelexpress.metadata.publisher import PublisherThread

    client = MxClient(address)
    worker = make_worker(p2p_pb2, p2p_pb2.SOURCE_STATUS_INITIALIZING)
    thread = PublisherThread(
        client,
        worker_id="upstream",
        worker_rank=0,
        publish_fn=lambda: client.publish_metadata(make_identity(p2p_pb2), worker, "upstream"),
        interval_secs=0.2,  # type: ignore[arg-type]
        source_load_provider=lambda: 0.5,
    )
    thread.start()
    print("started", flush=True)
    sys.stdin.read()
    thread.stop()


def import_both(ours_first: bool) -> dict[str, Any]:
    """This project's stubs and the published ones, in one process."""

    def ours() -> Any:
        from ramet.srt.modelexpress import source_identity
        from ramet.srt.modelexpress.client import client
        from ramet.srt.modelexpress.proto import p2p_pb2

        assert client.SERVICE is not None
        return p2p_pb2.SourceIdentity(model_name="a"), source_identity.compute_source_id

    def theirs() -> Any:
        from modelexpress import client, p2p_pb2

        assert client.MxClient is not None
        return p2p_pb2.SourceIdentity(model_name="a")

    first, second = (ours, theirs) if ours_first else (theirs, ours)
    results = {first.__name__: first(), second.__name__: second()}
    identity, compute = results["ours"]
    return {
        "same_bytes": identity.SerializeToString() == results["theirs"].SerializeToString(),
        "id": compute(identity),
    }


def main() -> None:
    expose_package()
    command, *arguments = sys.argv[1:]
    if command == "serve":
        serve()
    elif command == "compute_ids":
        compute_ids()
    elif command == "keep_published":
        keep_published(*arguments)
    else:
        answer = {
            "call_everything": lambda: call_everything(*arguments),
            "read_record": lambda: read_record(*arguments),
            "import_both": lambda: import_both(arguments == ["ours"]),
        }[command]()
        print(json.dumps(answer))


if __name__ == "__main__":
    main()
