"""A sweep runs every combination, survives being killed, loses nothing, and says what came of it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from trainer import recipe
from trainer.__main__ import main
from trainer.config import PROJECT, load_yaml, plain
from trainer.errors import EXIT_REQUEUE, EXIT_USER_MISTAKE, RequeueError, UserError
from trainer.sweep import workers as workshop
from trainer.sweep.config import DrawConfig, SweepConfig, VariantConfig, load
from trainer.sweep.points import _settings, check_same, points, result_of
from trainer.sweep.table import sign_flip_test, table

TINY = [
    "data.delay_steps=10",
    "data.num_train=60",
    "data.num_valid=10",
    "data.num_test=10",
    "model.hidden_size=8",
    "model.structure={kind: permuted_block_diagonal, num_blocks: 4}",
    "validation.every_steps=3",
    "max_steps=6",
    "plan.micro_batch_samples=5",
    "tracking.wandb=disabled",
]


def write(folder: Path, **more: object) -> Path:
    path = folder / "tiny.yaml"
    values = {
        "config": "copying/t1000",
        "overrides": TINY,
        "grid": {"optimizer.lr": [1e-3, 1e-2, 3e-2]},
        "seeds": [0, 1],
        "workers": 2,
        "test": True,
        "runs_dir": str(folder / "runs"),
        **more,
    }
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def command(path: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "trainer", "sweep", str(path)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(folder: Path) -> list[Path]:
    return sorted((folder / "runs/tiny").glob("*/result.json"))


def results(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "runs/tiny/results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "command")} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    process = command(write(folder))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "6 runs, 0 finished, 2 at a time" in output
    assert "about " in output
    return folder


def test_every_combination_is_a_run_and_the_table_has_them(whole: Path) -> None:
    rows = results(whole)
    assert [(row["variant"], row["seed"]) for row in rows] == [
        (f"optimizer.lr={lr}", seed) for seed in (0, 1) for lr in (0.001, 0.01, 0.03)
    ]  # seed by seed
    assert len({row["best"] for row in rows}) == 6
    for row in rows:
        assert (whole / "runs/tiny" / row["run"] / "checkpoints/latest").exists()
        assert row["steps"] == 6
        config = load_yaml(whole / "runs/tiny" / row["run"] / "config.yaml")
        assert (config["tracking"]["group"], config["tracking"]["tags"]) == ("tiny", ["sweep"])
        told = (whole / "runs/tiny" / row["run"] / "logs/rank-00000.log").read_text()
        assert "runs as a dense matrix" in told  # though a worker runs several
        assert row["test"]["loss"] > 0
        assert row["test"]["loss"] != row["best"]
    table, page = ((whole / "runs/tiny" / name).read_text() for name in ("table.md", "report.html"))
    assert table.count("./launch.sh train copying/t1000") == page.count("./launch.sh train copying/t1000") == 6
    assert "| optimizer.lr=0.03 |" in table
    assert "| best loss | test loss |" in table
    assert (whole / "runs/tiny/curves.png").stat().st_size > 1000


def test_a_finished_run_of_other_settings_or_without_a_test_is_not_taken(whole: Path) -> None:
    """The settings of CONFIG itself are in no run's name."""
    sweep = load(whole / "tiny.yaml")
    point = points(sweep, "tiny")[0]
    folder, config = whole / "runs/tiny" / point.name, recipe.load(point.config, point.overrides).config
    check_same(folder, config)
    for changed, told in (
        (["model.hidden_size=12"], "model.hidden_size = 8, now 12"),
        (["max_steps=7"], "max_steps = 6, now 7"),
    ):
        with pytest.raises(UserError, match=told):
            check_same(folder, recipe.load(point.config, [*point.overrides, *changed]).config)
    row = result_of(sweep, "tiny", point)
    (folder / "result.json").write_text(json.dumps({**row, "test": {}}))
    assert result_of(sweep, "tiny", point) is None
    assert result_of(sweep, "tiny", dataclasses.replace(point, test=False))
    (folder / "result.json").write_text(json.dumps(row))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "asked to stop"])
