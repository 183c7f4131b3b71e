"""Owns the formats of tool calls by name, and which one a chat template is made for."""

import re

from ramet.srt.configs.parser_config import NONE
from ramet.srt.text.tool_calls.deepseek import SECTION_BEGIN as DEEPSEEK_BEGIN
from ramet.srt.text.tool_calls.deepseek import DeepSeekV3Format, DeepSeekV31Format
from ramet.srt.text.tool_calls.format import ToolCallFormat
from ramet.srt.text.tool_calls.glm45 import Glm45Format
from ramet.srt.text.tool_calls.harmony import HarmonyFormat
from ramet.srt.text.tool_calls.hermes import HermesFormat
from ramet.srt.text.tool_calls.kimi_k2 import KimiK2Format
from ramet.srt.text.tool_calls.llama3 import Llama3Format
from ramet.srt.text.tool_calls.mistral import MistralFormat
from ramet.srt.text.tool_calls.pythonic import PythonicFormat
from ramet.srt.text.tool_calls.qwen3_coder import Qwen3CoderFormat

FORMATS: dict[str, type[ToolCallFormat]] = {
    "deepseekv3": DeepSeekV3Format,
    "deepseekv31": DeepSeekV31Format,
    "glm45": Glm45Format,
    "gpt-oss": HarmonyFormat,
    "hermes": HermesFormat,
    "kimi_k2": KimiK2Format,
    "llama3": Llama3Format,
    "mistral": MistralFormat,
    "pythonic": PythonicFormat,
    "qwen": HermesFormat,
    "qwen25": HermesFormat,
    "qwen3_coder": Qwen3CoderFormat,
}


def recognise_tool_calls(template: str) -> str:
    """The name of the format in which a chat template writes calls, or asks for them; "none" if it is none of these."""
    if "<|channel|>" in template and "functions." in template:
        return "gpt-oss"
    if "<|tool_calls_section_begin|>" in template:
        return "kimi_k2"
    if DEEPSEEK_BEGIN in template:
        return "deepseekv3" if "```json" in template else "deepseekv31"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" in template and "<tool_calls>" not in template:
        return _recognise_tagged(template)
    if "func_name1(" in template:
        return "pythonic"
    if re.search(r'"name\\*": function name, \\*"parameters\\*":', template):
        return "llama3"
    return NONE


def _recognise_tagged(template: str) -> str:
    """The same for a template that has <tool_call>."""
    if "<arg_key>" in template:
        return "glm45"
    if "<function=" in template and "<parameter=" in template:
        return "qwen3_coder"
    return "hermes" if re.search(r'"name\\*":.{0,80}"arguments\\*":', template, re.DOTALL) else NONE
