"""Owns what makes two sources the same: the SourceIdentity of an engine, and its hash, the mx_source_id.

Seed and client build their identity with the same function here, so that they cannot disagree about it.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ramet.srt.modelexpress.proto import p2p_pb2

if TYPE_CHECKING:
    from ramet.srt.configs.load_config import LoadConfig
    from ramet.srt.weights.manifest import WeightManifest

# Part of every identity. Upstream engines put the version of their modelexpress package here, so a source is shared
# with them when they run this one.
MX_VERSION = "0.7.0"

ROLE_PARAMETER = "model_role"  # extra parameter that sets a draft model's source apart; absent for the target
TRAINER_PARAMETER = "ramet_trainer"  # extra parameter of what a trainer's ranks publish, each of them a part
CLAIM_PARAMETER = "ramet_claim"  # extra parameter of the identity under which instances agree who reads the files
OPTIONAL_ID_FIELDS = (
    "backend_framework_version",
    "torch_version",
    "cuda_version",
    "triton_version",
    "gpu_arch",
    "compile_config_digest",
)


@dataclass(frozen=True, kw_only=True)
class EngineValues:
    """What an engine serves, by the names that --modelexpress-config gives where it gives any."""

    model_name: str
    dtype: str  # "bfloat16"; a leading "torch." is dropped
    revision: str = ""  # commit of the hub snapshot when it is known
    quantization: str = ""
    role: str = "target"
    tp_size: int = 1
    pp_size: int = 1
    ep_size: int = 1
    is_trainer: bool = False


def make_source_identity(
    config: "LoadConfig", manifest: "WeightManifest", *, is_trainer: bool = False
) -> p2p_pb2.SourceIdentity:
    """The identity of a rank's weights: for a seed that publishes them and a client that looks for them alike.

    Args:
        is_trainer: whether a trainer publishes them: who looks for an instance does not find it.
    """
    engine = EngineValues(
        model_name=config.modelexpress_model_name,
        dtype=config.modelexpress_dtype,
        revision=manifest.revision,
        quantization=config.modelexpress_quantization,
        role=manifest.role,
        tp_size=config.modelexpress_tp_size,
        pp_size=config.modelexpress_pp_size,
        ep_size=config.modelexpress_ep_size,
        is_trainer=is_trainer,
    )
    return build_source_identity(engine)


def build_source_identity(engine: EngineValues) -> p2p_pb2.SourceIdentity:
    """The identity of what an engine serves."""
    extra = {} if engine.role == "target" else {ROLE_PARAMETER: engine.role}
    return p2p_pb2.SourceIdentity(
        mx_version=MX_VERSION,
        mx_source_type=p2p_pb2.MX_SOURCE_TYPE_WEIGHTS,
        model_name=engine.model_name,
        backend_framework=p2p_pb2.BACKEND_FRAMEWORK_SGLANG,
        tensor_parallel_size=engine.tp_size,
        pipeline_parallel_size=engine.pp_size,
        expert_parallel_size=engine.ep_size,
        dtype=engine.dtype.removeprefix("torch."),
        quantization=engine.quantization,
        extra_parameters=extra | ({TRAINER_PARAMETER: "1"} if engine.is_trainer else {}),
        revision=engine.revision,
    )


def compute_source_id(identity: p2p_pb2.SourceIdentity) -> str:
    """The mx_source_id, as the reference server has it: 16 hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:16]


def canonical_json(identity: p2p_pb2.SourceIdentity) -> str:
    """Compact JSON with sorted keys, lowercased strings and enums as numbers; not ASCII-escaped."""
    extra: dict[str, str] = {}
    for key, value in sorted(identity.extra_parameters.items()):
        extra.setdefault(key.lower(), value.lower())
    payload: dict[str, object] = {
        "backend_framework": identity.backend_framework,
        "dtype": identity.dtype.lower(),
        "expert_parallel_size": identity.expert_parallel_size,
        "extra_parameters": extra,
        "model_name": identity.model_name.lower(),
        "mx_source_type": identity.mx_source_type,
        "mx_version": identity.mx_version.lower(),
        "pipeline_parallel_size": identity.pipeline_parallel_size,
        "quantization": identity.quantization.lower(),
        "revision": identity.revision.lower(),
        "tensor_parallel_size": identity.tensor_parallel_size,
    }
    payload.update({name: getattr(identity, name).lower() for name in OPTIONAL_ID_FIELDS if getattr(identity, name)})
    return json.dumps(payload, separators=(",", ":"), sort_keys=True, ensure_ascii=False)


def same_model(one: p2p_pb2.SourceIdentity, other: p2p_pb2.SourceIdentity) -> bool:
    """Whether two identities differ in nothing but the sizes of their parallel dimensions."""
    copy = p2p_pb2.SourceIdentity()
    copy.CopyFrom(other)
    copy.tensor_parallel_size = one.tensor_parallel_size
    copy.pipeline_parallel_size = one.pipeline_parallel_size
    copy.expert_parallel_size = one.expert_parallel_size
    return canonical_json(one) == canonical_json(copy)
