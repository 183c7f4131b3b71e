"""Owns what the flags must be together."""

import dataclasses
import os
import re

from ramet.srt.configs.modelexpress_config import embedded_port, resolve_address
from ramet.srt.configs.weight_format import FORMATS
from ramet.srt.flags.flag import flag_name
from ramet.srt.server_facts import ServerFacts
from ramet.srt.utils.http_origin import ANY_HOST, is_host_name
from ramet.srt.utils.net import split_address
from ramet.srt.weights.content_digest import parse_digest
from ramet.srt.weights.version import check_version

ORIGIN = re.compile(r"https?://[^/\s?#@*]+")
USUAL_PORT = re.compile(r"http://.*:80|https://.*:443")
CHECKED_KEYS = ("api_key", "admin_api_key")  # in words of their own
ROOT_PATH = re.compile(r"(/[^/\s?#]+)+")


def check_server_args(args: ServerFacts) -> None:
    """Raises ValueError, which names the flags, if some contradict each other or can't be used."""
    _check_texts(args)
    _check_files(args)
    _check_task(args)
    _check_passes(args)
    _check_parallelism(args)
    _check_modelexpress(args)
    _check_remote_instance(args)
    _check_certificates(args)
    _check_keys(args)
    _check_allowed_hosts(args)
    _check_origins(args)
    _check_root_path(args)
    _check_log(args)
    _check_lora(args)


def _check_texts(args: ServerFacts) -> None:
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        texts = value if isinstance(value, tuple | list) else (value,)
        if field.name not in CHECKED_KEYS and value != field.default and "" in [str(text).strip() for text in texts]:
            raise ValueError(f"{flag_name(field.name)} must not be empty")


def _check_files(args: ServerFacts) -> None:
    if args.weights_digest is not None and args.load_format == "dummy":
        raise ValueError("--weights-digest and --load-format dummy contradict each other")
    if args.awaits_weights:
        _check_waiting(args)
    if args.weights_digest not in (None, "files"):
        parse_digest(str(args.weights_digest), "--weights-digest")
    check_version(args.weight_version, "--weight-version")
    if args.enable_weights_cpu_backup and not args.enable_memory_saver:
        raise ValueError("--enable-weights-cpu-backup needs --enable-memory-saver")
    if args.chat_template is not None and not os.path.isfile(args.chat_template):
        reason = "is a folder; a file is expected" if os.path.isdir(args.chat_template) else ""
        text = f"{args.chat_template} {reason}" if reason else f"there is no file {args.chat_template}"
        raise ValueError(f"--chat-template: {text}")
    args.parser_config.check()


def _check_waiting(args: ServerFacts) -> None:
    flag = "--checkpoint-engine-wait-weights-before-ready"
    others = {
        f"--load-format {args.load_format}": args.load_format not in ("auto", "dummy"),
        "--weights-digest": args.weights_digest is not None,
        "--lora-paths": bool(args.lora_paths),
    }
    for other, is_there in others.items():
        if is_there:
            raise ValueError(f"{flag} and {other} contradict each other")


def _check_task(args: ServerFacts) -> None:
    if args.classifier_from_token is None:
        return
    if args.is_embedding:
        raise ValueError("--classifier-from-token and --is-embedding contradict each other")
    labels = args.classifier_labels
    if len(labels) != 2 or not all(labels) or labels[0] == labels[1]:
        raise ValueError(
            "--classifier-from-token must be two different tokens, joined by a comma; got "
            f"{args.classifier_from_token!r}"
        )


