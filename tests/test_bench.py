"""The benchmarks run and report what they say; how fast anything is, is not asked here."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrize

from kernels import bench as kernel_bench
from tests.helpers import overrides, run_ranks
from trainer import recipe
from trainer.__main__ import main
from trainer.bench import language, layers, loader, orthogonal, plan, pseudospectrum, tables
from trainer.errors import EXIT_USER_MISTAKE, UserError

pytestmark = pytest.mark.distributed


def run(ranks: Any, what: str, arguments: list[str], out: Path) -> dict[str, Any]:
    assert main(["bench", what, "speech/tones", *arguments, "--repetitions=1", "--steps=1", f"--json={out}"]) == 0
    return json.loads(out.read_text())


def test_step(corpus: Path, tmp_path: Path) -> None:
    """Before it times anything it compares the losses of all three ways."""
    (result,) = run_ranks(1, run, "step", overrides(corpus, tmp_path), tmp_path / "step.json")
    assert list(result["rows"]) == ["bare loop", "engine, ZeRO 0", "engine, ZeRO 1"]
    assert result["rows"]["bare loop"]["ratio_to_bare"]["median"] == 1.0
    assert all(row["seconds_a_step"]["median"] > 0 for row in result["rows"].values())
    assert "torch" in result["machine"]


def test_loader(corpus: Path, tmp_path: Path) -> None:
    """All ways deliver the same sound; waiting is that of two whole epochs, the first steps included."""
    out, picture = tmp_path / "loader.json", tmp_path / "loader.png"
    arguments = [*overrides(corpus, tmp_path, "num_workers=1"), f"--picture={picture}"]
    (result,) = run_ranks(1, run, "loader", arguments, out)
    for name in (
        "waveforms: ours",
        "waveforms: webdataset",
        "log-mel: files + torchaudio",
        "log-mel: bare parts, ours",
    ):
        assert result["rows"][name]["audio_hours_per_second"]["median"] > 0
        assert result["rows"][name]["audio_hours_per_cpu_second"]["median"] > 0
    wanted = {(line["contest"], line["rival"]): line["wanted"] for line in result["ratios"] if line["wanted"]}
    assert wanted == loader.WANTED
    assert result["trained_steps"] == 8
    assert len(result["waiting_percent_of_first_steps"]) == 2
    assert 0 < result["waiting_percent"] < 100
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_who_delivers_less_is_found_out() -> None:
    with pytest.raises(AssertionError, match=r"webdataset delivers 0\.500 hours, wanted 1\.000"):
        loader._check({"webdataset": lambda: 1800 * 16000}, {"webdataset": 1.0}, 3600 * 16000)


@pytest.mark.parametrize("names", [("a.wav", "a.txt"), ("a.flac", "a.json")])
def test_shards_that_no_rival_reads_are_a_mistake(tmp_path: Path, names: tuple[str, ...]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match=r"a\.tar: holds other samples than KEY\.flac with KEY\.txt"):
        loader.read_clips([tmp_path / "a.tar"], 1.0)


def test_waiting_is_a_share_of_the_time_of_all_steps() -> None:
    rows = [
        {"epoch": epoch, "step_seconds": seconds, "data_wait_percent": percent}
        for epoch, seconds, percent in [(0, 4.0, 50.0), (0, 1.0, 0.0), (1, 5.0, 10.0)]
    ]
    assert loader.waiting_percent(rows) == pytest.approx(25.0)


def test_no_repetition_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--repetitions=0"]) == EXIT_USER_MISTAKE
    assert "--repetitions 0: wanted" in capsys.readouterr().err


def test_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rival that computes something else is found out before it is timed."""
    out, picture = tmp_path / "kernels.json", tmp_path / "kernels.png"
    arguments = ["--only=blocks of 16", "--seconds=0.01", f"--json={out}", f"--picture={picture}"]
    assert main(["bench", "kernels", *arguments]) == 0
    (line,) = json.loads(out.read_text())["lines"]
    assert set(line["forward"]) - {"flashrnn"} == {"milliseconds", "reference", "loop", "dense", "copy", "floor"}
    assert 0 < line["both"]["floor"]["median"] < 1
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "blocks of 16" in capsys.readouterr().out
    wrong = next(kernel_bench.benches())
    wrong.rivals = {"loop": (lambda: 2 * wrong.ours(), wrong.inputs, True)}
    with pytest.raises(AssertionError, match="the output of loop differs"):
        kernel_bench.measure(wrong, 0.01, 1e11)
    wrong.exact = lambda u, weight: 1.001 * wrong.function(u.float(), weight.float()).double()
    with pytest.raises(AssertionError, match="our output differs"):
        kernel_bench.measure(wrong, 0.01, 1e11)
    assert main(["bench", "kernels", "--only=blocks of 17"]) == EXIT_USER_MISTAKE
    assert "no line has 'blocks of 17' in its name, which is one of blocks of 64" in capsys.readouterr().err


