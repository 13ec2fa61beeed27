"""Weights go from one run to another and out of a run, whole; what does not fit is told; what is frozen stays."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import fit, fit_and_listen, overrides, run_ranks
from trainer import checkpoint, recipe
from trainer import config as configuration
from trainer.__main__ import main
from trainer.errors import EXIT_USER_MISTAKE

pytestmark = pytest.mark.distributed
STILL = "optimizer.lr=1e-12"


@pytest.fixture(scope="module")
def source(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of two steps."""
    return run_ranks(1, fit, overrides(corpus, tmp_path_factory.mktemp("source"), "name=source", "max_steps=2"))[0]


@pytest.fixture(scope="module")
def renamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of as many letters, which are others."""
    folder = tmp_path_factory.mktemp("renamed") / "tones"
    letters = ["data.corpus.alphabet=hgfedcba", "data.text.alphabet=' hgfedcba'"]
    recipe.load("speech/tones", overrides(folder, folder, *letters)).prepare()
    return folder


OTHERS = {
    "the same": ([], set()),
    "more letters": (["data.text.alphabet=' abcdefghij'"], {"output.weight", "output.bias"}),
    "another head": (["model.intermediate_ctc=0.3"], {"middle_output.weight", "middle_output.bias"}),
    "stage 3": (["data.text.alphabet=' abcdefghij'", "zero.stage=3"], {"output.weight", "output.bias"}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_weights_are_taken_and_what_differs_is_told(
    corpus: Path, tmp_path: Path, source: dict[str, Any], other: str
) -> None:
    """On two processes; nothing but the weights: step, optimizer and average begin anew."""
    more, fresh = OTHERS[other]
    arguments = overrides(corpus, tmp_path, "seed=5", STILL, "max_steps=1", "optimizer.average_decay=0", *more)
    without = run_ranks(2, fit, [*arguments, "name=without"])[0]["raw"]
    result = run_ranks(2, fit_and_listen, [*arguments, "name=with", f"init_from={source['run']}"])[0]
    assert result["position"]["step"] == 1
    for name, value in result["raw"].items():
        want = without[name] if name in fresh else source["weights"][name]
        torch.testing.assert_close(value, want, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    told = {text.split(": ")[1] for text in result["said"] if text.startswith("init_from = ")}
    assert told == fresh


def test_other_labels_of_the_same_number_get_a_fresh_head(
    renamed: Path, tmp_path: Path, source: dict[str, Any]
) -> None:
    arguments = overrides(
        renamed, tmp_path, "data.text.alphabet=' hgfedcba'", STILL, "max_steps=1", "name=run", "seed=5"
    )
    result = run_ranks(1, fit_and_listen, [*arguments, f"init_from={source['run']}"])[0]
    assert not torch.allclose(result["raw"]["output.weight"], source["weights"]["output.weight"], atol=1e-3)
    name = "rnn.layers.0.0.weight_ih"
    assert torch.allclose(result["raw"][name], source["weights"][name], atol=1e-6)
    assert any("output.weight: here [10, 32], there [10, 32], for other labels" in text for text in result["said"])


def test_another_body_is_a_mistake(corpus: Path, tmp_path: Path, source: dict[str, Any]) -> None:
    arguments = overrides(corpus, tmp_path, "name=run", "model.rnn.num_layers=3", f"init_from={source['run']}")
    with pytest.raises(RuntimeError, match="UserError: init_from = ") as error:
        run_ranks(2, fit, arguments)
    assert "rnn.layers.2.0.weight_ih: here [64, 32], there absent" in str(error.value)
    with pytest.raises(RuntimeError, match="UserError: nowhere: is not a run directory"):
        run_ranks(1, fit, [*arguments, "init_from=nowhere"])


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_what_is_frozen_stays(corpus: Path, tmp_path: Path, stage: int) -> None:
    """Weights and running statistics; over a resume; and everything else moves."""
    arguments = overrides(
        corpus,
        tmp_path,
        "freeze=[subsampling, rnn.layers.0, rnn.norms.1]",
        "model.rnn.norm=batch",
        "model.rnn.hidden_size=64",
        f"zero.stage={stage}",
        "name=run",
        "validation.every_steps=99",
    )
    first = run_ranks(2, fit, [*arguments, "max_steps=1"])[0]["weights"]
    last = run_ranks(2, fit, [*arguments, "max_steps=3"])[0]["weights"]
    frozen = {n for n in first if n.startswith(("subsampling.", "rnn.layers.0.", "rnn.norms.1.", "log_mel."))}
    assert {"rnn.norms.1.running_mean", "rnn.layers.0.1.weight_hh.weight"} < frozen
    for name in first:
        assert torch.equal(first[name], last[name]) == (name in frozen), name


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        ("[subsampling, rnn.layer.0]", r"freeze = 'rnn\.layer\.0': .*; did you mean rnn\.layers\.0\?"),
        ("[zzz]", r"freeze = 'zzz': .*; parts: output, rnn, subsampling"),
        ("[rnn, output, subsampling]", "nothing is left to train"),
    ],
)
def test_a_part_that_cannot_be_frozen_is_a_mistake(corpus: Path, tmp_path: Path, parts: str, wanted: str) -> None:
    with pytest.raises(RuntimeError, match=f"UserError: .*{wanted}"):
        run_ranks(1, fit, overrides(corpus, tmp_path, f"freeze={parts}"))


def test_export_is_one_plain_state_dict(
    corpus: Path, tmp_path: Path, source: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """It needs no data, and gives the numbers that validation used."""
    assert main(["export", str(source["run"]), f"to={tmp_path / 'out'}"]) == 0
    assert "weights.pt: " in capsys.readouterr().out
    weights = torch.load(tmp_path / "out" / "weights.pt", weights_only=True)
    for name, value in source["weights"].items():
        assert torch.equal(weights[name], value), name
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (facts["step"], facts["labels"]["alphabet"]) == (2, " abcdefgh")
    plain = configuration.load_yaml(tmp_path / "out" / "config.yaml")
    model = recipe.from_plain(plain, "export").build_model()
    model.load_state_dict(weights)  # strict: nothing is missing, nothing is left over
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"weights.pt", "config.yaml", "export.json"}


def test_export_keeps_what_it_was_told_and_does_without_a_decoder_that_cannot_be_had(
    tmp_path: Path, source: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    nowhere = f"data.path={tmp_path / 'nowhere'}"
    assert main(["export", str(source["run"]), f"to={out}", "decoder.kind=beam", "decoder.weight=0.7", nowhere]) == 0
    assert "no streaming step: " in (told := capsys.readouterr().out)
    assert "nowhere" in told
    assert configuration.load_yaml(out / "config.yaml")["decoder"]["weight"] == 0.7


def test_export_of_a_damaged_run_takes_the_one_before(corpus: Path, tmp_path: Path) -> None:
    arguments = overrides(corpus, tmp_path, "name=run", "validation.every_steps=1", "checkpoint.every_steps=1")
    run = run_ranks(2, fit, [*arguments, "max_steps=2", "zero.stage=3"])[0]["run"]
    for step in checkpoint.steps_in(run / "checkpoints")[1:]:
        (run / "checkpoints" / f"step-{step:08d}" / "rank-00001.pt").unlink()
    assert main(["export", str(run)]) == 0
    assert json.loads((run / "export" / "export.json").read_text())["step"] == 1


def test_what_export_cannot_do_is_a_mistake(
    tmp_path: Path, source: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for arguments, wanted in [
        (["nowhere"], "nowhere: is not a run directory"),
        ([str(source["run"]), "split=all"], "split = 'all': wanted train, valid or test"),
        ([str(source["run"]), "too=x"], "too: unknown key"),
        ([str(source["run"]), f"to={tmp_path / 'file'}"], "name another with to=FOLDER"),
    ]:
        assert main(["export", *arguments]) == EXIT_USER_MISTAKE
        assert wanted in capsys.readouterr().err
