"""A trained recogniser for Python: sound in, text out, at once or while it comes.

import trainer

recogniser = trainer.load("runs/speech-read_ru_streaming")
print(recogniser.transcribe("hello.wav"))

stream = recogniser.stream()
for samples in microphone:              # any number of samples at a time, at recogniser.sample_rate_hz
    print(stream.push(samples))
print(stream.finish())

for word in recogniser.words("hello.wav"):
    print(word.word, word.start, word.end, word.confidence)
"""

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer import checkpoint, sounds
from trainer import config as configuration
from trainer.config import show
from trainer.data.audio import LogMel
from trainer.data.text import BLANK, Tokens, label_of_space
from trainer.decoding.alignment import Word, of_spans, spans
from trainer.decoding.tuning import with_recorded
from trainer.errors import UserError
from trainer.models.acoustic import AcousticModel
from trainer.models.streaming import AcousticStream, for_inference
from trainer.recipe import Recipe, of_trained
from trainer.run import RunDirectory

PAUSE_SECONDS = 0.8
"""Of blanks, after which what was said is final."""
LONGEST_SECONDS = 30.0
"""Of a part that is decoded at once: a longer one ends at the next blank, one of twice the length anywhere."""
WINDOW_SECONDS = 30.0
MARGIN_SECONDS = 3.0
"""Of a model that needs the whole of a recording: it gets windows, and so much more on either side."""

Decoder = Callable[[Tensor, Tensor], list[list[int]]]
"""Log-probabilities (B, T, V) and lengths (B,) -> the labels of each row, without blanks."""


class Hypothesis:
    """What was heard so far, decoded from log-probabilities that come piece by piece.

    Until a pause, the best path of CTC stands for what a decoder may find; then the decoder has the last word. So
    memory and work are bounded by what lies between two pauses.

    Args:
        decoder: None for the best path.
        frame_seconds: of an output frame.
        space: the label between words, if there is one. It comes at each pause, where nets that were trained on single
            sentences have none, and where the best path has it at an end of a part, which a decoder may leave out.
        timed: find the times of `words`, too.
    """

    def __init__(
        self, decoder: Decoder | None, frame_seconds: float, space: int | None = None, timed: bool = False
    ) -> None:
        self._decoder, self._space = decoder, [] if space is None else [space]
        self._frame_seconds, self._timed = frame_seconds, timed
        self._pause, self._longest = round(PAUSE_SECONDS / frame_seconds), round(LONGEST_SECONDS / frame_seconds)
        self.frames = 0
        self.first_frame: int | None = None
        """The frame of the first label."""
        self._final: list[int] = []
        self._spans: list[tuple[int, int, float]] = []  # of what is final, if it is timed
        self._between: list[int] = []  # a space that came after what is final
        self._begin()

    def _begin(self) -> None:
        self._part: list[Tensor] = []
        self._labels: list[int] = []
        self._length = self._blanks = 0
        self._before = BLANK

    @property
    def labels(self) -> list[int]:
        """Without blanks."""
        meet = self._final and self._labels and self._between not in (self._final[-1:], self._labels[:1])
        return self._final + (self._between if meet else []) + self._labels

    def words(self, tokens: Tokens) -> list[Word]:
        """What is final, if it is timed, word by word."""
        return of_spans(self._spans, self._final, tokens, self._frame_seconds) if self._timed else []

    def push(self, log_probs: Tensor) -> None:
        """Take the log-probabilities (T, V) of new frames."""
        best = log_probs.argmax(-1).tolist()
        start = 0
        for t, label in enumerate(best):
            if label not in (BLANK, self._before):
                self._labels.append(label)
                self.first_frame = self.frames if self.first_frame is None else self.first_frame
            self._before = label
            self._blanks = self._blanks + 1 if label == BLANK else 0
            self._length += 1
            self.frames += 1
            long = self._length >= self._longest and label == BLANK
            if self._blanks >= self._pause or long or self._length >= 2 * self._longest:
                self._keep(log_probs[start : t + 1])
                start = t + 1
                self.finish(pause=self._blanks >= self._pause)
        self._keep(log_probs[start:])

    def _keep(self, log_probs: Tensor) -> None:
        if (self._timed or self._decoder is not None) and len(log_probs):
            self._part.append(log_probs)

    def finish(self, pause: bool = False) -> None:
        """What is heard up to here is final.

        Args:
            pause: whether a word ends here.
        """
        path = self._labels
        if self._decoder is not None and path:
            part = torch.cat(self._part)[None]
            (self._labels,) = self._decoder(part, torch.tensor([part.shape[1]]))
        if path and path[:1] == self._space:
            self._between = self._space
        labels = self.labels
        if self._timed and self._labels:
            first = self.frames - self._length
            between = len(labels) - len(self._final) - len(self._labels)  # a space that no frame says
            self._spans += [(first, first, 0.0)] * between
            self._spans += [(a + first, b + first, p) for a, b, p in spans(torch.cat(self._part), self._labels)]
        self._final = labels
        if pause or (path and path[-1:] == self._space):
            self._between = self._space
        elif self._labels:
            self._between = []
        before = self._before  # a label that is cut in two is one all the same
        self._begin()
        self._before = before


