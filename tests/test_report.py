"""The report is one file, whole on its own, and shows what data says without believing it."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import overrides
from trainer import page, recipe, report
from trainer.__main__ import main
from trainer.data.dataset import Media
from trainer.evaluation import write_evaluation
from trainer.plots import LEVELS, LINE, curves, seen
from trainer.run import RunDirectory, append

EVIL = "<script>alert(1)</script>"


def make_run(folder: Path, corpus: Path, finished: bool) -> tuple[RunDirectory, recipe.Recipe]:
    task = recipe.load("speech/tones", overrides(corpus, folder, "name=run"))
    run = RunDirectory(folder / "run")
    run.claim(task.config)
    run.save_config(task.config)
    if finished:
        keys = task.build_dataset("test").index.keys
        append(
            run.metrics,
            [
                {
                    "kind": "train",
                    "step": s,
                    "epoch": 0,
                    "loss": 3 / s,
                    "lr": 1e-3,
                    "grad_norm": None if s == 3 else 1.0,
                    "audio_hours": s / 10,
                    "audio_hours_per_second": 0.02,
                    "padding_percent": 3.0,
                    "data_wait_percent": 1.0,
                    "step_seconds": 0.5,
                }
                for s in range(1, 9)
            ],
        )
        rates = {f"cer{kind}": 0.1 for kind in ("", "_insertions", "_deletions", "_substitutions")}
        append(run.metrics, [{"kind": "validation", "step": 8, "epoch": 0, "loss": 0.5, **rates}])
        append(run.refused, [{"step": 3, "epoch": 0, "keys": ["a"]}])
        append(run.spikes, [{"step": 9, "epoch": 0, "loss": 77.5, "usual": 1.5, "taken_back_from": 7}])
        append(run.quarantine, [{"key": EVIL, "reason": EVIL, "epoch": 0, "step": 2}])
        rows = [
            {"key": k, "errors": 1, "length": 4, "columns": {"reference": "abcd", "hypothesis": EVIL}} for k in keys
        ]
        write_evaluation(run.path / "evaluation", "test", {"step": 8, "metrics": {**rates, "loss": 0.5}}, rows)
    return run, task


class Tags(HTMLParser):
    """Tags of a page as a browser sees them, and what they would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: dict[str, int] = {}
        self.loads: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names[tag] = self.names.get(tag, 0) + 1
        self.loads += [value or "" for name, value in attributes if name in ("src", "href", "data", "srcset")]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_finished_run(corpus: Path, tmp_path: Path) -> None:
    run, task = make_run(tmp_path, corpus, finished=True)
    assert report.write(run, task, "test")["cer"] == 0.1
    text = run.report.read_text(encoding="utf-8")
    tags = Tags(text)
    assert "10.00 %" in text
    assert tags.names["html"] == 1
    assert not tags.open
    assert tags.names["audio"] == text.count("data:audio/mpeg;base64,") > 3
    folder = run.path / "report"
    for name in ("loss", "error-rates", "learning-rate", "gradient-norm", "throughput", "padding-and-waiting"):
        image = np.asarray(Image.open(folder / f"{name}.png").convert("L"))
        assert image.shape[1] > 600
        assert image.std() > 5, "something is drawn"
    assert (folder / "example.png").is_file()
    assert (folder / "worst-00.png").stat().st_size > 500
    for title in ("Curves", "Errors", "Samples of test", "Bad samples and refused steps", "Configuration", "Versions"):
        assert f"<h2>{title}" in text
    assert "1 refused" in text
    assert "77.5</td>" in text
    assert "7 to 9" in text


def test_data_is_never_markup_and_nothing_is_loaded(corpus: Path, tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, corpus, finished=True)
    evil_name = recipe.load("speech/tones", overrides(corpus, tmp_path, f"tracking.project={EVIL}", "name=run"))
    word = {"word": EVIL, "start": 0.0, "end": 0.1, "confidence": 0.5}
    columns = {"reference": EVIL, EVIL: EVIL, "hypothesis": "<b>"}
    evil = {"key": f'"{EVIL}', "errors": 9, "length": 1, "columns": columns, "facts": {"words": [word]}}
    append(run.path / "evaluation" / "test.jsonl", [evil])
    report.write(run, evil_name, "test")
    text = run.report.read_text(encoding="utf-8")
    tags = Tags(text)
    assert "script" not in tags.names
    assert text.count("&lt;script&gt;") > 3
    assert tags.loads
    assert all(load.startswith("data:") for load in tags.loads)
    assert not re.search(r"url\(|@import|<link|<iframe|<meta http-equiv", text)
    assert "no sound: KeyError" in text  # a key that the data do not hold costs only its own sound


def test_a_run_that_has_only_begun(corpus: Path, tmp_path: Path) -> None:
    run, task = make_run(tmp_path, corpus, finished=False)
    assert report.write(run, task, "test") == {}
    text = run.report.read_text()
    assert "is not evaluated yet" in text
    assert "No step has been recorded" in text
    assert "No bad sample" in text
    row = {"kind": "train", "step": 1, "epoch": 0, "loss": None, "grad_norm": None, "lr": 1e-3, "step_seconds": 1.0}
    append(run.metrics, [row])
    report.write(run, task, "test")
    assert (run.path / "report" / "loss.png").is_file()


def test_an_evaluation_of_nothing(corpus: Path, tmp_path: Path) -> None:
    run, task = make_run(tmp_path, corpus, finished=True)
    write_evaluation(run.path / "evaluation", "test", {"step": 8, "metrics": {}}, [])
    assert report.write(run, task, "test") == {}
    assert "The evaluation holds no sample" in run.report.read_text()


