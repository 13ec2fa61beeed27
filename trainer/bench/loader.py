"""The loader beside what people use instead, as ratios of one interleaved run on the same FLAC data.

The rivals stand here in full, so that anyone can see that nothing was left out of them or put into them: a straight
webdataset pipeline, a torch Dataset on files, lhotse (where it is installed), and the bare parts without any loader.
They decode with soundfile, which is what their users take, and webdataset once more with our decoder; all on one
thread, from files that the kernel has in its cache, with freed memory kept (`kernels.keep_pages`, as in `train`), and
hand out padded batches. On top of that ours checks every byte and every label and writes checksums for the ledger.
"""

import importlib.util
import io
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
import torch
import torchaudio
import webdataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from kernels import keep_pages
from trainer import recipe as recipes
from trainer.bench.timing import Timing, describe, interleaved
from trainer.config import show
from trainer.data.audio import LOG_FLOOR, LogMel
from trainer.data.loader import Loader
from trainer.data.plan import Step
from trainer.distributed import Ranks
from trainer.engine import Training
from trainer.errors import UserError
from trainer.run import read_lines

CLIPS = 8
"""Clips in a batch of webdataset and of files; lhotse and ours get as many seconds."""
PLAIN = ["speeds=[1.0]", "time_masks=0", "frequency_masks=0", "gain_db=[0, 0]", "noise=null", "reverberation=null"]
"""No augmentation: the rivals have none."""
NEEDED = (
    "holds other samples than KEY.flac with KEY.txt, as `prepare` writes them; bench loader wants what all can read"
)
WANTED = {
    ("waveforms", "webdataset, our decoder"): 1.1,
    ("waveforms", "best of the others"): 1.0,
    ("log-mel", "webdataset + torchaudio"): 2.0,
    ("log-mel", "bare parts, ours"): 0.9,
    ("log-mel", "one worker"): 1.7,
}
"""At least so many times as fast; `one worker` is what two workers are compared with."""
OURS, ONE_WORKER, TWO_WORKERS = "ours", "ours, one worker", "ours, two workers"


@dataclass(frozen=True)
class Clip:
    """One recording as it lies in a shard."""

    key: str
    flac: bytes
    text: str
    seconds: float


def read_clips(shards: Iterable[Path], hours: float) -> tuple[list[Path], list[Clip]]:
    """Whole shards, from the first on, until they hold so many hours.

    Raises:
        UserError: a shard holds no FLAC, or some without a text of its own.
    """
    used: list[Path] = []
    clips: list[Clip] = []
    for shard in shards:
        used.append(shard)
        with tarfile.open(shard) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]
        keys = [name.removesuffix(".flac") for name in members if name.endswith(".flac")]
        if not keys or any(f"{key}.txt" not in members for key in keys):
            raise UserError(f"{show(shard)}: {NEEDED}")
        for key in keys:
            flac = members[f"{key}.flac"]
            sound = soundfile.info(io.BytesIO(flac))
            clips.append(Clip(key, flac, members[f"{key}.txt"].decode(), sound.frames / sound.samplerate))
        if sum(clip.seconds for clip in clips) >= 3600 * hours:
            break
    return used, clips


def batch_seconds(clips: list[Clip]) -> float:
    """What `CLIPS` of them last, or the longest alone."""
    return max(CLIPS * sum(clip.seconds for clip in clips) / len(clips), *(clip.seconds for clip in clips))


Decode = Callable[[bytes], Tensor]
Features = Callable[[Tensor], Tensor] | None


def decode(flac: bytes) -> Tensor:
    return torch.from_numpy(soundfile.read(io.BytesIO(flac), dtype="float32")[0])


def stock_log_mel(log_mel: LogMel, sample_rate_hz: int, window_ms: float) -> Callable[[Tensor], Tensor]:
    """The same features by torchaudio, (N,) -> (T, F)."""
    window = round(sample_rate_hz * window_ms / 1000)
    transform = torchaudio.transforms.MelSpectrogram(
        sample_rate_hz, log_mel.n_fft, window, log_mel.hop, f_min=20.0, n_mels=log_mel.num_bands, center=False
    )
    return lambda wave: log_mel.normalise((transform(wave) + LOG_FLOOR).log().T)


