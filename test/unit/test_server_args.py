"""What a flag's value must be, and what is said of one that can't be used."""

from dataclasses import fields

import pytest
from ramet.srt.flags.flag import flag_name
from ramet.srt.server_args import ServerArgs

COUNTS = (
    "max_queued_requests", "page_size", "stream_interval", "tp_size", "pp_size", "dp_size", "ep_size", "nnodes",
    "context_length", "max_total_tokens", "max_running_requests",
)  # fmt: skip
SECONDS = ("drain_timeout", "watchdog_timeout", "remote_instance_weight_loader_timeout", "dist_timeout")
PORTS = ("port", "engine_info_bootstrap_port")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        *(
            (name, value, f"must be a port number from 0 to 65535; got {value}")
            for name in PORTS
            for value in (-1, 65536)
        ),
        *((name, value, f"must be at least 1; got {value}") for name in COUNTS for value in (0, -3)),
        *((name, value, f"must be above 0; got {value}") for name in SECONDS for value in (0, -0.5)),
        ("base_gpu_id", -1, "must not be negative; got -1"),
        ("chunked_prefill_size", 0, "must be -1 or at least 1; got 0"),
        ("chunked_prefill_size", -2, "must be -1 or at least 1; got -2"),
        ("target_itl_ms", -1.0, "must not be negative; got -1.0"),
        ("mem_fraction_static", 0.0, "must be between 0 and 1; got 0.0"),
        ("mem_fraction_static", 1, "must be between 0 and 1; got 1"),
        ("model_path", "", "must not be empty"),
        ("log_level", "loud", "must be one of debug, info, warning, error; got 'loud'"),
        ("tp_size", None, "must be at least 1; got None"),
    ],
)
def test_what_is_out_of_range_is_named(name: str, value: object, reason: str) -> None:
    with pytest.raises(ValueError) as error:
        ServerArgs(**{"model_path": "m", name: value})
    assert str(error.value) == f"{flag_name(name)} {reason}"


def test_a_missing_template_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=f"^--chat-template: there is no file {tmp_path}/no.jinja$"):
        ServerArgs(model_path="m", chat_template=f"{tmp_path}/no.jinja")


@pytest.mark.parametrize("name", ["api_key", "admin_api_key"])
@pytest.mark.parametrize("key", ["", " ", "key\n", " key"])
def test_a_key_that_all_or_none_could_show_is_refused(name: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"^{flag_name(name)} must not be empty, nor begin or end with white space$"):
        ServerArgs(**{"model_path": "m", name: key})
    assert getattr(ServerArgs(**{"model_path": "m", name: "a key"}), name) == "a key"


@pytest.mark.parametrize("name", ["https://ui.example", "ui.example:8080", "ui.example/", "*.example", "[::1]", "a b"])
def test_a_host_that_no_request_can_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="^--allowed-hosts takes names and addresses, .*; got '") as error:
        ServerArgs(model_path="m", allowed_hosts=f"ok.example,{name}")
    assert str(error.value).endswith(f"{name!r}")
    assert ServerArgs(model_path="m", allowed_hosts="ok.example, ::1,10.0.0.9").allowed_host_names[1] == "::1"
    assert ServerArgs(model_path="m", allowed_hosts="*").allowed_host_names == ["*"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 0), ("port", 65535), ("page_size", 1), ("base_gpu_id", 0), ("chunked_prefill_size", -1),
        ("chunked_prefill_size", 1), ("mem_fraction_static", 0.5), ("drain_timeout", 0.1), ("context_length", None),
        ("target_itl_ms", 0.0), ("target_itl_ms", None), ("schedule_policy", "lpm"), ("schedule_policy", "fcfs"),
        ("schedule_policy", "priority"),
    ],
)  # fmt: skip
def test_what_is_in_range_is_taken(name: str, value: object) -> None:
    assert getattr(ServerArgs(**{"model_path": "m", name: value}), name) == value


def test_a_target_for_the_token_time_needs_prompts_that_may_be_split() -> None:
    with pytest.raises(ValueError, match="^--target-itl-ms splits prompts, which --chunked-prefill-size -1 forbids$"):
        ServerArgs(model_path="m", chunked_prefill_size=-1, target_itl_ms=10.0)
    assert ServerArgs(model_path="m", chunked_prefill_size=-1, target_itl_ms=0.0).target_itl_ms == 0.0


