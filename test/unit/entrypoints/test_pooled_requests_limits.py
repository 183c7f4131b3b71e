"""What one request that generates nothing may become in memory."""

import pytest
from ramet.srt.entrypoints.openai import serving_pooling
from ramet.srt.entrypoints.openai.serving_pooling import check_joined_size
from ramet.srt.errors import RequestError


@pytest.mark.parametrize(
    ("queries", "documents", "words"),
    [(["q" * 10] * 4, ["d"] * 4, "44 characters"), ([[1] * 10] * 4, [[2]] * 4, "44 token ids")],
)
def test_a_query_stands_in_every_prompt(monkeypatch: pytest.MonkeyPatch, queries, documents, words: str) -> None:
    for limit in (44, 43):
        monkeypatch.setattr(serving_pooling, "MAX_JOINED_CHARS", limit)
        monkeypatch.setattr(serving_pooling, "MAX_JOINED_IDS", limit)
        if limit == 44:
            check_joined_size(queries, documents, "query", "items")
            continue
        with pytest.raises(RequestError, match=words.replace("44", "43")) as caught:
            check_joined_size(queries, documents, "query", "items")
        assert caught.value.param == "query"
