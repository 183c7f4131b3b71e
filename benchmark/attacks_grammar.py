"""Owns attacks by constrained output: functions that send what is expensive to compile or to follow, and may leave.

benchmark/bench_attacks.py runs them beside the small requests of another client. By itself:
`python benchmark/attacks_grammar.py http://127.0.0.1:30000 [name …]` says what each is answered.
"""

import json
import random
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 120.0
LEAVE_S = 0.2  # after which an abandoned request's connection is closed

Attack = Callable[[str], str]  # from the server's URL to the answer's status, or what came instead


def post(url: str, params: dict[str, Any], timeout_s: float = TIMEOUT_S) -> str:
    """One request with a constraint: the status and the beginning of the answer."""
    body = json.dumps({"text": "The", "sampling_params": {"max_new_tokens": 500, **params}}).encode()
    request = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return f"{answer.status} {answer.read(100)!r}"
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read(200)!r}"
    except OSError as error:
        return f"none ({error})"


def _mark() -> str:
    """Something that makes each constraint another one than those before it."""
    return f"m{random.getrandbits(48):x}"


def chained_refs(url: str, num: int = 1000) -> str:
    """Properties that lead from one definition to the next."""
    steps = {
        f"a{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}, "title": _mark()}
        for i in range(num)
    }
    return post(url, {"json_schema": {"$ref": "#/$defs/a0", "$defs": {**steps, f"a{num}": {"type": "string"}}}})


def chained_rules(url: str, num: int = 3000) -> str:
    """Lark rules that lead from one to the next."""
    rules = "".join(f'r{i}: "a" r{i + 1} "c"\n' for i in range(num))
    return post(url, {"ebnf": f'start: r0 "{_mark()}"\n{rules}r{num}: "b"\n'})


def chained_gbnf(url: str, num: int = 3000) -> str:
    """The same in GBNF, which is converted first."""
    rules = "".join(f'r{i} ::= "a" r{i + 1} "c"\n' for i in range(num))
    return post(url, {"ebnf": f'root ::= r0 "{_mark()}"\n{rules}r{num} ::= "b"\n'})


def ambiguous(url: str) -> str:
    """Each token can be read in more ways than the one before it."""
    return post(url, {"ebnf": f"root ::= s # {_mark()}\ns ::= s s s | s s | [a-z ]"})


def ambiguous_nullable(url: str) -> str:
    """The same with rules that match nothing."""
    return post(url, {"ebnf": f'root ::= s # {_mark()}\ns ::= s s | t\nt ::= [a-z ] | ""'})


def abandoned(url: str, num: int = 10000) -> str:
    """Many rules, and nobody who waits for what they are compiled to."""
    rules = "".join(f'r{i} ::= "w{i}" s\n' for i in range(num))
    names = " | ".join(f"r{i}" for i in range(num))
    return post(url, {"ebnf": f'root ::= {names} | "{_mark()}"\n{rules}s ::= "x" | "(" s ")"\n'}, LEAVE_S)


def large_regex(url: str) -> str:
    """A megabyte."""
    return post(url, {"regex": "a" * 1_000_000 + _mark()})


def repeated_regex(url: str) -> str:
    """A short text for very many states."""
    return post(url, {"regex": f"(a{{1000}}){{1000}}({_mark()})?"})


def large_multiple(url: str) -> str:
    """An automaton that divides."""
    return post(url, {"json_schema": {"type": "integer", "multipleOf": random.randrange(600_000, 900_000)}})


def endless_array(url: str) -> str:
    """More items than a context holds; llguidance 1.7 never ends compiling it."""
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": 10**9, "title": _mark()}
    return post(url, {"json_schema": schema})


def large_enum(url: str) -> str:
    """Many values."""
    return post(url, {"json_schema": {"enum": [f"{_mark()}{i}" for i in range(20_000)]}})


def many_properties(url: str) -> str:
    """Many optional properties, any of which can be left out."""
    mark = _mark()
    properties = {f"{mark}{i}": {"type": "string"} for i in range(5000)}
    return post(url, {"json_schema": {"type": "object", "properties": properties, "additionalProperties": False}})


def self_reference(url: str) -> str:
    """A schema that is itself."""
    return post(url, {"json_schema": {"$ref": "#", "title": _mark()}})


def rule_cycle(url: str) -> str:
    """Rules that lead back without a token."""
    return post(url, {"ebnf": f"root ::= a # {_mark()}\na ::= b\nb ::= a"})


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        chained_refs,
        chained_rules,
        chained_gbnf,
        ambiguous,
        ambiguous_nullable,
        abandoned,
        large_regex,
        repeated_regex,
        large_multiple,
        endless_array,
        large_enum,
        many_properties,
        self_reference,
        rule_cycle,
    )
}


def main(url: str, *names: str) -> None:
    """Run the named attacks, or all, one after another."""
    for name in names or ATTACKS:
        started = time.monotonic()
        answer = ATTACKS[name](url.rstrip("/"))
        print(f"{name:20} {time.monotonic() - started:6.2f} s  {answer[:160]}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
