"""Owns what an instance says of itself: to those who ask for its model or its state, and in its log."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

import ramet
from ramet.srt.managers.io_struct import GetInternalStateReqOutput

if TYPE_CHECKING:
    from ramet.srt.entrypoints.instance import Instance

SECRET_FIELDS = ("api_key", "admin_api_key", "ssl_keyfile_password")


def server_info(instance: "Instance", states: Sequence[GetInternalStateReqOutput]) -> dict[str, Any]:
    """What /get_server_info shows: configuration without the keys, limits, weights, start-up phases, load."""
    args = {
        name: value for name, value in dataclasses.asdict(instance.server_args).items() if name not in SECRET_FIELDS
    }
    return {
        **args,
        "state": "serving",
        "served_model_name": instance.server_args.model_name,
        "weight_version": instance.manager.weight_version,
        "version": ramet.__version__,
        "max_total_num_tokens": instance.schedulers[0].max_total_num_tokens,
        "max_req_len": instance.schedulers[0].max_req_len,
        "ranks": [_without(scheduler, "type") for scheduler in instance.schedulers],
        "startup_phases": instance.progress.phases,
        "internal_states": [_without(state, "type", "request_id") for state in states],
    }


def vllm_config(instance: "Instance") -> dict[str, Any]:
    """What trainers read of vLLM's configuration in /server_info?config_format=json, where it has the same meaning."""
    config, args = instance.model_config, instance.server_args
    return {
        "model_config": {
            "model": instance.weight_updates.model_path,
            "dtype": f"torch.{config.dtype}",
            "max_model_len": config.context_len,
            "quantization": config.quantization or None,
        },
        "parallel_config": {
            "tensor_parallel_size": args.tp_size,
            "pipeline_parallel_size": args.pp_size,
            "data_parallel_size": args.dp_size,
        },
        "weight_transfer_config": {"backend": "nccl"},
    }


def model_info(instance: "Instance") -> dict[str, Any]:
    """What /get_model_info shows."""
    return {
        "model_path": instance.weight_updates.model_path,
        "served_model_name": instance.server_args.model_name,
        "tokenizer_path": instance.server_args.tokenizer_path or instance.server_args.model_path,
        "is_generation": instance.model_config.embedding is None,
        "architecture": instance.model_config.architecture,
        "dtype": instance.model_config.dtype,
        "context_length": instance.model_config.context_len,
        "vocab_size": instance.model_config.vocab_size,
        "default_sampling_params": instance.sampling_defaults,
        "weight_version": instance.manager.weight_version,
    }


def ready_line(instance: "Instance") -> str:
    """The log line of a start that has come to its end."""
    reports = [scheduler.load_report for scheduler in instance.schedulers]  # of this node's ranks
    num_bytes, seconds = sum(report.num_bytes for report in reports), max(report.seconds for report in reports)
    url, ready_s = instance.server_args.url(), instance.progress.phases["ready"]
    return (
        f"ready on {url} {ready_s:.2f} s after the launch; weights from "
        f"{', '.join(sorted({report.source for report in reports}))}: {num_bytes / 1e9:.3f} GB in {seconds:.3f} s "
        f"({num_bytes / max(seconds, 1e-9) / 1e9:.2f} GB/s)"
    )


def _without(message: msgspec.Struct, *names: str) -> dict[str, Any]:
    """The message's fields as JSON values, but those with `names`."""
    return {name: value for name, value in msgspec.to_builtins(message).items() if name not in names}
