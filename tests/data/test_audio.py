"""Features are a function of a clip alone, the same in the worker and in the model."""

import contextlib
import io

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from tests.helpers import overrides
from trainer import recipe
from trainer.data.audio import LOG_FLOOR, AudioError, FeaturesConfig, change_speed, checksum, decode, stretched


def clips(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    waves = [torch.randn(n, generator=generator) * 0.1 for n in lengths]
    return torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), torch.tensor(lengths)


def test_a_clip_has_the_same_features_alone_and_padded() -> None:
    log_mel = FeaturesConfig().build(16000)
    waves, lengths = clips(16000, 9001, 300)
    together, frames = log_mel(waves, lengths)
    assert frames.tolist() == log_mel.num_frames(lengths.numpy()).tolist()
    for b, n in enumerate(lengths.tolist()):
        alone, _ = log_mel(waves[b : b + 1, :n], torch.tensor([n]))
        assert torch.equal(together[b, : frames[b]], alone[0])
        assert not together[b, frames[b] :].any()


def test_a_frame_depends_on_the_samples_under_its_window_only() -> None:
    log_mel = FeaturesConfig().build(16000)
    wave, _ = clips(8000)
    whole = log_mel.energies(wave)
    part = log_mel.energies(wave[:, 160 * 10 : 160 * 20 + log_mel.n_fft])  # a stream's chunk
    torch.testing.assert_close(part, whole[:, 10:21], rtol=1e-4, atol=1e-4)  # float32 FFT


@pytest.mark.parametrize(("rate", "window_ms", "num_bands"), [(16000, 25, 80), (8000, 32, 40), (22050, 20, 64)])
def test_the_features_are_torchaudios(rate: int, window_ms: float, num_bands: int) -> None:
    """To float rounding: a filter bank or window of another kind would show."""
    log_mel = FeaturesConfig(num_bands=num_bands, window_ms=window_ms).build(rate)
    theirs = torchaudio.transforms.MelSpectrogram(
        rate, log_mel.n_fft, round(rate * window_ms / 1000), log_mel.hop, f_min=20.0, n_mels=num_bands, center=False
    )
    wave, _ = clips(rate)
    torch.testing.assert_close(log_mel.energies(wave), (theirs(wave) + LOG_FLOOR).log().mT, rtol=1e-4, atol=1e-4)


def test_features_in_the_worker_equal_those_in_the_model(corpus) -> None:
    batches = {}
    for where in ("worker", "model"):
        task = recipe.load("speech/tones", overrides(corpus, corpus, f"data.features.where={where}"))
        dataset = task.build_dataset("train")
        batch = dataset.load(dataset.plan.epoch(0)[0].micro_batches[0])
        model = task.build_model().train()
        if where == "model":
            assert batch["audio"].ndim == 2
            x, frames = model.log_mel(batch["audio"], batch["lengths"])
            from trainer import keyed

            x = model.spec_augment(x, frames, keyed.fold(batch["noise_keys"], "spec_augment"))
            batches[where] = (x, frames)
        else:
            batches[where] = (batch["audio"], batch["lengths"])
    assert torch.equal(batches["worker"][0], batches["model"][0])
    assert torch.equal(batches["worker"][1], batches["model"][1])
    assert (batches["worker"][0] == 0).all(-1).any()  # something was masked


def test_features_are_normalised_over_the_corpus(corpus) -> None:
    dataset = recipe.load("speech/tones", overrides(corpus, corpus)).build_dataset("train")
    x = torch.cat([torch.from_numpy(dataset.media(k).image).T for k in dataset.index.keys])
    assert x.mean(0).abs().max() < 0.02
    assert (x.std(0) - 1).abs().max() < 0.02


@pytest.mark.parametrize("speed", [0.9, 1.0, 1.1, 1.05])
@pytest.mark.parametrize("length", [777, 16000, 16001])
def test_the_plan_knows_the_length_after_a_change_of_speed(speed: float, length: int) -> None:
    made = len(change_speed(torch.zeros(length), 16000, speed))
    assert stretched(np.array([length]), speed, 16000).tolist() == [made]


