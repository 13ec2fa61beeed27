"""Each way to save memory or time is one key, and the run is the same run with it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import fit, overrides, run_ranks
from trainer import distributed
from trainer.__main__ import main
from trainer.distributed import Trained, ZeroConfig
from trainer.errors import EXIT_USER_MISTAKE
from trainer.optim import AdamWConfig
from trainer.run import read_lines

pytestmark = pytest.mark.distributed
WIDE = "model.rnn.hidden_size=64"  # else every weight is below distributed.SMALL


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_lines(run / "metrics.jsonl") if row["kind"] == "train"]


@pytest.fixture(scope="module")
def plain(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    arguments = overrides(corpus, tmp_path_factory.mktemp("plain"), "name=plain", WIDE, "max_steps=4")
    return run_ranks(2, fit, arguments)[0]


@pytest.mark.parametrize(
    ("setting", "tolerance"),
    [
        ("zero.stage=1", 1e-5),
        ("zero.stage=2", 1e-5),
        ("zero.stage=3", 1e-5),
        ("zero={stage: 1, offload: true}", 1e-5),
        ("zero={stage: 2, offload: true}", 1e-5),
        ("zero={stage: 3, offload: true}", 1e-5),
        ("activation_checkpointing=true", 0.0),
        ("precision=bf16", 2e-2),  # 8 bits of mantissa, averaged over many frames
    ],
)
def test_one_key_changes_no_number(corpus: Path, tmp_path: Path, plain: Any, setting: str, tolerance: float) -> None:
    """Losses, gradient norms and averaged weights; two processes, two rounds each: accumulation, clipping, dropout."""
    result = run_ranks(2, fit, overrides(corpus, tmp_path, WIDE, "max_steps=4", setting))[0]
    rows, wanted = ([*read_lines(r["run"] / "metrics.jsonl")] for r in (result, plain))
    for name in ("loss", "grad_norm"):
        got, want = ([row[name] for row in part if row["kind"] == "train"] for part in (rows, wanted))
        assert got == pytest.approx(want, rel=5 * tolerance if name == "grad_norm" else tolerance), name
    assert result["values"]["loss"] == pytest.approx(plain["values"]["loss"], rel=tolerance)
    if setting == "precision=bf16":
        assert losses(result["run"]) != losses(plain["run"])


@pytest.mark.parametrize("micro_batch_seconds", [4, 16])
def test_accumulation_is_one_key(corpus: Path, tmp_path: Path, micro_batch_seconds: int) -> None:
    """More and smaller micro-batches in a step, or fewer and larger: the plan says how many rounds there are."""
    rounds = {}
    for world_size in (1, 2):
        key = f"plan.micro_batch_seconds={micro_batch_seconds}"
        arguments = overrides(corpus, tmp_path, key, f"name=n{world_size}", "max_steps=3")
        rounds[world_size] = losses(run_ranks(world_size, fit, arguments)[0]["run"])
    assert rounds[1] == pytest.approx(rounds[2], rel=1e-5)


def count_passes(ranks: Any, arguments: list[str]) -> int:
    from trainer.models.recurrence import Layer

    original, calls = Layer.compute, [0]

    def count(self: Any, *inputs: Any) -> Any:
        calls[0] += self.training
        return original(self, *inputs)

    Layer.compute = count
    fit(ranks, arguments)
    return calls[0]


@pytest.mark.parametrize("stage", [0, 3])
def test_activations_are_computed_again(corpus: Path, tmp_path: Path, stage: int) -> None:
    arguments = overrides(corpus, tmp_path, WIDE, f"zero.stage={stage}", "max_steps=1", "name=kept")
    kept = run_ranks(2, count_passes, arguments)
    again = run_ranks(2, count_passes, [*arguments, "activation_checkpointing=true", "name=again"])
    assert kept[0] > 0
    assert again == [2 * n for n in kept]


def held(ranks: Any) -> list[int]:
    """Elements of the weights that are on this rank outside of a pass: in all, and those of the largest weight."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.ReLU(), torch.nn.Linear(300, 1))
    trained = Trained(model, ZeroConfig(stage=3), AdamWConfig(), "fp32", 1)
    trained.backward(trained.model(torch.ones(2, 300)).square().mean())
    trained.step()
    return [p.numel() for p in model.parameters()]


def test_stage_3_holds_only_a_part_of_a_weight() -> None:
    for kept in run_ranks(2, held):
        assert kept == [0, 300, 300, 1]  # the matrix is elsewhere; the vectors are below distributed.SMALL


