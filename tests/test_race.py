"""The race is fair: ours has the settings of its rivals, and the bare loop reads the shards of `prepare`."""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from webdataset import TarWriter

from tests.helpers import encoded
from trainer import recipe
from trainer.config import PROJECT


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(PROJECT / "docs/race")
    return {name: __import__(name) for name in ("common", "race", "bare_loop")}


@pytest.mark.parametrize("config", ["speech/read_ru", "speech/read_ru_block"])
def test_ours_has_the_settings_of_the_rivals(config: str, scripts: dict[str, ModuleType]) -> None:
    common, net = scripts["common"], scripts["common"].Net()
    ours = recipe.load(config, scripts["race"].BASE).config
    assert (ours.data.text.alphabet, ours.data.augment.speeds) == (common.ALPHABET, common.SPEEDS)
    masks = ours.data.augment
    assert (masks.time_masks, masks.time_mask_frames, masks.frequency_masks, masks.frequency_mask_bands) == (
        3,
        20,
        2,
        10,
    )
    assert ours.plan.micro_batch_seconds * ours.plan.micro_batches_per_step == common.BATCH_SECONDS
    assert (ours.optimizer.lr, ours.optimizer.betas, ours.optimizer.weight_decay) == (
        common.PEAK_RATE,
        (0.9, 0.98),
        0.01,
    )
    assert ours.schedule.warmup_steps == common.WARM_UP_STEPS
    assert (ours.model.rnn.hidden_size, ours.model.rnn.num_layers) == (net.rnn.hidden_size, net.rnn.num_layers)
    assert ours.model.rnn.dropout == ours.model.input_dropout == net.rnn.dropout == net.dropout.p


def test_the_bare_loop_passes_once_over_a_few_clips(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 1)):
        (tmp_path / split).mkdir()
        with TarWriter(str(tmp_path / split / "shard-000000.tar")) as tar:
            for i in range(count):
                wave = encoded(random.uniform(-0.3, 0.3, 16000).astype(np.float32), subtype="PCM_16")
                tar.write({"__key__": f"{split}{i}", "flac": wave, "txt": "Да, вот".encode()})
    monkeypatch.setattr(sys, "argv", ["bare_loop.py", f"--data={tmp_path}", "--passes=2", "--threads=1"])
    scripts["bare_loop"].main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["passes"] for row in rows] == [1, 2]
    assert rows[1]["hours"] == pytest.approx(2 * 3 / 3600)
    assert 0 < rows[0]["seconds"] < rows[1]["seconds"]
    (line,) = scripts["race"].table({name: [rows] for name in scripts["race"].RIVALS})[2:3]
    assert "| 1.00 (1.00-1.00) | 1.00 (1.00-1.00) |" in line