def test_an_interrupted_sweep_goes_on_and_loses_nothing(whole: Path, tmp_path: Path, number: int) -> None:
    path = write(tmp_path)
    process = command(path)
    deadline = time.monotonic() + 200
    while len(finished(tmp_path)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    before = {p: p.stat().st_mtime_ns for p in finished(tmp_path)}
    process.send_signal(number)
    process.communicate(timeout=300)
    assert process.returncode == (-9 if number == signal.SIGKILL else EXIT_REQUEUE)
    assert 2 <= len(before) < 6
    again = command(path)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert all(p.stat().st_mtime_ns == at for p, at in before.items())  # none of them was run again
    assert results(tmp_path) == results(whole)


def test_a_run_that_fails_is_told_and_the_others_are_done(tmp_path: Path) -> None:
    grid = {"model.parametrization.kind": ["cayley"], "init_from": [None, "nowhere"]}
    path = write(tmp_path, grid=grid, seeds=[0, 1], overrides=[*TINY, "num_workers=1"])  # runs with loaders
    process = command(path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == EXIT_USER_MISTAKE, output
    assert "2 runs failed" in output
    assert " and 1 more: " in output
    assert output.count("nowhere: ") == 2, "once when it happens, and once at the end"
    assert len(finished(tmp_path)) == 2
    assert (tmp_path / "runs/tiny/table.md").is_file()


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({"grid": {"optimizer.lrr": [1]}}, "optimizer.lrr"),
        ({"grid": {"seed": [1]}, "random": {"seed": {"choices": [1]}}}, "grid and random are both given"),
        ({"grid": {"seed": [1]}}, "seed: is set by the sweep itself"),
        ({"grid": {}, "random": {"runs_dir": {"choices": ["a"]}}}, "runs_dir: is set by the sweep itself"),
        ({"overrides": [*TINY, "name=mine"]}, "name: is set by the sweep itself"),
        ({"config": None}, "config is missing"),
        ({"seeds": []}, "seeds"),
        ({"random": {"optimizer.lr": {"low": 1}}, "grid": {}}, "wanted either choices, or low and high"),
        ({"random": {"optimizer.lr": {"low": 0, "high": 1, "log": True}}, "grid": {}}, "above 0 where log"),
        ({"seedz": [1]}, "did you mean seeds?"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(
    more: dict, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(write(tmp_path, **more))]) == EXIT_USER_MISTAKE
    assert wanted in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_draws_follow_from_the_name_and_stay_inside() -> None:
    sweep = SweepConfig(
        config="copying/t1000",
        random={
            "optimizer.lr": DrawConfig(low=1e-4, high=1e-2, log=True),
            "model.hidden_size": DrawConfig(low=8, high=32, whole=True),
            "optimizer.kind": DrawConfig(choices=("rmsprop", "adamw")),
        },
        samples=200,
        seeds=(0,),
    )
    drawn = list(_settings(sweep, "a"))
    assert drawn == list(_settings(sweep, "a")) != list(_settings(sweep, "b"))
    rates = [d["optimizer.lr"] for d in drawn]
    assert all(1e-4 <= lr <= 1e-2 for lr in rates)
    assert 0.4 < sum(lr < 1e-3 for lr in rates) / 200 < 0.6
    assert {d["model.hidden_size"] for d in drawn} == set(range(8, 33))
    assert {d["optimizer.kind"] for d in drawn} == {"rmsprop", "adamw"}
    assert len({p.name for p in points(sweep, "a")}) == 200


def test_equal_runs_are_run_once() -> None:
    """Two processes would meet in one run directory."""
    draws = SweepConfig(config="copying/t1000", random={"model.hidden_size": DrawConfig(choices=(8, 9))}, seeds=(0, 0))
    grid = SweepConfig(config="copying/t1000", grid={"model.hidden_size": (8, 9, 8)}, seeds=(0, 1, 0))
    assert len(points(draws, "a")) == 2
    assert len(points(grid, "a")) == 4


def test_each_worker_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert workshop.gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert workshop.gpus() == ["4", "7"]
    assert workshop.default_workers() == 2
    started = []
    monkeypatch.setattr(
        workshop,
        "get_context",
        lambda how: SimpleNamespace(
            Pipe=Mock(return_value=(Mock(), Mock())), Process=lambda **of: started.append(of["args"]) or Mock()
        ),
    )
    workers = workshop.Workers(3, Path("nowhere"))
    for number in range(3):
        workers._start(number)
    assert [arguments[3] for arguments in started] == ["4", "7", "4"]


def test_an_analysis_ends_at_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.analysis.run.analyze", lambda run, recipe, split, options, say: say("analysis", 1, 9))
    with pytest.raises(RequeueError):
        workshop._analysis(Mock(), 5, SimpleNamespace(received=signal.SIGTERM))
    with pytest.raises(TypeError):  # it goes on
        workshop._analysis(Mock(), 5, SimpleNamespace(received=None))


def test_pairs_are_compared_by_the_signs_of_their_differences() -> None:
    assert sign_flip_test([1.0, 1.0, 1.0]) == 2 / 8
    assert sign_flip_test([1.0, -1.0]) == 1.0
    assert sign_flip_test([1.0] * 10) == 2 / 1024
    assert sign_flip_test([1.0] * 20) < 1e-3 < 0.5 < sign_flip_test([1.0, -1.0] * 10)


def test_the_table_has_means_spreads_and_what_a_paper_says() -> None:
    variants = {"a": VariantConfig(paper="1.5", wanted="below 2"), "b": VariantConfig()}
    sweep = SweepConfig(config="copying/t1000", variants=variants)
    rows = [
        {
            "variant": variant,
            "label": variant,
            "config": "copying/t1000",
            "seed": seed,
            "monitor": "loss",
            "best": best + seed,
            "parameters": 21764,
            "steps": 9,
            "seconds": 60,
        }
        for variant, best in (("a", 1.0), ("b", 3.0))
        for seed in (0, 1, 2)
    ]
    first, second = table(sweep, rows)
    assert first["best loss"] == "2 +- 1"
    assert (first["paper"], first["wanted"]) == ("1.5", "below 2")
    assert first["against the first, 95 % (p)"] == ""
    assert second["against the first, 95 % (p)"] == "+2 +- 0 (0.25)"
    assert second["parameters"] == "21,764"
    assert second["seeds"] == "0, 1, 2"
    rows[3]["best"] = None  # no validation was a number
    first, second = table(sweep, rows)
    assert second["best loss"] == "inf"
    assert second["against the first, 95 % (p)"] == ""


def test_variants_are_compared_within_a_configuration_and_validation_chooses_a_strength() -> None:
    variants = {"plain": VariantConfig(), **{f"noise {s}": VariantConfig(family="noise") for s in (1, 2)}}
    sweep = SweepConfig(config=("copying/t1000", "adding/t200"), variants=variants, test=True, seeds=(0, 1, 2))
    every = points(sweep, "a")
    assert len({p.name for p in every}) == len(every) == 2 * 3 * 3
    assert every[0].variant == "copying/t1000, plain"
    valid = {("copying", "noise 1"): 2, ("copying", "noise 2"): 1, ("adding", "noise 1"): 1, ("adding", "noise 2"): 2}
    rows = [
        {
            "variant": p.variant, "label": p.label, "config": p.config, "seed": p.seed, "monitor": "loss",
            "best": valid.get((p.config.split("/")[0], p.label), 5), "parameters": 1, "steps": 1, "seconds": 60,
            "test": {"loss": {"plain": 3.0, "noise 1": 4.0 + p.seed / 10, "noise 2": 5.0}[p.label] + p.seed},
        }
        for p in every
    ]  # fmt: skip
    lines = {line[""]: line for line in table(sweep, rows)}
    assert [name for name in lines if name.endswith("*")] == ["adding/t200, noise 1 *", "copying/t1000, noise 2 *"]
    compared = "against the first, 95 % (p)"
    assert lines["adding/t200, plain"][compared] == ""
    assert lines["copying/t1000, noise 2 *"][compared] == "+2 +- 0 (0.25)"
    # 0.1 +- t(2) 0.1 / sqrt 3
    assert lines["adding/t200, noise 1 *"][compared] == "+1.1 +- 0.25 (0.25)"
    assert lines["adding/t200, noise 1 *"]["test loss"] == "5.1 +- 1.1"


@pytest.mark.parametrize("path", sorted((PROJECT / "configs/sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_run_of_the_projects_sweeps_is_valid_and_compared_on_the_same_data(path: Path) -> None:
    sweep, data = load(path), dict[str, dict]()
    every = points(sweep, path.stem)
    if path.stem == "many":
        assert len(every) == 500
    for point in (p for p in every if p.seed == sweep.seeds[0]):
        config = recipe.load(point.config, point.overrides).config
        assert data.setdefault(point.config, plain(config)["data"]) == plain(config)["data"], point.variant


def test_each_monitor_has_its_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(
        tmp_path, config=None, grid={}, variants={"a": {"config": "copying/t1000"}, "b": {"config": "pixels/permuted"}}
    )
    rows = [
        {
            "run": monitor, "variant": label, "label": label, "config": monitor, "seed": 0, "monitor": monitor,
            "best": 1.0, "test": {monitor: 1.0}, "parameters": 1, "steps": 1, "seconds": 1, "command": f"train {label}",
        }
        for label, monitor in (("a", "loss"), ("b", "error"))
    ]  # fmt: skip
    monkeypatch.setattr("trainer.sweep.run.run", lambda *_: rows)
    (tmp_path / "runs/tiny").mkdir(parents=True)
    assert main(["sweep", str(path)]) == 0
    assert {p.name for p in (tmp_path / "runs/tiny").glob("*.png")} == {"curves-loss.png", "curves-error.png"}
    assert (tmp_path / "runs/tiny/report.html").read_text().count("data:image/png") == 2


def test_reproduce_is_the_sweep_of_its_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.verbs.sweep.sweep", lambda path, overrides: print(path.name, overrides) or 0)
    assert main(["reproduce", "many", "workers=3"]) == 0
    assert capsys.readouterr().out == "many.yaml ['workers=3']\n"
    assert main(["reproduce", "memorie"]) == EXIT_USER_MISTAKE
    assert "known tables: many, memory" in capsys.readouterr().err


def test_the_command_line_sets_keys_of_the_file_and_of_every_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    said = load(path, ["seeds=[7]", "optimizer.clip_norm=2", "workers=3"])
    assert (said.seeds, said.workers) == ((7,), 3)
    assert said.overrides == (*load(path).overrides, "optimizer.clip_norm=2")
    for wrong, wanted in (("workers=0", "workers"), ("seed=1", "seed: is set by the sweep"), ("fast", "key=value")):
        assert main(["sweep", str(path), wrong]) == EXIT_USER_MISTAKE
        assert wanted in capsys.readouterr().err
