"""What parsing an output costs for each of its tokens: microseconds in the main process, one request's share.

    python benchmark/bench_parsers.py [--tokens 20000] [--rounds 5]

Each parser reads outputs in pieces of the size of a token: an answer without calls, reasoning and an answer, and calls
whose arguments are mostly one long text. The parser of an instance does it, with all that it does to a choice.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench_common import ROOT, report

sys.path.insert(0, str(ROOT / "test"))

PROSE = 'A ramet is one plant of a clonal colony: it "grows" out of another, <like> {this} [one].\nSo it goes. '
PIECE = re.compile(r" ?[^\W\d_]{1,6}|\d|\s|<\|[a-z_]+\|>|<｜[^｜]+｜>|[^\w\s]{1,2}|_")
CALL_CHARS = 400  # of the long argument


def pieces_of(text: str) -> list[str]:
    """The text in pieces of the size of tokens."""
    pieces = PIECE.findall(text)
    assert "".join(pieces) == text
    return pieces


def repeated(text: str, num_tokens: int) -> list[str]:
    """Pieces of the text, again and again."""
    pieces = pieces_of(text)
    return (pieces * (num_tokens // len(pieces) + 1))[:num_tokens]


def microseconds(make: Callable[[], "OutputParser"], pieces: list[str], rounds: int) -> float:  # noqa: F821 - imported late
    """The processor's time for one piece, in the fastest round: others may have the caches meanwhile."""
    times = []
    for _ in range(rounds):
        parser = make()
        start = time.process_time()
        for piece in pieces:
            parser.feed(piece)
        parser.finish()
        times.append((time.process_time() - start) / len(pieces) * 1e6)
    return min(times)


def measure(name: str, reasoning: str, num_tokens: int, rounds: int) -> dict[str, float]:
    """Kind of output -> microseconds for each token."""
    from ramet.srt.configs.parser_config import ParserConfig
    from ramet.srt.text.output_format import OutputFormat, PromptEnd
    from tool_call_texts import TOOLS, WRITERS, make_tokenizer

    output_format = OutputFormat(make_tokenizer(), ParserConfig(tool_call_parser=name, reasoning_parser=reasoning))
    is_harmony = name == "gpt-oss"
    tools = [type(tool)(tool.name.replace("-", "_"), tool.parameters) for tool in TOOLS]

    def make() -> "OutputParser":  # noqa: F821 - as above
        return output_format.parser(PromptEnd(), tools if name != "none" else ())

    answer = ["<|channel|>", "final", "<|message|>"] if is_harmony else []
    thought = ["<|channel|>", "analysis", "<|message|>"] if is_harmony else ["<think>", "\n"]
    between = ["<|end|>", "<|start|>", "assistant", *answer] if is_harmony else ["\n", "</think>", "\n\n"]
    half = repeated(PROSE, num_tokens // 2)
    measured = {"answer": microseconds(make, [*answer, *half, *half], rounds)}
    if reasoning != "none":
        measured["reasoning and answer"] = microseconds(make, [*thought, *half, *between, *half], rounds)
    if name != "none":
        text = WRITERS[name][0]([("write_file", {"text": (PROSE * 9)[:CALL_CHARS]})] * (num_tokens // 100))
        pieces = pieces_of(text)[:num_tokens]
        measured["calls"] = microseconds(make, pieces, rounds)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000, help="length of each output")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="file for the result as JSON")
    args = parser.parse_args()
    from ramet.srt.configs.parser_config import TOOL_CALL_PARSERS

    names = [name for name in TOOL_CALL_PARSERS if name not in ("auto", "qwen", "qwen25")]  # those two are hermes
    values, rows = {}, []
    for name in names:
        values[name] = measure(name, "gpt-oss" if name == "gpt-oss" else "qwen3", args.tokens, args.rounds)
        rows.append((name, ", ".join(f"{kind} {value:.2f} µs" for kind, value in values[name].items())))
    report("Parsers, for each token", args.output, rows, {"tokens": args.tokens, "microseconds": values})


if __name__ == "__main__":
    main()
