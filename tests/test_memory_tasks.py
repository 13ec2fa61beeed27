"""Copying, adding and pixels: their models have the papers' sizes, they learn, and they resume exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.test_generated import write_set
from tests.helpers import fit, run_ranks
from trainer import recipe
from trainer.__main__ import main
from trainer.engine import initialise
from trainer.errors import UserError
from trainer.run import read_ledger

QUIET = ["tracking.wandb=disabled", "validation.table_rows=0"]


def tiny(task: str, folder: Path, runs: Path, *more: str) -> list[str]:
    """Overrides that make a run of a second of any of these recipes."""
    sizes = {
        "copying/t1000": ["data.delay_steps=12", "data.num_train=90", "data.num_valid=10"],
        "adding/t200": ["data.length_steps=16", "data.num_train=90", "data.num_valid=10"],
        "pixels/sequential": [f"data.corpus={{kind: mnist, path: {folder}}}", "data.num_valid=2"],
    }
    plan = "plan={micro_batch_samples: 3, micro_batches_per_step: 3}"
    return [*QUIET, *sizes[task], plan, "model.hidden_size=12", f"runs_dir={runs}", "name=run", *more]


TASKS = ["copying/t1000", "adding/t200", "pixels/sequential"]


@pytest.mark.parametrize(
    ("config", "overrides", "wanted"),
    [
        ("copying/t1000", [], 21_764),
        ("adding/t200", [], 15_046),
        ("pixels/sequential", [], 16_415),
        ("pixels/permuted", ["model.hidden_size=360"], 68_950),
        ("pixels/sequential", ["model.hidden_size=512"], 136_970),
        ("timit_frames/timit", [], 83_121),
        ("timit_frames/timit", ["model.hidden_size=322"], 135_208),
        ("timit_frames/timit", ["model.hidden_size=425"], 200_304),
    ],
)
def test_models_have_the_papers_numbers_of_parameters(config: str, overrides: list[str], wanted: int) -> None:
    """n (n - 1) / 2 + n in + n + n out + out (Helfrich et al. 2018)."""
    model = recipe.load(config, overrides).build_model()
    assert sum(p.numel() for p in model.parameters()) == wanted


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    write_set(tmp_path / "pictures", packed=True)
    return tmp_path / "pictures"


@torch.no_grad()
@pytest.mark.parametrize("task", TASKS)
def test_a_dummy_and_an_invalid_place_count_nothing(task: str, pictures: Path, tmp_path: Path) -> None:
    made = recipe.load(task, tiny(task, pictures, tmp_path))
    model, dataset = made.build_model().eval(), made.build_dataset("train")
    output = made.step(model, dataset.dummy())
    for found in [*output.losses.values(), *output.metrics.values()]:
        assert float(torch.as_tensor(found.sum).detach()) == found.count == 0
    whole = dataset.load(dataset.plan.epoch(0)[0].micro_batches[0])
    part = {name: value[1:] for name, value in whole.items() if name != "faults"} | {"faults": []}
    spoiled = whole | {"valid": torch.tensor([False, True, True])}
    for a, b in zip(made.step(model, spoiled).losses.values(), made.step(model, part).losses.values(), strict=True):
        assert a.count == b.count
        torch.testing.assert_close(a.sum, b.sum)


@pytest.mark.parametrize("task", TASKS)
def test_a_plan_says_what_the_net_has(
    task: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", task, *tiny(task, pictures, tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "1 x dense cayley rnn modrelu of 12 units" in told
    assert "66; 144 multiply-adds" in told


@pytest.mark.parametrize("task", TASKS)
def test_half_way_and_resumed_is_the_whole(task: str, pictures: Path, tmp_path: Path) -> None:
    def trained(runs: str, *steps: int) -> dict[str, Any]:
        for number in steps:
            (result,) = run_ranks(1, fit, tiny(task, pictures, tmp_path / runs, f"max_steps={number}"), task)
        return result

    whole, resumed = trained("whole", 4), trained("resumed", 2, 4)
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name
    rows = [read_ledger(tmp_path / runs / "run/ledger") for runs in ("whole", "resumed")]
    assert rows[0] == rows[1]
    assert [len(row["keys"]) for row in rows[0]][:3] == [3, 3, 3]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_ranks_share_the_batches_of_one(stage: int, pictures: Path, tmp_path: Path) -> None:
    """A group of its own for what parametrises the matrix, at both ends of ZeRO; resumed on another number of ranks."""
    arguments = {
        name: tiny("copying/t1000", pictures, tmp_path / name, f"zero.stage={stage}") for name in ("one", "two")
    }
    (one,) = run_ranks(1, fit, [*arguments["one"], "max_steps=6"], "copying/t1000")
    run_ranks(2, fit, [*arguments["two"], "max_steps=3"], "copying/t1000")
    (two,) = run_ranks(1, fit, [*arguments["two"], "max_steps=6"], "copying/t1000")
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=name)
    assert read_ledger(tmp_path / "one/run/ledger") == read_ledger(tmp_path / "two/run/ledger")


def test_an_orthogonal_net_remembers(tmp_path: Path) -> None:
    """Over 100 steps, far below what a net without memory reaches; docs/results.md has 1,000 and 2,000."""
    more = [
        "data.delay_steps=100",
        "data.num_train=2000",
        "data.num_valid=100",
        "max_steps=100",
        f"runs_dir={tmp_path}",
    ]
    (result,) = run_ranks(
        1, fit, [*QUIET, *more, "model.hidden_size=128", "validation.every_steps=100"], "copying/t1000"
    )
    chance = recipe.load("copying/t1000", more).config.data.chance
    assert result["values"]["loss"] < chance / 2


FRAMES = ["data.corpus={kind: tones, num_utterances: 60}", "data.text={alphabet: null, unknown: error}"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated tones at 8 kHz."""
    folder = tmp_path_factory.mktemp("sound") / "tones"
    recipe.load("timit_frames/read_ru", [*FRAMES, f"data.path={folder}"]).prepare()
    return folder