def test_the_sense_of_priorities_needs_priorities() -> None:
    flags = {"model_path": "m", "schedule_low_priority_values_first": True}
    with pytest.raises(ValueError, match="^--schedule-low-priority-values-first needs --schedule-policy priority$"):
        ServerArgs(**flags)
    assert ServerArgs(**flags, schedule_policy="priority").scheduler_config("cpu").low_priority_values_first


def test_every_number_has_a_limit() -> None:
    """A new flag that takes a number says which numbers make sense. These are checked with other flags, or take all."""
    elsewhere = {"node_rank", "random_seed", "remote_instance_weight_loader_seed_instance_service_port"}
    numbers = {field.name for field in fields(ServerArgs) if "int" in str(field.type) or "float" in str(field.type)}
    assert {field.name for field in fields(ServerArgs) if field.metadata["limit"]} == numbers - elsewhere


def test_a_digest_is_64_hex_digits_or_that_of_the_files() -> None:
    digest = "0aF1" * 16
    config = ServerArgs(model_path="m", weights_digest=digest).load_config()
    assert config.weights_digest == digest.lower()
    assert ServerArgs(model_path="m", weights_digest="files").load_config().weights_digest == "files"
    for wrong in ("abc", digest + "0", "g" * 64, "sha256:" + digest):
        with pytest.raises(ValueError, match="--weights-digest must be 64 hex digits, as ramet digest prints them"):
            ServerArgs(model_path="m", weights_digest=wrong)
    with pytest.raises(ValueError, match="--weights-digest and --load-format dummy"):
        ServerArgs(model_path="m", weights_digest=digest, load_format="dummy")


def test_waiting_for_weights_goes_with_no_other_source_of_them() -> None:
    waiting = {"model_path": "m", "checkpoint_engine_wait_weights_before_ready": True}
    assert ServerArgs(**waiting, load_format="dummy").load_config().load_format == "none"
    others: list[dict[str, object]] = [{"load_format": "safetensors"}, {"weights_digest": "files"}]
    for other in others:
        with pytest.raises(ValueError, match="-before-ready and --.* contradict each other"):
            ServerArgs(**waiting | other)


def test_parsers_are_known_and_go_together() -> None:
    args = ServerArgs(model_path="m", tool_call_parser="hermes")
    assert (args.parser_config.tool_call_parser, args.parser_config.reasoning_parser) == ("hermes", "auto")
    with pytest.raises(ValueError, match="--tool-call-parser must be one of auto, none"):
        ServerArgs(model_path="m", tool_call_parser="qwen4")
    with pytest.raises(ValueError, match="don't go together"):
        ServerArgs(model_path="m", tool_call_parser="gpt-oss", reasoning_parser="qwen3")


TEXTS = [field.name for field in fields(ServerArgs) if "str" in str(field.type) and not field.metadata["choices"]]


@pytest.mark.parametrize("text", ["", " "])
@pytest.mark.parametrize("name", TEXTS)
def test_an_empty_text_is_refused_wherever_it_is_not_the_default(name: str, text: str) -> None:
    several = next(field for field in fields(ServerArgs) if field.name == name).metadata["several"]
    if (name, text) == ("root_path", ""):
        ServerArgs(model_path="m", root_path="")
        return
    with pytest.raises(ValueError, match=f"^{flag_name(name)} must not be empty"):
        ServerArgs(**{"model_path": "m", name: ("a", text) if several else text})


@pytest.mark.parametrize(
    "origin", ["https://*.example", "https://ui.*", "https://ui.example:443", "http://ui.example:80", "*.example"]
)
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="^--cors-allow-origins"):
        ServerArgs(model_path="m", cors_allow_origins=("https://ok.example", origin))
    ServerArgs(model_path="m", cors_allow_origins=("*", "https://ui.example:8443", "http://[::1]:8080"))


def test_a_level_without_lines_is_refused() -> None:
    with pytest.raises(ValueError, match="^--log-requests-level needs --log-requests$"):
        ServerArgs(model_path="m", log_requests_level=2)
    assert ServerArgs(model_path="m", log_requests=True, log_requests_level=2).log_requests_level == 2