class Recogniser:
    """A model with its labels and features.

    Args:
        model: trained.
        tokens: its labels.
        sample_rate_hz: of the sound it hears.
        decoder: from log-probabilities to labels; None for the best path.

    Attributes:
        model: a copy for inference.
        frame_seconds: from one output frame to the next.
    """

    def __init__(
        self, model: AcousticModel, tokens: Tokens, sample_rate_hz: int, decoder: Decoder | None = None
    ) -> None:
        self.model = for_inference(model)
        self.tokens, self.decoder = tokens, decoder
        self.sample_rate_hz = sample_rate_hz
        features = model.log_mel
        if not isinstance(features, LogMel):
            raise UserError(
                "data.features.kind = precomputed: the model hears no sound but features that came with its corpus; "
                "train one on sound"
            )
        self.features: LogMel = self.model.log_mel  # type: ignore[assignment]
        self.hop = features.hop * model.config.subsampling.stride
        self.frame_seconds = self.hop / sample_rate_hz

    def cannot_stream(self) -> str | None:
        """The key that keeps the model from running while sound comes, None if it can."""
        if self.features.clip_mean:
            return "data.features.clip_mean = true: a mean is known when the sound has ended; train without"
        reason = self.model.config.cannot_stream()
        return None if reason is None else f"model.{reason}"

    def hypothesis(self, timed: bool = False) -> Hypothesis:
        """Of a recording whose log-probabilities come piece by piece."""
        return Hypothesis(self.decoder, self.frame_seconds, label_of_space(self.tokens), timed)

    def stream(self, timed: bool = False) -> "Stream":
        """Recognition of sound that comes piece by piece.

        Args:
            timed: find the times of the stream's `words`, too.

        Raises:
            UserError: the model needs the whole; the message names the key.
        """
        if (reason := self.cannot_stream()) is not None:
            raise UserError(reason)
        return Stream(self, timed)

    def log_probs(self, sound: NDArray[Any] | Tensor) -> Tensor:
        """Of samples (N,) at the model's rate, all at once: (T, V)."""
        wave = samples(sound)
        with torch.inference_mode():
            x = self.features.clip(wave)[None]
            y, _, _ = self._whole(x)
        return y[0]

    def _whole(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        model = self.model
        here, model.features_here = model.features_here, False
        try:
            return model(x, torch.full((len(x),), x.shape[1]))
        finally:
            model.features_here = here

    def transcribe(self, sound: str | Path | NDArray[Any] | Tensor, sample_rate_hz: int | None = None) -> str:
        """Text of a recording. Memory does not grow with its length, however long it is.

        Args:
            sound: a file, or samples (N,): floating point in [-1, 1], or 16-bit integers.
            sample_rate_hz: of samples; None: the model's.

        Raises:
            UserError: the file is none, or holds no sound.
        """
        return self.tokens.decode(self._hear(sound, sample_rate_hz).labels)

    def words(self, sound: str | Path | NDArray[Any] | Tensor, sample_rate_hz: int | None = None) -> list[Word]:
        """The words of the same text, with their times and confidences."""
        return self._hear(sound, sample_rate_hz, timed=True).words(self.tokens)

    def _hear(
        self, sound: str | Path | NDArray[Any] | Tensor, sample_rate_hz: int | None, timed: bool = False
    ) -> Hypothesis:
        if isinstance(sound, (str, Path)):
            blocks = sounds.of_file(Path(sound), self.sample_rate_hz)
        else:
            blocks = sounds.of_samples(samples(sound), sample_rate_hz or self.sample_rate_hz, self.sample_rate_hz)
        heard = self.hypothesis(timed)
        for part in self.pieces(blocks):
            heard.push(part)
        heard.finish()
        return heard

    def pieces(self, blocks: Iterator[Tensor]) -> Iterator[Tensor]:
        """Log-probabilities (T, V) of a recording that comes in blocks of samples, as they are known.

        A model that needs the whole gets windows of half a minute, and three seconds more on either side.
        """
        if self.cannot_stream() is None:
            features, model = self.features.stream(), AcousticStream(self.model)
            for block in blocks:
                yield model.push(features.push(block)[None])[0]
            yield model.push(features.push(torch.zeros(0), last=True)[None], last=True)[0]
            return
        window = round(WINDOW_SECONDS / self.frame_seconds) * self.hop
        margin = round(MARGIN_SECONDS / self.frame_seconds) * self.hop
        waiting, before = torch.zeros(0), 0  # `before` samples of it are a margin
        for block in blocks:
            waiting = torch.cat([waiting, block])
            while len(waiting) >= before + window + margin:
                y = self.log_probs(waiting[: before + window + margin])
                yield y[before // self.hop : (before + window) // self.hop]
                waiting, before = waiting[before + window - margin :], margin
        yield self.log_probs(waiting)[before // self.hop :]


class Stream:
    """Recognition of one recording while it comes.

    Args:
        recogniser: whose model can.
        timed: see `Recogniser.stream`.

    Attributes:
        heard: what was heard so far, as labels.
        seconds: of sound that came.
    """

    def __init__(self, recogniser: Recogniser, timed: bool = False) -> None:
        self.recogniser = recogniser
        self._features = recogniser.features.stream()
        self._model = AcousticStream(recogniser.model)
        self.heard = recogniser.hypothesis(timed)
        self.seconds = 0.0

    def push(self, sound: NDArray[Any] | Tensor) -> str:
        """Take new samples (N,) at the model's rate; the text so far, whose end may still change."""
        wave = samples(sound)
        self.seconds += len(wave) / self.recogniser.sample_rate_hz
        frames = self._features.push(wave)
        if len(frames):
            self.heard.push(self._model.push(frames[None])[0])
        return self.text

    def finish(self) -> str:
        """The whole text; nothing comes after it."""
        frames = self._features.push(torch.zeros(0), last=True)
        self.heard.push(self._model.push(frames[None], last=True)[0])
        self.heard.finish()
        return self.text

    @property
    def text(self) -> str:
        """So far."""
        return self.recogniser.tokens.decode(self.heard.labels)

    @property
    def words(self) -> list[Word]:
        """What is final, if it is timed, word by word."""
        return self.heard.words(self.recogniser.tokens)

    @property
    def behind_seconds(self) -> float:
        """How much more sound has come than was decided on."""
        return self.seconds - self.heard.frames * self.recogniser.frame_seconds


def samples(sound: NDArray[Any] | Tensor) -> Tensor:
    """Samples (N,) as float32 in [-1, 1].

    Raises:
        ValueError: of another shape or type, or not finite.
    """
    wave = torch.as_tensor(np.ascontiguousarray(sound) if isinstance(sound, np.ndarray) else sound)
    if wave.ndim != 1:
        raise ValueError(f"sound is of shape {tuple(wave.shape)}, wanted (N,): one channel")
    if wave.dtype == torch.int16:
        return wave.float() / 32768
    if not wave.is_floating_point():
        raise ValueError(f"sound is of {wave.dtype}, wanted floating point in [-1, 1] or int16")
    if not wave.isfinite().all():
        raise ValueError("sound holds samples that are no finite numbers")
    return wave.float()


def load(run: str | Path, overrides: Sequence[str] = ()) -> Recogniser:
    """The recogniser of a run's best checkpoint, or of a folder that `export` wrote; the corpus is not needed, but
    where labels are subwords and it was not exported, or the decoder's n-gram is one of its transcripts.

    Args:
        overrides: `key=value` that change the saved configuration.

    Raises:
        UserError: there is none, or it recognises nothing.
    """
    recipe, weights, labels, folder = open_weights(run, overrides)
    found = recipe.recogniser(weights, labels, folder)
    assert isinstance(found, Recogniser)
    return found


def open_weights(
    run: str | Path, overrides: Sequence[str] = ()
) -> tuple[Recipe[Any], dict[str, Tensor], dict[str, str], Path]:
    """A run or exported folder: its recipe, weights, what the outputs stand for, and the folder.

    Raises:
        UserError: it is neither.
    """
    folder = Path(run)
    facts = folder / "export.json"
    if os.path.isfile(facts):  # takes any name; that of Path, only one that a folder can have
        try:
            said = json.loads(facts.read_text(encoding="utf-8"))
            labels, content = said["labels"], (folder / "weights.pt").read_bytes()
            if hashlib.sha256(content).hexdigest() != said["sha256"]:
                raise ValueError(f"weights.pt, {len(content):,} bytes, has another SHA-256 than export.json says")
            weights = torch.load(io.BytesIO(content), weights_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{show(folder)}: is not what `export` wrote: {error}; export the run again") from error
        config = folder / "config.yaml"
        return of_trained(configuration.load_yaml(config), show(config), overrides), weights, labels, folder
    directory = RunDirectory.existing(str(run))
    best = checkpoint.best(directory.checkpoints)
    labels = best.state["data"]["train"]
    recipe = of_trained(directory.saved_config(), show(directory.config), with_recorded(overrides, directory))
    return recipe, best.weights(), labels, directory.path
