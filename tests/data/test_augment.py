"""Augmentation does what it says, and is a function of the clip's key alone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from tests.helpers import overrides
from trainer import keyed, recipe
from trainer.data.audio import change_speed
from trainer.data.augment import (
    AugmentConfig,
    NoiseConfig,
    ReverberationConfig,
    SpecAugment,
    WaveAugment,
    fast_length,
    reverberate,
)
from trainer.data.loader import Loader
from trainer.errors import UserError

RATE = 16000


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Noises (short, long, another rate, two channels) and impulse responses."""
    noises, rooms = tmp_path_factory.mktemp("noises"), tmp_path_factory.mktemp("rooms")
    generator = np.random.default_rng(0)
    (noises / "deeper").mkdir()
    soundfile.write(noises / "short.wav", generator.normal(0, 0.1, 3000), RATE)
    soundfile.write(noises / "long.flac", generator.normal(0, 0.02, 80000), RATE)
    soundfile.write(noises / "deeper" / "other.wav", generator.normal(0, 0.1, (20000, 2)), 8000)
    (noises / "readme.txt").write_text("not sound")
    for name in ("small", "large"):
        decay = np.exp(-np.arange(1500) / (100 if name == "small" else 400))
        response = generator.normal(0, 0.1, 1500) * decay
        response[20] = 1
        soundfile.write(rooms / f"{name}.wav", response, RATE)
    return noises, rooms


def speech(samples: int = 20000, seed: int = 0) -> Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)) * 0.1


def ratio_db(wave: Tensor, noise: Tensor) -> float:
    return 10 * float(torch.log10(wave.double().square().sum() / noise.double().square().sum()))


def keys(count: int) -> Iterator[int]:
    return (keyed.key("clip", i) for i in range(count))


@pytest.mark.parametrize("samples", [400, 20000, 50001])
@pytest.mark.parametrize("snr_db", [-5.0, 7.0, 30.0])
def test_the_noise_has_the_ratio_that_was_asked_for(folders: tuple[Path, Path], snr_db: float, samples: int) -> None:
    noise = NoiseConfig(path=folders[0], snr_db=(snr_db, snr_db), share=1)
    augment, wave = WaveAugment(AugmentConfig(noise=noise), RATE), speech(samples)
    heard = [augment(wave, key) for key in keys(20)]
    for noisy in heard:
        assert noisy.shape == wave.shape
        assert abs(ratio_db(wave, noisy - wave) - snr_db) < 0.1
    assert len({float(noisy.sum()) for noisy in heard}) == 20  # no two have the same piece of noise


def test_ratios_are_drawn_between_the_limits(folders: tuple[Path, Path]) -> None:
    noise = NoiseConfig(path=folders[0], snr_db=(5, 20), share=0.5)
    augment, wave = WaveAugment(AugmentConfig(noise=noise), RATE), speech()
    ratios = [ratio_db(wave, y - wave) for y in (augment(wave, key) for key in keys(300)) if y is not wave]
    assert 0.4 < len(ratios) / 300 < 0.6
    assert 4.9 < min(ratios) < 7
    assert 18 < max(ratios) < 20.1


def test_a_room_is_a_convolution_in_which_the_direct_sound_stays_in_its_place(folders: tuple[Path, Path]) -> None:
    wave = speech(5000)
    response = torch.from_numpy(soundfile.read(folders[1] / "large.wav", dtype="float32")[0])
    got = reverberate(wave, response)
    wanted = np.convolve(wave.double().numpy(), response.double().numpy())[20 : 20 + len(wave)]
    wanted *= np.sqrt(float(wave.double().square().sum()) / np.square(wanted).sum())
    np.testing.assert_allclose(got.numpy(), wanted, atol=1e-6)
    assert abs(ratio_db(wave, got)) < 1e-3
    alone = torch.zeros(100)
    alone[37] = 0.5
    torch.testing.assert_close(reverberate(wave, alone), wave, rtol=1e-5, atol=1e-6)
    rooms = ReverberationConfig(path=folders[1], share=1)
    augment = WaveAugment(AugmentConfig(reverberation=rooms), RATE)
    small = torch.from_numpy(soundfile.read(folders[1] / "small.wav", dtype="float32")[0])
    choices = [got, reverberate(wave, small)]
    drawn = [[torch.equal(augment(wave, key), choice) for choice in choices] for key in keys(20)]
    assert all(sum(which) == 1 for which in drawn)
    assert {which.index(True) for which in drawn} == {0, 1}


