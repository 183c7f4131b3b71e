"""What `/become` asks for as the arguments of an instance, and what a standby's flags may say."""

import pytest
from ramet.srt.entrypoints.standby.orders import BecomeBody, make_template, server_args_of, shape_key
from ramet.srt.errors import RequestError

EXPRESS = {"modelexpress_config": '{"url": "127.0.0.1:8001"}'}


def args_of(values=None, **body):
    return server_args_of(BecomeBody.make(model_path="m", **body), make_template(values or {}))


def test_what_the_body_says_goes_before_the_flags_of_the_standby():
    args = args_of({"dtype": "float16", "max_total_tokens": 64}, dtype="bfloat16", served_model_name="name")
    assert (args.model_path, args.dtype, args.max_total_tokens) == ("m", "bfloat16", 64)
    assert args.model_names == ("name",) and args.enable_memory_saver and args.engine_info_bootstrap_port == 0


@pytest.mark.parametrize(
    ("flags", "body", "load_format", "backend", "fallback", "is_source"),
    [
        ({}, {}, "auto", "transfer_engine", "disk", None),
        ({}, {"source": "files"}, "auto", "transfer_engine", "disk", None),
        ({}, {"seed": "h:1"}, "remote_instance", "transfer_engine", "disk", None),
        ({}, {"source": "instance", "seed": "h:1"}, "remote_instance", "transfer_engine", "error", None),
        (EXPRESS, {}, "remote_instance", "modelexpress", "disk", False),
        (EXPRESS, {"source": "modelexpress"}, "remote_instance", "modelexpress", "error", False),
        (EXPRESS, {"source": "files"}, "auto", "transfer_engine", "disk", True),
        (EXPRESS, {"seed": "h:1"}, "remote_instance", "transfer_engine", "disk", None),
    ],
)
def test_where_weights_come_from(flags, body, load_format, backend, fallback, is_source):
    args = args_of(dict(flags), **body)
    assert args.load_format == load_format
    assert args.remote_instance_weight_loader_backend == backend
    if load_format == "remote_instance":
        assert args.remote_instance_weight_loader_fallback == fallback
    assert (None if args.modelexpress is None else bool(args.modelexpress.source)) is is_source
    assert [f"{one.host}:{one.port}" for one in args.seeds] == (["h:1"] if "seed" in body else [])


def test_a_shape_is_the_same_wherever_its_weights_come_from():
    key = shape_key(args_of())
    assert key == shape_key(args_of(seed="h:1", weight_version="2"))
    assert key == shape_key(args_of(source="files", weights_digest=None))
    for other in ({"served_model_name": "x"}, {"tp_size": 2}, {"context_length": 8}, {"tokenizer_path": "t"}):
        assert key != shape_key(args_of(**other))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"source": "instance"}, "seed"),
        ({"source": "modelexpress"}, "source"),
        ({"source": "files", "seed": "h:1"}, "seed"),
        ({"source": "elsewhere"}, "source"),
        ({"quantization": "int3"}, "quantization"),
        ({"weights_digest": "no digest"}, None),
        ({"ep_size": 3}, "tp_size"),
        ({"requests": "forget"}, "requests"),
        ({"tp_size": 0}, "tp_size"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_what_can_not_be_is_refused_by_its_name(body, param):
    with pytest.raises(RequestError) as refused:
        args_of(**body)
    assert refused.value.param == param or param is None


def test_nothing_is_said_of_no_model():
    BecomeBody.make(model_path=None, requests="abort").check_nothing_else()
    with pytest.raises(RequestError, match="tp_size"):
        BecomeBody.make(model_path=None, tp_size=2).check_nothing_else()
    with pytest.raises(RequestError, match="model_path"):
        BecomeBody.make(source="files")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_path": "m"}, "model_path of /become"),
        ({"load_format": "dummy"}, "source of /become"),
        ({"remote_instance_weight_loader_seed_instance_ip": "h:1"}, "seed of /become"),
        ({"engine_info_bootstrap_port": 6789}, "takes a free one"),
        ({"nnodes": 2}, "one node"),
        ({"modelexpress_config": '{"url": "embedded"}'}, "no metadata server"),
        ({"modelexpress_config": '{"url": "h:1", "source": true}'}, "source"),
        ({"drain_timeout": -1.0}, "--drain-timeout"),
    ],
)
def test_flags_that_are_none_of_a_standby(values, words):
    with pytest.raises(ValueError, match=words):
        make_template(values)
