"""Owns what a standby is asked to become, and the arguments of the instance that this makes of it."""

import dataclasses
import json
from typing import Annotated, Any, Literal

from pydantic import Field

from ramet.srt.configs.modelexpress_config import ModelExpressConfig
from ramet.srt.entrypoints.http.http_validation import RequestBody, Text
from ramet.srt.entrypoints.weight_calls import Place, Version
from ramet.srt.errors import RequestError
from ramet.srt.flags.flag import flag_name
from ramet.srt.server_args import ServerArgs
from ramet.srt.weights.content_digest import parse_digest

NO_MODEL = "standby"  # in the place of a model's path, of a standby that has none
Size = Annotated[int, Field(ge=1, le=4096)]
Source = Literal["auto", "instance", "modelexpress", "files"]

# What a body says of its model, by the names of the flags. The others are the standby's own, for all of its models.
MODEL_FIELDS = (
    "model_path",
    "revision",
    "tokenizer_path",
    "chat_template",
    "weight_version",
    "weights_digest",
    "tp_size",
    "pp_size",
    "dp_size",
    "ep_size",
    "dtype",
    "quantization",
    "context_length",
    "is_embedding",
    "tool_call_parser",
    "reasoning_parser",
)
# Flags that a standby refuses: a body says it, or every model that it becomes has its own.
BODY_FLAGS = {
    "model_path": "model_path",
    "revision": "revision",
    "tokenizer_path": "tokenizer_path",
    "chat_template": "chat_template",
    "served_model_name": "served_model_name",
    "weight_version": "weight_version",
    "weights_digest": "weights_digest",
    "load_format": "source",
    "remote_instance_weight_loader_backend": "source",
    "remote_instance_weight_loader_fallback": "source",
    "remote_instance_weight_loader_seed_instance_ip": "seed",
    "remote_instance_weight_loader_seed_instance_service_port": "seed",
}
REFUSED_FLAGS = {
    "from_standby": "it is one",
    "engine_info_bootstrap_port": "each of its models takes a free one",
    "checkpoint_engine_wait_weights_before_ready": "it becomes models whose weights are there",
    "remote_instance_weight_loader_send_weights_group_ports": "it knows no seed yet",
    "nnodes": "it is one node",
    "node_rank": "it is one node",
    "dist_init_addr": "it is one node",
    "lora_paths": "load adapters when it has become their model",
}
# What says where weights come from, which is another matter at each change.
WAY_FIELDS = (
    "checkpoint_engine_wait_weights_before_ready",
    "load_format",
    "weight_version",
    "weights_digest",
    "modelexpress_config",
    "remote_instance_weight_loader_backend",
    "remote_instance_weight_loader_fallback",
    "remote_instance_weight_loader_seed_instance_ip",
)


class BecomeBody(RequestBody):
    """Which model, and where its weights come from. Null in place of the path: none, it is a standby again."""

    model_path: Place | None
    source: Source | None = None  # "auto": the seed if one is named, else instances that are listed, else files
    seed: Place | None = None  # host:port of an instance that serves the model
    served_model_name: Annotated[Text, Field(min_length=1, max_length=4096)] | None = None
    weight_version: Version | None = None
    weights_digest: Text | None = None
    revision: Annotated[Text, Field(max_length=256)] | None = None
    tokenizer_path: Place | None = None
    chat_template: Place | None = None
    tp_size: Size | None = None
    pp_size: Size | None = None
    dp_size: Size | None = None
    ep_size: Size | None = None
    dtype: Text | None = None
    quantization: Text | None = None
    context_length: Size | None = None
    is_embedding: bool | None = None
    tool_call_parser: Text | None = None
    reasoning_parser: Text | None = None
    # Refused unless no model serves, or this one: nobody's model is taken away by who looks for a standby.
    from_standby: bool | None = None
    # Of the model that serves now: those that run end by themselves, for up to --drain-timeout, or at once.
    requests: Literal["drain", "abort"] | None = None

    @property
    def drains(self) -> bool:
        """Whether requests that run may end by themselves."""
        return self.requests != "abort"

    @property
    def way(self) -> Source:
        """Where the weights come from."""
        return self.source or "auto"

    def check_nothing_else(self) -> None:
        """Raises RequestError if a body without a model says something about one."""
        for name in self.model_fields_set - {"model_path", "requests"}:
            if getattr(self, name) is not None:
                raise RequestError(f"{name} says something of a model, and model_path is null", param=name)


