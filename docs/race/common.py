"""What both rivals share: the corpus, the network, the error rate. Nothing of this project is imported.

The network is that of `base/speech_small` as torch writes it: two convolutions of stride 2, a projection, three layers
of bidirectional `nn.LSTM` with 192 units a direction side by side, a linear map to the labels.
"""

import argparse
import io
import math
from collections.abc import Iterable
from pathlib import Path

import soundfile
import torch
import torchaudio
import webdataset
from torch import Tensor, nn

SAMPLE_RATE_HZ = 16_000
ALPHABET = " абвгдежзийклмнопрстуфхцчшщъыьэюяё"
"""Label 0 is the blank of CTC, label i the i-th of these."""
SPEEDS = (0.9, 1.0, 1.1)
BATCH_SECONDS = 66.0
"""Sound a step."""
PEAK_RATE, WARM_UP_STEPS = 4e-3, 120


def options(description: str) -> argparse.ArgumentParser:
    """What both rivals are told on the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, default=Path("data/read_ru"))
    parser.add_argument("--passes", type=int, default=14)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def utterances(data: Path, split: str) -> list[tuple[Tensor, str]]:
    """Waveforms (N,) at 16 kHz and transcripts of a split that `./launch.sh prepare speech/read_ru` has written."""
    found = []
    shards = sorted(str(path) for path in (data / split).glob("*.tar"))
    for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False):
        wave, rate = soundfile.read(io.BytesIO(sample["flac"]), dtype="float32")
        wave = torch.from_numpy(wave)
        if rate != SAMPLE_RATE_HZ:
            wave = torchaudio.functional.resample(wave, rate, SAMPLE_RATE_HZ)
        found.append((wave, cleaned(sample["txt"].decode())))
    return found


def cleaned(text: str) -> str:
    """Lower case; what is not in the alphabet is a space; one space between words."""
    return " ".join("".join(c if c in ALPHABET else " " for c in text.lower()).split())


def labels(text: str) -> list[int]:
    return [1 + ALPHABET.index(c) for c in text]


def greedy(log_probs: Tensor) -> str:
    """Best path of CTC: (T, V) -> text."""
    path = torch.unique_consecutive(log_probs.argmax(-1)).tolist()
    return " ".join("".join(ALPHABET[i - 1] for i in path if i).split())


def cer(pairs: Iterable[tuple[str, str]]) -> float:
    """Character error rate of (reference, hypothesis) pairs."""
    errors = total = 0
    for reference, hypothesis in pairs:
        errors += int(torchaudio.functional.edit_distance(list(reference), list(hypothesis)))
        total += len(reference)
    return errors / total


def rate(step: int, total: int) -> float:
    """Learning rate of a step: linear warm-up, then a cosine to nought, as in `speech/read_ru`."""
    if step < WARM_UP_STEPS:
        return PEAK_RATE * (step + 1) / WARM_UP_STEPS
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP_STEPS) / max(1, total - WARM_UP_STEPS)))


class Net(nn.Module):
    """Features (B, T, 80) to log-probabilities (B, T / 4, V)."""

    def __init__(self, hidden_size: int = 192, num_layers: int = 3, dropout: float = 0.1) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.projection = nn.Linear(32 * 20, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.rnn = nn.LSTM(hidden_size, hidden_size, num_layers, bidirectional=True, batch_first=True, dropout=dropout)
        self.output = nn.Linear(2 * hidden_size, 1 + len(ALPHABET))

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolutions(x.unsqueeze(1))
        x = self.projection(x.transpose(1, 2).flatten(2))
        x, _ = self.rnn(self.dropout(x))
        return self.output(x).log_softmax(-1)


def num_output_frames(frames: Tensor) -> Tensor:
    """Frames behind both convolutions."""
    return ((frames + 1) // 2 + 1) // 2
