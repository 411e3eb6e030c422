"""Text to tokens and back: what comes out token by token is what comes out at once, and the chat template says what transformers says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.inference.http.conftest import SPECIAL, VOCABULARY
from tokenizers import decoders, models, normalizers

from kvfs.common.errors import InvalidArgument, SetupError
from kvfs.inference.http.chat_template import ChatTemplate
from kvfs.inference.http.detokenizer import REPLACEMENT, Detokenizer, byte_of_character
from kvfs.inference.http.tokenizer import Tokenizer

TOKENS = st.lists(st.integers(0, VOCABULARY + 3), max_size=60)


def pieces(made: Detokenizer, tokens: list[int]) -> list[str]:
    return [*(made.feed(token) for token in tokens), made.finish()]


@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_text_survives_the_way_to_tokens_and_back(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokens, skip_special_tokens=False) == text
    assert "".join(pieces(tokenizer.detokenizer(skip_special_tokens=False), tokens)) == text


@given(tokens=TOKENS, skip=st.booleans())
def test_any_tokens_one_by_one_give_the_text_of_all_at_once(tokenizer: Tokenizer, tokens: list[int], skip: bool) -> None:
    """Also tokens that are no UTF-8 together, and numbers that are no tokens."""
    assert "".join(pieces(tokenizer.detokenizer(skip_special_tokens=skip), tokens)) == tokenizer.decode(tokens, skip_special_tokens=skip)


@given(text=st.text(st.characters(codec="utf-8", exclude_characters=REPLACEMENT), max_size=40))
def test_no_half_character_comes_out(tokenizer: Tokenizer, text: str) -> None:
    """A tokenizer of bytes alone cuts every character that has several; nothing stands for a half, and each comes out with its last byte."""
    raw = [tokenizer.token_id(piece) for piece in map(tokenizer_piece, text.encode())]
    tokens = [token for token in raw if token is not None]
    assert len(tokens) == len(text.encode())
    made, out = tokenizer.detokenizer(), ""
    for count, token in enumerate(tokens, 1):
        out += made.feed(token)
        assert out == text.encode()[:count].decode(errors="ignore")
    assert made.finish() == "" and out == text


def tokenizer_piece(byte: int) -> str:
    return next(character for character, value in byte_of_character().items() if value == byte)


def test_a_character_that_never_ends_is_not_lost(tokenizer: Tokenizer) -> None:
    first_of_four = tokenizer.token_id(tokenizer_piece("🦑".encode()[0]))
    assert first_of_four is not None
    made = tokenizer.detokenizer()
    assert (made.feed(first_of_four), made.finish()) == ("", REPLACEMENT)


@pytest.fixture(scope="module")
def sentencepiece_like(module_path: Path) -> Tokenizer:
    """Byte fallback and a mark for spaces, as Llama 2's: not byte-level."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁squid", "s", "é"]
    made = tokenizers.Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.save(str(module_path / "tokenizer.json"))
    return Tokenizer.load(module_path)


def test_another_kind_of_tokenizer_one_by_one(sentencepiece_like: Tokenizer) -> None:
    made = sentencepiece_like
    squid = [made.token_id(f"<0x{byte:02X}>") for byte in "🦑".encode()]
    tokens = [made.token_id(word) for word in ("▁the", "▁squid", "s", "▁")] + squid + [made.token_id("é")] + squid[:2]
    numbers = [token for token in tokens if token is not None]
    out = pieces(made.detokenizer(), numbers)
    assert out[:5] == ["the", " squid", "s", " ", ""] and out[7] == "🦑" and out[8] == "é"
    assert "".join(out) == made.decode(numbers) and REPLACEMENT not in "".join(out[:-1])


def test_the_first_token_and_special_tokens(tokenizer: Tokenizer) -> None:
    begin = tokenizer.token_id("<bos>")
    assert tokenizer.encode("hello")[0] == begin and tokenizer.encode("hello")[1:] == tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("<bos>hello").count(begin or 0) == 1
    tokens = [*tokenizer.encode("a"), *(number for word in SPECIAL if (number := tokenizer.token_id(word)) is not None)]
    assert tokenizer.decode(tokens) == "a" == "".join(pieces(tokenizer.detokenizer(), tokens))
    assert tokenizer.decode(tokens, skip_special_tokens=False).endswith("".join(SPECIAL))


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 < 2 & ü?"}, {"role": "assistant", "content": "Yes."}]


@pytest.mark.parametrize("prompt", [True, False])
def test_the_chat_template_says_what_transformers_says(checkpoint: Path, tokenizer: Tokenizer, prompt: bool) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.chat_template is not None
    text = tokenizer.chat_template.render(MESSAGES, add_generation_prompt=prompt)
    assert text == theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompt, tokenize=False)
    assert tokenizer.encode(text, add_special_tokens=False) == list(theirs(text, add_special_tokens=False)["input_ids"])


def test_a_template_that_asks_for_tools_is_told_of_none(checkpoint: Path, tmp_path: Path) -> None:
    """Mistral's and others ask `tools is not none`, which what is not there at all is not."""
    transformers = pytest.importorskip("transformers")
    directory = shutil.copytree(checkpoint, tmp_path / "copy")
    asked = "".join(f"{{% if {name} is not none %}}{name}{{% endif %}}" for name in ("tools", "documents"))
    source = asked + "{{ messages[1].content }}{{ thinking is defined }}"
    (directory / "chat_template.jinja").write_text(source)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    made = Tokenizer.load(directory).chat_template
    assert made is not None
    for variables in ({}, {"thinking": True}):
        expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, **variables)
        assert made.render(MESSAGES, variables=variables) == expected


def test_a_template_file_goes_first_and_named_ones_are_found(checkpoint: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoint, tmp_path / "copy")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ eos_token }}{{ messages[0].content }}"}]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    made = Tokenizer.load(directory).chat_template
    assert made is not None and made.render(MESSAGES) == "<eos>Be brief."
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}")
    made = Tokenizer.load(directory).chat_template
    assert made is not None and made.render(MESSAGES).endswith('{"role": "user", "content": "1 < 2 & ü?"}')


@pytest.mark.parametrize(
    "source",
    ["{{ raise_exception('no such role') }}", "{{ messages[9].content.x }}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 / 0 }}"],
)
def test_a_template_fails_as_a_refused_request(source: str) -> None:
    with pytest.raises(InvalidArgument, match="chat template"):
        ChatTemplate(source, {}, "here").render(MESSAGES)


def test_what_a_checkpoint_lacks_is_said(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    directory = shutil.copytree(checkpoint, tmp_path / "copy")
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(SetupError, match="is not JSON"):
        Tokenizer.load(directory)
    (directory / "tokenizer_config.json").write_text('{"chat_template": "{% for %}"}')
    with pytest.raises(SetupError, match="chat template cannot be read"):
        Tokenizer.load(directory)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(SetupError, match="cannot be read"):
        Tokenizer.load(directory)
