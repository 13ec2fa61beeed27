"""What sparsity buys: each net is trained, timed beside the others and drawn."""

import json
from pathlib import Path

from recipes import sparsity
from tests.helpers import overrides
from trainer import recipe
from trainer.__main__ import main
from trainer.config import PROJECT
from trainer.sweep.config import load


def test_sparse_nets_are_trained_timed_and_drawn(corpus: Path, tmp_path: Path) -> None:
    small = [*(line for line in overrides(corpus, tmp_path) if not line.startswith("runs_dir=")), "max_steps=3"]
    values = {
        "config": "speech/tones",
        "conclusion": "sparsity",
        "test": True,
        "seeds": [0, 1],
        "workers": 1,
        "runs_dir": str(tmp_path / "runs"),
        "overrides": [*small, "model.rnn.directions=forward"],
        "variants": {
            "dense, equal width": {},
            "diagonal, equal width": {"overrides": ["model.rnn.structure.kind=diagonal"]},
        },
    }
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    assert main(["sweep", str(path)]) == 0
    folder = tmp_path / "runs/study"
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [(row["variant"], row["seed"]) for row in rows] == [
        ("dense, equal width", 0),
        ("diagonal, equal width", 0),
        ("dense, equal width", 1),
        ("diagonal, equal width", 1),
    ]  # stopped early, it has every variant of the first seed
    table = (folder / "table.md").read_text().split("One thread; chunks of 80 ms")[1]
    dense, diagonal = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if ", equal" in line
    ]
    assert dense[3] == f"{2 * 4 * 16 * 16:,}"  # layers, gates
    assert diagonal[3] == f"{2 * 4 * 16:,}"
    assert dense[4] == dense[6] == "1.00 (1.00-1.00)"
    assert float(diagonal[5]) > 0
    assert (folder / "sparsity.png").stat().st_size > 5_000
    assert sparsity.conclude([], folder).pictures == []


def test_the_study_compares_at_equal_width_and_at_equal_parameters() -> None:
    """Within three per cent, for any corpus: the number of labels hardly counts."""
    from trainer.data.audio import FeaturesConfig
    from trainer.models.acoustic import AcousticModel

    sweep = load(PROJECT / "configs/sweeps/sparsity.yaml")
    weights = {}
    for name, variant in sweep.variants.items():
        config = recipe.load("speech/read_ru_streaming", [*sweep.overrides, *variant.overrides]).config
        model = AcousticModel(config.model, FeaturesConfig().build(16000), 36)
        weights[tuple(name.split(", "))] = sum(p.numel() for p in model.parameters())
        assert ("width" in name) == (config.model.rnn.hidden_size == 256)
    dense = weights["dense", "equal width"]
    for structure in ("8 blocks", "32 blocks", "diagonal"):
        assert weights[structure, "equal width"] < 0.75 * dense
        assert abs(weights[structure, "equal parameters"] / dense - 1) < 0.03
