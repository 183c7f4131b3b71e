"""Owns the server's configuration: the flags, checked once, and from them one config for each owner."""

from dataclasses import dataclass
from typing import Any

from ramet.srt.configs.load_config import NO_WEIGHTS, LoadConfig
from ramet.srt.configs.modelexpress_config import resolve_address
from ramet.srt.configs.runner_config import RunnerConfig, WeightsConfig
from ramet.srt.configs.scheduler_config import SchedulerConfig
from ramet.srt.flags.runtime_flags import DEVICE_DEFAULTS
from ramet.srt.server_checks import check_server_args
from ramet.srt.server_facts import ServerFacts
from ramet.srt.utils.net import is_loopback, local_address

BACKLOG_TARGETS = 2.5  # that requests wait for a token while many prompts wait, where no target was given


@dataclass(frozen=True, kw_only=True)
class ServerArgs(ServerFacts):
    """Everything that can be said about how an instance runs. Validated when made, frozen after."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_server_args(self)

    def scheduler_config(self, device_type: str) -> SchedulerConfig:
        """What a replica's scheduler must know, on that kind of device ("cpu" or "cuda")."""
        defaults = DEVICE_DEFAULTS[device_type]
        target_itl_ms, most_itl_ms = self.target_itl_ms, self.target_itl_ms
        if target_itl_ms is None or most_itl_ms is None:  # nobody has said what users of this instance bear
            target_itl_ms, most_itl_ms = defaults.target_itl_ms, BACKLOG_TARGETS * defaults.target_itl_ms
        splits_prompts = self.chunked_prefill_size != -1
        return SchedulerConfig(
            max_running_requests=self.max_running_requests or defaults.max_running_requests,
            max_queued_requests=self.max_queued_requests,
            page_size=self.page_size,
            chunked_prefill_size=self.chunked_prefill_size or defaults.chunked_prefill_size,
            target_itl_s=target_itl_ms / 1000 if splits_prompts else 0.0,
            most_itl_s=most_itl_ms / 1000 if splits_prompts else 0.0,
            schedule_policy=self.schedule_policy,
            low_priority_values_first=self.schedule_low_priority_values_first,
            disable_radix_cache=self.disable_radix_cache,
            stream_interval=self.stream_interval,
            decode_log_interval=self.decode_log_interval,
            random_seed=self.random_seed,
            overlap=device_type == "cuda" and not self.disable_overlap_schedule,
            num_lora_slots=0 if self.lora_config is None else self.lora_config.max_loras_per_batch,
        )

    def load_config(self, *, dtype: str = "", quantization: str = "") -> LoadConfig:
        """What a rank's model loader must know.

        Args:
            dtype, quantization: the engine's real ones.
        """
        express = self.modelexpress
        names: dict[str, Any] = {}
        if express is not None:
            names = {
                "modelexpress_url": resolve_address(express.url),
                "modelexpress_model_name": self.weights_name,
                "modelexpress_tp_size": express.tp_size or self.tp_size,
                "modelexpress_pp_size": express.pp_size or self.pp_size,
                "modelexpress_ep_size": express.ep_size or self.ep_size,
                "modelexpress_dtype": express.dtype or dtype,
                "modelexpress_quantization": quantization if express.quantization is None else express.quantization,
                "modelexpress_wait_s": express.wait_timeout,
            }
        keys = [self.api_key]
        if self.remote_instance_weight_loader_backend != "modelexpress":
            # Who may publish at a metadata server decides whom an instance asks: that must not earn the admin key.
            keys.append(self.admin_api_key)
        is_forced_seed = self.load_format == "remote_instance" and not self.takes_weights_from_instances
        return LoadConfig(
            load_format=NO_WEIGHTS if self.awaits_weights else "auto" if is_forced_seed else self.load_format,
            random_seed=self.random_seed,
            seeds=self.seeds,
            backend=self.remote_instance_weight_loader_backend,
            send_weights_group_ports=self.send_weights_group_ports,
            local_mode=self.remote_instance_weight_loader_local_mode,
            fallback=self.remote_instance_weight_loader_fallback,
            timeout_s=self.remote_instance_weight_loader_timeout,
            host=self.host,
            http_port=self.port,
            ssl_ca_certs=self.ssl_ca_certs,
            api_keys=tuple(key for key in keys if key is not None),
            weights_digest=self.weights_digest.lower() if self.weights_digest else None,
            model_path=self.model_path,
            revision=self.revision,
            **names,
        )

    def runner_config(self, device_type: str, *, dtype: str, quantization: str) -> RunnerConfig:
        """What a rank's model runner must know, on that kind of device ("cpu" or "cuda").

        Args:
            dtype, quantization: the engine's real ones.
        """
        defaults = DEVICE_DEFAULTS[device_type]
        node_address = None if self.nnodes == 1 else local_address(self.dist_init_addr)
        # A loopback address is of no use to other nodes.
        weights_host = node_address if node_address is not None and is_loopback(self.host) else self.host
        return RunnerConfig(
            attention_backend=self.attention_backend,
            page_size=self.page_size,
            max_running_requests=self.max_running_requests or defaults.max_running_requests,
            max_prefill_tokens=self.scheduler_config(device_type).prefill_budget,
            max_total_tokens=self.max_total_tokens,
            max_state_slots=self.max_mamba_cache_size,
            mem_fraction_static=self.mem_fraction_static or defaults.mem_fraction_static,
            use_cuda_graph=not self.disable_cuda_graph,
            tuning_dir=self.tuning_dir,
            num_local_ranks=len(self.local_ranks),
            weights=WeightsConfig(
                name=self.weights_name,
                load=self.load_config(dtype=dtype, quantization=quantization),
                is_seed=self.is_seed,
                host=weights_host,
                control_host=node_address,
                admin_api_key=self.registration_key,
                is_published=self.modelexpress is not None,
                network=self.network_use(weights_host),
                check_interval_s=self.weights_check_interval,
                version=self.weight_version,
            ),
            lora=self.lora_config,
            can_sleep=self.enable_memory_saver,
            keeps_copy_room=self.enable_weights_cpu_backup,
        )
