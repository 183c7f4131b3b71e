"""A value for every flag of an instance, for a start on a CPU with all of those that can be given together."""

import json
from pathlib import Path
from typing import Any

from ramet.srt.server_flags import NEEDLESS, sectioned_fields

API_KEY, ADMIN_KEY = "sesame", "locksmith"
ROOT_PATH = "/llm"
# What contradicts others that are given, or the model.
LEFT_OUT = {
    "max_mamba_cache_size": "linear layers, which this model has not",
    "classifier_from_token": "another task",
    "is_embedding": "another task",
    "checkpoint_engine_wait_weights_before_ready": "no weights to serve",
    "remote_instance_weight_loader_seed_instance_ip": "weights by address, and by name",
    "remote_instance_weight_loader_seed_instance_service_port": "weights by address, and by name",
    "remote_instance_weight_loader_send_weights_group_ports": "weights by broadcast",
}


def every_flag(model: Path, certificates: Path, adapter: Path, folder: Path) -> dict[str, Any]:
    """By field: what is given. Flags with a default that are not named here have that."""
    template = folder / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    named = {
        "model_path": str(model),
        "tokenizer_path": str(model),
        "served_model_name": ["tiny", "tiny-alias"],
        "revision": "main",
        "quantization": "fp8",
        "kv_cache_dtype": "fp8_e4m3",
        "context_length": 128,
        "chat_template": str(template),
        "trust_request_chat_template": True,
        "port": 0,
        "api_key": API_KEY,
        "admin_api_key": ADMIN_KEY,
        "ssl_certfile": str(certificates / "server.pem"),
        "ssl_keyfile": str(certificates / "server.key"),
        "ssl_keyfile_password": "of no use here",
        "ssl_ca_certs": str(certificates / "ca.pem"),
        "allowed_hosts": "llm.example",
        "cors_allow_origins": ["https://ui.example", "http://localhost:8080"],
        "root_path": ROOT_PATH,
        "profile_dir": str(folder),
        "tuning_dir": str(folder),
        "log_format": "json",
        "log_requests": True,
        "log_requests_level": 1,
        "decode_log_interval": 2,
        "otlp_traces_endpoint": "127.0.0.1:9",
        "disable_cuda_graph": True,
        "disable_overlap_schedule": True,
        "disable_radix_cache": True,
        "max_running_requests": 4,
        "max_total_tokens": 512,
        "mem_fraction_static": 0.3,
        "chunked_prefill_size": 64,
        "target_itl_ms": 200.0,
        "schedule_policy": "priority",
        "schedule_low_priority_values_first": True,
        "enable_lora": True,
        "lora_paths": [f"poet={adapter}"],
        "max_loras_per_batch": 2,
        "max_lora_rank": 8,
        "tp_size": 2,
        "dp_size": 2,
        "enable_dp_attention": True,
        "dist_init_addr": "127.0.0.1:1",
        "modelexpress_config": {"url": "embedded:0", "source": True},
        "weights_digest": "files",
        "remote_instance_weight_loader_start_seed_via_transfer_engine": True,
        "enable_memory_saver": True,
        "enable_weights_cpu_backup": True,
        "engine_info_bootstrap_port": 0,
    }
    fields = [field for _, fields in sectioned_fields() for field in fields if field.name not in LEFT_OUT]
    return {field.name: named.get(field.name, field.default) for field in fields}


def write_config(path: Path, values: dict[str, Any]) -> None:
    """As a file for --config, with the flags that have no effect."""
    path.write_text(json.dumps(values | {name.lstrip("-"): True for name in NEEDLESS}))
