"""Generated samples are functions of seed and number; their plan gives each once; pictures are read or refused."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.data import images
from trainer.data.generated import GeneratedConfig, GeneratedPlan
from trainer.data.images import FILES, ImagesConfig, ImagesDataset, MnistConfig
from trainer.data.plan import mine
from trainer.data.synthetic import AddingConfig, AddingDataset, CopyingConfig, CopyingDataset
from trainer.errors import UserError

SIZES = GeneratedConfig(micro_batch_samples=4, micro_batches_per_step=3)


def plan(shuffle: bool = True, seed: int = 0) -> GeneratedPlan:
    return GeneratedPlan(SIZES, 50, 7, seed, shuffle)


def samples(steps) -> list[int]:
    return [s for step in steps for m in step.micro_batches for s in m.samples]


def test_an_epoch_has_each_sample_once_in_an_order_of_its_own() -> None:
    first, second = plan().epoch(0), plan().epoch(1)
    assert sorted(samples(first)) == sorted(samples(second)) == list(range(50))
    assert samples(first) != samples(second)
    assert samples(plan().epoch(0)) == samples(first) != samples(plan(seed=1).epoch(0))
    assert samples(plan(shuffle=False).epoch(3)) == list(range(50))
    assert sorted(samples(plan().epoch(0, ["7", "9"]))) == [i for i in range(50) if i not in (7, 9)]


def test_steps_are_full_but_the_last_and_counts_are_known() -> None:
    steps = plan().epoch(0)
    assert [len(step.micro_batches) for step in steps] == [3, 3, 3, 3, 1]
    assert [step.counts["samples"] for step in steps] == [12, 12, 12, 12, 2]
    assert [step.counts["frames"] for step in steps] == [84, 84, 84, 84, 14]
    assert [step.last for step in steps] == [False] * 4 + [True]
    assert steps.totals() == {"samples": 50.0, "frames": 350.0}
    assert samples(steps[2:]) == samples(steps)[24:]
    assert len(steps[2:][1:]) == 2
    assert steps[-1].last
    assert [m.number for m in mine(steps[0], 1, 2, 2) if m] == [1]


def batch(dataset, numbers=(0, 1, 2)):
    return dataset.tensors(np.array(numbers))


@pytest.mark.parametrize("build", [CopyingDataset, AddingDataset])
def test_a_sample_is_a_function_of_seed_split_and_number(build) -> None:
    config = CopyingConfig(delay_steps=9) if build is CopyingDataset else AddingConfig(length_steps=30)
    one, other = (batch(build(config, "train", SIZES, 0), n) for n in ((0, 1, 2), (2, 0)))
    for name in one:
        assert torch.equal(one[name][[2, 0]], other[name])
    assert not torch.equal(one["targets"], batch(build(config, "train", SIZES, 1))["targets"])
    assert not torch.equal(one["targets"], batch(build(config, "valid", SIZES, 0))["targets"])


def test_copying_shows_waits_marks_and_asks() -> None:
    config = CopyingConfig(delay_steps=15, num_symbols=5, num_recalled=3)
    dataset = CopyingDataset(config, "train", SIZES, 0)
    found = batch(dataset, range(200))
    inputs, targets = found["inputs"], found["targets"]
    assert inputs.shape == targets.shape == (200, 15 + 6)
    shown = inputs[:, :3]
    assert set(shown.unique().tolist()) == {1, 2, 3, 4, 5}
    assert torch.equal(targets[:, -3:], shown)
    assert not targets[:, :-3].any()
    assert (inputs[:, -4] == 6).all()  # one step before the first that is asked for
    inputs[:, -4] = 0
    assert not inputs[:, 3:].any()
    assert CopyingConfig(delay_steps=1000).chance == pytest.approx(0.0204, abs=5e-5)
    assert CopyingConfig(delay_steps=2000).chance == pytest.approx(0.0103, abs=5e-5)


def test_adding_marks_one_number_in_each_half() -> None:
    dataset = AddingDataset(AddingConfig(length_steps=11), "train", SIZES, 0)
    found = batch(dataset, range(3000))
    numbers, marks = found["inputs"].unbind(-1)
    assert (marks[:, :5].sum(1) == 1).all()
    assert (marks[:, 5:].sum(1) == 1).all()
    assert marks.sum(0).gt(0).all()
    torch.testing.assert_close((numbers * marks).sum(1), found["targets"])
    assert float(found["targets"].mean()) == pytest.approx(1.0, abs=0.03)
    assert float(found["targets"].var()) == pytest.approx(1 / 6, abs=0.01)


def write_set(folder: Path, packed: bool) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    arrays = {}
    for part, (image_name, label_name) in FILES.items():
        pictures = generator.integers(0, 256, (12, 4, 3), dtype=np.uint8)
        labels = generator.integers(0, 10, 12, dtype=np.uint8)
        for name, values, kind in ((image_name, pictures, 2051), (label_name, labels, 2049)):
            content = struct.pack(f">{1 + values.ndim}i", kind, *values.shape) + values.tobytes()
            path = folder / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(content) if packed else content)
        arrays |= {f"x_{part}": pictures, f"y_{part}": labels}
    return arrays


def pictures(folder: Path, split: str = "train", **options) -> ImagesDataset:
    images.read.cache_clear()
    config = ImagesConfig(corpus=MnistConfig(path=folder), num_valid=2, **options)
    return ImagesDataset(config, split, SIZES, 0)


def test_rows_of_a_picture_are_frames_in_the_order_of_its_pixels(tmp_path: Path) -> None:
    arrays = write_set(tmp_path / "set", packed=True)
    rows = pictures(tmp_path / "set", pixels_per_frame=3)
    got = rows.tensors(np.array([2, 0]))["inputs"]
    assert got.shape == (2, 4, 3)
    np.testing.assert_array_equal((got * 255).round().numpy().astype(np.uint8), arrays["x_train"][[2, 0]])
    assert rows.plan.frames == 4
    whole = pictures(tmp_path / "set", permutation=1).tensors(np.array([1]))["inputs"]
    assert torch.equal(
        whole.flatten(),
        pictures(tmp_path / "set", permutation=1, pixels_per_frame=6).tensors(np.array([1]))["inputs"].flatten(),
    )
    with pytest.raises(UserError, match=r"data.pixels_per_frame = 5: does not divide the 12 pixels(.|\n)*take 1, or 3"):
        pictures(tmp_path / "set", pixels_per_frame=5)


@pytest.mark.parametrize("layout", ["packed", "unpacked", "torchvision", "npz"])
def test_pictures_are_found_in_each_layout(tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "set"
    arrays = write_set(folder / "MNIST/raw" if layout == "torchvision" else folder, layout == "packed")
    if layout == "npz":
        for path in folder.iterdir():
            path.unlink()
        np.savez(folder / "mnist.npz", **arrays)
    sets = {split: pictures(folder, split) for split in ("train", "valid", "test")}
    assert {split: len(dataset) for split, dataset in sets.items()} == {"train": 10, "valid": 2, "test": 12}
    found = batch(sets["valid"], [1])
    torch.testing.assert_close(found["inputs"], torch.from_numpy(arrays["x_train"][11] / 255.0).float().view(1, 12, 1))
    assert found["targets"].tolist() == [arrays["y_train"][11]]
    order = np.random.RandomState(5).permutation(12)
    permuted = batch(pictures(folder, "valid", permutation=5), [1])
    assert torch.equal(permuted["inputs"], found["inputs"][:, order])
    assert pictures(folder).identity != pictures(folder, permutation=5).identity


def test_damaged_and_missing_pictures_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither train-images-idx3-ubyte and train-labels"):
        pictures(tmp_path)
    folder = tmp_path / "set"
    write_set(folder, packed=False)
    path, labels = (folder / name for name in FILES["train"])
    whole = path.read_bytes()
    for content, wanted in [
        (whole[:-1], "cut short; fetch it again"),
        (labels.read_bytes(), "begins with 2049, wanted 2051"),
        (b"", "cannot be read"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"train-images-idx3-ubyte: .*{wanted}"):
            pictures(folder)
    path.unlink()
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(whole)[:-9])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz: cannot be read .*fetch it again"):
        pictures(folder)
    (tmp_path / "mnist.npz").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match=r"mnist.npz: holds no x_train"):
        pictures(tmp_path)
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(whole))
    images.read.cache_clear()
    config = ImagesConfig(corpus=MnistConfig(path=folder))
    with pytest.raises(UserError, match="num_valid = 5000: leaves none of the 12 pictures"):
        ImagesDataset(config, "train", SIZES, 0)
    with pytest.raises(UserError, match=r"holds no pictures yet; run `\./launch.sh prepare CONFIG`"):
        ImagesDataset(ImagesConfig(path=tmp_path), "train", SIZES, 0)


def test_an_archive_cut_short_and_other_classes_are_named(tmp_path: Path) -> None:
    arrays = write_set(tmp_path / "set", packed=False)
    np.savez(tmp_path / "mnist.npz", **arrays)
    whole = (tmp_path / "mnist.npz").read_bytes()
    (tmp_path / "mnist.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"mnist.npz: holds no x_train and y_train to be read"):
        pictures(tmp_path)
    np.savez(tmp_path / "mnist.npz", **arrays | {"y_train": arrays["y_train"] + 20})
    with pytest.raises(UserError, match=r"classes 2\d to 2\d, wanted 0 to 9"):
        pictures(tmp_path)


def test_mnist_itself() -> None:
    folder = Path(__file__).parents[2] / "../shared/data/mnist"
    if not folder.is_dir():
        pytest.skip("the files of MNIST are not beside this checkout")
    images.read.cache_clear()
    config = ImagesConfig(corpus=MnistConfig(path=folder))
    sizes = [len(ImagesDataset(config, split, SIZES, 0)) for split in ("train", "valid", "test")]
    assert sizes == [55_000, 5_000, 10_000]
