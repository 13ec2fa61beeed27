"""Any transcribed audio: JSON lines or a table that name files and what is said in them."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from trainer.config import Config, Free, show
from trainer.data.corpora.base import SPLITS, BadLinesError, Progress, Utterance
from trainer.errors import UserError

AUDIO_FIELDS = ("audio", "audio_filepath")  # the second is NeMo's


class ManifestConfig(Config):
    """Manifests: a line an utterance, with `audio` (or `audio_filepath`), `text`, and if you like `key` and `split`.

    A path is relative to the manifest that names it. Without a `split` (train, valid, test) the transcript decides.
    """

    kind: Literal["manifest"] = "manifest"
    files: Free[tuple[Path, ...]] = ()
    """JSON lines (.jsonl, .json), or a table with a heading (.csv, .tsv)."""

    def utterances(self, folder: Path, progress: Progress) -> list[Utterance]:
        """Read every manifest.

        Args:
            folder: of the prepared corpus; not used.
            progress: not used, reading takes seconds.

        Raises:
            UserError: no manifest, or the lines that cannot be used, all of them in one message.
        """
        if not self.files:
            raise UserError(
                "data.corpus.files = []: there is nothing to prepare; name your manifests, e.g. "
                "data.corpus.files='[data/all.jsonl]', or choose another corpus with data.corpus.kind"
            )
        for file in self.files:
            if not file.is_file():
                raise UserError(f"data.corpus.files: {show(file)}: there is no such file; mend the path")
        found: dict[str, Utterance] = {}
        problems: list[str] = []
        for file in self.files:
            try:
                for line, fields in _rows(file, problems):
                    utterance = _utterance(file, line, fields, problems)
                    if utterance is None:
                        continue
                    first = found.setdefault(utterance.key, utterance)
                    if first is not utterance:
                        problems.append(
                            f"{utterance.where}: key = {utterance.key!r}: is that of {first.where} too; "
                            "give each line its own `key`, or remove one"
                        )
            except UnicodeDecodeError as error:
                raise UserError(f"{show(file)}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error
        if problems:
            raise BadLinesError(problems, list(found.values()))
        if not found:
            raise UserError(f"{', '.join(map(show, self.files))}: holds no utterance; add lines")
        return list(found.values())


def _rows(file: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Lines of a manifest as (line number, fields)."""
    ending = file.suffix.lower()
    if ending in (".csv", ".tsv"):
        with file.open(encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(lines, delimiter="\t" if ending == ".tsv" else ",")
            for row in table:
                # DictReader fills a short line with None.
                yield (
                    table.line_num,
                    {name: value for name, value in row.items() if name and value is not None},
                )
    elif ending in (".jsonl", ".json"):
        with file.open(encoding="utf-8-sig") as lines:
            for number, text in enumerate(lines, 1):
                if not text.strip():
                    continue
                where = f"{show(file)} line {number}"
                try:
                    fields = json.loads(text)
                except ValueError as error:
                    problems.append(f"{where}: {text.strip()[:60]!r}: is not JSON ({error}); write one object a line")
                    continue
                if isinstance(fields, dict):
                    yield number, fields
                else:
                    problems.append(f"{where}: {text.strip()[:60]!r}: is not an object; write {{...}} on each line")
    else:
        raise UserError(f"data.corpus.files: {show(file)}: ending {ending!r}, wanted .jsonl, .json, .csv or .tsv")


def _utterance(file: Path, line: int, fields: dict[str, Any], problems: list[str]) -> Utterance | None:
    where = f"{show(file)} line {line}"
    name = next((n for n in AUDIO_FIELDS if fields.get(n)), None)
    if name is None:
        problems.append(f"{where}: audio: is missing; add the path of the recording as `audio`")
        return None
    path = file.parent / str(fields[name])  # an absolute path stays as it is
    key = fields.get("key") or _relative(path, file.parent)
    key = re.sub(r"[^\w@+=-]", "_", str(key))  # webdataset ends a key at the first dot
    text, split = fields.get("text"), fields.get("split") or None
    before = len(problems)

    def problem(field: str, value: object, reason: str) -> None:
        problems.append(f"{where}: key {key}: {field} = {value!r}: {reason}")

    if not path.is_file():
        problem(name, fields[name], f"there is no such file ({show(path)}); mend the path or remove the line")
    if text is None:
        problems.append(f"{where}: key {key}: text: is missing; add the transcript or remove the line")
    elif not str(text).strip():
        problem("text", text, "is empty; write what is said or remove the line")
    if split is not None and split not in SPLITS:
        problem("split", split, f"wanted one of {', '.join(SPLITS)}; mend it or leave it out")
    if fields.get("offset"):
        problem(
            "offset",
            fields["offset"],
            "parts of longer recordings are not read; cut them into files of their own",
        )
    if len(problems) > before:
        return None
    return Utterance(key, str(text), path, split, where)


def _relative(path: Path, folder: Path) -> str:
    """Path without its ending, from the manifest's folder on if it lies below."""
    path = path.with_suffix("")
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path).lstrip("/")
