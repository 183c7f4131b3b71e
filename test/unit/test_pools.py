"""Which standby becomes what: as many instances as are wanted, whoever dies, fails or is started beside them."""

import json

import pytest
from ramet.srt.modelexpress.server.pools import FAILED_PAUSE_S, LEASE_S, Pools
from ramet.srt.weights.pool import SetScale, StandbyReport, read_set_scale, read_standby_report


class World:
    """Standbys that do what they are told when `work` is called."""

    def __init__(self, num_standbys):
        self.now = 100.0
        self.others = {}
        self.pools = Pools(lambda model: self.others.get(model, []), 1000)
        self.reports = {
            f"http://s{n}": StandbyReport(instance=f"http://s{n}", started_at=n, state="standby", is_warm=True)
            for n in range(num_standbys)
        }
        self.orders = []
        self.broken = {}

    def tell(self, url, **changes):
        report = self.reports[url]
        self.reports[url] = report = StandbyReport(
            **{name: getattr(report, name) for name in report.__struct_fields__} | changes
        )
        return self.pools.report(report, self.now)

    def work(self, rounds=3):
        for _ in range(rounds):
            self.now += 1.0
            for url in list(self.reports):
                order = self.tell(url)
                if order.number:
                    body = json.loads(order.become)
                    self.orders.append((url, body["model_path"]))
                    self.carry_out(url, order, body)

    def carry_out(self, url, order, body):
        model = body["model_path"] or ""
        if error := self.broken.get(url, ""):
            self.tell(url, done_number=order.number, error=error)
        else:
            name = body.get("served_model_name", model)
            state = "serving" if model else "standby"
            self.tell(url, done_number=order.number, error="", state=state, model=name, recipe=order.become)

    def serving(self, model):
        return [url for url, report in self.reports.items() if report.model == model]


def test_as_many_as_are_wanted_and_no_more():
    world = World(4)
    state = world.pools.scale(SetScale(model="m", instances=2), world.now)
    assert (state.wanted, state.serving, state.becoming) == (2, [], [])
    world.work()
    assert len(world.serving("m")) == 2 and len(world.orders) == 2
    world.pools.scale(SetScale(model="m", instances=3), world.now)
    world.work()
    assert len(world.serving("m")) == 3
    world.pools.scale(SetScale(model="m", instances=1), world.now)
    world.work()
    assert len(world.serving("m")) == 1
    world.pools.scale(SetScale(model="m", instances=9), world.now)
    world.work()
    assert len(world.serving("m")) == 4
    (model,) = world.pools.state(world.now).models
    assert (model.model, model.wanted, len(model.serving), model.becoming) == ("m", 9, 4, [])


def test_instances_that_were_started_by_themselves_count_and_are_nobodys_to_stop():
    world = World(2)
    world.others["m"] = ["http://own1", "http://own2"]
    world.pools.scale(SetScale(model="m", instances=3), world.now)
    world.work()
    assert len(world.serving("m")) == 1
    world.pools.scale(SetScale(model="m", instances=0), world.now)
    world.work()
    assert world.serving("m") == [] and len(world.pools.state(world.now).models[0].serving) == 2


def test_what_a_fleet_still_counts_of_a_standby_does_not_count():
    world = World(1)
    world.others["m"] = ["http://s0"]
    world.work(1)
    world.pools.scale(SetScale(model="m", instances=1), world.now)
    world.work()
    assert world.orders == [("http://s0", "m")]


def test_another_takes_the_place_of_one_that_has_died():
    world = World(3)
    world.pools.scale(SetScale(model="m", instances=2), world.now)
    world.work()
    (dead, _) = world.serving("m")
    del world.reports[dead]
    world.now += LEASE_S
    world.work()
    assert len(world.serving("m")) == 2


def test_one_that_could_not_become_it_is_left_alone_for_a_while_and_another_is_asked():
    world = World(2)
    world.broken["http://s0"] = "no memory"
    world.pools.scale(SetScale(model="m", instances=1), world.now)
    world.work()
    assert world.serving("m") == ["http://s1"]
    assert [url for url, _ in world.orders] == ["http://s0", "http://s1"]
    assert world.pools.state(world.now).standbys[0].error == "no memory"
    world.pools.scale(SetScale(model="m", instances=2), world.now)
    world.work(1)
    assert world.orders[-1][0] == "http://s0", "an operator's word is a new beginning"
    num_asked = len(world.orders)
    world.work(int(FAILED_PAUSE_S) - 2)
    assert len(world.orders) == num_asked
    assert "no memory" in world.pools.state(world.now).models[0].error
    world.broken.clear()
    world.work(4)
    assert len(world.serving("m")) == 2 and world.pools.state(world.now).models[0].error == ""


def test_one_that_has_been_the_model_comes_first():
    world = World(3)
    world.tell("http://s2", kept=["m"])
    world.pools.scale(SetScale(model="m", instances=1), world.now)
    world.work()
    assert world.serving("m") == ["http://s2"]


def test_what_a_standby_has_become_others_become_in_the_same_way():
    world = World(2)
    recipe = json.dumps({"model_path": "/folder", "served_model_name": "m"})
    world.tell("http://s0", state="serving", model="m", recipe=recipe)
    world.tell("http://s1")
    world.pools.scale(SetScale(model="m", instances=2), world.now)
    world.work()
    assert world.orders == [("http://s1", "/folder")] and len(world.serving("m")) == 2
    world = World(1)
    world.pools.scale(SetScale(model="m", instances=1, become={"model_path": "/other"}), world.now)
    world.work(1)
    assert world.orders == [("http://s0", "/other")]


def test_one_that_calls_its_model_by_another_name_counts_all_the_same():
    world = World(3)
    recipe = {"model_path": "m", "served_model_name": "/where/it/is/m"}
    world.pools.scale(SetScale(model="m", instances=1, become=recipe), world.now)
    world.work(6)
    assert len(world.orders) == 1
    world.pools.scale(SetScale(model="m", instances=0), world.now)
    world.work()
    assert [path for _, path in world.orders] == ["m", None] and not world.serving("/where/it/is/m")


def test_without_a_wish_all_stays_as_it_is():
    world = World(2)
    world.pools.scale(SetScale(model="m", instances=2), world.now)
    world.work()
    world.pools.scale(SetScale(model="m", instances=None), world.now)
    world.work()
    assert len(world.serving("m")) == 2 and world.pools.state(world.now).models[0].wanted is None


def test_a_standby_that_was_started_again_is_another_one():
    world = World(1)
    world.pools.scale(SetScale(model="m", instances=1), world.now)
    first = world.tell("http://s0").number
    assert world.tell("http://s0").number == first > 0
    assert world.tell("http://s0", started_at=7.0).number > first


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '{"model": "m"}', '{"model": "", "instances": 1}', '{"model": "m", "instances": -1}',
        '{"model": "m", "instances": 1, "become": {}}', '{"model": "m", "instances": 1, "become": {"model_path": 1}}',
        '{"model": "m", "instances": 100000}',
    ],
)  # fmt: skip
def test_what_is_no_wish_is_refused(text):
    with pytest.raises(ValueError):
        read_set_scale(text.encode())


def test_what_is_no_report_is_refused():
    for text in ("{}", '{"instance": "", "started_at": 1, "state": "standby"}', "["):
        with pytest.raises(ValueError):
            read_standby_report(text.encode())