def _check_passes(args: ServerFacts) -> None:
    if args.clone_prefix_cache:
        if args.disable_radix_cache:
            raise ValueError("--clone-prefix-cache and --disable-radix-cache contradict each other")
        if args.world_size > 1:
            raise ValueError("--clone-prefix-cache is for instances of one rank")
        if not args.is_seed:
            raise ValueError(
                "--clone-prefix-cache is for instances that give their weights or take them from others "
                "(--remote-instance-weight-loader-start-seed-via-transfer-engine, --load-format remote_instance, "
                "--modelexpress-config)"
            )
    if args.tuning_dir is not None and not os.path.isdir(args.tuning_dir):
        raise ValueError(f"--tuning-dir {args.tuning_dir} is no folder")
    if args.target_itl_ms and args.chunked_prefill_size == -1:
        raise ValueError("--target-itl-ms splits prompts, which --chunked-prefill-size -1 forbids")
    if args.schedule_low_priority_values_first and args.schedule_policy != "priority":
        raise ValueError("--schedule-low-priority-values-first needs --schedule-policy priority")


def _check_parallelism(args: ServerFacts) -> None:
    if args.enable_dp_attention and (args.dp_size == 1 or args.tp_size % args.dp_size):
        raise ValueError(
            f"--enable-dp-attention needs a --dp-size above 1 that divides --tp-size; got {args.dp_size} and "
            f"{args.tp_size}"
        )
    if args.tp_size % args.ep_size:
        raise ValueError(f"--ep-size {args.ep_size} does not divide --tp-size {args.tp_size}")
    if not 0 <= args.node_rank < args.nnodes:
        raise ValueError(f"--node-rank must be from 0 to {args.nnodes - 1} (--nnodes); got {args.node_rank}")
    if args.world_size % args.nnodes:
        raise ValueError(
            f"{args.world_size} ranks (--tp-size {args.tp_size} x --pp-size {args.pp_size} x "
            f"{args.num_replicas} replicas) can't be spread evenly over --nnodes {args.nnodes}"
        )
    if args.dist_init_addr is not None:
        split_address(args.dist_init_addr, "--dist-init-addr")
    if args.nnodes == 1:
        return
    if args.dist_init_addr is None:
        raise ValueError("--nnodes above 1 needs --dist-init-addr host:port, the same on every node")
    if args.is_seed and args.engine_info_bootstrap_port == 0:
        raise ValueError("--engine-info-bootstrap-port 0 is for one node: others can't know which port it is")


def _check_modelexpress(args: ServerFacts) -> None:
    is_backend = args.remote_instance_weight_loader_backend == "modelexpress"
    if is_backend and args.load_format != "remote_instance" and args.modelexpress is None:
        raise ValueError(
            "--remote-instance-weight-loader-backend modelexpress needs --load-format remote_instance, or "
            '--modelexpress-config with "source": true'
        )
    config = args.modelexpress
    if config is None:
        return
    if config.quantization not in (None, "", *FORMATS):
        raise ValueError(
            f'--modelexpress-config quantization must be one of {", ".join(FORMATS)}, or "" for none; '
            f"got {config.quantization!r}"
        )
    if not config.is_embedded:
        resolve_address(config.url)
    config.check_sizes(tp_size=args.tp_size, pp_size=args.pp_size, ep_size=args.ep_size)
    if config.is_embedded and args.nnodes > 1 and embedded_port(config.url) == 0:
        raise ValueError("--modelexpress-config url embedded:0 is for one node: others can't know which port it is")
    if args.load_format == "remote_instance" and not is_backend:
        raise ValueError(
            "--modelexpress-config with --load-format remote_instance needs "
            "--remote-instance-weight-loader-backend modelexpress"
        )
    if args.load_format != "remote_instance" and not (config.source or config.is_embedded):
        raise ValueError(
            '--modelexpress-config without "source": true needs --load-format remote_instance and '
            "--remote-instance-weight-loader-backend modelexpress"
        )


