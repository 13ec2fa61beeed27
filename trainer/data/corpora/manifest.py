"""Any transcribed audio: JSON lines or a table that name files and what is said in them."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from trainer.config import Config, Free, is_file, show
from trainer.data.corpora.base import SPLITS, BadLinesError, Progress, Utterance
from trainer.data.text import not_text
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
            if not is_file(file):
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
        yield from _table_rows(file, "\t" if ending == ".tsv" else ",", problems)
    elif ending in (".jsonl", ".json"):
        yield from _json_rows(file, problems)
    else:
        raise UserError(f"data.corpus.files: {show(file)}: ending {ending!r}, wanted .jsonl, .json, .csv or .tsv")


def _json_rows(file: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, text in enumerate(lines, 1):
            if not text.strip():
                continue
            where = f"{show(file)} line {number}"
            try:
                fields = json.loads(text, object_pairs_hook=_once)
            except (ValueError, RecursionError) as error:
                problems.append(f"{where}: {text.strip()[:60]!r}: is not JSON ({error}); write one object a line")
                continue
            if isinstance(fields, dict):
                yield number, fields
            else:
                problems.append(f"{where}: {text.strip()[:60]!r}: is not an object; write {{...}} on each line")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of a field that is repeated, JSON would silently take the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(n for n in names if names.count(n) > 1)!r} is given twice")
    return fields


def _table_rows(file: Path, delimiter: str, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        # Strict: a quote that is never closed would take the rest of the file into one field.
        table = csv.DictReader(lines, delimiter=delimiter, strict=True)
        first = 1  # line where what is read began
        try:
            heading = list(table.fieldnames or [])
            if "text" not in heading or not set(heading) & set(AUDIO_FIELDS) or len(set(heading)) < len(heading):
                names = ", ".join(map(repr, heading)) or "nothing"
                cure = f"wanted audio and text, each once, with {delimiter!r} between them"
                problems.append(f"{show(file)} line 1: the heading names {names}: {cure}")
                return
            first = table.line_num + 1
            for row in table:
                more = row.pop(None, [])
                fields = {name: value for name, value in row.items() if value is not None}  # a short line ends in None
                line = table.line_num - sum(value.count("\n") for value in fields.values())
                if more:
                    problems.append(
                        f"{show(file)} line {line}: has {len(heading) + len(more)} fields, the heading {len(heading)}; "
                        f"put a field with {delimiter!r} in it into quotes"
                    )
                else:
                    yield line, fields
                first = table.line_num + 1
        except csv.Error as error:
            problems.append(
                f"{show(file)} line {first}: cannot be read as a row ({error}), nor can what follows; is a quote "
                "open that should be closed? One that is meant is written twice"
            )


def _utterance(file: Path, line: int, fields: dict[str, Any], problems: list[str]) -> Utterance | None:
    where = f"{show(file)} line {line}"
    name = next((n for n in AUDIO_FIELDS if fields.get(n)), None)
    if name is None:
        problems.append(f"{where}: audio: is missing; add the path of the recording as `audio`")
        return None
    path = file.parent / str(fields[name])  # an absolute path stays as it is
    named = fields.get("key")
    key = _relative(path, file.parent) if named in (None, "") else named
    key = re.sub(r"[^\w@+=-]", "_", str(key))  # webdataset ends a key at the first dot
    text: Any = fields.get("text")
    split = fields.get("split") or None
    before = len(problems)

    def problem(field: str, value: object, reason: str) -> None:
        problems.append(f"{where}: key {key}: {field} = {value!r}: {reason}")

    for field, value in ((name, fields[name]), ("key", named), ("text", text), ("split", split)):
        if value is not None and not isinstance(value, (str, int) if field == "key" else str):
            problem(field, value, "is not text; write it in quotes")
    if len(problems) > before:
        return None
    if not is_file(path):
        problem(name, fields[name], f"there is no such file ({show(path)}); mend the path or remove the line")
    if text is None:
        problems.append(f"{where}: key {key}: text: is missing; add the transcript or remove the line")
    elif not text.strip():
        problem("text", text, "is empty; write what is said or remove the line")
    elif bad := not_text(text):
        problem("text", text, f"holds {bad!r}, which is no character of a text; write it again or remove the line")
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
    return Utterance(key, text, path, split, where)


def _relative(path: Path, folder: Path) -> str:
    """Path without its ending, from the manifest's folder on if it lies below."""
    path = path.with_suffix("")
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path).lstrip("/")
