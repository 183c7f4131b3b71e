"""Owns the flags: each one's type, default, help and the values that it may have by itself."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ramet.srt.configs.kv_cache_config import KV_CACHE_DTYPES
from ramet.srt.configs.parser_config import REASONING_PARSERS, TOOL_CALL_PARSERS

LOAD_FORMATS = ("auto", "safetensors", "dummy", "remote_instance")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
QUANTIZATIONS = ("fp8",)  # while plain weights are read
ATTENTION_BACKENDS = ("auto", "triton", "flashinfer", "torch_varlen", "torch_native")
REMOTE_BACKENDS = ("transfer_engine", "nccl", "modelexpress")
LOCAL_MODES = ("auto", "map", "copy", "off")
FALLBACKS = ("disk", "error")
SCHEDULE_POLICIES = ("deadline", "lpm", "fcfs", "priority")
LOAD_BALANCE_METHODS = ("round_robin", "total_requests")
SAMPLING_DEFAULTS = ("model", "openai")
GRAMMAR_BACKENDS = ("llguidance", "none")
LOG_LEVELS = ("debug", "info", "warning", "error")


class DeviceDefaults(NamedTuple):
    """What depends on the kind of device where it was not given."""

    max_running_requests: int
    mem_fraction_static: float
    chunked_prefill_size: int
    target_itl_ms: float


DEVICE_DEFAULTS = {"cpu": DeviceDefaults(64, 0.5, 2048, 500.0), "cuda": DeviceDefaults(256, 0.85, 8192, 40.0)}


class Limit(NamedTuple):
    """What a flag's number must be, as a check and as what stands behind "must"."""

    holds: Callable[[Any], bool]
    text: str


PORT = Limit(lambda value: 0 <= value <= 65535, "be a port number from 0 to 65535")
COUNT = Limit(lambda value: value >= 1, "be at least 1")
NOT_NEGATIVE = Limit(lambda value: value >= 0, "not be negative")
SECONDS = Limit(lambda value: value > 0, "be above 0")
SHARE = Limit(lambda value: 0 < value < 1, "be between 0 and 1")
CHUNK = Limit(lambda value: value == -1 or value >= 1, "be -1 or at least 1")