def collate(samples: list[tuple[Tensor, str]]) -> tuple[Tensor, Tensor, list[str]]:
    audio = [x for x, _ in samples]
    return pad_sequence(audio, batch_first=True), torch.tensor([len(x) for x in audio]), [text for _, text in samples]


def bare(clips: list[Clip], features: Features, decode: Decode) -> Iterator[tuple[Tensor, Tensor]]:
    """Decode and compute, nothing else: the bytes are in memory, nothing is put together."""
    for clip in clips:
        x = decode(clip.flac)
        x = x if features is None else features(x)
        yield x, torch.tensor([len(x)])


def with_webdataset(shards: list[Path], features: Features, decode: Decode) -> Iterator[Any]:
    def sample(parts: dict[str, bytes]) -> tuple[Tensor, str]:
        wave = decode(parts["flac"])
        return wave if features is None else features(wave), parts["txt"].decode()

    pipeline = webdataset.WebDataset([str(s) for s in shards], shardshuffle=len(shards), empty_check=False)
    return iter(pipeline.shuffle(100).map(sample).batched(CLIPS, collation_fn=collate))


class Files(Dataset[tuple[Tensor, str]]):
    """A folder of FLAC files."""

    def __init__(self, clips: list[Clip], folder: Path, features: Features) -> None:
        self.samples = [(folder / f"{i}.flac", clip.text) for i, clip in enumerate(clips)]
        self.features = features

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        path, text = self.samples[i]
        wave = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        return wave if self.features is None else self.features(wave), text


def with_files(files: Files) -> Iterator[Any]:
    return iter(DataLoader(files, batch_size=CLIPS, shuffle=True, collate_fn=collate))


def write_files(clips: list[Clip], folder: Path) -> None:
    folder.mkdir()
    for i, clip in enumerate(clips):
        (folder / f"{i}.flac").write_bytes(clip.flac)


def write_shar(clips: list[Clip], files: Path, folder: Path) -> None:
    """The same recordings as lhotse keeps them, the bytes unchanged."""
    import lhotse

    folder.mkdir()
    cuts = []
    for i, clip in enumerate(clips):
        cut = lhotse.Recording.from_file(files / f"{i}.flac", recording_id=f"{i}").to_cut()
        cut.supervisions = [lhotse.SupervisionSegment(f"{i}", f"{i}", 0, cut.duration, text=clip.text)]
        cuts.append(cut)
    shards = lhotse.CutSet.from_cuts(cuts)
    shards.to_shar(folder, fields={"recording": "original"}, shard_size=64, num_jobs=1, verbose=False)


def with_lhotse(folder: Path, log_mel: LogMel | None, sample_rate_hz: int, batch_seconds: float) -> Iterator[Any]:
    """Shar and dynamic bucketing; its filter banks also remove the mean and pre-emphasise."""
    import lhotse
    from lhotse.dataset import DynamicBucketingSampler, K2SpeechRecognitionDataset, OnTheFlyFeatures
    from lhotse.dataset.input_strategies import AudioSamples

    shift = None if log_mel is None else log_mel.hop / sample_rate_hz
    inputs: Any = AudioSamples()
    if log_mel is not None:
        bank = lhotse.Fbank(
            lhotse.FbankConfig(sampling_rate=sample_rate_hz, num_filters=log_mel.num_bands, frame_shift=shift)
        )
        inputs = OnTheFlyFeatures(bank, use_batch_extract=False)  # the faster of its two ways
    cuts = lhotse.CutSet.from_shar(in_dir=folder, shuffle_shards=True)
    sampler = DynamicBucketingSampler(cuts, max_duration=batch_seconds, shuffle=True, num_buckets=10)
    dataset = K2SpeechRecognitionDataset(input_strategy=inputs)
    for chosen in sampler:
        batch = dataset[chosen]
        about = batch["supervisions"]
        yield batch["inputs"], about["num_samples" if log_mel is None else "num_frames"], about["text"]


def with_ours(dataset: Any, steps: list[Step], workers: int) -> Iterator[Any]:
    for _, batches in Loader(dataset, steps, 0, 1, dataset.plan.micro_batches_per_step, workers):
        for batch in batches:
            yield batch["audio"], batch["lengths"] * batch["valid"]


