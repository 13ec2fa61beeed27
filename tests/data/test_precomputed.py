"""Feature matrices take the place of sound: read from files, packed as .npy, normalised and batched."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from tests.data import layouts
from tests.data.layouts import sphinx
from trainer.data.audio import AudioError, FeaturesConfig, decode_matrix
from trainer.data.index import Index
from trainer.data.matrices import read_matrix
from trainer.data.prepare import prepare
from trainer.data.prepared import SpeechDataConfig
from trainer.data.text import TextConfig
from trainer.errors import UserError

KINDS = {
    "log_mel": FeaturesConfig(num_bands=8),
    "precomputed": FeaturesConfig(kind="precomputed", num_bands=8),
}


@pytest.mark.parametrize("name", KINDS)
def test_features_of_both_kinds_answer_the_same_questions(name: str) -> None:
    features = KINDS[name].build(8000)
    generator = torch.Generator().manual_seed(0)
    shape = (2, 4000) if name == "log_mel" else (2, 40, 8)
    lengths = torch.tensor([shape[1], shape[1] // 2])
    signals = torch.randn(shape, generator=generator)
    signals[1, lengths[1] :] = 0
    features.mean.fill_(0.5)
    features.deviation.fill_(2.0)

    x, frames = features(signals, lengths)
    assert frames.tolist() == features.num_frames(lengths.numpy()).tolist()
    assert x.shape == (2, frames[0], features.num_bands)
    assert not x[1, frames[1] :].any()
    alone, _ = features(signals[1:, : lengths[1]], lengths[1:])
    assert torch.equal(x[1, : frames[1]], alone[0])
    assert torch.equal(alone[0], features.normalise(features.energies(signals[1, : lengths[1]])))

    silence = features.silence()
    x, frames = features(silence[None], torch.tensor([len(silence)]))
    assert (x.shape[1], frames.tolist()) == (1, [1])


@pytest.mark.parametrize("name", KINDS)
def test_without_its_mean_a_clip_is_the_same_through_any_microphone(name: str) -> None:
    """By all three ways: a clip alone, in a batch, and where a gradient goes through it."""
    features = KINDS[name].model_copy(update={"clip_mean": True}).build(8000)
    features.mean.fill_(0.5)
    features.deviation.fill_(2.0)
    signals = torch.randn((2, 4000) if name == "log_mel" else (2, 40, 8), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([signals.shape[1], signals.shape[1] // 2])
    louder = signals * 3 if name == "log_mel" else signals + torch.arange(8.0)
    for x, frames in (features(louder, lengths), features(signals.requires_grad_(), lengths)):
        for b in range(2):
            alone = features.clip(signals[b, : lengths[b]].detach())
            assert alone.mean(0).abs().max() < 1e-5
            assert alone.abs().max() > 0.5
            torch.testing.assert_close(x[b, : frames[b]], alone, rtol=1e-3, atol=1e-3)
        assert not x[1, frames[1] :].any()


def npy(matrix: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, matrix, allow_pickle=matrix.dtype == object)
    return stream.getvalue()


MATRIX = np.arange(24, dtype=np.float32).reshape(6, 4)


@pytest.mark.parametrize(
    ("ending", "content"),
    [
        ("npy", npy(MATRIX)),
        ("npy", npy(np.asfortranarray(MATRIX.astype(np.float64)))),
        ("mfc", sphinx(MATRIX, ">")),
        ("mfc", sphinx(MATRIX, "<")),
    ],
)
def test_a_matrix_is_read_whatever_wrote_it(tmp_path: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content)
    got = read_matrix(path, 4)
    assert got.dtype == np.float32
    assert np.array_equal(got, MATRIX)


@pytest.mark.parametrize(
    ("ending", "content", "reason"),
    [
        ("npy", npy(MATRIX)[:-1], "not a matrix"),
        ("npy", npy(MATRIX)[:20], "not a matrix"),
        ("npy", b"", "not a matrix"),
        ("npy", npy(MATRIX[0]), "not a matrix of numbers"),
        ("npy", npy(MATRIX[:0]), "no rows"),
        ("npy", npy(MATRIX[:, :3]), "3 columns, wanted 4"),
        ("npy", npy(np.where(MATRIX == 3, np.nan, MATRIX)), "NaN"),
        ("mfc", sphinx(MATRIX)[:-4], "not a Sphinx feature file, or cut"),
        ("mfc", sphinx(MATRIX)[:-1], "not a Sphinx feature file, or cut"),
        ("mfc", b"", "not a Sphinx feature file, or cut"),
        ("mfc", sphinx(MATRIX[:, :3]), "18 values are no rows of 4"),
        ("mfc", sphinx(MATRIX[:0]), "no rows"),
        ("mfc", sphinx(np.full((2, 4), np.inf)), "NaN or infinite"),
        ("htk", b"", "ends in '.htk', wanted .npy or .mfc"),
    ],
)
def test_a_damaged_matrix_says_why(tmp_path: Path, ending: str, content: bytes, reason: str) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content)
    with pytest.raises(AudioError, match=reason):
        read_matrix(path, 4)


def test_a_damaged_header_is_an_error_of_few_kinds() -> None:
    """Every bit flipped, and sizes that no memory holds: nothing else than `AudioError` comes out."""
    whole, reasons = npy(MATRIX), set()
    start = whole.index(b"(")
    room = whole.index(b"\n") - start
    shapes = (b"(99999999999999, 4), }", b"(3, 99999999999999999999), }", b"(3, 4.0), }", b"(-3, 4), }", b"(3, 4")
    damaged = [whole[:start] + shape.ljust(room) + whole[start + room :] for shape in shapes]
    for bit in range(8 * (start + room)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(changed))
    for content in damaged:
        try:
            decode_matrix(content, 4)
        except AudioError as error:
            reasons.add(error.reason)
    assert reasons <= {"not a matrix", "not a matrix of numbers", "wrong width", "no rows", "NaN or infinite values"}


class Command:
    """What a pickle may hold."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def test_nothing_in_a_matrix_is_executed(tmp_path: Path) -> None:
    content = npy(np.array([[Command(tmp_path / "executed")]]))
    with pytest.raises(AudioError, match="not a matrix"):
        decode_matrix(content, 1)
    assert not (tmp_path / "executed").exists()


