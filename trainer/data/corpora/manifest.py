"""Any transcribed audio: JSON lines (those of NeMo too) or a table that name files and what is said in them."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from trainer.config import Free, is_file, show
from trainer.data.corpora.base import (
    SPLITS,
    BadLinesError,
    Progress,
    SplitFiles,
    SplitName,
    Utterance,
    json_lines,
    make_key,
    not_utf8,
)
from trainer.data.text import not_text
from trainer.errors import UserError

AUDIO_FIELDS = ("audio", "audio_filepath")  # the second is NeMo's


class ManifestConfig(SplitFiles):
    """Manifests: a line an utterance, with `audio` (or `audio_filepath`) and `text`, and if you like `key`, `speaker`,
    `split`, and for a part of a longer recording `offset` and `duration` in seconds.

    A path is relative to the manifest that names it. Manifests of one split stand in `train`, `valid`, `test`; in
    `files` each line may have its `split`, and without one the transcript decides. Without an `offset` the whole
    recording is read, whatever its `duration` says.
    """

    kind: Literal["manifest"] = "manifest"
    files: Free[tuple[Path, ...]] = ()
    """JSON lines (.jsonl, .json, also with .gz), or a table with a heading (.csv, .tsv)."""

    def utterances(self, folder: Path, progress: Progress) -> list[Utterance]:
        """Read every manifest.

        Args:
            folder: of the prepared corpus; not used.
            progress: not used, reading takes seconds.

        Raises:
            UserError: no manifest, or the lines that cannot be used, all of them in one message.
        """
        given = [(None, file) for file in self.files] + list(self.by_split())
        if not given:
            raise UserError(
                "data.corpus.files = []: there is nothing to prepare; name your manifests, e.g. "
                "data.corpus.files='[data/all.jsonl]', or choose another corpus with data.corpus.kind"
            )
        for split, file in given:
            if not is_file(file):
                raise UserError(f"data.corpus.{split or 'files'}: {show(file)}: there is no such file; mend the path")
        found: dict[str, Utterance] = {}
        problems: list[str] = []
        for split, file in given:
            for line, fields in _rows(file, problems):
                utterance = self._utterance(file, split, line, fields, problems)
                if utterance is None:
                    continue
                first = found.setdefault(utterance.key, utterance)
                if first is not utterance:
                    problems.append(
                        f"{utterance.where}: key = {utterance.key!r}: is that of {first.where} too; "
                        "give each line its own `key`, or remove one"
                    )
        if problems:
            raise BadLinesError(problems, list(found.values()))
        if not found:
            raise UserError(f"{', '.join(show(file) for _, file in given)}: holds no utterance; add lines")
        return list(found.values())

    def _utterance(
        self, file: Path, split: SplitName | None, line: int, fields: dict[str, Any], problems: list[str]
    ) -> Utterance | None:
        """An utterance, in the split of its manifest if that has one."""
        if split is not None and fields.get("split") not in (None, "", split):
            problems.append(
                f"{show(file)} line {line}: split = {fields['split']!r}: the manifest is in data.corpus.{split}; take "
                "one of the two out"
            )
            return None
        if split is not None and isinstance(fields.get("text"), str):
            fields = {**fields, "split": self.split_of(split, fields["text"])}
        return _utterance(file, line, fields, problems)


def _rows(file: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Lines of a manifest as (line number, fields)."""
    ending = file.suffix.lower()
    if ending in (".csv", ".tsv"):
        yield from _table_rows(file, "\t" if ending == ".tsv" else ",", problems)
    elif (Path(file.stem).suffix.lower() if ending == ".gz" else ending) in (".jsonl", ".json"):
        yield from json_lines(file, problems)
    else:
        raise UserError(f"data.corpus.files: {show(file)}: ending {ending!r}, wanted .jsonl, .json, .csv or .tsv")


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
        except UnicodeDecodeError as error:
            raise UserError(not_utf8(file, error)) from error


def _utterance(file: Path, line: int, fields: dict[str, Any], problems: list[str]) -> Utterance | None:
    where = f"{show(file)} line {line}"
    name = next((n for n in AUDIO_FIELDS if fields.get(n)), None)
    if name is None:
        problems.append(f"{where}: audio: is missing; add the path of the recording as `audio`")
        return None
    path = file.parent / str(fields[name])  # an absolute path stays as it is
    named = fields.get("key")
    key = _relative(path, file.parent) if named in (None, "") else named
    key = make_key(str(key))
    text: Any = fields.get("text")
    split = fields.get("split") or None
    speaker = fields.get("speaker")
    before = len(problems)

    def problem(field: str, value: object, reason: str) -> None:
        problems.append(f"{where}: key {key}: {field} = {value!r}: {reason}")

    for field, value in ((name, fields[name]), ("key", named), ("text", text), ("split", split), ("speaker", speaker)):
        if value is not None and not isinstance(value, (str, int) if field in ("key", "speaker") else str):
            problem(field, value, "is not text; write it in quotes")
    times = {field: _seconds(fields[field]) for field in ("offset", "duration") if fields.get(field) not in (None, "")}
    for field, seconds in times.items():
        if seconds is None or (field == "duration" and seconds == 0):
            problem(field, fields[field], "wanted seconds; mend it or leave it out")
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
    if len(problems) > before:
        return None
    start, duration = times.get("offset"), times.get("duration")
    end = None if start is None or duration is None else start + duration
    speaker = None if speaker in (None, "") else str(speaker)
    return Utterance(key, text, path, split, where, speaker, start or 0.0, end)


def _seconds(value: Any) -> float | None:
    """A time of JSON or of a table; None if it is none."""
    try:
        seconds = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else -1.0
    except ValueError:
        return None
    return seconds if seconds >= 0 and math.isfinite(seconds) else None


def _relative(path: Path, folder: Path) -> str:
    """Path without its ending, from the manifest's folder on if it lies below."""
    path = path.with_suffix("")
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path).lstrip("/")
