"""What the scheduler is told of the flags: every value is known, whatever was not given."""

import sys

import pytest
from ramet.srt.server_args import ServerArgs


@pytest.mark.parametrize(
    ("device_type", "requests", "chunk", "target_s"), [("cpu", 64, 2048, 0.5), ("cuda", 256, 8192, 0.04)]
)
def test_what_was_not_given_is_the_devices(device_type, requests, chunk, target_s):
    config = ServerArgs(model_path="m").scheduler_config(device_type)
    assert config.max_running_requests == requests
    assert config.chunked_prefill_size == config.prefill_budget == chunk
    assert config.target_itl_s == target_s and config.schedule_policy == "deadline"
    assert config.most_itl_s == 2.5 * target_s, "while many prompts wait"
    assert config.overlap == (device_type == "cuda")


def test_what_was_given_holds_on_every_device():
    args = ServerArgs(model_path="m", max_running_requests=3, chunked_prefill_size=-1, disable_overlap_schedule=True)
    for config in (args.scheduler_config("cpu"), args.scheduler_config("cuda")):
        assert config.max_running_requests == 3 and not config.overlap
        assert config.prefill_budget == sys.maxsize
        assert config.target_itl_s == config.most_itl_s == 0.0, "prompts that are never split can't keep to a target"


@pytest.mark.parametrize(("given", "target_s"), [(25.0, 0.025), (0.0, 0.0)])
def test_a_target_that_was_given_holds_on_every_device(given, target_s):
    args = ServerArgs(model_path="m", target_itl_ms=given)
    for config in (args.scheduler_config("cpu"), args.scheduler_config("cuda")):
        assert config.target_itl_s == config.most_itl_s == target_s
