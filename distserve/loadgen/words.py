"""Words to make prompts of: one token each in the model's own vocabulary, or plain English when there is none."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

_SPACE_MARKS = ("Ġ", "▁")
_LEAST_LETTERS = 3

_ENGLISH = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work government number night point home water room mother
area money story fact month lot right study book eye job word business issue side kind head house service friend
father power hour game line end member law car city community name president team minute idea kid body
information back parent face others level office door health person art war history party result change morning
reason research girl guy moment air teacher force education foot boy age policy music market plan effort class
film river stone garden paper light winter summer window table green black white small large young early happy
quick quiet strong
"""
ENGLISH = tuple(_ENGLISH.split())


class WordSource(Protocol):
    """Where the words of made-up prompts come from."""

    def text(self, tokens: int, rng: random.Random) -> str:
        """A text of so many tokens."""
        ...


class EnglishWords:
    """Common words; about one token each in most vocabularies. The server's own count is what is reported."""

    def text(self, tokens: int, rng: random.Random) -> str:
        return " ".join(rng.choices(ENGLISH, k=tokens))


class VocabularyWords:
    """Lower-case words that are one token each, with the space before them, in a model's tokenizer."""

    def __init__(self, tokenizer_file: Path) -> None:
        """Read a ``tokenizer.json``. Raises ``ValueError`` when it has too few such words."""
        self._tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self.words = sorted(w for t in self._tokenizer.get_vocab() if (w := _word(t)))
        self.words = [w for w in self.words if self._count(" " + w) == 1]
        if len(self.words) < len(ENGLISH):
            raise ValueError(f"{tokenizer_file} has only {len(self.words)} words of one token each")

    def text(self, tokens: int, rng: random.Random) -> str:
        made = "".join(" " + word for word in rng.choices(self.words, k=tokens))
        if (count := self._count(made)) != tokens:
            raise ValueError(f"a text of {tokens} words became {count} tokens")
        return made

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _word(token: str) -> str:
    """The word behind a vocabulary entry such as ``Ġhouse``, or nothing."""
    word = token[1:]
    fits = token[:1] in _SPACE_MARKS and len(word) >= _LEAST_LETTERS and word.isascii() and word.isalpha()
    return word if fits and word.islower() else ""