def test_a_fast_length_is_the_next_one_of_small_factors() -> None:
    def smooth(n: int) -> bool:
        for p in (2, 3, 5):
            while n % p == 0:
                n //= p
        return n == 1

    fast = [n for n in range(2, 3000, 2) if smooth(n)]
    for n in range(1, 2900):
        assert fast_length(n) == next(f for f in fast if f >= n), n


def test_gain_is_uniform_in_decibels() -> None:
    augment, wave = WaveAugment(AugmentConfig(gain_db=(-6, 3)), RATE), speech(100)
    gains = [ratio_db(augment(wave, key), wave) for key in keys(300)]
    assert -6.001 < min(gains) < -5.5
    assert 2.5 < max(gains) < 3.001
    assert abs(np.mean(gains) - -1.5) < 0.5


def test_silence_stays_silent(folders: tuple[Path, Path]) -> None:
    noise, rooms = NoiseConfig(path=folders[0], share=1), ReverberationConfig(path=folders[1], share=1)
    augment = WaveAugment(AugmentConfig(noise=noise, reverberation=rooms, gain_db=(6, 6)), RATE)
    for key in keys(5):
        assert not augment(torch.zeros(1000), key).any()


def settings(folders: tuple[Path, Path]) -> list[str]:
    noises, rooms = folders
    return [
        f"data.augment.noise={{path: {noises}, share: 0.7}}",
        f"data.augment.reverberation={{path: {rooms}, share: 0.5}}",
        "data.augment.gain_db=[-3, 3]",
    ]


def test_a_clip_is_the_same_whoever_loads_it(corpus: Path, folders: tuple[Path, Path]) -> None:
    """On any number of workers and alone, in waveform and features; another in another epoch and at another seed."""

    def load(workers: int, epoch: int, *more: str) -> dict[str, tuple[int, Tensor]]:
        task = recipe.load("speech/tones", overrides(corpus, corpus, *settings(folders), *more))
        dataset = task.build_dataset("train")
        steps = dataset.plan.epoch(epoch)
        found = {}
        for _, batches in Loader(dataset, steps, 0, 1, dataset.plan.micro_batches_per_step, workers):
            for batch in batches:
                for b, key in enumerate(batch["keys"]):
                    if key:  # not a dummy
                        features = batch["audio"][b, : batch["lengths"][b]].clone()
                        found[key] = (batch["checksums"][b], features)
        return found

    alone = load(0, 0)
    for other in (load(1, 0), load(2, 0), load(0, 0, "plan.micro_batch_seconds=4", "plan.num_buckets=1")):
        assert other.keys() == alone.keys()
        for key, (checksum, features) in alone.items():
            assert other[key][0] == checksum
            assert torch.equal(other[key][1], features)
    for changed in (load(0, 1), load(0, 0, "seed=1")):
        same = [key for key in alone if changed[key][0] == alone[key][0]]
        assert len(same) < 0.2 * len(alone)


def test_lengths_are_those_of_the_plan(corpus: Path, folders: tuple[Path, Path]) -> None:
    """The plan counts frames and seconds before a sample is read."""
    more = [*settings(folders), "data.features.where=model"]
    dataset = recipe.load("speech/tones", overrides(corpus, corpus, *more)).build_dataset("train")
    for step in dataset.plan.epoch(0)[:3]:
        for micro_batch in step.micro_batches:
            batch = dataset.load(micro_batch)
            for row, speed, length in zip(micro_batch.samples, micro_batch.speeds, batch["lengths"], strict=True):
                plain = torch.from_numpy(dataset.waveform(row))
                assert len(change_speed(plain, RATE, speed)) == length


def test_validation_is_not_augmented(corpus: Path, folders: tuple[Path, Path]) -> None:
    task = recipe.load("speech/tones", overrides(corpus, corpus, *settings(folders), "data.features.where=model"))
    dataset = task.build_dataset("valid")
    micro_batch = dataset.plan.epoch(0)[0].micro_batches[0]
    batch = dataset.load(micro_batch)
    for row, wave, length in zip(micro_batch.samples, batch["audio"], batch["lengths"], strict=True):
        assert torch.equal(wave[:length], torch.from_numpy(dataset.waveform(row)))


