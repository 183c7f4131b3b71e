"""The tokenizer of a model folder against transformers, token bytes, and what is wrong with broken folders."""

import json
from pathlib import Path
from typing import Any

import pytest
from ramet.srt.errors import RequestError
from ramet.srt.text.incremental_decode import IncrementalDecoder
from ramet.srt.text.tokenizer import Tokenizer
from random_models import write_tokenizer
from tokenizer_kinds import write_kind
from tokenizers import AddedToken
from tokenizers import Tokenizer as BackendTokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


def configure(folder: Path, **settings: Any) -> Tokenizer:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return Tokenizer.from_path(str(folder))


def test_same_as_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_path(str(folder))
    for text in ("a ramet", "植物 🌱", " x\n\n", "<|im_start|>user\nhi<|im_end|>", "<s>a</s>"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert ours.chat_template is not None
    for prompt in (False, True):
        assert ours.chat_template.render(messages, add_generation_prompt=prompt) == theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )


def test_token_bytes_join_to_the_text(folder: Path) -> None:
    tokenizer = Tokenizer.from_path(str(folder))
    text = "clone 植物 🌱\n<|im_end|>"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert tokenizer.token_bytes(330) == b"", "an id that no token has"


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "Qwen2Tokenizer", "LlamaTokenizerFast", "GemmaTokenizer"])
@pytest.mark.parametrize("says", [True, False])
def test_begin_marks(folder: Path, name: str, says: bool) -> None:
    """The flag counts for classes that have heeded it since transformers 4; others do as tokenizer.json says."""
    from tokenizers.processors import TemplateProcessing

    plain = Tokenizer.from_path(str(folder)).encode("a")
    heeds = name in ("LlamaTokenizerFast", "GemmaTokenizer")
    flags = {"tokenizer_class": name, "add_bos_token": says, "add_eos_token": True}
    assert configure(folder, **flags).encode("a") == ([1, *plain] if heeds and says else plain)
    assert configure(folder, **flags).encode("a", add_special_tokens=False) == plain
    assert configure(folder, **flags).encode("<s>a") == ([1, *plain] if says or not heeds else plain), "never twice"
    backend = BackendTokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    assert configure(folder, **flags).encode("a") == (plain if heeds and not says else [1, *plain])


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}])
@pytest.mark.parametrize("marks", [None, "<s> $A", "$A </s>"])
def test_marks_are_those_of_transformers(folder: Path, flags: dict[str, bool], marks: str | None) -> None:
    from tokenizers.processors import TemplateProcessing

    transformers = pytest.importorskip("transformers")
    if marks is not None:
        backend = BackendTokenizer.from_file(str(folder / "tokenizer.json"))
        backend.post_processor = TemplateProcessing(single=marks, special_tokens=[("<s>", 1), ("</s>", 2)])
        backend.save(str(folder / "tokenizer.json"))
    ours, theirs = configure(folder, **flags), transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("a", "<s>a", ""):
        assert ours.encode(text) == theirs.encode(text)


def test_a_failure_of_the_library_is_the_requests(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As the binding's, which is no Exception."""

    class Broken:
        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> None:
            raise PanicException("AddedVocabulary bad split")

    tokenizer = Tokenizer.from_path(str(folder))
    monkeypatch.setattr(tokenizer, "_backend", Broken())
    with pytest.raises(RequestError, match="bad split"):
        tokenizer.encode("a")


def test_truncation_and_padding_are_off(folder: Path) -> None:
    ids = Tokenizer.from_path(str(folder)).encode("植物は育つ!?")
    backend = BackendTokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(folder / "tokenizer.json"))
    assert len(ids) > 4
    assert Tokenizer.from_path(str(folder)).encode("植物は育つ!?") == ids


def test_tokens_of_the_config_file(folder: Path) -> None:
    tokenizer = configure(
        folder,
        added_tokens_decoder={"320": {"content": "<new>", "special": True}, "321": {"content": "<tool>"}},
        eos_token={"content": "<new>"},
    )
    assert tokenizer.encode("a<new>b<tool>")[1:] == [320, *tokenizer.encode("b"), 321]
    assert tokenizer.decode([320, 321], skip_special_tokens=True) == "<tool>"
    assert tokenizer.special_token_id("eos_token") == 320
    with pytest.raises(ValueError, match="id 500"):
        configure(folder, added_tokens_decoder={"500": {"content": "<far>"}})