def test_pseudospectrum(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is that of the grid: one that is half a percent off is said to be."""
    monkeypatch.setattr(pseudospectrum, "SIZE", 24)
    monkeypatch.setattr(pseudospectrum, "POINTS", 12)
    out, arguments = tmp_path / "out.json", ["bench", "pseudospectrum"]
    assert main([*arguments, f"--json={out}"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 6
    for row in rows:
        assert row["checked"] > 10
        assert row["error"] <= row["tolerance"]
        assert row["seconds"] > 0
    assert "MISSED" not in capsys.readouterr().out
    exact = pseudospectrum.grid
    monkeypatch.setattr(
        pseudospectrum, "grid", lambda *a, **k: replace(g := exact(*a, **k), smallest=1.005 * g.smallest)
    )
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("5.0e-03") == 6


@pytest.mark.parametrize(
    "line", ["diagonal gru, H=1024", "dense gru, H=1024, B=1, bfloat16", "ctc, 16 rows", "moments"]
)
def test_every_kind_of_line_agrees_with_its_definition(line: str) -> None:
    (found,) = [b for b in kernel_bench.benches() if b.name.startswith(line)]
    kernel_bench._agree(found)


@pytest.mark.parametrize("line", ["blocks of 64, B=1,", "gru blocks", "lstm blocks"])
def test_flashrnn_computes_the_same(line: str) -> None:
    pytest.importorskip("flashrnn", reason="measured where a user has installed it")
    (ours,) = [b for b in kernel_bench.benches() if b.name.startswith(line)]
    assert "flashrnn" in ours.rivals
    kernel_bench._agree(ours)
    _, (_, weight), _ = ours.rivals["flashrnn"]
    with torch.no_grad():
        weight.mul_(1.01)
    with pytest.raises(AssertionError, match="the output of flashrnn differs"):
        kernel_bench._agree(ours)


@pytest.mark.parametrize("config", ["speech/tones", "speech/timit", "speech/an4_cepstra"])
def test_plan(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus is made, merged, planned and read from, whatever the configuration's labels and features; each first
    batch is that of the plan."""
    small_things = {"CLIPS": 8, "TEMPLATES": 2, "START_METHOD": "fork"}
    for name, value in small_things.items():
        monkeypatch.setattr(plan, name, value)
    monkeypatch.setattr(tables, "LIBRISPEECH_UTTERANCES", 10_000)
    out = tmp_path / "plan.json"
    small = ["--sizes=2000", "--per-shard=100", "--world-size=1", "--repetitions=2", f"--folder={tmp_path}"]
    assert main(["bench", "plan", config, "num_workers=0", *small, f"--json={out}"]) == 0
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert (row["utterances"], row["shards"], row["processes"]) == (2000, 20, 1)
    assert 60 < row["file_bytes_an_utterance"]["index"] < 80
    assert row["first_batch_seconds"]["worst"] > 0
    assert all(order["padding_percent"] < 5 for order in result["orders"])
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    capsys.readouterr()
    assert main(["bench", "plan", "--sizes=many"]) == EXIT_USER_MISTAKE
    assert "--sizes many: wanted" in capsys.readouterr().err


def bench_orthogonal(ranks: Any, out: Path) -> dict[str, Any]:
    small = ["data.delay_steps=20", "model.hidden_size=16"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orthogonal, "DRIFT_STEPS", 3)
        assert main(["bench", "orthogonal", "copying/t1000", *small, "--repetitions=1", f"--json={out}"]) == 0
    return json.loads(out.read_text())


def test_orthogonal(tmp_path: Path) -> None:
    (result,) = run_ranks(1, bench_orthogonal, tmp_path / "orthogonal.json")
    assert [name.split(" ")[0] for name in result["rows"]] == ["forming", "forming", "copying,"]
    for row in result["rows"].values():
        assert row["clock"]["median"] > 0
        assert row["wanted"]
    assert all(off < 1e-5 for _, off in result["drifts"].values())


def test_the_rival_of_the_orthogonal_net_computes_the_same() -> None:
    """Given the same matrix, the net of torch's parts is the recipe's."""
    ours = recipe.load("copying/t1000", ["model.hidden_size=16"]).build_model()
    rival = orthogonal.TorchNet(10, 16, 9)
    layer = next(ours.rnn.recurrent_layers())
    parametrize.remove_parametrizations(rival.recurrent, "weight")
    with torch.no_grad():
        layer.bias_hh.uniform_(-0.01, 0.01)
        rival.input.weight.copy_(layer.weight_ih)
        rival.recurrent.weight.copy_(layer.weight_hh.weight)
        rival.bias.copy_(layer.bias_hh)
        rival.output.load_state_dict(ours.output.state_dict())
    x = torch.randn(3, 30, 10)
    torch.testing.assert_close(rival(x), ours(x), rtol=1e-4, atol=1e-6)


def contest(ranks: Any, out: Path, monkey: dict[str, Any]) -> dict[str, Any]:
    for name, value in monkey.items():
        setattr(language, name, value)
    assert main(["bench", "language", "--repetitions=1", "--steps=1", f"--json={out}"]) == 0
    return json.loads(out.read_text())


def test_language(tmp_path: Path) -> None:
    """Before it times anything, the rival computes our loss with our weights."""
    small = {"VOCABULARY": 60, "TRAINING_WORDS": 3000, "CUTOFF": 20}
    contests = {"full": (16, 1, False, 1.0), "blocks, adaptive": (16, 2, True, 1.5)}
    (result,) = run_ranks(1, contest, tmp_path / "language.json", {**small, "CONTESTS": contests})
    assert list(result["rows"]) == ["full", "blocks, adaptive"]
    assert all(speed > 0 for row in result["rows"].values() for speed in row["tokens_per_second"])


@pytest.mark.parametrize("ragged", [False, True])
def test_a_layer_computes_what_torch_does_and_is_measured_as_models_run_it(ragged: bool) -> None:
    line = layers.layer_bench(24, 3, ragged)
    kernel_bench._agree(line)
    weights = line.inputs[1:]
    with torch.no_grad():
        weights[0][0, 0] += 1.0
    with pytest.raises(AssertionError, match="the output of torch differs"):
        kernel_bench._agree(line)
