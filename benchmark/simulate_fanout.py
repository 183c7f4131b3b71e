"""A simulation of one instance's weights spreading to a thousand others; docs/scaling.md has its results.

    python benchmark/simulate_fanout.py [--instances 1000] [--per-host 8] [--size-gb 16] [--markdown]

A transfer runs at the smaller of its seed's share and its client's share of their links; shares are equal. An instance
gives its weights once it has all of them and has checked and registered them, as Ramet's do. With several instances on
a host, the first takes the weights over the network and the others from it. Figures of links are measured ones.
"""

import argparse
import heapq
import itertools
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Link:
    """What was measured between two instances (docs/scaling.md says where), in GB/s."""

    name: str
    rate: float  # in and out of one instance, or of one host
    verify_rate: float  # at which an instance hashes what it has received

    def setup_s(self, size: float) -> float:
        """Seconds around a transfer of `size` GB in which the client's link is idle."""
        return SETUP_S + size / self.verify_rate


LINKS = (
    Link("TCP, Mooncake, two-core CPU", 1.2, 5.3),
    Link("TCP, Mooncake, H200 host without RDMA", 1.7, 1000.0),
    Link("NCCL over NVLink, large pieces", 362.0, 1000.0),
)
SETUP_S = 0.3  # asking, planning, registering
LOCAL_S = 0.05  # to map, or copy over NVLink, the weights of an instance on the same host


@dataclass(frozen=True)
class Strategy:
    """Who gives weights to whom.

    Attributes:
        fanout: transfers that one seed has at a time; None: all that ask.
        all_give: every loaded instance is a seed; otherwise the first one alone.
        num_seeds: seeds that one client splits its ranges over, where there are so many.
    """

    name: str
    fanout: int | None
    all_give: bool = True
    num_seeds: int = 1


STRATEGIES = (
    Strategy("one seed, all at once", fanout=None, all_give=False),
    Strategy("one seed, one after the other", fanout=1, all_give=False),
    Strategy("chain", fanout=1, all_give=False),  # by `chain_seconds`
    Strategy("every loaded one a seed, one client at a time", fanout=1),
    Strategy("every loaded one a seed, two clients at a time", fanout=2),
    Strategy("every loaded one a seed, four clients at a time", fanout=4),
    Strategy("every loaded one a seed, clients take from two", fanout=2, num_seeds=2),
)