def test_special_token_that_the_file_does_not_mark(folder: Path) -> None:
    backend = BackendTokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([AddedToken("<end>", special=False)])
    backend.save(str(folder / "tokenizer.json"))
    assert configure(folder, eos_token="<end>").decode([backend.token_to_id("<end>")], skip_special_tokens=True) == ""


def test_chat_template_sources(folder: Path) -> None:
    def rendered(tokenizer: Tokenizer) -> str:
        assert tokenizer.chat_template is not None
        return tokenizer.chat_template.render([{"role": "user", "content": "x"}])

    listed = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "listed"}]
    assert rendered(configure(folder, chat_template=listed)) == "listed"
    (folder / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    assert rendered(Tokenizer.from_path(str(folder))) == "file x"
    (folder / "mine.jinja").write_text("mine")
    assert rendered(Tokenizer.from_path(str(folder), str(folder / "mine.jinja"))) == "mine"
    (folder / "chat_template.jinja").unlink()
    assert configure(folder, chat_template=None).chat_template is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_broken_files_are_named(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        Tokenizer.from_path(str(folder))


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        Tokenizer.from_path(str(tmp_path))


TOOL = {"content": "<tool>", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False}
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
SPECIAL_X = {**TOOL, "content": "<x>", "special": True}
END = {**TOOL, "content": "<|im_end|>"}
ADDED_FILES: dict[str, dict[str, Any]] = {
    "ids": {CONFIG: {"added_tokens_decoder": {"320": TOOL, "321": SPECIAL_X}}},
    "other flags": {CONFIG: {"added_tokens_decoder": {"4": {**END, "rstrip": True, "special": True}}}},
    "no longer special": {CONFIG: {"added_tokens_decoder": {"4": END}}},
    "base token": {CONFIG: {"added_tokens_decoder": {"69": {**TOOL, "content": "a", "special": True}}}},
    "additional": {CONFIG: {"additional_special_tokens": ["<x>", "<y>", "<|im_end|>"]}},
    "extra": {CONFIG: {"extra_special_tokens": ["<y>", "<x>"], "additional_special_tokens": ["<z>"]}},
    "extra by name": {CONFIG: {"extra_special_tokens": {"image_token": "<image>", "b_token": "<b>"}}},
    "extra with and without names": {
        CONFIG: {"extra_special_tokens": {"image_token": "<image>"}, "additional_special_tokens": ["<x>", "<y>"]}
    },
    "extra by name and the map's": {
        CONFIG: {"extra_special_tokens": {"image_token": "<image>"}, "additional_special_tokens": ["<x>"]},
        MAP: {"additional_special_tokens": ["<y>"]},
    },
    "role and extra": {
        CONFIG: {"mask_token": {"__type": "AddedToken", **TOOL, "content": "<x>"}, "extra_special_tokens": ["<x>"]}
    },
    "added and special later": {
        CONFIG: {"added_tokens_decoder": {"320": TOOL}, "additional_special_tokens": ["<x>"], "mask_token": "<tool>"}
    },
    "own roles": {CONFIG: {"image_token": "<image>", "pad_token": "<pad>", "add_x_token": True}},
    "role with flags": {CONFIG: {"mask_token": {"__type": "AddedToken", **TOOL}}},
    "added": {ADDED: {"<x>": 320, "<y>": 321}, CONFIG: {"additional_special_tokens": ["<y>"]}},
    "map": {MAP: {"pad_token": "<pad>", "eos_token": {**TOOL, "content": "<end>"}}},
    "map with extra": {MAP: {"extra_special_tokens": ["<y>", TOOL]}, ADDED: {"<x>": 320, "<y>": 321}},
    "map alone": {MAP: {"additional_special_tokens": ["<y>", "<x>"]}},
    "map and added": {
        MAP: {"additional_special_tokens": ["<y>"], "cls_token": "<x>"},
        ADDED: {"<x>": 320, "<y>": 321, "<w>": 322},
    },
    "map without effect": {
        MAP: {"pad_token": "<pad>"}, ADDED: {"<x>": 320}, CONFIG: {"added_tokens_decoder": {}}
    },
    "split": {CONFIG: {"split_special_tokens": True}},
}  # fmt: skip


@pytest.mark.parametrize("files", ADDED_FILES.values(), ids=ADDED_FILES)
def test_tokens_of_all_files_are_those_of_transformers(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    transformers = pytest.importorskip("transformers")
    for name, content in files.items():
        file = folder / name
        file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | content))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_path(str(folder))
    expected = {
        token_id: repr(token) for token_id, token in theirs.backend_tokenizer.get_added_tokens_decoder().items()
    }
    assert {token_id: repr(token) for token_id, token in ours._backend.get_added_tokens_decoder().items()} == expected
    assert ours.special_tokens == theirs.special_tokens_map
    for text in ("a <tool> b<x><y>", " <|im_end|> a", "<image><pad><w></s>"):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == ids
        for skip in (True, False):
            expected_text = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip) == expected_text
            decoder = IncrementalDecoder(ours, skip_special_tokens=skip)
            assert "".join([*(decoder.push([i]) for i in ids), decoder.push([], final=True)]) == expected_text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("added_tokens.json", {"<x>": 400}, r"added_tokens\.json: added token '<x>' can't get the id 400"),
        ("added_tokens.json", {"<x>": "y"}, r"added_tokens\.json: 'y' is not a token id"),
        ("added_tokens.json", ["<x>"], r"added_tokens\.json must hold a JSON object"),
        ("special_tokens_map.json", {"eos_token": 5}, r"special_tokens_map\.json: 'eos_token': 5 is not a token"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "'added_tokens_decoder' must be an object"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"5": {"x": 1}}},
            "'added_tokens_decoder': .* is not a token",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"5": {"content": "x", "special": 1}}},
            "special of 'x' must be",
        ),
        ("tokenizer_config.json", {"additional_special_tokens": "<x>"}, "must be a list or an object"),
        ("tokenizer_config.json", {"chat_template": 5}, "'chat_template' must be a text"),
    ],
)
def test_entries_that_are_no_tokens_are_named(folder: Path, name: str, content: Any, words: str) -> None:
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        Tokenizer.from_path(str(folder))


