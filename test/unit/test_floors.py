"""The floors of the code: a file imports only from floors below its own, and no file imports itself by way of others.

FLOORS doubles as the map of the code. A new folder or top-level file gets a line here.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "python" / "ramet"

# From the ground up. A file belongs to the longest name that its own begins with.
FLOORS = {
    "ramet": "the package's face: the version, and Engine on demand",
    "srt.environ": "environment variables",
    "srt.errors": "what a request can end with; what an error says in one line",
    "srt.observability": "logs and progress",
    "srt.utils": "addresses, host memory, the CUDA driver, threads, imports: knows nothing of models",
    "srt.configs": "one frozen config for each owner",
    "srt.text": "tokens and text, chat templates, text that comes in pieces",
    "srt.text.tool_calls": "tool calls in each family's format: parsers and grammars",
    "srt.text.reasoning": "what models write before they answer",
    "srt.text.output_parser": "one output's content, reasoning and calls",
    "srt.text.output_format": "an instance's parsers, and grammars that hold a model to their formats",
    "srt.weights": "weight data without torch: manifest, boxes, plans, what instances say to each other",
    "srt.lora.adapter": "what an adapter is, without torch",
    "srt.flags": "the flags of each subject",
    "srt.server_flags": "all of them together",
    "srt.server_facts": "what follows from them",
    "srt.server_checks": "what they must be together",
    "srt.server_args": "one config from them for each owner",
    "srt.cli_parser": "how command lines are read",
    "srt.config_file": "flags from a file",
    "srt.command_line": "flags from the command line",
    "srt.distributed": "ranks that meet and talk",
    "srt.sampling": "what a request asks of its tokens",
    "srt.batch": "one pass as data",
    "srt.mem_cache": "the KV cache: pages, rows, prefixes",
    "srt.layers.kernels": "Triton kernels",
    "srt.layers.cpu_kernels": "kernels for CPUs in C++, and building them",
    "srt.layers": "layers, each with the rule by which it is sharded",
    "srt.layers.attention": "attention and its backends",
    "srt.models": "model families",
    "srt.model_loader.arena": "the memory that holds a rank's weights, on each kind of device",
    "srt.model_loader.transport": "what both sides of a transfer speak",
    "srt.model_loader.checksums": "what weights hash to",
    "srt.model_loader.checkpoint": "weights from files",
    "srt.model_loader": "what all ways to fill an arena share",
    "srt.model_loader.seed": "giving weights",
    "srt.model_loader.client": "taking weights",
    "srt.model_loader.remote_instance_loader": "weights from running instances, or else from files",
    "srt.model_loader.loader": "the loader that the flags ask for",
    "srt.model_loader.digest_command": "ramet digest",
    "srt.lora": "adapters: their files, and a rank's part of them",
    "srt.modelexpress": "what clients and server of the metadata service share",
    "srt.modelexpress.client": "finding seeds by what they serve, and being found",
    "srt.modelexpress.server": "the metadata server",
    "srt.model_executor": "one rank's model, and its weights as others see them",
    "srt.managers": "the processes behind the HTTP server: requests, tokens, passes",
    "srt.entrypoints.http": "what all HTTP routes share",
    "srt.entrypoints.openai": "OpenAI's routes",
    "srt.entrypoints.anthropic": "Anthropic's routes",
    "srt.entrypoints": "an instance from its start to its end",
    "srt.entrypoints.routes": "the HTTP routes, a file for each API",
    "srt.entrypoints.http_api": "all routes as one application",
    "srt.entrypoints.http_server": "when that application is served",
    "srt.entrypoints.launch": "an instance with its HTTP server",
    "srt.entrypoints.standby": "an instance without a model, and what it becomes",
    "trainer": "a training process: what it publishes of a model, with nothing of the server",
    "launch_server": "python -m ramet.launch_server",
    "modelexpress_server": "python -m ramet.modelexpress_server",
    "cli": "the console script",
    "__main__": "python -m ramet",
}
# The face makes Engine known without importing it: whoever asks for it gets it.
EXCEPTED = {("ramet", "ramet.srt.entrypoints.engine")}


def module_name(path: Path) -> str:
    name = ".".join(("ramet", *path.relative_to(PACKAGE).with_suffix("").parts))
    return name.removesuffix(".__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py") if "_pb2" not in path.name}


@functools.cache
def imported_modules(module: str) -> set[str]:
    """The modules of the package that a module imports: at its top, in functions, and for types only."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; the whole name says where it leads"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else str(node.module) for name in names}
    return {name for name in found if name in MODULES and name != module}


def floor(module: str) -> str:
    name = module.removeprefix("ramet.")
    fitting = [key for key in FLOORS if name == key or name.startswith(f"{key}.")]
    assert fitting, f"{module} belongs to no floor: give it a line in FLOORS"
    return max(fitting, key=len)


def upward_imports() -> Iterator[str]:
    order = list(FLOORS)
    for module in MODULES:
        if not MODULES[module].read_text().strip():
            continue  # a folder's empty __init__.py
        for target in sorted(imported_modules(module)):
            if order.index(floor(target)) > order.index(floor(module)) and (module, target) not in EXCEPTED:
                yield f"{module} ({floor(module)}) imports {target} ({floor(target)})"


def test_nothing_imports_from_a_floor_above_its_own():
    assert list(upward_imports()) == []


def test_there_is_no_circle():
    imports = {module: imported_modules(module) for module in MODULES}
    for module, target in EXCEPTED:
        imports[module].discard(target)
    open_modules: list[str] = []
    done: set[str] = set()

    def visit(module: str) -> None:
        if module in open_modules:
            circle = [*open_modules[open_modules.index(module) :], module]
            raise AssertionError(f"a circle of imports: {' -> '.join(circle)}")
        if module not in done:
            open_modules.append(module)
            for target in sorted(imports[module]):
                visit(target)
            done.add(open_modules.pop())

    for module in sorted(MODULES):
        visit(module)


def test_every_floor_is_in_use():
    used = {floor(module) for module, path in MODULES.items() if path.read_text().strip()}
    assert set(FLOORS) == used
