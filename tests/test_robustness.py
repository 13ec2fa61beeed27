"""The study of robustness: a sweep analyses what it trained, and recipes/robustness.py concludes from known numbers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from recipes import robustness
from tests.data.test_generated import write_set
from trainer.__main__ import main
from trainer.analysis.study import SIZES
from trainer.config import PROJECT
from trainer.recipe import known_recipes
from trainer.sweep.config import load
from trainer.sweep.points import RESULT, points, result_of

SMALL = sum(0 < size <= 0.1 for size in SIZES)


def run(task: str, cell: str, form: str, seed: int, clean: float, rise: float, **more: float | None) -> dict[str, Any]:
    """A finished run whose every curve rises by `rise` at each size."""
    numbers = {"radius": 0.9, "norm": 1.5, "nonnormality": 0.8, "nonnormality_at_start": 0.7, "kreiss": 1.2}
    numbers |= {"radius_at_start": 0.6, "norm_at_start": 1.1, "lyapunov": -0.1, "clean": clean} | more
    curve = [clean, *([clean + rise] * SMALL), *([9.0] * (len(SIZES) - SMALL - 1))]
    analysis = {"summary": numbers, "sizes": list(SIZES), "curves": dict.fromkeys(robustness.COSTS, curve)}
    return {"variant": f"{task}, {cell}, {form}", "seed": seed, "monitor": "error", "analysis": analysis}


def sorted_kinds() -> list[str]:
    """In the order of the table."""
    return [kind for kind in robustness.NAMES if kind in robustness.COSTS]


def test_tables_say_what_the_runs_do(tmp_path: Path) -> None:
    rows = [
        run(
            "pixels", cell, form, seed, clean + seed / 100, rise, radius=radius, lyapunov=lyapunov, scaled_to_norm_1=0.5
        )
        for cell in ("Elman", "GRU")
        for form, clean, rise, radius, lyapunov in (("free", 0.1, 0.2, 1.3, 0.1), ("norm 1", 0.3, 0.1, 0.9, -0.2))
        for seed in (0, 1, 2)
    ]
    rows.append(run("music", "Elman", "free", 0, 8.0, -1.0, kreiss=None))
    found = robustness.conclude([*rows, {"variant": "not analysed"}], tmp_path)
    assert [path.name for path in found.pictures] == ["robustness.png"]
    assert found.pictures[0].stat().st_size > 10_000
    nets, forms, normality, together, helped = found.tables.values()
    assert [(line["task"], line["cell"], line["form"]) for line in nets] == [
        ("pixels", "Elman", "free"), ("pixels", "Elman", "norm 1"), ("pixels", "GRU", "free"),
        ("pixels", "GRU", "norm 1"), ("music", "Elman", "free"),
    ]  # fmt: skip
    assert nets[1]["clean"] == "0.31 +- 0.01"
    assert nets[1]["cost of attack"].startswith("0.1")
    assert nets[4]["Kreiss"] == "∞"
    assert robustness.clean(rows[0] | {"test": {"error": 0.7}}) == 0.7  # the whole test, where it was scored
    free, norm = forms
    assert (free["nets"], free["radius <= 1"], free["Lyapunov < 0"]) == ("7", "1", "1")
    assert (norm["nets"], norm["radius <= 1"], norm["Lyapunov < 0"]) == ("6", "6", "6")
    assert norm["worse clean"] == "6 of 6 (0.031)"  # 2 / 2^6
    assert norm["larger cost of attack; ratio"] == "0 of 6 (0.031); 0.50"
    assert free["worse clean"] == ""
    scaled = [(line["metric clean"], line["metric scaled to norm 1"]) for line in normality]
    assert scaled == [("0.11 +- 0.01", "0.5 +- 0"), ("0.11 +- 0.01", "0.5 +- 0"), ("8", "")]
    assert {line["further from normal than at start"] for line in normality} == {"3 of 3", "1 of 1"}
    assert float(together[0]["Lyapunov, cost of attack"].split()[0]) > 0.9
    assert helped[0] == {"task": "pixels"} | {robustness.NAMES[kind]: "0 of 7" for kind in sorted_kinds()}
    assert helped[1][robustness.NAMES[robustness.ATTACK]] == "1 of 7 (1)"
    assert together[0]["clean, non-normality"] == ""  # all nets are equally far from normal


def test_any_number_of_forms_and_a_recipe_without_inputs_are_drawn(tmp_path: Path) -> None:
    rows = [run("words", "LSTM", form, 0, 0.1, 0.2) for form in ("free", *"abcdefgh")]
    for row in rows:
        row["analysis"]["curves"] = {kind: row["analysis"]["curves"][kind] for kind in (robustness.WEIGHTS,)}
    found = robustness.conclude(rows, tmp_path)
    nets, forms, *_ = found.tables.values()
    assert [(line["cost of attack"], line["cost of worst E"]) for line in nets] == [("", "0.2")] * 9
    assert {line["larger cost of attack; ratio"] for line in forms} == {""}
    assert found.pictures[0].stat().st_size > 10_000


def test_a_perturbation_that_has_no_finite_loss_costs_infinitely_much() -> None:
    broken = run("pixels", "Elman", "free", 0, 0.1, 0.2)
    assert robustness.cost(broken, robustness.ATTACK) == pytest.approx(0.2)
    broken["analysis"]["curves"][robustness.ATTACK][2] = None
    assert robustness.cost(broken, robustness.ATTACK) == math.inf


def test_a_sweep_analyses_what_it_trained(tmp_path: Path) -> None:
    write_set(tmp_path / "pictures", packed=True)
    small = [f"data={{corpus: {{kind: mnist, path: {tmp_path / 'pictures'}}}, num_valid: 2, pixels_per_frame: 3}}"]
    small += ["plan.micro_batch_samples=3", "model.hidden_size=8", "tracking.wandb=disabled", "max_steps=2"]
    values = {
        "conclusion": "robustness",
        "analyze": 3,
        "seeds": [0],
        "workers": 1,
        "runs_dir": str(tmp_path / "runs"),
        "variants": {"pixels, Elman, free": {"config": "robustness/pixels", "overrides": small}},
    }
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    assert main(["sweep", str(path)]) == 0
    folder = tmp_path / "runs/study"
    (row,) = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert row["analysis"]["summary"]["clean"] == row["analysis"]["curves"]["pgd_l2"][0]
    assert (folder / row["run"] / "analysis/robustness.png").is_file()
    text = (folder / "table.md").read_text()
    assert "| pixels | Elman | free | error |" in text
    assert "Every net; costs" in (folder / "report.html").read_text()
    assert (folder / "robustness.png").is_file()
    sweep = load(path)
    (point,) = points(sweep, "study")
    assert result_of(sweep, "study", point) == row
    result = folder / point.name / RESULT
    result.write_text(json.dumps({name: value for name, value in row.items() if name != "analysis"}))
    assert result_of(sweep, "study", point) is None  # it goes on with what is missing


def test_the_study_has_three_cells_in_five_forms_on_three_tasks() -> None:
    for name in ("robustness", "robustness_short"):
        sweep = load(PROJECT / f"configs/sweeps/{name}.yaml")
        assert sweep.conclusion == "robustness"
        assert sweep.analyze
        names = [robustness.parts({"variant": variant}) for variant in sweep.variants]
        assert [len(set(column)) for column in zip(*names, strict=True)] == [3, 3, 5]
        assert len(set(names)) == 45
        for (task, cell, form), variant in zip(names, sweep.variants.values(), strict=True):
            assert variant.config == f"robustness/{task}"
            told = " ".join(variant.overrides)
            assert {"Elman": "cell" not in told, "GRU": "kind=gru" in told, "LSTM": "kind=lstm" in told}[cell]
            assert (form == robustness.FREE) == ("parametrization" not in told and "structure" not in told)
    assert "robustness" not in known_recipes()


def test_a_conclusion_that_nobody_draws_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("config: copying/t1000\nconclusion: robustnes\n")
    assert main(["sweep", str(path)]) == 2
    assert "conclusion = 'robustnes': there is no such file in recipes/" in capsys.readouterr().err
