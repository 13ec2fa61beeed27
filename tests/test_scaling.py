"""The model of communication: what it says of the cases in which the answer is known."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers import overrides
from trainer.__main__ import main
from trainer.bench import scaling
from trainer.bench.scaling import Cluster, all_reduce_seconds, efficiency
from trainer.models import recurrence

SLOW = Cluster(8, inside=1e9, between=1e8, inside_delay=0.0, between_delay=0.0)


def test_bytes_of_a_ring() -> None:
    """Each device sends and takes 2 (n - 1) / n of the gradients; one alone sends nothing."""
    assert all_reduce_seconds(1e9, 1, SLOW) == 0
    assert all_reduce_seconds(1e9, 4, SLOW) == pytest.approx(2 * 3 / 4)
    # Between two hosts goes an eighth of them for each device, once each way.
    assert all_reduce_seconds(1e9, 16, SLOW) == pytest.approx(2 * 7 / 8 + 2 / 2 / 8 * 10)


def test_messages_grow_and_bytes_do_not() -> None:
    late = Cluster(8, inside=1e30, between=1e30, inside_delay=1e-6, between_delay=1e-3)
    assert all_reduce_seconds(1.0, 512, late) == pytest.approx(2 * 7e-6 + 2 * 63e-3)
    assert all_reduce_seconds(1e9, 4096, SLOW) < 1.1 * all_reduce_seconds(1e9, 64, SLOW)


def test_what_is_hidden_costs_nothing() -> None:
    alone = all_reduce_seconds(1e9, 8, SLOW)
    assert efficiency(alone, 1e9, 8, SLOW, hidden=0.0) == pytest.approx(0.5)
    assert efficiency(alone, 1e9, 8, SLOW, hidden=1.0) == 1.0


def test_runs_are_measured(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "WARM_UP_STEPS", 1)
    out = tmp_path / "scaling.json"
    small = overrides(corpus, tmp_path, "plan.micro_batches_per_step=2")
    assert main(["bench", "scaling", "speech/tones", *small, "--repetitions=1", "--steps=1", f"--json={out}"]) == 0
    result = json.loads(out.read_text())
    assert set(result["audio_hours_per_second"]) == {"one process", "2 processes", "2 copies"}
    assert all(speed["median"] > 0 for speed in result["audio_hours_per_second"].values())
    assert {row["devices"] for row in result["forecast"]} == {8, 64, 512}


@pytest.mark.parametrize(
    ("rnn", "kind", "weights"),
    [
        ("{cell: {kind: gru}, directions: concat}", "recurrences (our kernels)", 2 * 3 * 32 * 32),
        (
            "{cell: {kind: gru}, structure: {kind: block_diagonal, num_blocks: 4}}",
            "recurrences (our kernels)",
            3 * 32 * 8,
        ),
        ("{cell: {kind: gru}, structure: {kind: diagonal}}", "recurrences (our kernels)", 3 * 32),
        ("{cell: {kind: lstm}}", "LSTM (oneDNN): input and recurrence", 4 * 32 * (32 + 32)),
    ],
)
def test_operations_are_counted(rnn: str, kind: str, weights: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two for each recurrent weight, frame and row; what is not recurrent as torch counts it."""
    monkeypatch.setattr(recurrence, "torch_is_faster", lambda *_: kind.startswith("LSTM"))
    from trainer.bench.utilization import PRODUCTS, count
    from trainer.models.rnn import RNNConfig

    config = RNNConfig.model_validate(yaml.safe_load(rnn) | {"hidden_size": 32, "num_layers": 1})
    net, head = config.build(32), torch.nn.Linear(config.output_size, 5)
    x = torch.randn(3, 7, 32, requires_grad=True)
    counted = count(lambda: head(net(x, torch.tensor([7, 5, 7]))[0]))
    assert counted[kind] == 2 * weights * 3 * 7
    gates, ways = (4, 1) if kind.startswith("LSTM") else (3, config.output_size // 32)
    inputs = 0 if kind.startswith("LSTM") else 2 * ways * gates * 32 * 32 * 3 * 7
    assert counted[PRODUCTS] == inputs + 2 * 5 * config.output_size * 3 * 7


def test_utilization_is_of_a_step(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "utilization.json"
    small = overrides(corpus, tmp_path)
    assert main(["bench", "utilization", "speech/tones", *small, "--repetitions=1", f"--json={out}"]) == 0
    result = json.loads(out.read_text())
    assert 0 < result["utilization"] < 1
    assert result["utilization"] == pytest.approx(
        sum(result["flops"].values()) / result["step_seconds"] / result["peak"]
    )


@pytest.mark.slow
def test_memory_is_linear_in_the_batch_and_less_where_layers_are_computed_again() -> None:
    from trainer.bench import memory

    def measure(shapes, again: bool) -> list[float]:
        found = memory.measure("speech/read_ru_deep", [], lambda line: None, shapes, [again])
        return [row["activation_bytes"] / 2**20 for row in found]

    small, large = measure([(12, 4), (12, 12)], again=False)
    assert 2.6 < large / small < 3.4
    (again,) = measure([(12, 12)], again=True)
    assert again < 0.7 * large


def test_the_verb_tells_memory_by_depth_and_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.bench import memory

    monkeypatch.setattr(memory, "measure", partial(memory.measure, shapes=[(2, 1)], ways=[True]))
    assert main(["bench", "memory", "speech/read_ru_deep"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.rstrip(" │").endswith("yes")]
    assert line.replace("│", " ").split()[:2] == ["2", "1"]


def test_memory_is_measured_of_speech_alone() -> None:
    from trainer.bench import memory
    from trainer.errors import UserError

    with pytest.raises(UserError, match="is no acoustic model"):
        memory.one({"config": "copying/t1000", "overrides": [], "batch": 1, "recompute": False})
