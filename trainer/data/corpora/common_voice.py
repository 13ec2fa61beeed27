"""Common Voice: sentences read by volunteers in many languages, https://commonvoice.mozilla.org, CC0.

Layout of a language: `train.tsv`, `dev.tsv`, `test.tsv`, each with the columns `client_id`, `path` and `sentence` among
others, and `clips/*.mp3`. Other columns differ from version to version and are not looked at.
"""

from pathlib import Path
from typing import Literal

from trainer.config import Config, Free, show
from trainer.data.corpora.base import Progress, Reading, SplitName, Utterance, make_key, read_text
from trainer.errors import UserError

TABLES: dict[SplitName, str] = {"train": "train.tsv", "valid": "dev.tsv", "test": "test.tsv"}
COLUMNS = ("client_id", "path", "sentence")


class CommonVoiceConfig(Config):
    """One language of Common Voice, with the split that comes with it: no speaker is in two of its parts."""

    kind: Literal["common_voice"] = "common_voice"
    path: Free[Path | None] = None
    """Folder of the language, e.g. cv-corpus-17.0/cy; it holds train.tsv and clips/."""

    def utterances(self, folder: Path, progress: Progress) -> list[Utterance]:
        """Read the three tables.

        Args:
            folder: of the prepared corpus; not used.
            progress: told the tables that were read.

        Raises:
            UserError: a table is missing, or the lines that cannot be used, all in one message.
        """
        cure = "set data.corpus.path to the folder of a language of https://commonvoice.mozilla.org/datasets"
        if self.path is None:
            raise UserError(f"data.corpus.path: is missing; {cure}")
        reading = Reading()
        for number, (split, name) in enumerate(TABLES.items(), 1):
            _read_table(reading, self.path / name, split, cure)
            progress("reading tables", number, len(TABLES))
        return reading.result(f"data.corpus.path = {show(self.path)}")


def _read_table(reading: Reading, table: Path, split: SplitName, cure: str) -> None:
    lines = read_text(table, cure)
    heading = lines[0].split("\t") if lines else []
    if missing := [name for name in COLUMNS if name not in heading]:
        reading.problems.append(f"{show(table)} line 1: has no column {', '.join(missing)}; unpack the archive again")
        return
    speaker, path, sentence = (heading.index(name) for name in COLUMNS)
    for number, line in enumerate(lines[1:], 2):
        where = f"{show(table)} line {number}"
        fields = line.split("\t")  # quotes are part of a sentence, not of the table
        if len(fields) < len(heading):
            reading.problems.append(
                f"{where}: has {len(fields)} fields, the heading {len(heading)}; mend the line or remove it"
            )
            continue
        clip = fields[path] if "." in fields[path] else f"{fields[path]}.mp3"  # the first versions leave it out
        text = _unquoted(fields[sentence])
        key = make_key(Path(clip).stem)
        reading.add(Utterance(key, text, table.parent / "clips" / clip, split, where, fields[speaker]))


def _unquoted(sentence: str) -> str:
    """Without the quotes that a table writer has put around and doubled inside."""
    if len(sentence) > 1 and sentence[0] == sentence[-1] == '"':
        return sentence[1:-1].replace('""', '"')
    return sentence
