"""Choices of kernels that were measured: files of them, who takes which, and the measuring itself on a CPU."""

import json
import logging

import pytest
import random_models as rm
import torch
from ramet.cli import main
from ramet.srt.layers import cpu_matmul, tuned_file
from ramet.srt.layers.cpu_kernels import build
from ramet.srt.layers.kernels.choices import (
    CHOICES,
    CPU_LINEAR,
    OTHER,
    OURS,
    choose_all,
    chosen,
    row_class,
    trying,
    watching,
)
from ramet.srt.layers.tuned_file import Stamp, file_name, load_measured, make_entry, write_measured
from ramet.srt.model_executor import kernel_choices
from ramet.srt.model_executor.kernel_choices import choose_kernels
from ramet.srt.model_executor.tuner import Tuner

HERE = Stamp("NVIDIA H200", "2.13.0", "3.6.0", 1)
SHAPE = (16, 40, 30)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def stamped(monkeypatch, tmp_path):
    monkeypatch.setattr(tuned_file, "stamp_of", lambda device: HERE)
    monkeypatch.setenv("RAMET_TUNING_DIR", str(tmp_path / "user"))
    yield
    choose_all({})


def write(folder, value=OTHER, stamp=HERE, shape=SHAPE, name="one.json"):
    entry = make_entry("cpu_linear", shape, value, 1.0, 2.0)
    write_measured(folder / name, stamp, [entry], [("cpu_linear", shape)])
    return folder / name


def test_what_was_measured_is_taken_and_the_default_elsewhere(tmp_path):
    write(tmp_path / "user")
    choose_kernels(None, CPU)
    assert CPU_LINEAR.pick(OURS, *SHAPE) == OTHER
    assert CPU_LINEAR.pick(OURS, 32, 40, 30) == OURS
    with trying(CPU_LINEAR, SHAPE, OURS):
        assert CPU_LINEAR.pick(OTHER, *SHAPE) == OURS
    assert CPU_LINEAR.pick(OURS, *SHAPE) == OTHER


def test_a_given_folder_goes_before_the_users(tmp_path):
    write(tmp_path / "user", OTHER)
    write(tmp_path / "user", OTHER, shape=(32, 40, 30), name="two.json")
    write(tmp_path / "shipped", OURS)
    assert load_measured(str(tmp_path / "shipped"), CPU) == {
        ("cpu_linear", SHAPE): OURS,
        ("cpu_linear", (32, 40, 30)): OTHER,
    }


@pytest.mark.parametrize("field", ["device", "torch", "triton"])
def test_files_of_other_devices_and_versions_are_not_taken(tmp_path, caplog, field):
    there = Stamp(**{name: getattr(HERE, name) for name in Stamp.__struct_fields__} | {field: "another"})
    write(tmp_path / "user", stamp=there)
    with caplog.at_level(logging.INFO):
        assert load_measured(None, CPU) == {}
    assert f"it was measured with {field} 'another', here it is" in caplog.text
    assert file_name(there) != file_name(HERE)


def test_kernels_of_another_version_are_not_taken(tmp_path, caplog):
    write(tmp_path / "user", stamp=Stamp("NVIDIA H200", "2.13.0", "3.6.0", 2))
    with caplog.at_level(logging.INFO):
        assert load_measured(None, CPU) == {}
    assert "it was measured with kernels 2, here it is 1" in caplog.text


def _edited(change):
    def edit(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def _forged(change):
    """A file whose digest is right: as another version would have written it."""

    def edit(path):
        content = json.loads(path.read_text())
        change(content["entries"][0])
        entries = [tuned_file.Entry(**entry | {"value": tuple(entry["value"])}) for entry in content["entries"]]
        content["digest"] = tuned_file._digest(HERE, entries)
        path.write_text(json.dumps(content))

    return edit


BAD = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-20]), "it is no file of `ramet tune`"),
    "empty": (lambda path: path.write_text(""), "it is no file of `ramet tune`"),
    "not text": (lambda path: path.write_bytes(b"\xff\xfe{}"), "it is no file of `ramet tune`"),
    "another thing": (lambda path: path.write_text('{"format": 1, "stamp": 3}'), "it is no file of `ramet tune`"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
    "another format": (_edited(lambda content: content.update(format=2)), "it has format 2, not 1"),
    "changed by hand": (_edited(lambda content: content["entries"][0].update(value=[1])), "it has been changed"),
    "unknown choice": (_forged(lambda entry: entry.update(choice="none")), "there is no choice 'none'"),
    "other shape": (_forged(lambda entry: entry["key"].pop("rows")), "the shapes of 'cpu_linear' have rows"),
    "no such value": (_forged(lambda entry: entry.update(value=[7])), "'cpu_linear' can't be [7]"),
}