@torch.no_grad()
def test_the_next_frame_is_predicted_and_padding_is_not_in_the_mean(sound: Path) -> None:
    made = recipe.load("timit_frames/read_ru", [*FRAMES, f"data.path={sound}", "model.hidden_size=16"])
    model, dataset = made.build_model().eval(), made.build_dataset("train")
    batch = dataset.load(dataset.plan.epoch(0)[0].micro_batches[0])
    assert len(set(batch["lengths"].tolist())) > 1
    output = made.step(model, batch)
    found = output.metrics["mse"]
    errors, frames = [], []
    for audio, n in zip(batch["audio"], batch["lengths"].tolist(), strict=True):
        predictions, targets, counts = model(audio[None, :n], torch.tensor([n]))
        decibels, _ = model.spectra(audio[None, :n], torch.tensor([n]))
        assert torch.equal(targets, decibels[:, 1:])
        assert counts.item() == targets.shape[1] == (n - 256) // 128
        errors.append(float((predictions - targets).square().mean(-1).sum().detach()))
        frames.append(targets.shape[1])
    assert found.count == sum(frames)
    assert float(found.sum.detach()) == pytest.approx(sum(errors), rel=1e-4)
    assert [row.length for row in output.rows] == frames
    window = torch.hann_window(256)
    want = 10 * torch.log10(1e-5 + torch.fft.rfft(batch["audio"][0, 128 : 128 + 256] * window).abs() ** 2)
    torch.testing.assert_close(model.spectra(batch["audio"], batch["lengths"])[0][0, 1], want)
    dummy = made.step(model, dataset.dummy())
    assert dummy.metrics["mse"].count == float(dummy.losses["squared_error"].sum.detach()) == 0


def test_a_batch_of_spectra_is_learnt(sound: Path) -> None:
    made = recipe.load("timit_frames/read_ru", [*FRAMES, f"data.path={sound}", "model.hidden_size=32"])
    model, dataset = made.build_model().train(), made.build_dataset("train")
    initialise(model, 0)
    batch = dataset.load(dataset.plan.epoch(0)[0].micro_batches[0])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    errors = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = made.step(model, batch).losses["squared_error"]
        (loss.sum / loss.count).backward()
        optimizer.step()
        errors.append(float((loss.sum / loss.count).detach()))
    assert errors[-1] < errors[0] / 2


def test_features_other_than_sound_are_refused() -> None:
    with pytest.raises(UserError, match=r"set data.features=\{kind: log_mel, where: model\}"):
        recipe.load("timit_frames/read_ru", ["data.features.where=worker"])
