"""Tokenizers, incremental detokenizing and stop texts: what comes out depends on the tokens alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from distserve.gateway.detokenize import Detokenizer, StopFinder
from distserve.gateway.template import ChatTemplate, TemplateRefused
from distserve.gateway.text import INLINE_CHARS, TextCodec
from tests.gateway.tokenizers_for_tests import TEMPLATE, byte_level, save, sentencepiece

BYTE_LEVEL = TextCodec(byte_level())
PIECES = TextCodec(sentencepiece())
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def streamed(codec: TextCodec, ids: tuple[int, ...], skip: bool = True) -> tuple[list[str], str]:
    """The parts as they come, and the whole."""
    detokenizer = Detokenizer(codec, skip)
    parts = [*(detokenizer.push(i) for i in ids), detokenizer.finish()]
    return parts, "".join(parts)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 479), max_size=40), st.booleans())
def test_any_tokens_stream_to_what_the_tokenizer_decodes(ids: list[int], skip: bool) -> None:
    """Byte-level: exact for every sequence, broken characters included."""
    _, text = streamed(BYTE_LEVEL, tuple(ids), skip)
    assert text == BYTE_LEVEL.decode(ids, skip)


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_text_survives_and_no_part_holds_half_a_character(text: str) -> None:
    ids = BYTE_LEVEL.encode(text)
    parts, whole = streamed(BYTE_LEVEL, ids)
    assert whole == text
    assert "".join(p for p in parts if "\ufffd" in p).count("\ufffd") == text.count("\ufffd")


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_sentencepiece_text_survives_with_its_leading_space(text: str) -> None:
    """An answer continues a prompt, so the space that "▁" stands for stays; a whole text's decoding drops it."""
    ids = PIECES.encode(text, add_special_tokens=False)
    _, whole = streamed(PIECES, ids)
    marked = text.replace("▁", " ")
    assert whole == (" " + marked if text else "")
    assert PIECES.decode(ids) == (whole[1:] if whole.startswith(" ") else whole)


def test_a_character_over_several_tokens_comes_out_whole() -> None:
    ids = [PIECES.encode("🙂", add_special_tokens=False)][0]
    assert len(ids) == 5  # "▁" and four bytes
    parts, whole = streamed(PIECES, ids)
    assert parts == [" ", "", "", "", "🙂", ""]
    assert streamed(PIECES, ids[:-1])[1] == " \ufffd"
    assert whole == " 🙂"


def test_unknown_and_special_ids() -> None:
    assert streamed(BYTE_LEVEL, (2, 511, 2))[1] == ""
    assert streamed(BYTE_LEVEL, (2,), skip=False)[1] == "<|im_end|>"
    assert BYTE_LEVEL.is_special(2) and not BYTE_LEVEL.is_special(100)


def offline_cut(text: str, stops: list[str]) -> tuple[str, str]:
    """The definition, by trying every end: the first end at which a stop text is complete; the longest there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, ""


@settings(max_examples=500, deadline=None)
@given(st.text("ab\n", max_size=40), st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4), st.data())
def test_stops_are_found_however_the_text_is_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    finder, shown, rest = StopFinder(stops), "", text
    found = ""
    while rest and not found:
        size = data.draw(st.integers(0, len(rest)))
        out, found = finder.push(rest[:size])
        shown += out
        rest = rest[max(size, 0) :]
        if size == 0:
            out, found = finder.push(rest[:1])
            shown += out
            rest = rest[1:]
        full, _ = offline_cut(text, stops)
        assert full.startswith(shown)  # never shows what a stop text takes back
    if not found:
        shown += finder.finish()
    assert (shown, found) == offline_cut(text, stops)


def test_only_a_possible_stop_is_held_back() -> None:
    finder = StopFinder(["</s>"])
    assert finder.push("hello <") == ("hello ", "")
    assert finder.push("/b") == ("</b", "")
    assert finder.push(" </s") == (" ", "")
    assert finder.push("> and") == ("", "</s>")


def test_loads_a_directory_and_agrees_with_transformers(tmp_path: Path) -> None:
    directory = save(byte_level(), tmp_path)
    codec = TextCodec.load(directory)
    theirs = AutoTokenizer.from_pretrained(str(directory))
    for text in ("The quick brown fox", "Grüße, 世界 🙂", "<|im_start|>user\nhi<|im_end|>", "  \n\n two"):
        assert list(codec.encode(text)) == theirs(text)["input_ids"]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert codec.render(messages) == expected


async def test_long_text_is_encoded_the_same_aside() -> None:
    text = "The quick brown fox. " * (INLINE_CHARS // 10)
    assert await BYTE_LEVEL.encode_aside(text) == BYTE_LEVEL.encode(text)


@pytest.mark.parametrize(
    "source",
    [
        TEMPLATE,
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[{{ m.content|trim }}]\n    {% else %}"
        "{{ m | tojson }}{% endif %}{% endfor %}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% endfor %}{{ tools is none }}",
    ],
)
def test_templates_render_as_transformers_does(tmp_path: Path, source: str) -> None:
    directory = save(byte_level(), tmp_path, source)
    messages = [{"role": "system", "content": " Be <brief> "}, {"role": "user", "content": "Grüße"}]
    theirs = AutoTokenizer.from_pretrained(str(directory))
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert TextCodec.load(directory).render(messages) == expected


def test_template_files_win_over_configuration(tmp_path: Path) -> None:
    directory = save(byte_level(), tmp_path, "from configuration")
    (directory / "chat_template.jinja").write_text("from a file")
    assert TextCodec.load(directory).render([]) == "from a file"


def test_a_template_may_refuse_and_may_not_escape() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(TemplateRefused, match="roles must alternate"):
        template.render([])
    escape = ChatTemplate("{{ messages.__class__.__mro__ }}", {})
    with pytest.raises(TemplateRefused):
        escape.render([{"role": "user", "content": "x"}])
    with pytest.raises(ValueError, match="line 1"):
        ChatTemplate("{% for %}", {})


@pytest.mark.parametrize("damage", ["missing", "no directory", "broken tokenizer", "broken configuration"])
def test_what_cannot_be_loaded_is_said_in_a_sentence(tmp_path: Path, damage: str) -> None:
    directory = save(byte_level(), tmp_path / "model")
    match damage:
        case "missing":
            (directory / "tokenizer.json").unlink()
        case "no directory":
            directory = tmp_path / "nowhere"
        case "broken tokenizer":
            (directory / "tokenizer.json").write_text('{"version": "1.0"}')
        case _:
            (directory / "tokenizer_config.json").write_text("[1, 2")
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        TextCodec.load(directory)
    assert str(directory) in str(caught.value)


def test_a_model_without_a_template_has_no_chat(tmp_path: Path) -> None:
    directory = save(byte_level(), tmp_path, None)
    assert not TextCodec.load(directory).has_chat
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert TextCodec.load(directory).render([]) == "d"
