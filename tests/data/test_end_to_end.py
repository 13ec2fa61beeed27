"""Corpora of other kinds than the default go all the way: prepare, plan, train, evaluate."""

import argparse
import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.data import layouts
from tests.helpers import TINY, run_ranks
from tests.helpers import overrides as speech_overrides
from trainer import recipe
from trainer.__main__ import main
from trainer.evaluation import read_evaluation
from trainer.run import read_lines

pytestmark = pytest.mark.distributed


@dataclass(frozen=True)
class Case:
    """A config of the project on a miniature corpus."""

    config: str
    make: Callable[[Path], Any]
    changes: tuple[str, ...]
    classes: str
    """What `plan` says of the output."""
    rate: str
    """The error rate that is watched."""
    audio: bool = True
    steps: int = 2
    decoder: tuple[str, ...] = ()
    """Overrides of `evaluate`."""


CASES = {
    "phones": Case("speech/timit", layouts.timit, (), r"5 classes \(phones\), a frame each 40 ms", "per"),
    "subwords": Case(
        "speech/librispeech_100",
        layouts.librispeech,
        ("data.text.tokens.vocabulary_size=17", "precision=fp32"),
        r"17 classes \(subwords\)",
        "cer",
        steps=20,
        decoder=("decoder.kind=beam",),
    ),
    "cepstra": Case("speech/an4_cepstra", layouts.an4_cepstra, (), r"29 classes \(characters\)", "cer", audio=False),
}


def arguments(case: Case, root: Path) -> list[str]:
    """Overrides that make a run of few steps."""
    tiny = [o for o in TINY if not o.startswith(("data.corpus", "data.features", "data.augment.speeds"))]
    corpus = [f"data.corpus.path={root / 'raw'}", f"data.path={root / 'data'}", f"runs_dir={root / 'runs'}"]
    model = ["model.subsampling.projection=16", "validation.every_steps=2", "name=run"]
    model += [f"max_steps={case.steps}", f"max_epochs={case.steps}"]
    return [*tiny, *corpus, *model, "plan.micro_batches_per_step=1", "plan.micro_batch_seconds=2", *case.changes]


def fit(ranks: Any, config: str, overrides: list[str]) -> dict[str, float]:
    from trainer.engine import Training

    return Training(recipe.load(config, overrides), ranks).fit()


def evaluated(ranks: Any, run: Path, *overrides: str) -> str:
    from trainer.verbs import evaluate

    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert evaluate.main(parser.parse_args([str(run), *overrides])) == 0
    return output.getvalue()


@pytest.mark.parametrize("name", CASES)
def test_a_corpus_goes_all_the_way(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    case.make(tmp_path / "raw")
    overrides = arguments(case, tmp_path)
    task = recipe.load(case.config, overrides)
    assert task.monitor == case.rate
    task.prepare()
    capsys.readouterr()
    assert main(["plan", case.config, *overrides]) == 0
    assert re.search(case.classes, capsys.readouterr().out)

    (values,) = run_ranks(1, fit, case.config, overrides)
    rates = {rate for rate in ("per", "cer", "wer") if rate in values}
    assert rates == ({"per"} if case.rate == "per" else {"cer", "wer"})
    rows = list(read_lines(tmp_path / "runs/run/metrics.jsonl"))
    assert rows[-2]["step"] == rows[-1]["step"] == case.steps
    assert rows[-1]["audio_hours"] == rows[-2]["audio_hours"] > 0
    (told,) = run_ranks(1, evaluated, tmp_path / "runs/run", *case.decoder)
    assert f"{case.rate.upper()} " in told
    result = read_evaluation(tmp_path / "runs/run/evaluation/test.json")
    assert result["scored"] == result["total"] == len(task.build_dataset("test"))
    row = result["rows"][0]
    if name == "phones":  # 48 are trained on, errors are counted on 39
        assert row["columns"]["reference"] == layouts.TIMIT_39
        assert (row["length"], row["aligned_by"]) == (5, "word")
    media = task.build_dataset("test").media(row["key"])
    assert (media.audio is not None) == case.audio
    assert main(["report", str(tmp_path / "runs/run")]) == 0
    page = (tmp_path / "runs/run/report.html").read_text(encoding="utf-8")
    assert page.count('class="image outputs"') == 2 * len(result["rows"])  # the worst, and at random


def test_a_corpus_that_is_not_at_hand_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model.rnn.hidden_size=16", "model.rnn.num_layers=1", "model.subsampling.projection=16"]
    assert main(["plan", "speech/librispeech_960", "world_size=64", "utterances=1500", *small]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "of 1,500 made-up utterances on 64 process(es)" in told
    assert "1,500 of 1,500" in told
    assert re.search(r"up to 64 a step, 1 a process", told)
    assert "worst batch" in told
    assert '"train_micro_batch_size_per_gpu"' in told
    assert "warning" not in told
    assert main(["plan", "copying/t1000", "utterances=10"]) == 2
    capsys.readouterr()
    assert main(["plan", "speech/librispeech_960", "world_size=64", f"data.path={tmp_path / 'nowhere'}"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "prepare CONFIG` first; or plan as many made-up ones" in told
    assert "`plan speech/librispeech_960 utterances=N`" in told


def test_a_plan_warns_of_what_is_left_out_and_of_dummies(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def warned(*more: str) -> str:
        assert main(["plan", "speech/tones", *speech_overrides(corpus, tmp_path, *more)]) == 0
        return " ".join(capsys.readouterr().out.partition("warning: ")[2].split())

    assert warned("plan.max_seconds=0.05").startswith(
        "100 % of the samples are left out, see above: nothing to train on"
    )
    # One step of few micro-batches for many: what is no dummy is little.
    share = int(warned("plan.micro_batches_per_step=64", "world_size=64").split(" %")[0])
    assert 0 < share < 100
    assert share > 50
