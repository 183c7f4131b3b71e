"""Owns the flags about weights: where they come from, and how they change."""

from dataclasses import dataclass

from ramet.srt.flags.flag import NOT_NEGATIVE, PORT, SECONDS, flag

LOAD_FORMATS = ("auto", "safetensors", "dummy", "remote_instance")
REMOTE_BACKENDS = ("transfer_engine", "nccl", "modelexpress")
LOCAL_MODES = ("auto", "map", "copy", "off")
FALLBACKS = ("disk", "error")


@dataclass(frozen=True, kw_only=True)
class WeightFlags:
    """Weights."""

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
