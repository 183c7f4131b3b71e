"""Names: of a run, so that ranks of two are never put together; of versions; of tensors, as wrappers spell them."""

from pathlib import Path

import published_weights as pw
import pytest
import random_models as rm
import sharded_models as sm
import torch
import torch.distributed as dist
from ramet.srt.configs.load_config import LoadConfig
from ramet.srt.managers.published_sources import SETTLE_S, find_publication
from ramet.srt.utils.net import SeedAddress, split_address
from ramet.trainer import WeightPublisher, run
from ramet.trainer.run import run_name
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rm.make_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2", dtype="bfloat16")


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def group():
    """This process as a rank of torch.distributed's default group."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield store
    dist.destroy_process_group()


def found(publishers: list[WeightPublisher]) -> str:
    addresses = [SeedAddress(*split_address(one.address, "")) for one in publishers]
    return find_publication(lambda: addresses, LoadConfig(timeout_s=5.0), None).version


def test_ranks_of_a_group_are_a_run_and_nobody_else_is(group: dist.Store) -> None:
    name = run_name()
    assert run_name() == name and len(name) == 16
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=group, rank=0, world_size=1)
    assert run_name() == name  # whoever comes to this store
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    run._own_name.cache_clear()  # as another process begins
    assert run_name() != name


def test_ranks_of_two_runs_are_never_put_together(weights: dict[str, torch.Tensor], monkeypatch) -> None:
    """Also where together they have everything, under one name."""
    monkeypatch.setattr("ramet.srt.managers.published_sources.SETTLE_S", SETTLE_S / 40)
    halves = [pw.halves(weights, rank) for rank in range(2)]
    with pw.published(halves[0], run="a") as first, pw.published(halves[1], run="b") as second:
        with pytest.raises(ValueError, match=r"they are of several runs \(a, b\)"):
            found([*first, *second])
        assert second[0]._seed is not None
    with pw.published(*halves) as ranks:
        assert found(ranks) == "step-1"


def test_a_name_stands_for_one_content(weights: dict[str, torch.Tensor]) -> None:
    values = {name: tensor.clone() for name, tensor in weights.items()}
    with WeightPublisher(values, "step-1") as publisher:
        publisher.publish("step-1")
        publisher.withdraw()
        publisher.publish("step-1")
        values["model.norm.weight"].add_(1)
        publisher.publish("step-2")
        with pytest.raises(ValueError, match="'step-1' has been published with other content"):
            publisher.publish("step-1")
        assert publisher.version is None and publisher._seed is None  # nothing is on offer
        publisher.publish("step-2")
        assert found([publisher]) == "step-2"
        for name in ("default", "update-7"):
            with pytest.raises(ValueError, match="come without a name"):
                publisher.publish(name)
        with pytest.raises(TypeError, match="must be a string; got 3"):
            publisher.publish(3)
        assert publisher.version == "step-2"


def test_wrappers_leave_names_alone(folder: Path, weights: dict[str, torch.Tensor], group: dist.Store) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    compiled_around = torch.compile(parallel)
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer)
    (rank,) = sm.ranks_of()
    for wrapped in (model, model.state_dict(), parallel, compiled_around, torch.compile(model)):
        with pw.published(wrapped) as publishers:
            pw.assert_as_from_files(folder, pw.take(folder, publishers, rank)[0])


def test_names_of_no_checkpoint_are_said(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    adapted = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
    (rank,) = sm.ranks_of()
    with (
        pw.published(adapted) as publishers,
        pytest.raises(ValueError, match=r"lacks model.*; it has base_model\..* and \d+ others"),
    ):
        pw.take(folder, publishers, rank)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([torch.zeros(2)],), TypeError, "a module, or a mapping"),
        (("model",), TypeError, "a module, or a mapping"),
        (({3: torch.zeros(2)},), TypeError, "names of tensors must be strings; got 3"),
        (({"a._orig_mod.b": torch.zeros(2), "a.b": torch.zeros(2)},), ValueError, "two tensors a.b"),
    ],
)
def test_what_has_no_names_is_refused(arguments: tuple, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        WeightPublisher(*arguments, "step-1")
    for dtype in (torch.int8, "bfloat16"):
        with pytest.raises(ValueError, match="a floating-point type"):
            WeightPublisher({"a": torch.zeros(2)}, dtype=dtype)  # type: ignore[arg-type]