def test_fp16_without_a_gpu_is_a_mistake(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code = main(["train", "speech/tones", "nproc=1", *overrides(corpus, tmp_path, "precision=fp16")])
    assert code == EXIT_USER_MISTAKE
    assert "precision = 'fp16': this host has no GPU" in capsys.readouterr().err
    assert not (tmp_path / "speech-tones").exists()


def scaled(ranks: Any, stage: int, precision: Any) -> dict[str, Any]:
    """Steps of a model whose gradients overflow in fp16 at the scale that is begun with."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 150), torch.nn.Tanh(), torch.nn.Linear(150, 150))
    trained = Trained(model, ZeroConfig(stage=stage), AdamWConfig(lr=1e-3, clip_norm=0.5), precision, 1)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(ranks.rank))
    steps, kinds = [], []
    while len(steps) < 5:
        loss = trained.model(x).float().square().sum()
        trained.backward(loss)
        applied = trained.step()
        kinds.append((applied.applied, applied.rescaled))
        if applied.applied:
            steps.append(applied.grad_norm)
    return {"norms": steps, "kinds": kinds, "scale": trained.scale.value, "weights": trained.full("weight")}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_scale_of_fp16_is_found_and_changes_nothing_else(stage: int) -> None:
    """On a CPU, which computes in fp16 too, though slowly: clipping and norms are those of the gradient unscaled."""
    want = run_ranks(2, scaled, stage, "fp32")[0]
    results = run_ranks(2, scaled, stage, "fp16")
    assert want["kinds"] == [(True, False)] * 5
    assert want["scale"] == 1
    for got in results:
        refused = got["kinds"].count((False, True))
        assert 0 < refused < 16
        assert got["kinds"] == [(False, True)] * refused + [(True, False)] * 5
        assert got["scale"] == 2.0 ** (16 - refused)
        assert got["norms"] == pytest.approx(want["norms"], rel=5e-3)
        for name, value in want["weights"].items():
            torch.testing.assert_close(got["weights"][name], value, rtol=0, atol=2e-3)  # Adam: signs of tiny gradients


def test_a_scale_grows_again_and_a_bad_loss_is_nobodys_scale() -> None:
    scale = distributed.LossScale(enabled=True)
    assert scale.observe(applied=False)
    assert scale.value == 2.0**15
    assert not any(scale.observe(applied=True) for _ in range(scale.GROW_AFTER))
    assert scale.value == 2.0**16
    while scale.value > 1:
        assert scale.observe(applied=False)
    assert not scale.observe(applied=False)  # now it counts as a refused step
    off = distributed.LossScale(enabled=False)
    assert not off.observe(applied=False)
    assert off.value == 1


def test_a_trace_of_a_few_steps(corpus: Path, tmp_path: Path) -> None:
    run = run_ranks(2, fit, overrides(corpus, tmp_path, "profile=true", "max_steps=6"))[0]["run"]
    for rank in (0, 1):
        trace = json.loads((run / "profile" / f"rank-{rank:05d}.json").read_text())
        names = [event.get("name", "") for event in trace["traceEvents"]]
        assert len([name for name in names if name.startswith("ProfilerStep#")]) == 3
        assert any("ostinato::" in name for name in names)
    short = run_ranks(1, fit, overrides(corpus, tmp_path, "profile=true", "max_steps=3", "name=short"))[0]["run"]
    assert (short / "profile" / "rank-00000.json").is_file()


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("zero.stage=3", '"stage": 3'),
        ("zero={stage: 1, offload: true}", '"offload_optimizer"'),
        ("precision=bf16", '"bfloat16"'),
    ],
)
def test_plan_prints_what_deepspeed_gets(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, wanted: str
) -> None:
    assert main(["plan", "speech/tones", *overrides(corpus, tmp_path, setting)]) == 0
    assert wanted in capsys.readouterr().out


def time_outs(ranks: Any) -> list[float]:
    """Seconds after which a collective fails, of each group once DeepSpeed has made its own."""
    Trained(torch.nn.Linear(4, 1), ZeroConfig(stage=2), AdamWConfig(), "fp32", 1)
    groups = torch.distributed.distributed_c10d._world.pg_map
    return [g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups]


def test_the_time_out_is_that_of_every_group() -> None:
    """Ranks of tests start with 60 s; DeepSpeed's groups would have torch's half an hour."""
    for found in run_ranks(2, time_outs):
        assert len(found) >= 2
        assert set(found) == {60.0}
