"""Chat templates of real models: each renders to the text that transformers makes of it, chat by chat.

They are not in this repository: RAMET_TEMPLATES names a folder with *.jinja files.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from manual.compare_with_transformers import CHATS, Counts, compare_template, their_plain_tokenizer

FOLDER = os.environ.get("RAMET_TEMPLATES")
FILES = sorted(Path(FOLDER).rglob("*.jinja")) if FOLDER else []


@pytest.fixture(scope="module")
def their_tokenizer() -> Any:
    return their_plain_tokenizer()


@pytest.mark.skipif(not FILES, reason="RAMET_TEMPLATES names no folder with chat templates")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_template(
    file: Path, their_tokenizer: Any, capsys: pytest.CaptureFixture[str], record_property: Callable[..., None]
) -> None:
    record_property("client", "templates")
    record_property("step", file.name)
    counts = Counts()
    compare_template(file, their_tokenizer, counts)
    assert not counts.different, capsys.readouterr().out
    assert counts.same + counts.refused == len(CHATS)  # a few want values that no chat has: both refuse