def test_other_recordings_are_other_data(corpus: Path, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A resumed run that would hear other noise is refused; where the folder lies does not matter."""

    def identity(noises: Path | None) -> str:
        more = [f"data.augment.noise.path={noises}"] if noises else []
        task = recipe.load("speech/tones", overrides(corpus, corpus, *more))
        return task.build_dataset("train").identity["samples"]

    moved = tmp_path / "moved"
    moved.mkdir()
    soundfile.write(moved / "a.wav", np.zeros(100), RATE)
    first = identity(moved)
    assert first == identity(moved.rename(tmp_path / "again"))
    soundfile.write(tmp_path / "again" / "b.wav", np.zeros(100), RATE)
    assert identity(tmp_path / "again") != first
    assert identity(None) in first


def test_a_recording_that_cannot_be_used_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "broken.wav").write_bytes(b"RIFF, but nothing else")
    soundfile.write(tmp_path / "empty.flac", np.zeros(0), RATE)
    noise, rooms = NoiseConfig(path=tmp_path, share=1), ReverberationConfig(path=tmp_path, share=1)
    augment, wave = WaveAugment(AugmentConfig(noise=noise, reverberation=rooms), RATE), speech(1000)
    for key in keys(30):
        assert torch.equal(augment(wave, key), wave)
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == len(set(texts))
    for name in ("broken.wav", "empty.flac"):
        assert any(name in text and "replace or remove it" in text for text in texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("noise.path=/nowhere/at/all", r"data\.augment\.noise\.path = /nowhere/at/all: there is no such folder"),
        ("reverberation.path=EMPTY", r"data\.augment\.reverberation\.path = .*: holds no sound; wanted files that end"),
        ("noise={path: x, snr_db: [20, 5]}", r"snr_db = \[20, 5\]: wanted \[lowest, highest\], as \[5, 20\]"),
        ("gain_db=[3, -3]", r"gain_db = \[3, -3\]: wanted \[lowest, highest\], as \[-3, 3\]"),
        ("noise={snr_db: [5, 20]}", r"data\.augment\.noise\.path: is missing"),
        ("noise={path: x, share: 1.5}", r"share = 1\.5"),
    ],
)
def test_a_mistake_is_named_with_its_cure(corpus: Path, tmp_path: Path, change: str, message: str) -> None:
    setting = f"data.augment.{change.replace('EMPTY', str(tmp_path))}"
    with pytest.raises(UserError, match=message):
        recipe.load("speech/tones", overrides(corpus, corpus, setting)).build_dataset("train")


def test_spec_augment_is_a_function_of_the_key() -> None:
    augment = SpecAugment(AugmentConfig(time_masks=2, frequency_masks=2))
    x = torch.ones(3, 100, 80)
    lengths = torch.tensor([100, 60, 100])
    y = augment(x.clone(), lengths, [1, 2, 3])
    other = augment(x.flip(0).clone(), lengths.flip(0), [3, 2, 1]).flip(0)
    assert torch.equal(y, other)
    assert not torch.equal(y[0], y[2])
    assert (y[1, 60:] == 1).all()  # masks lie inside the clip
    assert 0 < (y == 0).float().mean() < 0.7


def test_masks_have_every_width_up_to_the_limit_and_lie_anywhere() -> None:
    config = AugmentConfig(time_masks=1, time_mask_frames=30, time_mask_share=0.2, frequency_masks=1)
    count = 2000
    y = SpecAugment(config)(torch.ones(count, 50, 40), torch.full((count,), 50), list(keys(count)))
    in_time = (y == 0).all(2).sum(1)
    in_frequency = (y == 0).all(1).sum(1)
    assert set(in_time.tolist()) == set(range(11))  # a fifth of 50 frames, not 30
    assert set(in_frequency.tolist()) == set(range(16))
    assert abs(in_time.float().mean() - 5) < 0.3
    hidden = (y == 0).all(2).float().mean(0)  # how often each frame is
    assert hidden[0] > 0
    assert hidden[-1] > 0
    assert hidden[15:35].std() < 0.02
