"""Actions: heads and counts are what they say, and the commands of docs/video.md run from files to the report."""

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recipes.video_action import ActionModelConfig, ActionNet
from tests.data.test_actions import archive, pickled, watch
from tests.helpers import fit, run_ranks
from tests.videos import write_video
from trainer import confusion, recipe
from trainer.__main__ import main
from trainer.analysis import perturbations
from trainer.analysis.inputs import noisy
from trainer.analysis.study import Options, curves_of, judge_of
from trainer.config import PROJECT
from trainer.data import actions, gestures
from trainer.engine import initialise
from trainer.evaluation import read_evaluation
from trainer.models.rnn import RNNConfig

TINY = ["tracking.wandb=disabled", "max_epochs=2", "model.rnn.hidden_size=8", "data.sampling.frames=6"]
TINY += ["plan={micro_batch_samples: 3, micro_batches_per_step: 2}"]


@pytest.fixture(autouse=True)
def _forget() -> None:
    actions._clips.cache_clear()


# The net


@pytest.mark.parametrize("directions", ["forward", "concat", "sum"])
@pytest.mark.parametrize("head", ["mean", "last"])
def test_a_head_reads_what_it_says_whatever_the_padding(head: Any, directions: Any) -> None:
    config = ActionModelConfig(head=head, rnn=RNNConfig(hidden_size=6, num_layers=2, directions=directions))
    net = ActionNet(config, (5,), 3, None).eval()
    initialise(net, 0)
    x, lengths = torch.randn(4, 9, 5), torch.tensor([9, 1, 4, 7])
    padded = x.clone()
    padded[2, 4:] = 100.0
    with torch.no_grad():
        logits = net(padded, lengths)
        for row, n in enumerate(lengths.tolist()):
            torch.testing.assert_close(net(x[row : row + 1, :n], lengths[row : row + 1])[0], logits[row])
            y, _ = net.rnn(x[row : row + 1, :n], None)
            if head == "mean":
                read = y.mean(1)
            elif directions == "forward":
                read = y[:, -1]
            elif directions == "concat":
                read = torch.cat([y[:, -1, :6], y[:, 0, 6:]], -1)
            else:
                read = y[:, -1] + y[:, 0]
            torch.testing.assert_close(net.output(read)[0], logits[row])


def joints(folder: Path, *more: str) -> list[str]:
    """Overrides of video_action/jhmdb for archives of a few clips."""
    folder.mkdir(exist_ok=True)
    archive(folder / "train.npz", 30)
    archive(folder / "test.npz", 12)
    corpus = f"data.corpus={{kind: joints, path: {folder}, train: train.npz, test: test.npz}}"
    return [*TINY, corpus, "data.augment.mirror_pairs=[[1, 2]]", f"runs_dir={folder}/runs", *more]


def test_segments_are_averaged_and_bad_places_count_nothing(tmp_path: Path) -> None:
    sampling = "data.sampling={frames: 4, stride: 1.5, segments: 3, min_share: 1}"
    made = recipe.load("video_action/jhmdb", joints(tmp_path, sampling, "model.rnn.norm=layer"))
    model, dataset = made.build_model().eval(), made.build_dataset("test")
    initialise(model, 0)
    (step, *_) = dataset.plan.epoch(0)
    batch = dataset.load(step.micro_batches[0])
    with torch.no_grad():
        output = made.step(model, batch)
        nats, right = [], 0
        for row, target in enumerate(batch["targets"].tolist()):
            part = slice(3 * row, 3 * row + 3)
            p = model(batch["inputs"][part], batch["lengths"][part]).softmax(-1).mean(0)
            nats.append(-float(p[target].log()))
            right += int(p.argmax()) == target
    assert output.losses["classes"].count == 3
    assert float(output.losses["classes"].sum) == pytest.approx(sum(nats), rel=1e-5)
    assert output.metrics["accuracy"].sum == right
    assert output.metrics["segment_accuracy"].count == 9
    assert [r.columns["class"] for r in output.rows] == [("run", "sit", "wave")[t] for t in batch["targets"]]
    with torch.no_grad():
        spoiled = made.step(model, batch | {"valid": torch.tensor([True, False, True])})
        dummy = made.step(model, dataset.dummy())
    assert float(spoiled.losses["classes"].sum) == pytest.approx(nats[0] + nats[2], rel=1e-5)
    assert [m.count for m in spoiled.metrics.values()] == [2, 2, 6]
    assert len(spoiled.rows) == 2
    assert float(dummy.losses["classes"].sum) == dummy.losses["classes"].count == len(dummy.rows) == 0


