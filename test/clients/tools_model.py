"""Owns the model that clients talk to: the demo model with a chat template that knows tools, and a longer context."""

import json
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEMO_MODEL = HERE.parents[1] / "examples" / "demo_model"
CONTEXT_LEN = 8192  # agents' instructions and schemas are long, and this vocabulary is small


def write_tools_model(folder: Path) -> Path:
    """The model's folder, its weights those of the demo model."""
    shutil.copytree(DEMO_MODEL, folder)
    for name, changes in {
        "config.json": {"max_position_embeddings": CONTEXT_LEN},
        "tokenizer_config.json": {
            "model_max_length": CONTEXT_LEN,
            "chat_template": (HERE / "tools_template.jinja").read_text(),
        },
    }.items():
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, **changes}))
    return folder
