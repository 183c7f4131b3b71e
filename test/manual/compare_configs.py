"""Owns the comparison of Ramet's reading of real configs with that of transformers.

`python test/manual/compare_configs.py FOLDER`: FOLDER holds files whose names end in config.json, at any depth. It
prints for each "equal", "refused" with Ramet's message, or "UNLIKE" with what differs. Then every key of every other
config is added to an accepted one of each class, which must still be equal, or refused by the key's name. It ends
with 1 otherwise.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import config_reference as cr


def main(folder: str) -> int:
    configs = read_folder(Path(folder))
    accepted = {}
    unlike = 0
    for name, config in configs.items():
        try:
            message = cr.compare(config)
        except cr.Disagreement as error:
            unlike += 1
            print(f"UNLIKE   {name}: {error}")
            continue
        if message is None:
            accepted[name] = config
        print(f"equal    {name}" if message is None else f"refused  {name}: {message.partition('config.json')[2]}")
    unlike += sum(add_foreign_keys(name, config, configs) for name, config in one_of_each_class(accepted).items())
    print(f"{len(configs)} configs: {len(accepted)} equal, {unlike} unlike")
    return int(unlike > 0)


def read_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """The JSON objects in files whose names end in config.json, but for those of a quantiser or of generation."""
    files = [
        file
        for file in sorted(folder.rglob("*config.json"))
        if not file.name.endswith(("quant_config.json", "generation_config.json", "tokenizer_config.json"))
    ]
    if not files:
        raise SystemExit(f"{folder} holds no file whose name ends in config.json")
    return {str(file.relative_to(folder)): json.loads(file.read_text()) for file in files}


def one_of_each_class(configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    by_class = {config["architectures"][0]: (name, config) for name, config in configs.items()}
    return dict(by_class.values())


def add_foreign_keys(name: str, config: dict[str, Any], others: dict[str, dict[str, Any]]) -> int:
    """How many keys of the other configs, added to this one, make Ramet compute something else than transformers."""
    values: dict[str, list[Any]] = defaultdict(list)
    for other in others.values():
        for part in (other, *(value for value in other.values() if isinstance(value, dict))):
            for key, value in part.items():
                if key not in config and key != "quantization_config" and value not in values[key]:
                    values[key].append(value)
    unlike = taken = refused = 0
    base = {**config, "num_hidden_layers": 2, "vocab_size": 64}
    for key, choices in values.items():
        for value in choices[:4]:
            try:
                message = cr.compare(base | {key: value})
            except cr.Disagreement as error:
                unlike += 1
                print(f"UNLIKE   {name} with {key} {str(value)[:60]}: {str(error)[:300]}")
                continue
            taken += message is None
            refused += message is not None
            if message is not None and repr(key) not in message:
                unlike += 1
                print(f"UNNAMED  {name} with {key} {str(value)[:60]}: {message[:300]}")
    print(f"         {name}: of foreign keys and values {taken} are harmless, {refused} refused, {unlike} unlike")
    return unlike


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    sys.exit(main(sys.argv[1]))