def test_noise_and_attacks_reach_every_segment_of_a_clip(tmp_path: Path) -> None:
    sampling = "data.sampling={frames: 4, stride: 1.5, segments: 2, min_share: 1}"
    made = recipe.load("video_action/jhmdb", joints(tmp_path, sampling, "model.rnn.norm=layer"))
    model = made.build_model().eval()
    initialise(model, 0)
    perturbations.plain_weights(model)
    judge = judge_of(made, model, "test", 3)
    clean, inputs = judge.score(), made.inputs()
    for kind, run in curves_of(judge, Options(seeds=1, sizes=(0.0, 0.5))):
        none, some = run()
        assert none == clean
        assert some["loss"] != clean["loss"], kind
    (batch, *_) = judge.batches
    noise = noisy(batch, inputs, "gaussian", 0.5, 0)["inputs"] - batch["inputs"]
    assert (noise.flatten(1).abs().amax(1) > 0).all()
    assert not torch.equal(noise[0], noise[1])


def test_half_way_and_resumed_is_the_whole_on_any_number_of_ranks(tmp_path: Path) -> None:
    more = ["max_epochs=9", "schedule={kind: constant}", "data.augment.noise=0.05", "model.rnn.norm=layer"]
    arguments = joints(tmp_path / "set", *more)

    def trained(ranks: int, name: str, *steps: int) -> dict[str, Any]:
        for number in steps:
            given = [*arguments, f"name={name}", f"max_steps={number}"]
            result = run_ranks(ranks, fit, given, "video_action/jhmdb")[0]
        return result

    whole, resumed, two = trained(1, "whole", 6), trained(1, "resumed", 3, 6), trained(2, "two", 6)
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-4, atol=1e-6)


# The commands of the page