def test_the_original_speed_is_drawn_only_if_it_is_named(corpus) -> None:
    dataset = recipe.load(
        "speech/tones", overrides(corpus, corpus, "data.augment.speeds=[0.9, 0.95]", "plan.micro_batch_seconds=60")
    ).build_dataset("train")
    steps = dataset.plan.epoch(0)
    assert {s for step in steps for m in step.micro_batches for s in m.speeds} == {0.9, 0.95}


def encode(samples: np.ndarray, rate: int = 16000, kind: str = "WAV", subtype: str = "FLOAT") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def test_flac_goes_where_there_is_room() -> None:
    content = encode(np.random.default_rng(0).uniform(-1, 1, 3000), 16000, "FLAC", "PCM_16")
    want = decode(content, 16000)
    room = np.full(3001, 7, np.float32)
    got = decode(content, 16000, intact=True, room=room)
    assert np.shares_memory(got, room)
    assert np.array_equal(got, want)
    assert room[3000] == 7
    assert np.array_equal(decode(content, 16000, intact=True, room=room[:2999]), want)


def test_flac_that_does_not_say_how_long_it_is() -> None:
    """As an encoder leaves it that wrote into a pipe."""
    content = bytearray(encode(np.random.default_rng(0).uniform(-1, 1, 3000), 16000, "FLAC", "PCM_16"))
    want = decode(bytes(content), 16000)
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    with contextlib.suppress(AudioError):  # libsndfile may refuse it, never shorten it
        assert np.array_equal(decode(bytes(content), 16000, intact=True), want)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"this is text", "not audio"),
        (encode(np.zeros(100, np.float32), 8000), "wrong sample rate: 8000 Hz, wanted 16000"),
        (encode(np.zeros((100, 2), np.float32)), "several channels: 2"),
        (encode(np.zeros(0, np.float32)), "no samples"),
        (encode(np.full(100, np.nan, np.float32)), "NaN"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_unusable_audio_says_why(content: bytes, reason: str) -> None:
    with pytest.raises(AudioError, match=reason):
        decode(content, 16000)


FLAC = [
    (kind, subtype, length)
    for kind, subtype in (("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("FLAC", "PCM_S8"), ("WAV", "PCM_16"))
    for length in (1, 4096, 30001)
]


@pytest.mark.parametrize(("kind", "subtype", "length"), FLAC)
def test_what_was_decoded_before_has_the_same_samples_by_either_decoder(kind: str, subtype: str, length: int) -> None:
    content = encode(np.random.default_rng(length).uniform(-1, 1, length), 16000, kind, subtype)
    assert np.array_equal(decode(content, 16000, intact=True), decode(content, 16000))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encode(np.zeros(100), 8000, "FLAC", "PCM_16"), "wrong sample rate: 8000 Hz, wanted 16000"),
        (encode(np.zeros((100, 2)), 16000, "FLAC", "PCM_16"), "several channels: 2"),
        (b"fLaC and then nothing of the kind", "not audio"),
    ],
    ids=["rate", "channels", "no FLAC"],
)
def test_unusable_flac_says_the_same_by_either_decoder(content: bytes, reason: str) -> None:
    for intact in (False, True):
        with pytest.raises(AudioError, match=reason):
            decode(content, 16000, intact)


@pytest.mark.parametrize("length", [1, 2, 1024, 1025, 50_000])
def test_a_checksum_depends_on_every_sample_and_its_place(length: int) -> None:
    values = np.random.default_rng(length).standard_normal(length).astype(np.float32)
    whole = checksum(values)
    assert checksum(values.copy()) == whole
    assert checksum(np.append(values, np.float32(0))) != whole
    for place in {0, length // 2, length - 1}:
        changed = values.copy()
        changed[place] = np.nextafter(changed[place], np.float32(9))
        assert checksum(changed) != whole
    if length > 1:
        assert checksum(values[::-1]) != whole