def flag(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    limit: Limit | None = None,
    aliases: Sequence[str] = (),
    repeatable: bool = False,
    several: bool = False,
) -> Any:
    """A field of ServerArgs whose metadata makes the command-line flag, and other spellings of it.

    Args:
        limit: what holds for a value that is given.
        repeatable: the flag may be given several times; the values are joined with commas.
        several: several values may stand behind the flag; the field is a tuple of them.
    """
    metadata = {"help": help, "choices": choices, "limit": limit, "aliases": aliases, "repeatable": repeatable}
    metadata["several"] = several
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ServerFlags:
    """The fields of ServerArgs, whose metadata makes the command line and docs/flags.md."""

    # Model
    model_path: str = flag(dataclasses.MISSING, "Folder or Hugging Face hub id of the model.")
    tokenizer_path: str | None = flag(None, "Folder or hub id of the tokenizer; the model's when not given.")
    served_model_name: str | None = flag(None, "Name of the model in the API; the model path when not given.")
    revision: str | None = flag(None, "Branch, tag or commit of the model on the hub.")
    dtype: str = flag("auto", "Type of the weights and activations; auto takes the checkpoint's.", choices=DTYPES)
    quantization: str | None = flag(
        None,
        "Type of the linear layers' and experts' weights: fp8 quantises them while they load; "
        "the checkpoint's when not given.",
        choices=QUANTIZATIONS,
    )
    kv_cache_dtype: str = flag(
        "auto",
        "Type of the keys and values in the KV cache: auto takes that of the activations; fp8_e4m3 holds twice as many "
        "tokens, with the scales of the checkpoint where it has some.",
        choices=KV_CACHE_DTYPES,
    )
    context_length: int | None = flag(
        None, "Longest prompt plus output in tokens; the model's when not given.", limit=COUNT
    )
    chat_template: str | None = flag(None, "File with a Jinja chat template that replaces the model's.")
    trust_request_chat_template: bool = flag(
        False, "Let a request bring its own chat template (`chat_template`); the template's limits hold for it, too."
    )
    tool_call_parser: str = flag(
        "auto",
        "How the model writes tool calls: auto goes by its chat template, none leaves them in the answer's text.",
        choices=TOOL_CALL_PARSERS,
    )
    reasoning_parser: str = flag(
        "auto",
        "How the model writes what it thinks before it answers: auto goes by its chat template, none leaves it in the "
        "answer's text.",
        choices=REASONING_PARSERS,
    )
    is_embedding: bool = flag(
        False,
        "Make embeddings of prompts, and nothing else. A model whose modules.json pools its last token does so anyway.",
    )
    classifier_from_token: str | None = flag(
        None,
        "Rank texts by the token that the model would answer with: the one for an irrelevant document and that for a "
        "relevant one, joined by a comma (no,yes). Not needed for a model whose modules.json names them.",
    )
    sampling_defaults: str = flag(
        "model",
        "Where temperature, top_k, top_p, min_p and repetition_penalty of a request come from that doesn't give them: "
        "the model's generation_config.json, or OpenAI's defaults, which sample from all tokens.",
        choices=SAMPLING_DEFAULTS,
    )
    random_seed: int = flag(0, "Seed of dummy weights and of the sampling seeds given to requests without one.")

    # HTTP
    host: str = flag("127.0.0.1", "Address that the HTTP server and the engine-info bootstrap server bind to.")
    port: int = flag(30000, "Port of the HTTP server.", limit=PORT)
    api_key: str | None = flag(None, "Bearer key that every API call needs, except the health checks.")
    admin_api_key: str | None = flag(
        None,
        "Bearer key for administrative calls (flush_cache, profiles, adapters, abort_request of all) and registering "
        "weights.",
    )
    ssl_ca_certs: str | None = flag(
        None,
        "File with the certificates (PEM) that other instances at https:// are verified with; the system's when not "
        "given.",
    )
    allowed_hosts: str | None = flag(
        None,
        "Names by which web pages and proxies may call a server without a key, besides its own: joined by commas, or * "
        "for all.",
    )
    max_connections: int = flag(
        4096, "Most connections to the HTTP server; those that wait for a request make room for new ones.", limit=COUNT
    )
    profile_dir: str | None = flag(
        None,
        "Folder below which /start_profile lets a caller choose one; without it callers choose none, and traces go to "
        "$RAMET_TORCH_PROFILER_DIR, or a folder of this user's in /tmp.",
    )
    log_level: str = flag("info", "Least severe log level that is shown.", choices=LOG_LEVELS)
    drain_timeout: float = flag(30.0, "Seconds that running requests may take to end after SIGTERM.", limit=SECONDS)

    # Runtime
    device: str = flag("auto", "Where the model runs.", choices=DEVICES)
    base_gpu_id: int = flag(
        0, "Number of the GPU that the node's first rank takes; the others take those behind it.", limit=NOT_NEGATIVE
    )
    attention_backend: str = flag(
        "auto",
        "Kernels for attention; auto takes, on a GPU, the first of triton, flashinfer, torch_varlen and torch_native "
        "that is installed and runs the model, on a CPU torch_native. torch_varlen has not run on a GPU yet. With "
        "auto, cuDNN, FlashAttention 3 or FlashInfer compute long prompts where installed and faster than triton.",
        choices=ATTENTION_BACKENDS,
    )
    disable_cuda_graph: bool = flag(False, "Launch every kernel of a decode pass by itself.")
    disable_overlap_schedule: bool = flag(
        False, "Plan a pass only when the tokens of the one before it are known, on a GPU too."
    )
    max_running_requests: int | None = flag(
        None, "Most requests that are decoded together; 64 on a CPU and 256 on a GPU when not given.", limit=COUNT
    )
    max_queued_requests: int = flag(4096, "Most requests that may wait; further ones get a 503.", limit=COUNT)
    max_total_tokens: int | None = flag(
        None, "KV cache capacity in tokens; computed from free memory when not given.", limit=COUNT
    )
    mem_fraction_static: float | None = flag(
        None,
        "Share of the free memory for weights and KV cache together; 0.5 on a CPU and 0.85 on a GPU by default.",
        limit=SHARE,
    )
    page_size: int = flag(16, "Tokens per KV cache page; also the granularity of prefix sharing.", limit=COUNT)
    chunked_prefill_size: int | None = flag(
        None,
        "Most prompt tokens in one forward pass, 2048 on a CPU and 8192 on a GPU when not given; -1 never splits a "
        "prompt.",
        limit=CHUNK,
    )
    target_itl_ms: float | None = flag(
        None,
        "Milliseconds that requests which decode should wait for a token at most: a pass beside them computes as many "
        "prompt tokens as that leaves time for. When not given it is 500 on a CPU and 40 on a GPU, and up to two and a "
        "half times as long while prompts of many passes wait. 0 is no target, and there is none where prompts are "
        "never split.",
        limit=NOT_NEGATIVE,
    )
    schedule_policy: str = flag(
        "deadline",
        "Order of prompts: by a deadline, which is the later the more of the prompt is to be computed; longest cached "
        "prefix first, unless others have waited too long; first come first served; or by the priority of requests, "
        "the highest first, where each level counts as much as ten seconds of waiting.",
        choices=SCHEDULE_POLICIES,
    )
    schedule_low_priority_values_first: bool = flag(
        False, "With --schedule-policy priority: a low value is a high priority, as in vLLM."
    )
    disable_radix_cache: bool = flag(False, "Do not keep the KV cache of ended requests for later ones.")
    stream_interval: int = flag(1, "Output tokens between two streamed events of a request.", limit=COUNT)
    grammar_backend: str = flag("llguidance", "Library for constrained output.", choices=GRAMMAR_BACKENDS)
    watchdog_timeout: float = flag(
        300.0,
        "Seconds within which the instance ends if one of its processes stands still, and that one forward pass may "
        "take.",
        limit=SECONDS,
    )

    # Adapters
    enable_lora: bool = flag(
        False,
        "Take LoRA adapters, by --lora-paths and /load_lora_adapter. A clone also takes those that its seeds have.",
    )
    lora_paths: tuple[str, ...] = flag(
        (),
        "Adapters to load at the start, which implies --enable-lora: NAME=PATH, PATH, or a JSON object with lora_name, "
        "lora_path and pinned. PATH is a folder, a hub id, or instance://HOST:PORT for an instance that has the "
        "adapter.",
        aliases=("--lora-modules",),
        several=True,
    )
    max_loras_per_batch: int | None = flag(
        None,
        "Adapters that the requests of one pass may have, 8 when not given: memory for so many is taken at the start. "
        "More can be loaded: they stay in host memory, and requests wait until theirs has a place.",
        limit=COUNT,
        aliases=("--max-loras",),
    )
    max_lora_rank: int | None = flag(
        None,
        "Largest rank of an adapter, and what memory is taken for; 16 when not given, or the largest of the folders "
        "in --lora-paths if that is more.",
        limit=COUNT,
    )

    # Parallelism
    tp_size: int = flag(
        1,
        "Tensor-parallel ranks: each holds a slice of every layer.",
        limit=COUNT,
        aliases=("--tensor-parallel-size", "--tp"),
    )
    pp_size: int = flag(
        1, "Pipeline stages: each holds a run of the layers.", limit=COUNT, aliases=("--pipeline-parallel-size", "--pp")
    )
    dp_size: int = flag(
        1, "Data-parallel replicas: each holds the whole model.", limit=COUNT, aliases=("--data-parallel-size", "--dp")
    )
    ep_size: int = flag(
        1,
        "Groups that the experts of a mixture-of-experts model are split over; divides --tp-size.",
        limit=COUNT,
        aliases=("--expert-parallel-size", "--ep"),
    )
    enable_dp_attention: bool = flag(
        False,
        "Split the tensor-parallel ranks into --dp-size groups that each hold all attention heads and the KV cache of "
        "their own requests; the other layers stay split over all ranks.",
    )
    load_balance_method: str = flag(
        "round_robin",
        "How requests are spread over the data-parallel replicas: in turn, or to the one with fewest running.",
        choices=LOAD_BALANCE_METHODS,
    )
    nnodes: int = flag(1, "Nodes that the instance runs on.", limit=COUNT)
    node_rank: int = flag(0, "This node's place among them; node 0 serves the users.")
    dist_init_addr: str | None = flag(None, "host:port on node 0 where the ranks of all nodes meet.")
    dist_timeout: float = flag(
        120.0,
        "Seconds that a node or rank may be late at the start, and that one operation between ranks may take.",
        limit=SECONDS,
    )

    # Weights
    load_format: str = flag("auto", "Where the weights come from.", choices=LOAD_FORMATS)
    checkpoint_engine_wait_weights_before_ready: bool = flag(
        False,
        "Load no weights: they come by a first update, whole, and until then requests get 503 and no other instance "
        "takes them.",
    )
    remote_instance_weight_loader_backend: str = flag(
        "transfer_engine",
        "How weights come from another host: one-sided reads from the seed at the address that is given, "
        "torch.distributed broadcasts from it (NCCL on GPUs, gloo on CPUs), or modelexpress: one-sided reads from an "
        "instance that is found by what it serves (--modelexpress-config).",
        choices=REMOTE_BACKENDS,
    )
    modelexpress_config: str | None = flag(
        None,
        "JSON object, or a file that holds one: url of the metadata server (host:port, or embedded to run one here), "
        "source (true: load from files and be a seed), wait_timeout in seconds, and model_name, tp_size, pp_size, "
        "ep_size, dtype, quantization where they are not the engine's own.",
    )
    weight_version: str = flag(
        "default",
        "Name of the version of the weights, which every answer bears. Where it is given, weights are taken only from "
        "instances that serve that version; else they keep their version's name.",
    )
    weights_digest: str | None = flag(
        None,
        "Digest that the weights must have, whoever gives them, as ramet digest prints it; or files, for the digest of "
        "this instance's own files. Weights that differ from it in one byte are not served.",
    )
    remote_instance_weight_loader_seed_instance_ip: str | None = flag(
        None,
        "Address of the seed instance, or of several: host or host:port, with commas in between, or the flag again; "
        "https:// before it where the seed is reached by TLS. "
        "Several seeds share the work, and replace each other when one fails.",
        repeatable=True,
    )
    remote_instance_weight_loader_seed_instance_service_port: int | None = flag(
        None, "HTTP port of the seed instances whose address does not name one."
    )
    remote_instance_weight_loader_send_weights_group_ports: str | None = flag(
        None,
        "JSON list of the ports on the seed's host that the groups of the backend nccl use, one for each rank. Only an "
        "upstream seed needs it: others choose free ports.",
    )
    remote_instance_weight_loader_start_seed_via_transfer_engine: bool = flag(
        False,
        "Offer this instance's weights to others, on other hosts by the transfer engine. A loaded client always offers "
        "its own; by the transfer engine unless its --host is loopback, or it was loaded by the backend nccl.",
    )
    remote_instance_weight_loader_local_mode: str = flag(
        "auto",
        "How to take weights from a seed on the same host: map shares its memory copy-on-write, copy copies "
        "it, off goes through the transfer engine.",
        choices=LOCAL_MODES,
    )
    remote_instance_weight_loader_fallback: str = flag(
        "disk", "What to do when no seed can give the weights: load from disk, or fail.", choices=FALLBACKS
    )
    remote_instance_weight_loader_timeout: float = flag(
        60.0, "Seconds that one seed may take to answer, and a transfer may go without progress.", limit=SECONDS
    )
    weights_check_interval: float = flag(
        10.0,
        "Seconds from one look of a seed at its weights in memory to the next. Where somebody has changed them, the "
        "instance ends. 0 never looks.",
        limit=NOT_NEGATIVE,
    )
    keep_weight_versions: int = flag(
        1,
        "Versions of the weights that stay in memory beside the one that serves once others have taken their place, "
        "for /rollback_weights.",
        limit=NOT_NEGATIVE,
    )
    enable_memory_saver: bool = flag(
        False,
        "Let the instance sleep: /release_memory_occupation and /sleep give the memory of weights and KV cache back; "
        "processes, addresses and CUDA graphs stay.",
    )
    enable_weights_cpu_backup: bool = flag(
        False,
        "Keep the weights of an instance that sleeps in host memory, from which they come back soonest; what is pinned "
        "for them stays pinned.",
    )
    weight_session_timeout: float = flag(
        300.0,
        "Seconds that may pass between two calls of an update by tensors (/begin_weight_update) before it is given up.",
        limit=SECONDS,
    )
    engine_info_bootstrap_port: int = flag(
        6789, "Port of the engine-info bootstrap server; 0 takes a free one.", limit=PORT
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._validate_value(field)

    def _validate_value(self, field: dataclasses.Field[Any]) -> None:
        choices, limit = field.metadata["choices"], field.metadata["limit"]
        value = getattr(self, field.name)
        if value is None and (choices or field.default is None):
            return
        if choices and value not in choices:
            raise ValueError(f"{flag_name(field.name)} must be one of {', '.join(choices)}; got {value!r}")
        if limit and (value is None or not limit.holds(value)):
            raise ValueError(f"{flag_name(field.name)} must {limit.text}; got {value}")


def flag_name(field_name: str) -> str:
    """The command-line flag of a field: model_path -> --model-path."""
    return "--" + field_name.replace("_", "-")
