"""The detokenizer's state: from announcement to last output, tokens that come early, and stop strings."""

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from ramet.srt.managers import detokenizer_manager
from ramet.srt.managers.detokenizer_manager import MAX_EARLY_REQUESTS, Detokenizer
from ramet.srt.managers.io_struct import DetokenizerRequest, FinishReason, RequestOutput
from ramet.srt.text.tokenizer import Tokenizer
from random_models import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(Path(folder))
    return Tokenizer.from_path(str(folder))


def output(rid: str, token_ids: list[int], reason: FinishReason | None = None) -> RequestOutput:
    return RequestOutput(
        rid=rid,
        token_ids=token_ids,
        finish_reason=reason,
        prompt_tokens=1,
        completion_tokens=len(token_ids),
        cached_tokens=0,
    )


def announcement(rid: str, stop: list[str] | None = None, **options: bool) -> DetokenizerRequest:
    return DetokenizerRequest(rid=rid, prompt_tail_ids=[], stop=stop or [], **options)


def test_text_of_interleaved_requests(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    ids = {"a": tokenizer.encode("clone 植物"), "b": tokenizer.encode("runner 🌱")}
    texts = {"a": "", "b": ""}
    for rid in ids:
        assert detokenizer.announce(announcement(rid)) == []
    for place in range(max(map(len, ids.values()))):
        batch = [output(rid, ids[rid][place : place + 1]) for rid in ids if place < len(ids[rid])]
        for text in detokenizer.push(batch):
            texts[text.output.rid] += text.text
    assert texts == {"a": "clone 植物", "b": "runner 🌱"}


def test_tokens_before_the_announcement_wait_for_it(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    first, *rest = tokenizer.encode("a ramet")
    assert detokenizer.push([output("a", [first])]) == []
    assert detokenizer.push([output("a", rest, FinishReason(type="length", length=9))]) == []
    texts = detokenizer.announce(announcement("a"))
    assert "".join(text.text for text in texts) == "a ramet"
    assert texts[-1].output.finish_reason is not None


def test_tokens_that_nobody_announces_are_dropped_in_the_end(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    for number in range(MAX_EARLY_REQUESTS + 1):
        detokenizer.push([output(str(number), [5])])
    assert detokenizer.announce(announcement("0")) == []
    assert len(detokenizer.announce(announcement("1"))) == 1


def test_a_finished_request_is_forgotten(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    end = FinishReason(type="stop", matched=2)
    for _ in range(2):
        detokenizer.announce(announcement("a", ["x"]))
        (text,) = detokenizer.push([output("a", tokenizer.encode("ab"), end)])
        assert text.text == "ab"


def test_held_text_comes_with_the_end(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    detokenizer.announce(announcement("a", ["ant!"]))
    (text,) = detokenizer.push([output("a", tokenizer.encode("plant"))])
    assert text.text == "pl"
    (text,) = detokenizer.push([output("a", [], FinishReason(type="abort", message="aborted"))])
    assert text.text == "ant"


@pytest.mark.parametrize(("keep", "expected"), [(False, "pl"), (True, "plant")])
def test_the_stop_string_is_cut(tokenizer: Tokenizer, keep: bool, expected: str) -> None:
    detokenizer = Detokenizer(tokenizer)
    detokenizer.announce(announcement("a", ["ant"], no_stop_trim=keep))
    reason = FinishReason(type="stop", matched="ant")
    (text,) = detokenizer.push([output("a", tokenizer.encode("plants"), reason)])
    assert text.text == expected


def test_a_stop_in_the_last_token_is_a_stop(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    detokenizer.announce(announcement("a", ["ant"]))
    (text,) = detokenizer.push([output("a", tokenizer.encode("plant"), FinishReason(type="length", length=3))])
    assert text.output.finish_reason == FinishReason(type="stop", matched="ant")


def test_special_tokens(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    end = FinishReason(type="stop", matched=4)
    for skip, expected in ((True, "a"), (False, "a<|im_end|>")):
        detokenizer.announce(announcement("a", skip_special_tokens=skip))
        (text,) = detokenizer.push([output("a", [*tokenizer.encode("a"), 4], end)])
        assert text.text == expected


def test_the_signals_that_follow_the_first_do_not_end_the_clean_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sockets"
    folder.mkdir()
    (folder / "one").touch()
    remove = shutil.rmtree

    def remove_under_fire(path: str, *, ignore_errors: bool) -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        remove(path, ignore_errors=ignore_errors)

    def serve(*_: object) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the first signal ends it")

    config = SimpleNamespace(directory=str(folder), parent_pid=os.getppid())
    monkeypatch.setattr(detokenizer_manager, "read_child_config", lambda: config)
    monkeypatch.setattr(detokenizer_manager, "die_with_parent", lambda *_: None)
    monkeypatch.setattr(detokenizer_manager, "_serve", serve)
    monkeypatch.setattr(shutil, "rmtree", remove_under_fire)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            detokenizer_manager.main(["--status-fd", "3"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 0
    assert not folder.exists()


def test_a_stop_tokens_text_is_cut_unless_it_is_wanted(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode("ab")
    for keep, expected in ((False, "a"), (True, "ab")):
        detokenizer.announce(announcement("a", no_stop_trim=keep))
        end = output("a", ids[1:], FinishReason(type="stop", matched=ids[1]))
        end.ends_in_stop_token = True
        texts = detokenizer.push([output("a", ids[:1]), end])
        assert "".join(text.text for text in texts) == expected