def drain(batches: Iterable[Any]) -> int:
    """Take every batch; returns samples or frames, padding apart."""
    return sum(int(batch[1].sum()) for batch in batches)


@dataclass(frozen=True)
class Contest:
    """Ways to load the same sound, and how much of it each loads."""

    ways: dict[str, Callable[[], object]]
    hours: dict[str, float]


def contests(config: str, overrides: list[str], hours: float, folder: Path) -> dict[str, Contest]:
    """Waveforms and log-mel: every way, by name, checked to deliver the whole of the data."""
    found: dict[str, Contest] = {}
    for name, where in (("waveforms", "model"), ("log-mel", "worker")):
        plain = [*(f"data.augment.{setting}" for setting in PLAIN), f"data.features.where={where}"]
        first: Any = recipes.load(config, [*overrides, *plain]).build_dataset("train")
        shards, clips = read_clips(first.index.shards, hours)
        plain.append(f"plan.micro_batch_seconds={batch_seconds(clips)}")
        dataset: Any = recipes.load(config, [*overrides, *plain]).build_dataset("train")
        rate, log_mel = dataset.config.sample_rate_hz, dataset.log_mel
        if not found:
            write_files(clips, folder / "files")
            if importlib.util.find_spec("lhotse"):
                write_shar(clips, folder / "files", folder / "shar")
        kept = {clip.key for clip in clips}
        steps = dataset.plan.epoch(0, [key for key in dataset.index.keys if key not in kept])
        if not steps:
            raise UserError(f"{config}: the plan leaves nothing of the first {len(shards)} shards; see `plan`")
        ways = _ways(dataset, steps, shards, clips, folder, with_features=where == "worker")
        total = sum(clip.seconds for clip in clips) / 3600
        own = sum(step.counts["seconds"] for step in steps) / 3600
        loaded = {way: own if way.startswith(OURS) else total for way in ways}
        _check(ways, loaded, 3600 * rate / (log_mel.hop if where == "worker" else 1))
        found[name] = Contest(ways, loaded)
    return found


def _ways(
    dataset: Any, steps: list[Step], shards: list[Path], clips: list[Clip], folder: Path, with_features: bool
) -> dict[str, Callable[[], object]]:
    rate, log_mel = dataset.config.sample_rate_hz, dataset.log_mel
    stock = stock_log_mel(log_mel, rate, dataset.config.features.window_ms) if with_features else None
    own = log_mel.clip if with_features else None

    def our_decode(flac: bytes) -> Tensor:
        return torch.from_numpy(log_mel.decode(flac, intact=True))

    suffix = " + torchaudio" if with_features else ""
    ours = "our decoder and log-mel" if with_features else "our decoder"
    ways: dict[str, Callable[[], object]] = {
        OURS: lambda: drain(with_ours(dataset, steps, 0)),
        f"webdataset{suffix}": lambda: drain(with_webdataset(shards, stock, decode)),
        f"files{suffix}": lambda: drain(with_files(Files(clips, folder / "files", stock))),
        f"webdataset, {ours}": lambda: drain(with_webdataset(shards, own, our_decode)),
        "bare parts, ours" if with_features else "bare decoder": lambda: drain(bare(clips, own, our_decode)),
    }
    if (shar := folder / "shar").exists():
        ways["lhotse"] = lambda: drain(
            with_lhotse(shar, log_mel if with_features else None, rate, batch_seconds(clips))
        )
    if with_features:
        ways["bare parts, torchaudio"] = lambda: drain(bare(clips, stock, decode))
    ways[ONE_WORKER] = lambda: drain(with_ours(dataset, steps, 1))
    ways[TWO_WORKERS] = lambda: drain(with_ours(dataset, steps, 2))
    return ways


def _check(ways: dict[str, Callable[[], object]], hours: dict[str, float], per_hour: float) -> None:
    """Who delivers less than the others is not faster."""
    for name, way in ways.items():
        delivered = float(way()) / per_hour  # type: ignore[arg-type]
        if not 0.98 < delivered / hours[name] < 1.02:  # a frame or two a clip depend on how ends are padded
            raise AssertionError(f"{name} delivers {delivered:.3f} hours, wanted {hours[name]:.3f}")