def check_standby_flags(values: dict[str, Any]) -> None:
    """Raises ValueError if flags are given that are no standby's."""
    for name in values:
        if name in REFUSED_FLAGS:
            raise ValueError(f"{flag_name(name)} is not for a standby: {REFUSED_FLAGS[name]}")
        if name in BODY_FLAGS:
            raise ValueError(f"{flag_name(name)} is not for a standby: {BODY_FLAGS[name]} of /become says it")


def make_template(values: dict[str, Any]) -> ServerArgs:
    """What all models of a standby have in common, from the flags that were given.

    Raises:
        ValueError: if a flag is none of a standby's, or its value is wrong.
    """
    check_standby_flags(values)
    values = {"model_path": NO_MODEL, "engine_info_bootstrap_port": 0, "enable_memory_saver": True, **values}
    if values.get("modelexpress_config") is None:
        return ServerArgs(**values)
    template = ServerArgs(**values, load_format="remote_instance", remote_instance_weight_loader_backend="modelexpress")
    assert template.modelexpress is not None
    if template.modelexpress.is_embedded:
        raise ValueError("--modelexpress-config: a standby runs no metadata server; url must be host:port")
    if template.modelexpress.source or template.modelexpress.model_name:
        raise ValueError("--modelexpress-config: source and model_name are not for a standby: /become says them")
    return template


def shape_of(model_path: str) -> BecomeBody:
    """What asks for a model that is to be prepared."""
    return BecomeBody.make(model_path=model_path, source="files")


def server_args_of(body: BecomeBody, template: ServerArgs) -> ServerArgs:
    """The arguments of the instance that a standby is to be.

    Raises:
        RequestError: if they can't be used; it names what is wrong.
    """
    values = {name: value for name in MODEL_FIELDS if (value := getattr(body, name)) is not None}
    if body.served_model_name is not None:
        values["served_model_name"] = (body.served_model_name,)
    try:
        if body.weights_digest is not None:
            parse_digest(body.weights_digest, "weights_digest")
        return dataclasses.replace(template, **values, **_way_of(body, template.modelexpress))
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(str(error), param=_param_of(str(error))) from None


def _param_of(message: str) -> str | None:
    """The field that a message about a flag is about, as far as it names one."""
    return next((name for name in MODEL_FIELDS if flag_name(name) in message), None)


def _way_of(body: BecomeBody, express: ModelExpressConfig | None) -> dict[str, Any]:
    """What says where the weights come from."""
    way = body.way
    if body.seed is not None and way not in ("auto", "instance"):
        raise RequestError(f"seed and source {way!r} contradict each other", param="seed")
    if way == "instance" and body.seed is None:
        raise RequestError("source 'instance' needs seed, host:port of an instance", param="seed")
    if way == "modelexpress" and express is None:
        raise RequestError(
            "this standby knows no metadata server that could be asked (--modelexpress-config)", param="source"
        )
    fallback = "disk" if way == "auto" else "error"
    if body.seed is not None:
        return {
            "load_format": "remote_instance",
            "modelexpress_config": None,
            "remote_instance_weight_loader_backend": "transfer_engine",
            "remote_instance_weight_loader_seed_instance_ip": body.seed,
            "remote_instance_weight_loader_fallback": fallback,
        }
    if express is not None and way != "files":
        return {"remote_instance_weight_loader_fallback": fallback}  # the rest is the template's
    if express is not None:
        return {
            "load_format": "auto",
            "remote_instance_weight_loader_backend": "transfer_engine",
            "modelexpress_config": dataclasses.replace(express, source=True).to_json(),
        }
    return {"load_format": "auto"}


def shape_key(args: ServerArgs) -> str:
    """The same for two instances that differ in nothing but where their weights come from, and which they are."""
    fields = {name: value for name, value in dataclasses.asdict(args).items() if name not in WAY_FIELDS}
    fields["is_listed"] = args.modelexpress is not None
    return json.dumps(fields, sort_keys=True, default=str)