def _check_remote_instance(args: ServerFacts) -> None:
    ip = args.remote_instance_weight_loader_seed_instance_ip
    port = args.remote_instance_weight_loader_seed_instance_service_port
    if args.load_format != "remote_instance" or args.modelexpress is not None:
        if ip is not None or port is not None:
            raise ValueError(
                "--remote-instance-weight-loader-seed-instance-ip and -service-port need --load-format "
                "remote_instance, and a backend other than modelexpress"
            )
        return
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(
            "--remote-instance-weight-loader-seed-instance-service-port must be a port number from 1 to "
            f"65535; got {port}"
        )
    _check_group_ports(args)
    if not args.seeds:
        raise ValueError(
            "--load-format remote_instance needs --remote-instance-weight-loader-seed-instance-ip and "
            "--remote-instance-weight-loader-seed-instance-service-port"
        )


def _check_certificates(args: ServerFacts) -> None:
    if args.ssl_certfile is None:
        for flag, value in (("--ssl-keyfile", args.ssl_keyfile), ("--ssl-keyfile-password", args.ssl_keyfile_password)):
            if value is not None:
                raise ValueError(f"{flag} needs --ssl-certfile")
    if args.ssl_ca_certs is None and args.ssl_certfile is None:
        return
    import ssl  # hardly ever needed at a start

    if args.ssl_ca_certs is not None:
        try:
            ssl.create_default_context(cafile=args.ssl_ca_certs)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ValueError(f"--ssl-ca-certs: no certificates in {args.ssl_ca_certs}: {reason}") from None
    if args.ssl_certfile is not None:
        from ramet.srt.utils.tls_certificate import server_context

        server_context(args.ssl_certfile, args.ssl_keyfile, args.ssl_keyfile_password)


def _check_origins(args: ServerFacts) -> None:
    for origin in args.cors_allow_origins:
        if origin != ANY_HOST and not ORIGIN.fullmatch(origin):
            raise ValueError(
                "--cors-allow-origins takes origins, as in https://ui.example or http://localhost:8080, or * "
                f"alone for all; got {origin!r}"
            )
        if USUAL_PORT.fullmatch(origin):
            raise ValueError(f"--cors-allow-origins: browsers leave the port of {origin} out, and so must you")


def _check_root_path(args: ServerFacts) -> None:
    if args.root_path and not ROOT_PATH.fullmatch(args.root_path):
        raise ValueError(f"--root-path must be a path without a slash at its end, as in /llm; got {args.root_path!r}")


def _check_log(args: ServerFacts) -> None:
    if args.log_requests_level and not args.log_requests:
        raise ValueError("--log-requests-level needs --log-requests")
    endpoint = args.otlp_traces_endpoint
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        split_address(endpoint, "--otlp-traces-endpoint")


def _check_keys(args: ServerFacts) -> None:
    for flag, key in (("--api-key", args.api_key), ("--admin-api-key", args.admin_api_key)):
        if key is not None and (key != key.strip() or not key):  # "" would be every caller's
            raise ValueError(f"{flag} must not be empty, nor begin or end with white space")


def _check_allowed_hosts(args: ServerFacts) -> None:
    for name in args.allowed_host_names:
        if name != ANY_HOST and not is_host_name(name):
            raise ValueError(
                f"--allowed-hosts takes names and addresses, as in ui.example,10.0.0.9, or *; got {name!r}"
            )


def _check_lora(args: ServerFacts) -> None:
    if not args.has_lora:
        for name in ("max_loras_per_batch", "max_lora_rank"):
            if getattr(args, name) is not None:
                raise ValueError(f"{flag_name(name)} needs --enable-lora")


def _check_group_ports(args: ServerFacts) -> None:
    name = "--remote-instance-weight-loader-send-weights-group-ports"
    given = args.remote_instance_weight_loader_send_weights_group_ports
    if given is None:
        return
    if args.remote_instance_weight_loader_backend != "nccl":
        raise ValueError(f"{name} needs --remote-instance-weight-loader-backend nccl")
    ports = args.send_weights_group_ports
    if len(ports) != args.world_size or len(set(ports)) != len(ports):
        raise ValueError(f"{name} must have one port for each of the {args.world_size} ranks; got {given}")
