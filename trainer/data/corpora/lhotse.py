"""Manifests of lhotse (Żelasko et al. 2021): recordings with supervisions, or cuts; JSON lines, with gzip or without.

Only what lies in a file as it is can be read: commands are not executed, addresses not fetched, transformed or mixed
audio not made. Changes of the sample rate are ignored: `prepare` makes its own.
"""

import itertools
from pathlib import Path
from typing import Any, Literal

from trainer.config import Free, show
from trainer.data.corpora.base import Progress, Reading, SplitFiles, SplitName, Utterance, json_lines, make_key
from trainer.errors import UserError

TOLERANCE_SECONDS = 0.005
"""Rounding of times: supervisions of a cut that overlap by less do not."""


class NotReadableError(ValueError):
    """A line that says something which is not read; the text says what and the cure."""


class LhotseConfig(SplitFiles):
    """Manifests of each split, e.g. train: [libri_recordings_train.jsonl.gz, libri_supervisions_train.jsonl.gz].

    A file of cuts stands alone; which is which shows in the lines.
    """

    kind: Literal["lhotse"] = "lhotse"
    root: Free[Path] = Path(".")
    """Where relative paths of recordings start: the folder that the manifests were made in."""

    def utterances(self, folder: Path, progress: Progress) -> list[Utterance]:
        """Read every manifest.

        Args:
            folder: of the prepared corpus; not used.
            progress: told the manifests that were read.

        Raises:
            UserError: there is no manifest, or the lines that cannot be used, all in one message.
        """
        files = list(self.by_split())
        if not files:
            raise UserError(
                "data.corpus.train = []: there is nothing to prepare; name manifests of lhotse, e.g. "
                "data.corpus.train='[data/cuts_train.jsonl.gz]'"
            )
        reading = Reading()
        recordings: dict[str, dict[str, Any]] = {}
        others: list[tuple[SplitName, str, dict[str, Any]]] = []
        for number, (split, file) in enumerate(files, 1):
            if not file.is_file():
                raise UserError(f"data.corpus.{split}: {show(file)}: there is no such file; mend the path")
            for line, fields in json_lines(file, reading.problems):
                if "sources" in fields:
                    recordings[str(fields.get("id"))] = fields
                else:
                    others.append((split, f"{show(file)} line {line}", fields))
            progress("reading manifests", number, len(files))
        for split, where, fields in others:
            self._add(reading, recordings, split, where, fields)
        return reading.result(", ".join(show(file) for _, file in files))

    def _add(
        self,
        reading: Reading,
        recordings: dict[str, dict[str, Any]],
        split: SplitName,
        where: str,
        fields: dict[str, Any],
    ) -> None:
        """Take a supervision or a cut."""
        key = fields.get("id")
        try:
            if "recording_id" in fields:
                recording = recordings.get(str(fields["recording_id"]))
                if recording is None:
                    raise NotReadableError(
                        f"no manifest has its recording {fields['recording_id']!r}; name that of the recordings too"
                    )
                text, speaker = fields.get("text"), fields.get("speaker")
            else:
                recording, text, speaker = _cut(fields)
            if not isinstance(text, str):
                raise NotReadableError("has no text; remove the line")
            start, duration = float(fields.get("start", 0)), float(fields["duration"])
            path = self.root / _file(recording)
            reading.add(
                Utterance(
                    make_key(str(key)),
                    text,
                    path,
                    self.split_of(split, text),
                    where,
                    None if speaker is None else str(speaker),
                    start,
                    start + duration,
                    _channel(fields.get("channel"), recording),
                )
            )
        except NotReadableError as error:
            reading.problems.append(f"{where}: id {key}: {error}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            named = f"{type(error).__name__}: {error}"
            reading.problems.append(f"{where}: id {key}: is no supervision or cut of lhotse ({named}); write it again")


def _cut(cut: dict[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """Recording, text and speaker of a cut."""
    if cut.get("type") not in ("MonoCut", None) or "recording" not in cut:
        raise NotReadableError(
            f"is a {cut.get('type', 'line without a type')}, wanted a MonoCut with its recording; use CutSet's "
            "trim_to_supervisions before it is padded, appended or mixed, and keep the recording"
        )
    spoken = sorted(cut["supervisions"], key=lambda s: float(s["start"]))
    for a, b in itertools.pairwise(spoken):
        if float(a["start"]) + float(a["duration"]) > float(b["start"]) + TOLERANCE_SECONDS:
            raise NotReadableError("has supervisions that overlap; use CutSet's trim_to_supervisions")
    texts = [s["text"] for s in spoken if s.get("text")]
    speakers = {s.get("speaker") for s in spoken}
    return cut["recording"], " ".join(texts), speakers.pop() if len(speakers) == 1 else None


def _file(recording: dict[str, Any]) -> str:
    """The file of a recording."""
    transforms = [t["name"] for t in recording.get("transforms") or [] if t["name"] != "Resample"]
    if transforms:
        raise NotReadableError(f"its recording is changed by {', '.join(transforms)}, which is not done; take another")
    sources = recording["sources"]
    if len(sources) != 1 or sources[0]["type"] != "file":
        kinds = ", ".join(str(source["type"]) for source in sources)
        raise NotReadableError(
            f"its recording comes from {len(sources)} source(s) of type {kinds}, wanted one file: nothing is executed "
            "or fetched; save it to a file (CutSet.save_audios does)"
        )
    return str(sources[0]["source"])


def _channel(channel: Any, recording: dict[str, Any]) -> int | None:
    """Number of a channel inside the file; None if the file has one only."""
    channels = recording["sources"][0]["channels"]
    if isinstance(channel, list):  # some manifests write [0]
        if len(channel) != 1:
            raise NotReadableError(f"is over the channels {channel}, wanted one; split it")
        (channel,) = channel
    if len(channels) == 1 or channel is None:
        return None
    if channel not in channels:
        raise NotReadableError(f"is on channel {channel}, and its recording has {channels}; mend it")
    return int(channels.index(channel))
