"""Every exported form of a recogniser computes what the recogniser does, and is measured as it is."""

import itertools

import pytest
import torch

from tests.test_recogniser import LETTERS, build, sound
from trainer import deployment
from trainer.data.audio import FeaturesConfig
from trainer.data.text import Characters
from trainer.engine import initialise
from trainer.models.acoustic import AcousticConfig, AcousticModel
from trainer.models.cells import ElmanConfig, GRUConfig
from trainer.models.fixed_step import FixedStep
from trainer.models.parametrizations import CayleyConfig
from trainer.models.rnn import RNNConfig
from trainer.models.structure import BlockDiagonalConfig, DenseConfig, DiagonalConfig
from trainer.recogniser import Recogniser

onnx = pytest.importorskip("onnx", reason="installed by the extra `onnx`")
pytest.importorskip("onnxruntime", reason="installed by the extra `onnx`")
pytest.importorskip("onnxscript", reason="installed by the extra `onnx`")

BLOCKS = BlockDiagonalConfig(num_blocks=3)
CASES = [
    {"cell": GRUConfig(), "structure": DiagonalConfig(), "norm": "batch"},
    {"cell": ElmanConfig(activation="modrelu"), "structure": BLOCKS, "parametrization": CayleyConfig()},
]


@pytest.mark.parametrize("options", CASES, ids=lambda o: f"{o['cell'].name}-{o.get('structure', DenseConfig()).kind}")
def test_onnx_computes_what_the_recogniser_does(options, tmp_path) -> None:
    config = AcousticConfig(rnn=RNNConfig(hidden_size=12, num_layers=1, **options), lookahead_frames=1)
    model = AcousticModel(config, FeaturesConfig(num_bands=20).build(16000), len(LETTERS) + 1)
    initialise(model, 0)
    made = Recogniser(model, Characters(LETTERS), 16000)
    step = FixedStep(made.model, 4)
    call = deployment.write_onnx(step, tmp_path / "step.onnx")
    wave = torch.from_numpy(sound(1.13))
    got = deployment.Runner(step, call)(wave)
    operators = [node.op_type for node in onnx.load(tmp_path / "step.onnx").graph.node]
    assert "Floor" not in operators  # places are counted in integers: a float32 is exact for 17 minutes of samples
    torch.testing.assert_close(got, made.log_probs(wave), rtol=0, atol=1e-4)


def test_the_table_tells_of_every_form(tmp_path) -> None:
    made = build()
    said = [(torch.from_numpy(sound(seconds)), "ab h") for seconds in (1.0, 0.7)]
    rows = deployment.deploy(made, tmp_path, 4, said, print)
    assert [row.name for row in rows] == ["PyTorch, kernels", "torch.export", "ONNX", "ONNX, int8"]
    assert all(row.difference < 1e-3 for row in rows[:3])
    assert 0 < rows[3].difference < 3  # of some tens: its outputs were made sharp
    assert rows[0].cer == rows[2].cer is not None
    assert rows[0].wer == rows[2].wer is not None
    for row, name in zip(rows[1:], ("step.pt2", "step.onnx", "step_int8.onnx"), strict=True):
        assert row.megabytes == (tmp_path / name).stat().st_size / 1e6
        assert row.milliseconds > 0


@pytest.mark.parametrize("rate", [16000, 22050, 11025])
def test_a_chunk_is_of_whole_output_frames_at_any_rate(rate: int) -> None:
    config = AcousticConfig(rnn=RNNConfig(hidden_size=4, num_layers=1, directions="forward"))
    model = AcousticModel(config, FeaturesConfig(num_bands=20).build(rate), len(LETTERS) + 1)
    made = Recogniser(model, Characters(LETTERS), rate)
    assert [deployment.chunk_frames(made, ms) for ms in (1, 80, 170)] == [4, 8, 16]


def test_a_form_that_differs_is_not_told_of(tmp_path, monkeypatch) -> None:
    calls = itertools.count()

    def wrong(step, path):
        path.write_bytes(b"")
        return lambda given: [x + 0.1 * next(calls) if x.is_floating_point() else x for x in step(*given)]

    monkeypatch.setattr(deployment, "write_exported", wrong)
    with pytest.raises(AssertionError, match=r"step\.pt2: differs"):
        deployment.deploy(build(), tmp_path, 4, [], print)