def measure(config: str, overrides: list[str], ranks: Ranks, repetitions: int, hours: float) -> dict[str, Any]:
    """Audio-hours a second of the loader and its rivals, and the share of a real run that waits for data.

    Args:
        repetitions: how often each way loads everything.
        hours: of sound; whole shards are taken until they hold so much.

    Returns:
        `rows`: for each contest and way audio-hours a second of the clock and of the processor; `ratios`: ours over
        each rival, repetition by repetition, by both, with what is wanted; and of two whole epochs of training, the
        first step and those at the start of an epoch included, the share of the step time that was waiting.
    """
    keep_pages()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker, so that the ways differ in nothing else
    rows: dict[str, Any] = {}
    ratios: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, contest in contests(config, overrides, hours, Path(folder)).items():
                timings = interleaved(contest.ways, repetitions)
                for way, timing in timings.items():
                    rows[f"{name}: {way}"] = {
                        "audio_hours_per_second": describe([contest.hours[way] / s for s in timing.seconds]),
                        "audio_hours_per_cpu_second": describe([contest.hours[way] / s for s in timing.cpu_seconds]),
                    }
                ratios += _ratios(name, contest, timings)
            hours = contest.hours[OURS]
    finally:
        torch.set_num_threads(threads)
    return {"config": config, "threads": 1, "hours": hours, "rows": rows, "ratios": ratios} | _waiting(
        config, overrides, ranks
    )


def _ratios(name: str, contest: Contest, timings: dict[str, Timing]) -> list[dict[str, Any]]:
    """Times as fast as each rival: by the clock, and by processor time, which other programs disturb less."""

    def line(rival: str, ours: Timing, other: Timing, share: float) -> dict[str, Any]:
        return {
            "contest": name,
            "rival": rival,
            "clock": describe([r * share for r in other.over(ours)]),
            "processor": describe([r * share for r in other.cpu_over(ours)]),
            "wanted": WANTED.get((name, rival)),
            "judged_by": "clock" if rival == "one worker" else "processor",
        }

    ours = timings[OURS]
    singles = [way for way in timings if not way.startswith(OURS)]
    share = {way: contest.hours[OURS] / contest.hours[way] for way in timings}
    lines = [line(way, ours, timings[way], share[way]) for way in singles]
    loaders = [row for row in lines if "bare" not in row["rival"] and "our" not in row["rival"]]
    best = min(loaders, key=lambda row: row["processor"]["median"])
    lines.append({**best, "rival": "best of the others", "wanted": WANTED.get((name, "best of the others"))})
    one, two = timings[ONE_WORKER], timings[TWO_WORKERS]
    workers = line("one worker", two, one, 1.0)
    # What two free cores would give at best, no measurement of speed: that is the clock's.
    workers["processor"] = {k: 2 * v for k, v in workers["processor"].items()}
    return [*lines, workers]


def _waiting(config: str, overrides: list[str], ranks: Ranks) -> dict[str, Any]:
    """Two epochs of training, and how long they waited for data."""
    with tempfile.TemporaryDirectory() as folder:
        extra = [f"runs_dir={folder}", "name=wait", "max_epochs=2", "max_steps=null", "validation.every_steps=1000000"]
        extra += ["tracking.wandb=disabled", "tracking.log_every_steps=1", "checkpoint.every_steps=1000000"]
        training = Training(recipes.load(config, [*overrides, *extra]), ranks)
        training.fit()
        rows = [row for row in read_lines(training.run.metrics) if row["kind"] == "train"]
        workers = training.recipe.config.num_workers
    firsts = [row for i, row in enumerate(rows) if i == 0 or row["epoch"] != rows[i - 1]["epoch"]]
    return {
        "waiting_percent": waiting_percent(rows),
        "waiting_percent_of_first_steps": [row["data_wait_percent"] for row in firsts],
        "waiting_percent_after_the_first_step": waiting_percent(rows[1:]),  # that one waits for the workers to start
        "trained_steps": len(rows),
        "num_workers": workers,
    }


def waiting_percent(rows: list[dict[str, Any]]) -> float:
    """Share of the time of all steps together that was waiting for data."""
    seconds = sum(row["step_seconds"] for row in rows)
    return float(sum(row["data_wait_percent"] * row["step_seconds"] for row in rows) / seconds) if rows else 0.0
