"""What bytes a token stands for, in the middle of a text.

Owns the three ways tokenizers spell bytes (byte-level BPE, sentencepiece with byte fallback, anything else). Text is
then UTF-8 of bytes in order, so it does not depend on how tokens are grouped, and a character spread over several
tokens is simply not complete yet. Knows nothing of streams or requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "▁"


def byte_reader(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """A function from token id to bytes. Ids the tokenizer does not know (padding of the vocabulary) give none."""
    kinds = _decoder_kinds(tokenizer)
    if "ByteLevel" in kinds:
        return lambda token_id: _byte_level(tokenizer, token_id)
    if "ByteFallback" in kinds or "Metaspace" in kinds:
        return lambda token_id: _sentencepiece(tokenizer, token_id)
    return _anchored(tokenizer)


def _byte_level(tokenizer: Tokenizer, token_id: int) -> bytes:
    """Each character of the token is one byte, in GPT-2's alphabet; a token with others (an added one) is itself."""
    token = tokenizer.id_to_token(token_id)
    if token is None:
        return b""
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:
        return token.encode()


def _sentencepiece(tokenizer: Tokenizer, token_id: int) -> bytes:
    token = tokenizer.id_to_token(token_id)
    if token is None:
        return b""
    if byte := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace(_SPACE_MARK, " ").encode()


def _anchored(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """For other decoders: what the token adds to the text of a plain token before it."""
    anchor = next(
        (i for i in range(tokenizer.get_vocab_size()) if tokenizer.decode([i], skip_special_tokens=True).strip()), 0
    )
    before = tokenizer.decode([anchor], skip_special_tokens=False)

    def read(token_id: int) -> bytes:
        if tokenizer.id_to_token(token_id) is None:
            return b""
        return tokenizer.decode([anchor, token_id], skip_special_tokens=False).removeprefix(before).encode()

    return read


def _decoder_kinds(tokenizer: Tokenizer) -> frozenset[str]:
    if tokenizer.decoder is None:
        return frozenset()
    root = json.loads(tokenizer.decoder.__getstate__())
    parts = [root, *root.get("decoders", [])]
    return frozenset(str(part["type"]) for part in parts)


def _gpt2_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: bytes that print are themselves, the others start at U+0100, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _gpt2_alphabet()
