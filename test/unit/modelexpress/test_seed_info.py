"""From a record to what its seed says: by URL, or from the tensors in it."""

import msgspec
import pytest
from modelexpress_harness import make_manifest, make_worker
from ramet.srt.modelexpress.client.seed_info import InfoAddress, make_info_url, make_seed_answer, read_info_url
from ramet.srt.modelexpress.proto import p2p_pb2
from ramet.srt.modelexpress.records import SourceRecord, read_source
from ramet.srt.weights.errors import WeightTransferError


def source_of(worker: p2p_pb2.WorkerMetadata) -> SourceRecord:
    return read_source(p2p_pb2.GetMetadataResponse(found=True, worker=worker, worker_id="w"))


@pytest.mark.parametrize(
    "address", [InfoAddress("10.0.0.1", 30000, 0, "target"), InfoAddress("fd00::1", 1, 17, "draft", "https")]
)
def test_a_url_is_read_back(address: InfoAddress) -> None:
    assert read_info_url(make_info_url(address)) == address


@pytest.mark.parametrize("url", ["", "http://h", "http://h:1/x", "http://h:1/x?rank=-1", "http://h:99999/x?rank=0"])
def test_what_is_no_such_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="[Pp]ort|host"):
        read_info_url(url)


def test_an_upstream_record_is_matched_by_name_and_size() -> None:
    worker = make_worker(4)
    for tensor in worker.tensor_source.tensors:
        tensor.dtype = ""
    answer = make_seed_answer(source_of(worker), make_manifest(3))
    assert answer.session_id == "127.0.0.1:12345"
    assert answer.weights_info["model.layers.2.mlp.down_proj.weight"] == ((1 << 40) + 512, 64, 2)
    assert answer.manifest is None and len(answer.weights_info) == 3


def test_what_does_not_match_is_named() -> None:
    """Defect 6: fp16 is not read as bf16, though it has the same size."""
    manifest = make_manifest(3)
    with pytest.raises(WeightTransferError, match=r"lacks model\.layers\.2\.mlp"):
        make_seed_answer(source_of(make_worker(2)), manifest)
    other_type = make_worker(3)
    other_type.tensor_source.tensors[1].dtype = "torch.float16"
    with pytest.raises(WeightTransferError, match=r"layers\.1.* has 128 bytes of float16 there and 128 bytes of bfl"):
        make_seed_answer(source_of(other_type), manifest)
    other_size = make_worker(3)
    other_size.tensor_source.tensors[0].size = 64
    with pytest.raises(WeightTransferError, match=r"layers\.0.* has 64 bytes"):
        make_seed_answer(source_of(other_size), manifest)
    own_head = make_worker(3)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        own_head.tensor_source.tensors.add(name=name, addr=len(name) << 20, size=64, dtype="torch.bfloat16")
    make_seed_answer(source_of(own_head), manifest)
    with pytest.raises(WeightTransferError, match="its output head is a matrix of its own"):
        make_seed_answer(source_of(own_head), msgspec.structs.replace(manifest, is_tied=True))
    source = msgspec.structs.replace(source_of(make_worker(3)), session_id="")
    with pytest.raises(WeightTransferError, match="no session"):
        make_seed_answer(source, manifest)
