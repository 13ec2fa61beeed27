"""A checkpoint goes anywhere: another number of processes, another stage of ZeRO, and the run is still the same run."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import fit, overrides, run_ranks
from trainer.run import read_ledger, read_lines

pytestmark = pytest.mark.distributed
WORLD_SIZES, LEG = (2, 1, 3), 3
CONSTANT = "schedule={kind: constant}"  # the length of a cosine is fixed when a run begins


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_lines(run / "metrics.jsonl") if row["kind"] == "train"]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An uninterrupted run on two processes at stage 0."""
    more = ["name=whole", CONSTANT, "model.rnn.hidden_size=64", "validation.every_steps=99"]
    steps = f"max_steps={LEG * len(WORLD_SIZES)}"
    return run_ranks(2, fit, overrides(corpus, tmp_path_factory.mktemp("whole"), *more, steps))[0]


@pytest.mark.parametrize(
    ("stages", "more"),
    [
        ((0, 0, 0), []),
        ((1, 1, 1), []),
        ((2, 2, 2), []),
        ((3, 3, 3), []),
        ((0, 3, 1), []),
        ((3, 1, 2), ["zero.offload=true"]),
    ],
    ids=str,
)
def test_two_processes_then_one_then_three(
    corpus: Path, tmp_path: Path, whole: Any, stages: tuple[int, ...], more: list[str]
) -> None:
    """Same samples in the same steps, and the loss curve of the uninterrupted run to float tolerance."""
    arguments = overrides(
        corpus, tmp_path, "name=moved", CONSTANT, "model.rnn.hidden_size=64", "validation.every_steps=99", *more
    )
    for leg, (world_size, stage) in enumerate(zip(WORLD_SIZES, stages, strict=True), 1):
        result = run_ranks(world_size, fit, [*arguments, f"zero.stage={stage}", f"max_steps={LEG * leg}"])[0]
        assert result["position"]["step"] == LEG * leg
    assert read_ledger(result["run"] / "ledger") == read_ledger(whole["run"] / "ledger")
    pairs = list(zip(losses(result["run"]), losses(whole["run"]), strict=True))
    print(f"ZeRO {stages}: losses apart by {max(abs(a - b) / b for a, b in pairs):.1e}")  # shown with -rP
    for got, want in pairs:
        assert got == pytest.approx(want, rel=1e-4)
    assert len(set(losses(whole["run"]))) == LEG * len(WORLD_SIZES)