@dataclass
class Result:
    """When instances had their weights, in seconds after the start."""

    loaded_s: list[float] = field(default_factory=list)
    most_given: int = 0  # copies that the busiest seed has sent

    @property
    def all_s(self) -> float:
        return self.loaded_s[-1]

    @property
    def half_s(self) -> float:
        return self.loaded_s[len(self.loaded_s) // 2]


class _Fluid:
    """Transfers that share links: when each is done follows from the shares, which change with each event."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.now = 0.0
        self.left: dict[int, float] = {}  # transfer -> bytes to go
        self.ends: dict[int, tuple[int, int]] = {}  # transfer -> (seed, client)
        self.num_out: dict[int, int] = {}
        self.num_in: dict[int, int] = {}
        self._ids = itertools.count()

    def start(self, seed: int, client: int, size: float) -> None:
        number = next(self._ids)
        self.left[number], self.ends[number] = size, (seed, client)
        self.num_out[seed] = self.num_out.get(seed, 0) + 1
        self.num_in[client] = self.num_in.get(client, 0) + 1

    def _speed(self, number: int) -> float:
        seed, client = self.ends[number]
        return min(self.rate / self.num_out[seed], self.rate / self.num_in[client])

    def next_end(self) -> float:
        """Seconds until the next transfer is done; infinite without one."""
        return min((left / self._speed(number) for number, left in self.left.items()), default=float("inf"))

    def advance(self, seconds: float) -> list[tuple[int, int]]:
        """Let time pass; the transfers that are done."""
        for number in self.left:
            self.left[number] -= seconds * self._speed(number)
        self.now += seconds
        done = [number for number, left in self.left.items() if left <= 1e-9]
        ends = [self.ends.pop(number) for number in done]
        for number, (seed, client) in zip(done, ends, strict=True):
            del self.left[number]
            self.num_out[seed] -= 1
            self.num_in[client] -= 1
        return ends


def spread(strategy: Strategy, num_clients: int, size: float, rate: float, setup_s: float) -> Result:
    """Instance 0 is loaded at 0 s; all others start to ask then.

    Args:
        size: GB.
        rate: GB/s of each link, each way.
        setup_s: seconds between a client's last byte and its first turn as a seed.
    """
    if strategy.name == "chain":
        return chain(num_clients, size, rate, setup_s)
    fluid, result = _Fluid(rate), Result()
    waiting = list(range(num_clients, 0, -1))
    parts_left: dict[int, int] = {}
    seeds, ready = [0], []  # ready: (time, instance) of those that check and register
    given: dict[int, int] = {}
    while len(result.loaded_s) < num_clients:
        _assign(strategy, fluid, waiting, seeds, parts_left, size, given)
        until_ready = ready[0][0] - fluid.now if ready else float("inf")
        for _, client in fluid.advance(min(fluid.next_end(), until_ready)):
            parts_left[client] -= 1
            if not parts_left[client]:
                heapq.heappush(ready, (fluid.now + setup_s, client))
        while ready and ready[0][0] <= fluid.now + 1e-9:
            when, client = heapq.heappop(ready)
            result.loaded_s.append(when)
            if strategy.all_give:
                seeds.append(client)
    result.most_given = max(given.values())
    return result


def _assign(
    strategy: Strategy,
    fluid: _Fluid,
    waiting: list[int],
    seeds: list[int],
    parts_left: dict[int, int],
    size: float,
    given: dict[int, int],
) -> None:
    """Give waiting clients the seeds that have the fewest transfers."""
    limit = strategy.fanout or len(waiting) + sum(fluid.num_out.values())
    free = [(fluid.num_out.get(seed, 0), seed) for seed in seeds if fluid.num_out.get(seed, 0) < limit]
    heapq.heapify(free)
    while waiting and free:
        client = waiting.pop()
        chosen = [heapq.heappop(free) for _ in range(min(strategy.num_seeds, len(free)))]
        parts_left[client] = len(chosen)
        for count, seed in chosen:
            fluid.start(seed, client, size / len(chosen))
            given[seed] = given.get(seed, 0) + 1
            if count + 1 < limit:
                heapq.heappush(free, (count + 1, seed))


def chain(num_clients: int, size: float, rate: float, setup_s: float) -> Result:
    """Each takes from the one before it."""
    step = size / rate + setup_s
    return Result([step * (number + 1) for number in range(num_clients)], most_given=1)


def over_hosts(strategy: Strategy, num_instances: int, per_host: int, size: float, link: Link) -> Result:
    """As `spread` between hosts; on each host the others follow the first. Instance 0 has its host's neighbours."""
    num_hosts = -(-num_instances // per_host)
    setup_s = link.setup_s(size)
    first = spread(strategy, num_hosts - 1, size, link.rate, setup_s) if num_hosts > 1 else Result([], 0)
    result = Result(most_given=first.most_given)
    for when in [0.0, *first.loaded_s]:
        result.loaded_s += [when] + [when + LOCAL_S + setup_s] * (per_host - 1)
    result.loaded_s = sorted(result.loaded_s)[:num_instances]
    return result


def make_rows(num_instances: int, per_host: int, size: float) -> list[tuple[str, ...]]:
    rows = [("who gives to whom", *(f"{link.name} ({link.rate:g} GB/s)" for link in LINKS), "most copies by one")]
    for strategy in STRATEGIES:
        results = [over_hosts(strategy, num_instances, per_host, size, link) for link in LINKS]
        times = [f"{format_s(one.half_s)} / {format_s(one.all_s)}" for one in results]
        rows.append((strategy.name, *times, str(results[0].most_given)))
    return rows


def format_s(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--per-host", type=int, default=1)
    parser.add_argument("--size-gb", type=float, default=16.0)
    parser.add_argument("--markdown", action="store_true", help="as a table for the page")
    args = parser.parse_args()
    rows = make_rows(args.instances, args.per_host, args.size_gb)
    print(
        f"{args.instances} instances, {args.per_host} on each host, {args.size_gb:g} GB: half of them / all of them\n"
    )
    if args.markdown:
        rows.insert(1, ("---",) * len(rows[0]))
        print("\n".join("| " + " | ".join(row) + " |" for row in rows))
        return
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    main()
