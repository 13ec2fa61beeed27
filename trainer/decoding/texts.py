"""The sentences that an n-gram is counted from, and how well it foresees others."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer import recipe
from trainer.config import PROJECT, is_file, show
from trainer.data.text import SPACE, UnknownCharacterError
from trainer.decoding.language_models import Units, units_of
from trainer.errors import UserError

Sentences = list[list[str]]


@dataclass(frozen=True)
class Texts:
    """What the verb `ngram` works on."""

    name: str
    training: Sentences
    held_out: dict[str, Sentences]
    words: set[str]
    """Of training."""
    held_out_words: dict[str, list[str]]
    """Running words of each text that is held out."""
    vocabulary: list[str] = field(default_factory=list)
    """Units that may come though training lacks them."""


def is_text(name: str) -> bool:
    """Whether an argument names a text file rather than a configuration."""
    path = Path(name)
    return is_file(path) and path.suffix not in (".yaml", ".yml") and PROJECT / "configs" not in path.resolve().parents


def read_lines(path: Path) -> list[str]:
    """The lines of a text that are not empty, with single spaces.

    Raises:
        UserError: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{show(path)}: cannot be read as text: {error}; name a file in UTF-8") from error
    return [line for raw in text.splitlines() if (line := " ".join(raw.split()))]


def from_files(names: Sequence[str], units: Units, test: str | None, text: str | None) -> Texts:
    """Text files as they are.

    Raises:
        UserError: one cannot be read, or is no file.
    """
    if text is not None:
        raise UserError("the command line: text=...: goes with a CONFIG; name the files alone")

    def cut(line: str) -> list[str]:
        return line.split() if units == "words" else [SPACE if c == " " else c for c in line]

    lines = [line for name in names for line in read_lines(Path(name))]
    other = {test: read_lines(Path(test))} if test else {}
    return _texts(Path(names[0]).stem, lines, other, cut, [])


def from_config(config: str, overrides: Sequence[str], units: Units, text: str | None, test: str | None) -> Texts:
    """The transcripts of a recipe, or texts written as these are.

    Raises:
        UserError: the recipe has no transcripts, or a file cannot be read.
    """
    loaded: Any = recipe.load(config, overrides)
    if not hasattr(loaded, "tokens"):
        raise UserError(f"{config}: the recipe {loaded.config.recipe} has no transcripts; name text files")
    tokens, settings = loaded.tokens, loaded.config.data

    def cleaned(path: Path) -> list[str]:
        alphabet = settings.text.alphabet or loaded.build_dataset("train").prepared.alphabet
        lines = [settings.text.normalise(line, alphabet)[0] for line in read_lines(path)]
        return [line for line in lines if line]

    def cut(line: str) -> list[str]:
        try:
            return units_of(line, units, tokens)
        except UnknownCharacterError:  # a piece that the vocabulary of subwords does not spell
            return []

    if text is None:
        lines = loaded.build_dataset("train").transcripts()
    else:
        lines = [line for name in text.split(",") for line in cleaned(Path(name))]
    if test is None:
        other = {split: loaded.build_dataset(split).transcripts() for split in ("valid", "test")}
    else:
        other = {test: cleaned(Path(test))}
    vocabulary = tokens.names[1:] if units == "labels" else []
    return _texts(loaded.config.name, lines, other, cut, vocabulary)


def _texts(name: str, lines: list[str], other: dict[str, list[str]], cut: Any, vocabulary: list[str]) -> Texts:
    return Texts(
        name,
        [units for line in lines if (units := cut(line))],
        {key: [units for line in rows if (units := cut(line))] for key, rows in other.items()},
        {word for line in lines for word in line.split()},
        {key: [word for line in rows for word in line.split()] for key, rows in other.items()},
        vocabulary,
    )


def measure(name: str, sentences: Sentences, lm: Any, known: Sequence[str], texts: Texts) -> str:
    """Perplexity of held-out sentences, their ends counted, and what of them is new.

    Args:
        lm: KenLM with the numbers of `known`, and after them that of `<unk>`.
    """
    number = {unit: i for i, unit in enumerate(known)}
    unknown = len(known)
    total = seen = 0.0
    count = new = 0
    for sentence in sentences:
        state = lm.start(False)
        for unit in sentence:
            state, score = lm.score(state, number.get(unit, unknown))
            total += score
            if unit in number:
                seen += score
            else:
                new += 1
        score = lm.finish(state)[1]
        total, seen, count = total + score, seen + score, count + len(sentence) + 1
    if not count:
        return f"{name}: holds no sentence"
    words = texts.held_out_words[name]
    new_words = sum(word not in texts.words for word in words)
    parts = [f"perplexity {10 ** (-total / count):.4g}"]
    if new:
        parts.append(f"{10 ** (-seen / max(count - new, 1)):.4g} without the {new} unknown units")
    parts.append(f"{math.log2(10) * -total / count:.3f} bits a unit")
    parts.append(f"{100 * new_words / max(len(words), 1):.1f} % of {len(words):,} words are not in training")
    return f"{name}: " + ", ".join(parts)
