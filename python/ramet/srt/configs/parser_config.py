"""Owns which parsers read a model's output: their names, and the choice of an instance."""

from dataclasses import dataclass

AUTO, NONE = "auto", "none"
HARMONY = "gpt-oss"  # its reasoning and its calls are messages of one format
TOOL_CALL_PARSERS = (
    AUTO, NONE, "deepseekv3", "deepseekv31", "glm45", HARMONY, "hermes", "kimi_k2", "llama3", "mistral", "pythonic",
    "qwen", "qwen25", "qwen3_coder",
)  # fmt: skip
REASONING_PARSERS = (AUTO, NONE, "deepseek-r1", "glm45", HARMONY, "kimi", "qwen3")


@dataclass(frozen=True, kw_only=True)
class ParserConfig:
    """Made by ServerArgs.parser_config. "auto" is resolved where the chat template is read: text/output_format.py."""

    tool_call_parser: str = AUTO  # one of TOOL_CALL_PARSERS
    reasoning_parser: str = AUTO  # one of REASONING_PARSERS

    def check(self) -> None:
        """Raises ValueError for a name that there isn't, and for two that don't go together."""
        for flag, name, known in (
            ("--tool-call-parser", self.tool_call_parser, TOOL_CALL_PARSERS),
            ("--reasoning-parser", self.reasoning_parser, REASONING_PARSERS),
        ):
            if name not in known:
                raise ValueError(f"{flag} must be one of {', '.join(known)}; got {name!r}")
        names = {self.tool_call_parser, self.reasoning_parser}
        if HARMONY in names and names - {HARMONY, AUTO, NONE}:
            raise ValueError(
                f"--tool-call-parser {self.tool_call_parser} and --reasoning-parser {self.reasoning_parser} don't go "
                f"together: {HARMONY} is one format of both"
            )
