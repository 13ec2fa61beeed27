"""The verb, from a trained run to its report."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from tests.data.test_generated import write_set
from tests.helpers import fit, run_ranks
from trainer.__main__ import main
from trainer.errors import UserError
from trainer.plots import picture
from trainer.run import read_lines
from trainer.verbs.analyze import decibels


def test_a_run_is_analysed_and_its_report_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path / "pictures", packed=True)
    corpus = f"data.corpus={{kind: mnist, path: {tmp_path / 'pictures'}}}"
    more = ["data.num_valid=2", "plan.micro_batch_samples=3", "model.hidden_size=8", "model.cell={kind: gru}"]
    free = ["model.parametrization.kind=free", "tracking.wandb=disabled", "validation.table_rows=0", "max_steps=2"]
    run_ranks(1, fit, [corpus, *more, *free, f"runs_dir={tmp_path / 'runs'}", "name=run"], "pixels/sequential")
    rows = [row for row in read_lines(tmp_path / "runs/run/metrics.jsonl") if row["kind"] == "validation"]
    assert {"norm/rnn.layers.0.0", "radius/rnn.layers.0.0", "nonnormality/rnn.layers.0.0"} <= rows[-1].keys()
    assert rows[-1]["gradient/rnn.layers.0"] > 0
    monkeypatch.chdir(tmp_path)
    before, opened = len(plt.get_fignums()), list[int]()

    def saved(*of: Any) -> None:
        opened.append(len(plt.get_fignums()) - before)
        picture(*of)

    monkeypatch.setattr("trainer.analysis.run.picture", saved)
    assert main(["analyze", "run", "samples=3", "sizes=0.1,0.03"]) == 0
    assert opened == [1] * 4  # a deep net has hundreds of pictures
    told = " ".join(capsys.readouterr().out.split())
    assert "estimates of the norm, error at most: power method " in told
    assert "error with every recurrent matrix scaled down, not trained further: norm at most 1: " in told
    assert main(["analyze", "run", "sizes=0,0.1"]) == 2
    assert "sizes = '0,0.1': wanted numbers above 0 and up to 1" in capsys.readouterr().err
    assert main(["analyze", "run", "snr_db=20"]) == 2
    assert "snr_db = '20': the run's inputs are no sound" in capsys.readouterr().err
    assert main(["analyze", "run", "smaples=3"]) == 2
    assert "smaples: there is no such key; did you mean samples?" in capsys.readouterr().err
    folder = tmp_path / "runs/run/analysis"
    values = json.loads((folder / "analysis.json").read_text())
    assert set(values["recurrences"]["rnn.layers.0.0"]["gates"]) == {"reset", "update", "new"}
    assert values["sizes"] == [0.0, 0.03, 0.1]
    assert len(values["curves"]["state"]["monitor"][0]) == 3
    assert values["curves"]["pgd_l2"]["monitor"][0][0] == values["summary"]["clean"]
    assert values["summary"]["scaled_to_norm_1"] == values["normalised"]["norm"]["monitor"]
    assert 0.5 < values["summary"]["nonnormality_at_start"] < 0.9  # a random matrix is far from normal
    assert len(list(folder.glob("*.png"))) == 4
    assert "Recurrence and robustness" in (tmp_path / "runs/run/report.html").read_text()


def test_signal_to_noise_ratios_are_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert decibels("20,40, 0") == pytest.approx([0.01, 0.1, 1.0])
    for wrong in ("-3", "loud", "20,", "nan", "inf"):
        with pytest.raises(UserError, match="wanted ratios in dB from 0 on"):
            decibels(wrong)


def test_what_cannot_be_perturbed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe that names no inputs, and states that are distributions."""
    small = ["data.delay_steps=12", "data.num_train=20", "data.num_valid=4", "data.num_test=4", "model.hidden_size=8"]
    small += ["model.cell={kind: rnn, activation: tanh}", "model.norm=none", "model.regularizers.fast_dropout={}"]
    more = [
        "max_steps=1",
        "tracking.wandb=disabled",
        "validation.table_rows=0",
        f"runs_dir={tmp_path / 'runs'}",
        "name=run",
    ]
    run_ranks(1, fit, [*small, *more], "copying/t1000")
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", "run", "samples=2"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "the recipe names no inputs that could be perturbed" in told
    assert "rnn.layers.0.0 W: radius" in told
    curves = json.loads((tmp_path / "runs/run/analysis/analysis.json").read_text())["curves"]
    assert "the states of fast dropout are distributions" in told
    assert set(curves) == {"weights", "weights_worst"}


def test_the_gradient_of_a_layer_is_that_of_all_its_weights() -> None:
    from trainer.analysis.recurrences import gradients
    from trainer.models.rnn import RNNConfig

    rnn = RNNConfig(hidden_size=4, num_layers=12, directions="sum").build(4)
    norms = {name: float(name.startswith(("layers.1.", "norms"))) for name, _ in rnn.named_parameters()}
    found = gradients(rnn, norms)
    weights = sum(name.startswith("layers.1.") for name in norms)
    assert found["gradient/layers.1"] == pytest.approx(weights**0.5, rel=1e-5)
    assert [name for name, norm in found.items() if norm] == ["gradient/layers.1"]  # not of 10 and 11
    assert len(found) == 12