def settings(root: Path, **changes: object) -> SpeechDataConfig:
    values = {
        "corpus": layouts.an4_cepstra(root),
        "path": root / "made",
        "features": FeaturesConfig(kind="precomputed", num_bands=13),
        "text": TextConfig(alphabet=" abcdefghijklmnopqrstuvwxyz"),
    }
    return SpeechDataConfig(**values | changes)


def test_matrices_are_packed_as_they_are(tmp_path: Path) -> None:
    config = settings(tmp_path)
    prepared = prepare(config, processes=1)
    (sample,) = webdataset.WebDataset(str(tmp_path / "made/train/shard-000000.tar"), shardshuffle=False)
    wanted = read_matrix(tmp_path / "feat/an4_clstk/fash/an251-fash-b.mfc", 13)
    assert np.array_equal(decode_matrix(sample["npy"], 13), wanted)
    about = json.loads(sample["json"])
    assert (about["rows_a_second"], about["seconds"], about["speaker"]) == (100, 1.2, "fash")
    assert prepared.statistics.mean == pytest.approx(wanted.mean(0).tolist(), rel=1e-5)
    assert prepared.statistics.deviation == pytest.approx(wanted.std(0).tolist(), rel=1e-5)
    index = Index.load(config.path / "train", config.rate_hz)
    assert (index.num_samples.tolist(), index.hours) == ([120], 1.2 / 3600)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"features": FeaturesConfig()}, "is a feature matrix, not sound; set data.features.kind to precomputed"),
        (
            {"features": FeaturesConfig(kind="precomputed", num_bands=7)},
            r"1,560 values are no rows of 7 \(data\.features",
        ),
    ],
)
def test_other_features_than_the_corpus_has_are_a_mistake(tmp_path: Path, changes: dict, reason: str) -> None:
    with pytest.raises(UserError, match=rf"line 1: key an251-fash-b: .*{reason}"):
        prepare(settings(tmp_path, **changes), processes=1)


def test_sound_is_no_matrix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"key an251-fash-b: .*ends in '\.sph', wanted \.npy or \.mfc"):
        prepare(settings(tmp_path, corpus=layouts.an4(tmp_path)), processes=1)