@pytest.mark.parametrize("how", BAD)
def test_what_is_broken_is_named_and_not_taken(tmp_path, caplog, how):
    edit, reason = BAD[how]
    path = write(tmp_path / "user", name="a.json")
    good = write(tmp_path / "user", shape=(32, 40, 30), name="b.json")
    edit(path)
    with caplog.at_level(logging.INFO):
        assert set(load_measured(None, CPU)) == {("cpu_linear", (32, 40, 30))}
    lines = [record.getMessage() for record in caplog.records if "is not taken" in record.getMessage()]
    assert len(lines) == 1 and str(path) in lines[0] and reason in lines[0] and str(good) not in lines[0]


def test_measuring_again_keeps_what_it_did_not_measure(tmp_path):
    path = tmp_path / "one.json"
    others = (32, 40, 30), (64, 40, 30)
    first = [make_entry("cpu_linear", shape, OTHER, 1.0, 2.0) for shape in (SHAPE, *others)]
    assert write_measured(path, HERE, first, [("cpu_linear", shape) for shape in (SHAPE, *others)]) == 3
    again = [make_entry("cpu_linear", SHAPE, OURS, 1.0, 2.0)]
    # The default was the best for one of them.
    assert write_measured(path, HERE, again, [("cpu_linear", SHAPE), ("cpu_linear", others[0])]) == 2
    measured = {place: entry.value for place, entry in tuned_file.read_measured(path, HERE).items()}
    assert measured == {("cpu_linear", SHAPE): OURS, ("cpu_linear", others[1]): OTHER}


def test_ranks_that_were_told_different_things_take_the_defaults(tmp_path, caplog, monkeypatch):
    write(tmp_path / "user")
    monkeypatch.setattr(kernel_choices, "gather_over_replica", lambda own: [own, b"another"])
    choose_kernels(None, CPU)
    assert chosen() == {} and "give all nodes the same files" in caplog.text
    monkeypatch.setattr(kernel_choices, "gather_over_replica", lambda own: [own, own])
    choose_kernels(None, CPU)
    assert chosen() == {("cpu_linear", SHAPE): OTHER}


def test_all_choices_can_be_kept():
    """Names of shapes and values are what a file holds: integers, each value once."""
    for name, choice in CHOICES.items():
        assert choice.name == name and len(choice.values) > 1
        assert all(isinstance(number, int) for value in choice.values for number in value)
        assert len({len(value) for value in choice.values}) == 1


@pytest.mark.parametrize(("num_rows", "expected"), [(1, 1), (2, 2), (3, 4), (16, 16), (17, 32)])
def test_classes_of_rows(num_rows, expected):
    assert row_class(num_rows) == expected


class FakeTrial:
    """A layer whose product takes the longer the further a value is from the best one."""

    name, copies = "layer", [None]

    def __init__(self, choice, best, wrong):
        self.choice, self.best, self.wrong = choice, best, wrong
        self.took = []

    def takes(self, num_rows):
        return num_rows in (1, 4)

    def run(self, num_rows):
        def compute(turn):
            value = self.choice.pick((0, 0), num_rows)
            if value == (3, 0):
                raise RuntimeError("out of resource: shared memory")
            self.took.append(abs(value[0] - self.best) + 1)
            return torch.full((2,), 2.0 if value == self.wrong else 1.0)

        return compute


def test_the_fastest_value_that_runs_and_is_right_is_kept(monkeypatch, caplog):
    from ramet.srt.layers.kernels import choices

    monkeypatch.setattr(choices, "CHOICES", {})
    choice = choices.Choice("tile", "rows", [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0)])
    monkeypatch.setattr(tuned_file, "CHOICES", {"tile": choice})
    trial = FakeTrial(choice, best=3, wrong=(4, 0))
    tuner = Tuner(CPU)
    monkeypatch.setattr(Tuner, "_seconds", lambda self, run, num_runs: (run(0), float(trial.took[-1]))[1])
    tuner.tune(trial)
    assert [(entry.key, entry.value, entry.us, entry.default_us) for entry in tuner.entries] == [
        ({"rows": 4}, (2, 0), 2e6, 4e6),
        ({"rows": 1}, (2, 0), 2e6, 4e6),
    ]
    assert tuner.tuned == [("tile", (4,)), ("tile", (1,))] and tuner.num_failed == 4
    assert "tile (4, 0) in layer with 4 rows is not taken: it is off by" in caplog.text
    assert chosen() == {("tile", (4,)): (2, 0), ("tile", (1,)): (2, 0)}
    tuner.close()
    assert chosen() == {}