def commands(config: str) -> list[list[str]]:
    """Those about one configuration, in order, without `./launch.sh`."""
    text = (PROJECT / "docs/video.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    names = (f"video_action/{config}", f"video_action-{config}")
    return [line.split()[1:] for line in lines if line.split()[2] in names]


def run(config: str, runs: Path, *more: str) -> dict[str, Any]:
    """Run them; what `evaluate` wrote."""
    verbs = []
    for verb, what, *given in commands(config):
        arguments = [*given, *more] if verb in ("prepare", "train") else given
        if verb not in ("prepare", "train"):
            what = str(runs / what)
        assert main([verb, what, *arguments]) == 0, verb
        verbs.append(verb)
    assert verbs[:3] == ["prepare", "train", "evaluate"]
    return read_evaluation(runs / f"video_action-{config}/evaluation/test.json")


def test_from_the_package_to_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a package of our own in place of seglearn's."""
    random = np.random.default_rng(0)
    people = [n // 2 for n in range(24)]
    values = {
        "X": [random.normal(size=(40, 6)) + 3 * (n % 2) for n in range(24)],
        "y": np.array([n % 2 for n in range(24)]),
        "side": np.array([1.0] * 24),
        "subject": np.array(people),
        "y_labels": ["PEN", "ROW"],
    }
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr(gestures.MEMBER, pickled(values))
    monkeypatch.setattr(gestures, "fetch", lambda raw, progress: wheel)
    more = [*TINY, f"data.path={tmp_path}/watch", f"runs_dir={tmp_path}/runs", "seed=2", "max_epochs=4"]
    found = run("watch", tmp_path / "runs", *more)
    shown = capsys.readouterr().out
    assert "24 recordings of 12 people" in shown
    assert "most often called" in shown
    assert found["scored"] == found["total"] == 2
    assert {row["columns"]["clip"].split(",")[0] for row in found["rows"]} == {"person 2"}
    page = (tmp_path / "runs/video_action-watch/report.html").read_text()
    assert "Classes of test" in page
    assert "upright row" in page
    assert (tmp_path / "runs/video_action-watch/report/confusion.png").stat().st_size > 1000


def test_joints_from_archives(tmp_path: Path) -> None:
    found = run("jhmdb", tmp_path / "runs", *joints(tmp_path))
    assert found["scored"] == 12
    assert found["metrics"]["accuracy"] == pytest.approx(1 - found["metrics"]["error"])


@pytest.mark.parametrize("where", ["prepare", "model"])
def test_videos_from_files_to_the_report(tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Real videos of FFmpeg's libraries: discs are told apart by features, or the net itself is trained."""
    pytest.importorskip("av", reason="installed by the extra `video`")
    pytest.importorskip("torchvision", reason="installed by the extra `video`")
    for n in range(12):
        split = ("train", "train", "valid", "test")[n % 4]
        write_video(tmp_path / f"films/{split}/down/{n}.mp4", n, down=True)
        write_video(tmp_path / f"films/{split}/right/{n}.avi", n, down=False)
    (tmp_path / "films/train/right/broken.avi").write_bytes(b"RIFF nothing of the kind")
    net = f"data.corpus.cnn={{weights: null, where: {where}}}"
    corpus = [f"data.corpus.path={tmp_path}/films", "data.corpus.size=32", net, f"data.path={tmp_path}/shards"]
    epochs = "max_epochs=12" if where == "prepare" else "max_epochs=1"
    more = [*TINY, *corpus, f"runs_dir={tmp_path}/runs", epochs, "optimizer={lr: 3.0e-3, average_decay: 0}"]
    found = run("frames", tmp_path / "runs", *more, "model.rnn={hidden_size: 32, dropout: 0, norm: layer}")
    assert "broken.avi: cannot be decoded" in capsys.readouterr().out
    assert found["scored"] == 6
    if where == "prepare":
        assert found["metrics"]["accuracy"] == 1
    else:
        from trainer import checkpoint

        weights = checkpoint.best(tmp_path / "runs/video_action-frames/checkpoints").weights()
        drawn = recipe.load("video_action/frames", more).build_model()
        initialise(drawn, 0)
        assert not torch.equal(weights["cnn.net.conv1.weight"], drawn.cnn.net.conv1.weight)
    assert "Classes of test" in (tmp_path / "runs/video_action-frames/report.html").read_text()


def test_every_configuration_is_on_the_page() -> None:
    text = (PROJECT / "docs/video.md").read_text(encoding="utf-8")
    for path in (PROJECT / "configs/video_action").glob("*.yaml"):
        assert f"| `video_action/{path.stem}` |" in text
    assert {"reproduce video", "reproduce watch"} <= set(re.findall(r"reproduce \w+", text))
    assert {"video.yaml", "watch.yaml"} <= {path.name for path in (PROJECT / "configs/sweeps").glob("*.yaml")}


def test_a_table_of_classes_counts_each_row_once() -> None:
    found = [("b", "b"), ("b", "a"), ("b", "a"), ("a", "a"), ("10", "2"), ("2", "2")]
    names, counts = confusion.matrix(found)
    assert names == ["a", "b", "2", "10"]
    assert counts.tolist() == [[1, 0, 0, 0], [2, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]]
    assert confusion.table(found) == [
        ("a", "1", "100.0", "33.3", ""),
        ("b", "3", "33.3", "100.0", "a (2)"),
        ("2", "1", "100.0", "50.0", ""),
        ("10", "1", "0.0", "", "2 (1)"),
    ]
    assert confusion.pairs([{"columns": {"class": "a", "guess": "b"}}, {"columns": {"frames": "3"}}]) == [("a", "b")]


def test_the_gestures_are_prepared_alike(tmp_path: Path) -> None:
    """What the tests of the data keep is what the recipe reads."""
    made = recipe.load("video_action/watch", [f"data.path={watch(tmp_path)}"])
    assert made.build_dataset("test").identity["classes"] == "swing row"
    assert made.build_model().output.weight.shape == (2, 128)
