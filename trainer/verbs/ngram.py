"""An ARPA n-gram with modified Kneser-Ney smoothing, from training transcripts or from text files.

    ./launch.sh ngram speech/read_ru                              labels (characters) of the training transcripts
    ./launch.sh ngram speech/read_ru units=words order=3 to=words.arpa
    ./launch.sh ngram speech/read_ru text=novel.txt,letters.txt   texts, cleaned as the transcripts are
    ./launch.sh ngram novel.txt letters.txt units=words prune=0,0,1 test=other.txt

Prints how many n-grams there are, and the perplexity and what is unknown on the validation and test transcripts, or on
`test=FILE`. A line of a file is a sentence. Files without a CONFIG are taken as they are.
"""

import argparse
from typing import TYPE_CHECKING, get_args

from trainer.verbs import positive, take

if TYPE_CHECKING:
    from pathlib import Path

    from trainer.decoding.texts import Texts

NAMES = ("units", "order", "prune", "to", "text", "test")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="CONFIG or FILE", help="a configuration of a recogniser, or a text file")
    parser.add_argument("overrides", metavar="FILE or key=value", nargs="*", help="more text files, and settings")
    parser.epilog = (
        "units=labels: labels (characters) or words; order=6 (words: 3); prune=0: of each length, leave out what "
        "occurs so often or less, the last number for all longer ones; to=FILE; text=FILES; test=FILE; other "
        "key=value change the configuration"
    )


def main(arguments: argparse.Namespace) -> int:
    from trainer.decoding.language_models import Units
    from trainer.errors import UserError

    given = {}
    for name in NAMES:
        given[name], arguments.overrides = take(arguments.overrides, name)
    units: Units | None = next((u for u in get_args(Units) if u == (given["units"] or "labels")), None)
    if units is None:
        raise UserError(f"the command line: units = {given['units']!r}: wanted labels or words")
    order = positive(given["order"], "order") or (6 if units == "labels" else 3)
    prune = _prune(given["prune"])

    from pathlib import Path

    from rich.console import Console

    from trainer.config import show
    from trainer.decoding import texts
    from trainer.decoding.ngram import estimate

    file = arguments.source
    if texts.is_text(file):
        source = texts.from_files([file, *arguments.overrides], units, given["test"], given["text"])
    else:
        source = texts.from_config(file, arguments.overrides, units, given["text"], given["test"])
    to = Path(given["to"] or f"{source.name}-{units}-{order}.arpa")
    model = estimate(source.training, order, prune, source.vocabulary)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        model.write(to)
    except OSError as error:
        raise UserError(f"{show(to)}: cannot be written: {error.strerror}; set to=FILE") from error
    console = Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    kept = ", ".join(f"{count:,}" for count in model.counts)
    say(f"{model.units:,} {units} of {len(source.training):,} sentences; n-grams of length 1 to {order}: {kept}")
    for line in _measured(source, to, order):
        say(line)
    say(f"written: {show(to)}")
    return 0


def _prune(text: str | None) -> list[int]:
    from trainer.errors import UserError

    parts = (text or "0").split(",")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"the command line: prune = {text!r}: wanted whole numbers with commas between, e.g. 0,0,1")
    found = [int(part) for part in parts]
    if found[0] != 0 or found != sorted(found):
        raise UserError(f"the command line: prune = {text!r}: must begin with 0 and never fall, e.g. 0,0,1")
    return found


def _measured(source: "Texts", path: "Path", order: int) -> list[str]:
    """Perplexity and unknown units and words of what the model was not made from."""
    from trainer.decoding.language_models import MAX_ORDER, load_arpa
    from trainer.decoding.texts import measure

    if not 2 <= order <= MAX_ORDER:
        return [f"KenLM reads models of order 2 to {MAX_ORDER}: neither measured here nor fit for a beam search"]
    if not source.held_out:
        return ["no other text to measure it with: set test=FILE"]
    known = sorted({unit for sentence in source.training for unit in sentence} | set(source.vocabulary))
    lm = load_arpa(path, [*known, "<unk>"])
    return [measure(name, sentences, lm, known, source) for name, sentences in source.held_out.items()]
