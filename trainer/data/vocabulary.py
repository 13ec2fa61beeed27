"""What a language model's tokens are: words, characters or subwords, numbered from the most frequent on.

Numbers that fall with frequency are what an adaptive softmax cuts into clusters.
"""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import sentencepiece
from numpy.typing import NDArray
from pydantic import Field

from trainer.config import Config
from trainer.errors import UserError

END, UNKNOWN = "<eos>", "<unk>"
"""The end of a line, and a word that is not in the vocabulary."""
Tokens = NDArray[np.int32]


class Vocabulary(Protocol):
    """The tokens of a language model."""

    @property
    def identity(self) -> str:
        """Short text that differs where the tokens differ."""
        ...

    @property
    def start(self) -> int:
        """The token that stands before a text begins: that of a line's end."""
        ...

    @property
    def unknown(self) -> int | None:
        """The token of what has none, if there is one."""
        ...

    def __len__(self) -> int: ...

    def encode(self, text: str) -> Tokens:
        """Tokens of a text, one for the end of each of its lines included."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens."""
        ...

    def save(self) -> bytes:
        """Everything, for `load` of its configuration."""
        ...


class CharactersConfig(Config):
    """A token a character, the line feed too. Those of all splits have one."""

    kind: Literal["characters"] = "characters"

    def learn(self, texts: Mapping[Any, str]) -> "Characters":
        """The vocabulary of {split: text}."""
        counts = Counter(texts["train"])
        others = sorted({c for text in texts.values() for c in set(text)} - counts.keys())
        return Characters([c for c, _ in sorted(counts.items(), key=lambda x: (-x[1], x[0]))] + others)

    def load(self, content: bytes) -> "Characters":
        return Characters(json.loads(content))


class WordsConfig(Config):
    """A token a word, and one for the end of each line.

    A word outside the vocabulary counts as `<unk>`: then bits a character leave out what it takes to spell it.
    """

    kind: Literal["words"] = "words"
    split: Literal["spaces", "punctuation"] = "spaces"
    """At spaces alone, as texts that were cut into words before have it, or punctuation marks on their own too."""
    lowercase: bool = False
    size: int | None = Field(None, ge=2)
    """So many of the most frequent words of training, `<eos>` and `<unk>` included; null: all."""

    def words(self, line: str) -> list[str]:
        """The words of a line."""
        line = line.lower() if self.lowercase else line
        return line.split() if self.split == "spaces" else re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", line)

    def learn(self, texts: Mapping[Any, str]) -> "Words":
        """The vocabulary of {split: text}."""
        counts = Counter(word for line in _lines(texts["train"]) for word in self.words(line))
        counts[END] = len(_lines(texts["train"]))
        ranked = [word for word, _ in sorted(counts.items(), key=lambda x: (-x[1], x[0]))]
        unseen = UNKNOWN not in counts and any(
            word not in counts
            for split in ("valid", "test")
            for line in _lines(texts[split])
            for word in self.words(line)
        )
        if self.size is not None and len(ranked) > self.size:
            kept = [word for word in ranked if word not in (END, UNKNOWN)][: self.size - 2]
            chosen = {*kept, END, UNKNOWN}
            ranked = [word for word in ranked if word in chosen]
            unseen = UNKNOWN not in ranked
        return Words(self, ranked + [UNKNOWN] * unseen)

    def load(self, content: bytes) -> "Words":
        return Words(self, json.loads(content))