def test_lost_data_cost_only_the_sound(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run(tmp_path / "runs", corpus, finished=True)
    monkeypatch.chdir(tmp_path)
    assert main(["report", "run", f"data.path={tmp_path / 'nowhere'}"]) == 0
    text = run.report.read_text()
    assert "Without sound and pictures" in text
    assert "<audio" not in text
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "report: runs/run/report.html"
    assert any(line.startswith("test: CER 10.00 %") for line in lines)
    assert main(["report", "run", "split=tset"]) == 2


def test_a_damaged_evaluation_is_explained(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = make_run(tmp_path, corpus, finished=True)
    (run.path / "evaluation" / "test.json").write_text("{")
    assert main(["report", str(run.path)]) == 2
    assert "test.json: is not what `evaluate` writes" in capsys.readouterr().err


def test_an_alignment_shows_each_kind_of_error() -> None:
    assert page.aligned("abcd", "axcde") == (
        "<span><i>a<em>b</em>cd·</i><i>a<em>x</em>cd<ins>e</ins></i><b> S  I</b></span>"
    )
    assert page.aligned("ab", "b") == "<span><i><del>a</del>b</i><i>·b</i><b>D</b></span>"
    assert (
        page.aligned("a b", "ab")
        == "<span><i>a<del>_</del></i><i>a·</i><b> D</b></span><span><i>b</i><i>b</i><b></b></span>"
    )
    assert page.aligned("", "") == ""
    assert page.aligned("x" * 50, "x" * 50).count("<span>") == 3  # a word that is too long for a phone is broken
    assert page.aligned("sil aa b", "sil b b", by="word") == (
        "<span><i>sil</i><i>sil</i><b></b></span> <span><i><em>aa</em></i><i><em>b</em></i><b>S</b></span> "
        "<span><i>b</i><i>b</i><b></b></span> "
    )


def test_sound_falls_back_where_mp3_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    wave = np.sin(np.arange(8000) / 20).astype(np.float32)
    assert "audio/mpeg" in page.sound(Media(wave, 16000))
    assert "audio/ogg" in page.sound(Media(wave, 5000))  # a rate that MP3 does not have
    assert page.sound(Media(None)) == ""


def test_what_a_net_made_of_a_sound_is_drawn_under_it() -> None:
    outputs = np.full((4, 10), 0.02)
    outputs[[0, 2, 2, 0, 3], [0, 1, 2, 3, 4]] = 0.9
    outputs[0, 5:] = 0.9
    image = np.random.default_rng(0).random((20, 40))
    pixels = seen(Media(image=image, outputs=outputs, classes=("<blank>", "a", "ж", "c")))
    assert pixels.width > 10 * 12
    column = (pixels.width - 120) + 12  # the first frame of the letter, behind the names
    levels = np.asarray(pixels)[-3 * LINE :, column + 2 : column + 10]  # three labels come up
    assert [levels[LINE * i + 3 : LINE * (i + 1) - 3].mean() > LEVELS / 2 for i in range(3)] == [False, True, False]
    assert (np.asarray(pixels)[40 : 40 + LINE + 4, column : column + 24] == LEVELS).any(), "its name is written there"
    assert seen(Media(image=image)).size == (40, 20)


def test_hours_of_audio_stand_over_loss_and_error_rates() -> None:
    train = [{"step": s, "loss": 1.0, "audio_hours": s / 10, "audio_hours_per_second": 1.0} for s in range(1, 41)]
    rates = {f"cer{kind}": 0.1 for kind in ("", "_insertions", "_deletions", "_substitutions")}
    figures = curves(train, [{"step": s, "loss": 0.5, **rates} for s in (20, 30, 40)], [])
    for name, first in (("loss", "0.1"), ("error-rates", "1.9")):
        below, top = figures[name].axes
        assert top.get_xlabel() == "hours of audio"
        assert top.get_xlim() == below.get_xlim()
        labels = [t.get_text() for t in top.get_xticklabels()]
        assert (labels[0], labels[-1]) == (first, "4")


def test_gradient_norms_of_layers_are_drawn() -> None:
    rows = [
        {"step": s, "loss": 1.0, **{f"gradient/rnn.layers.{i}": 10.0**-i for i in range(12)}} for s in (5, 9, 14, 20)
    ]
    axes = curves([{"step": 1, "loss": 2.0}], rows, [])["gradient-norm-of-layers"].axes[0]
    assert [line.get_label() for line in axes.lines] == ["step 5", "step 14", "step 20"]
    assert list(axes.lines[0].get_ydata()) == [10.0**-i for i in range(12)]
    rows[0] |= {"gradient/rnn.layers.3": 0.0, "gradient/rnn.layers.5": None}
    line = curves([{"step": 1, "loss": 2.0}], rows, [])["gradient-norm-of-layers"].axes[0].lines[0]
    assert list(line.get_xdata()) == list(range(1, 13))
    assert np.isnan(line.get_ydata()).nonzero()[0].tolist() == [3, 5]


def test_norms_and_radii_of_recurrent_matrices_are_drawn() -> None:
    """The largest as a line, the least below it; a matrix too wide for a radius leaves the norms alone."""
    rows = [{"step": s, "norm/a": 1.0 + s, "norm/b": 0.5, "radius/a": 0.9} for s in (1, 2)]
    axes = curves([{"step": 1, "loss": 2.0}], [*rows, {"step": 3, "norm/a": 7.0}], [])["recurrent-matrices"].axes[0]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn == {"norm": [[1, 2], [2, 3], [3, 7]], "radius of eigenvalues": [[1, 0.9], [2, 0.9]]}
    assert axes.collections[0].get_datalim(axes.transData).y0 == 0.5
    assert "recurrent-matrices" not in curves([{"step": 1, "loss": 2.0}], [{"step": 1, "loss": 2.0}], [])