def test_chat_templates_by_name(folder: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    template = configure(folder, chat_template=named).chat_template
    assert template is not None
    assert template.render([]) == "plain"
    assert template.render([], tools=[{}]) == "tools"
    template = configure(folder, chat_template=named[1:]).chat_template
    assert template is not None
    with pytest.raises(ValueError, match="has tool_use and none called default"):
        template.render([])
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("file tools")
    (folder / "chat_template.jinja").write_text("file")
    template = Tokenizer.from_path(str(folder)).chat_template
    assert template is not None
    assert (template.render([]), template.render([], tools=[])) == ("file", "file tools")


def test_older_files_that_cannot_be_read_are_one_line(folder: Path) -> None:
    pytest.importorskip("transformers")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json, .* can't read the older files here: .+") as caught:
        Tokenizer.from_path(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("wanted", [True, False, None])
def test_a_prefix_space_is_where_transformers_has_it(folder: Path, name: str, wanted: bool | None) -> None:
    transformers = pytest.importorskip("transformers")
    said = {} if wanted is None else {"add_prefix_space": wanted}
    ours = configure(folder, tokenizer_class=name, **said)
    assert ours.encode("a ramet", False) == transformers.AutoTokenizer.from_pretrained(folder).encode("a ramet")


def test_a_prefix_space_that_is_added_though_it_is_not_wanted_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for kind, number in (("unigram", 1), ("sentencepiece", 2), ("byte_level", 2)):
        Tokenizer.from_path(str(write_kind(tmp_path, kind, add_prefix_space=False)))
        assert len(caplog.messages) == number