def test_a_default_that_nothing_beats_stays(monkeypatch):
    from ramet.srt.layers.kernels import choices

    monkeypatch.setattr(choices, "CHOICES", {})
    choice = choices.Choice("tile", "rows", [(0, 0), (1, 0)])
    trial = FakeTrial(choice, best=0, wrong=None)
    monkeypatch.setattr(Tuner, "_seconds", lambda self, run, num_runs: (run(0), float(trial.took[-1]))[1])
    tuner = Tuner(CPU)
    tuner.tune(trial)
    assert tuner.entries == [] and len(tuner.tuned) == 2
    tuner.close()


def test_products_are_asked_for_by_the_layers(monkeypatch):
    monkeypatch.setattr(cpu_matmul, "lacks_instructions", lambda dtype: True)
    x, weight = torch.randn(20, 30).bfloat16(), torch.randn(40, 30).bfloat16()
    with watching() as seen:
        expected = cpu_matmul.widening_linear(x, weight)
    assert seen == {(CPU_LINEAR, (32, 40, 30)): OURS}
    calls = []
    monkeypatch.setattr(cpu_matmul, "blocked_linear", lambda *args: calls.append(args))
    with trying(CPU_LINEAR, (32, 40, 30), OTHER):
        torch.testing.assert_close(cpu_matmul.widening_linear(x, weight), expected, atol=2e-2, rtol=2e-2)
    assert not calls


def test_the_command_measures_a_model_on_a_cpu(tmp_path, monkeypatch, capsys):
    """With weights that nobody has: the folder has a config alone."""
    from ramet.srt.model_executor import layer_trials, tune_command, tuner

    for module in (cpu_matmul, tune_command):
        monkeypatch.setattr(module, "lacks_instructions", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(tune_command, "stamp_of", lambda device: HERE)
    monkeypatch.setattr(layer_trials, "COLD_BYTES", 1)
    monkeypatch.setattr(tuner, "NUM_ROWS", (16, 1))
    folder = rm.make_config(tmp_path / "model", "qwen3_moe", dtype="bfloat16")
    command = ["tune", str(folder), "--device", "cpu", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(build, "find_compiler", lambda: ["c++"])
    assert main(command) == 0
    assert "RAMET_CPU_KERNELS=0" in capsys.readouterr().out
    monkeypatch.setenv("RAMET_CPU_KERNELS", "0")
    assert main(command) == 0
    said = capsys.readouterr().out
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == file_name(HERE) and str(path) in said
    assert not said.startswith("0 choices")
    assert set(tuned_file.read_measured(path, HERE)) <= {("cpu_linear", key) for key in _shapes(said, path)}
    assert chosen() == {}


def _shapes(said, path):
    """Shapes in a file, each with a class of rows that was measured."""
    keys = [tuple(entry["key"][name] for name in CPU_LINEAR.key) for entry in json.loads(path.read_text())["entries"]]
    # An expert has some of the 16 rows.
    assert {rows for rows, *_ in keys} <= {2, 4, 8, 16} and f"has {len(keys)}" in said
    return keys


def test_the_command_says_when_there_is_nothing_to_measure(tmp_path, monkeypatch, capsys):
    from ramet.srt.model_executor import tune_command

    monkeypatch.setattr(tune_command, "lacks_instructions", lambda dtype: False)
    folder = rm.make_config(tmp_path / "model", "qwen3")
    assert main(["tune", str(folder), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("nothing to measure")
    assert main(["tune", str(tmp_path / "none"), "--device", "cpu"]) == 1
    assert main(["tune", str(folder), "--device", "cpu", "--tp-size", "7"]) == 1
    assert "does not divide" in capsys.readouterr().err


def test_the_stamp_of_this_machine_is_kept(tmp_path, monkeypatch):
    monkeypatch.undo()
    here = tuned_file.stamp_of(CPU)
    assert here.torch == str(torch.__version__) and here.device.endswith("threads")
    write(tmp_path, stamp=here)
    assert set(tuned_file.read_measured(tmp_path / "one.json", here)) == {("cpu_linear", SHAPE)}
    assert file_name(here).endswith(".json") and "/" not in file_name(here)
