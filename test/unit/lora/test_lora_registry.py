"""Names of adapters in the main process: what requests may say, and when the last of them has ended."""

import asyncio

import pytest
from ramet.srt.errors import RequestError
from ramet.srt.lora.adapter import LoraAdapter, LoraModule, LoraTargets
from ramet.srt.lora.adapter_paths import LoraPath, instance_address, instance_path, parse_lora_path
from ramet.srt.managers.lora_registry import LoadedAdapter, LoraRegistry
from ramet.srt.utils.net import SeedAddress


def make_registry(*names):
    registry = LoraRegistry()
    for name in names:
        module = LoraModule(name="model.layers.0.mlp.up_proj", rank=1, scale=1.0, file_name="")
        adapter = LoraAdapter(
            name=name, dtype="float32", digest="", modules=(module,), targets=LoraTargets(chosen="all-linear")
        )
        registry.add(LoadedAdapter(registry.next_number(), adapter, "path", pinned=False))
    return registry


def test_what_a_request_may_name():
    registry = make_registry("a", "base:b", "c:d")
    found = {None: "", "": "", "base": "", "a": "a", "base:a": "a", "base:b": "base:b", "c:d": "c:d", "base:c:d": "c:d"}
    assert {model: registry.name_of(model, "base") for model in found} == found
    for model in ("b", "base:base", "a:a", "A"):
        with pytest.raises(RequestError, match="serves 'base' and the adapters a, base:b, c:d"):
            registry.name_of(model, "base")
    with pytest.raises(RequestError, match="serves 'base'$"):
        make_registry().name_of("x", "base")


async def test_an_adapter_leaves_when_its_requests_have_ended():
    registry = make_registry("a", "b")
    loaded = registry.get("a")
    for rid in ("x", "y"):
        registry.begin(rid, registry.resolve("a"))
    registry.begin("z", registry.resolve("b"))
    leaving = asyncio.create_task(registry.retire(loaded))
    await asyncio.sleep(0)
    assert [one.adapter.name for one in registry.usable()] == ["b"]
    for ask in (lambda: registry.resolve("a"), lambda: registry.name_of("a", "base")):
        with pytest.raises(RequestError):
            ask()
    for rid in ("z", "x", "x", "unknown"):
        registry.end(rid)
        await asyncio.sleep(0)
        assert not leaving.done()
    registry.end("y")
    await asyncio.wait_for(leaving, 1)
    registry.remove("a")
    with pytest.raises(RequestError, match="is not loaded"):
        registry.resolve("a")
    registry.add(loaded)
    assert registry.next_number() == 3  # numbers don't come again


async def test_an_unused_one_leaves_at_once():
    registry = make_registry("a")
    await asyncio.wait_for(registry.retire(registry.get("a")), 1)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a=/x/y", LoraPath("a", "/x/y")),
        ("a=b=c", LoraPath("a", "b=c")),
        ("/x/a=b", LoraPath("/x/a=b", "/x/a=b")),
        ("owner/name", LoraPath("owner/name", "owner/name")),
        ("a=instance://h:1", LoraPath("a", "instance://h:1")),
        ("instance://h:1", LoraPath("", "instance://h:1")),
        ('{"lora_name": "a", "lora_path": "p", "pinned": true}', LoraPath("a", "p", True)),
        ('{"name": "a", "path": "p", "base_model_name": null}', LoraPath("a", "p")),
    ],
)
def test_flags(text, expected):
    assert parse_lora_path(text) == expected


@pytest.mark.parametrize(
    "text", ["a=", "=p", " a=p", "{", "{}", '{"lora_name": "a"}', '{"lora_name": "a", "lora_path": "p", "x": 1}', "",
             "a=instance://h", "instance://h:x"],
)  # fmt: skip
def test_flags_that_are_refused(text):
    with pytest.raises(ValueError):
        instance_address(parse_lora_path(text).path)


def test_instances():
    assert instance_address("/x") is None
    for address in (SeedAddress("h", 1), SeedAddress("::1", 2, "https")):
        assert instance_address(instance_path(address)) == (address, "")
        assert instance_address(f"{instance_path(address)}/a/b") == (address, "a/b")