class SubwordsConfig(Config):
    """A token a piece of a word, learnt from the training text, and one for the end of each line. What the pieces do
    not hold is spelt in bytes.

    Source: Kudo & Richardson 2018, arXiv:1808.06226.
    """

    kind: Literal["subwords"] = "subwords"
    size: int = Field(2000, ge=260)
    """Pieces, with 256 for bytes and the end of a line."""
    model: Literal["unigram", "bpe"] = "unigram"

    def learn(self, texts: Mapping[Any, str]) -> "Subwords":
        """The vocabulary of {split: text}."""
        writer = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(_lines(texts["train"])),
                model_writer=writer,
                vocab_size=self.size,
                model_type=self.model,
                character_coverage=1.0,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                byte_fallback=True,
                bos_id=-1,
                eos_id=1,
                eos_piece=END,
                pad_id=-1,
                max_sentence_length=1 << 20,
                minloglevel=2,
            )
        except RuntimeError as error:
            told = str(error).strip().splitlines()[-1]
            found = re.search(r"value <= (\d+)", told)
            why = f"the text gives {found[1]} at most; lower it" if found else f"sentencepiece cannot learn it ({told})"
            raise UserError(f"data.tokens.size = {self.size}: {why}") from error
        return Subwords(writer.getvalue())

    def load(self, content: bytes) -> "Subwords":
        return Subwords(content)


VocabularyConfig = Annotated[CharactersConfig | WordsConfig | SubwordsConfig, Field(discriminator="kind")]


def _lines(text: str) -> list[str]:
    """The lines of a text; a line feed at its end begins no other."""
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


class Characters:
    """One token a character.

    Args:
        alphabet: in the order of their numbers.
    """

    unknown = None

    def __init__(self, alphabet: Sequence[str]) -> None:
        self.alphabet = list(alphabet)
        self.identity = f"{len(self)} characters {_digest(self.save())}"
        self.start = self.alphabet.index("\n") if "\n" in self.alphabet else 0
        codes = np.array([ord(c) for c in self.alphabet])
        self._order = np.argsort(codes)
        self._codes = codes[self._order]

    def __len__(self) -> int:
        return len(self.alphabet)

    def encode(self, text: str) -> Tokens:
        codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        places = np.searchsorted(self._codes, codes).clip(max=len(self) - 1)
        if len(odd := np.flatnonzero(self._codes[places] != codes)):
            raise UserError(
                f"{chr(int(codes[odd[0]]))!r}: is in none of the texts that were prepared; leave it out of the text "
                "(prompt)"
            )
        return self._order[places].astype(np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.alphabet[i] for i in tokens)

    def save(self) -> bytes:
        return json.dumps(self.alphabet).encode()


class Words:
    """One token a word, and one for the end of a line.

    Args:
        config: how a line is cut.
        words: in the order of their numbers.
    """

    def __init__(self, config: WordsConfig, words: Sequence[str]) -> None:
        self.config, self.words = config, list(words)
        self.identity = f"{len(self)} words {_digest(self.save())}"
        self.number = {word: i for i, word in enumerate(self.words)}
        self.start = self.number[END]
        self.unknown = self.number.get(UNKNOWN)

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> Tokens:
        def numbers() -> Iterable[int]:
            for line in _lines(text):
                for word in self.config.words(line):
                    found = self.number.get(word, self.unknown)
                    if found is None:
                        raise UserError(
                            f"{word!r}: is not in the vocabulary, which has no {UNKNOWN}; leave it out "
                            "of the text (prompt)"
                        )
                    yield found
                yield self.start

        return np.fromiter(numbers(), np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        text = " ".join(self.words[i] for i in tokens)
        return re.sub(rf" ?{re.escape(END)} ?", "\n", text)

    def save(self) -> bytes:
        return json.dumps(self.words).encode()


class Subwords:
    """One token a piece of a word, and one for the end of a line.

    Args:
        model: a vocabulary, as `SubwordsConfig.learn` makes it.
    """

    unknown = None

    def __init__(self, model: bytes) -> None:
        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.identity = f"{len(self)} subwords {_digest(model)}"
        self.start = int(self.processor.eos_id())

    def __len__(self) -> int:
        return int(self.processor.get_piece_size())

    def encode(self, text: str) -> Tokens:
        rows: list[list[Any]] = self.processor.encode(_lines(text))
        return np.array([token for row in rows for token in (*row, self.start)], np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        lines: list[list[int]] = [[]]
        for token in tokens:
            if token == self.start:
                lines.append([])
            else:
                lines[-1].append(int(token))
        return "\n".join(self.processor.decode(line) for line in lines)

    def save(self) -> bytes:
        return self.model
