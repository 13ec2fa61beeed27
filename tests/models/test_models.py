"""Padding changes no real frame, structures equal their dense matrix, noise belongs to samples."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

import kernels
from kernels import products
from kernels.say import say_once
from tests.helpers import overrides
from trainer import recipe
from trainer.data.audio import AudioError, FeaturesConfig
from trainer.engine import initialise
from trainer.models.acoustic import AcousticConfig, AcousticModel
from trainer.models.cells import TORCH, ElmanConfig, GRUConfig, LSTMConfig
from trainer.models.encoders import Conv1dConfig, Conv2dConfig, ConvLayerConfig
from trainer.models.normalization import KeyedDropout, MaskedBatchNorm, frame_mask
from trainer.models.recurrence import torch_is_faster
from trainer.models.rnn import RNNConfig
from trainer.models.structure import (
    BandedConfig,
    BlockDiagonalConfig,
    DenseConfig,
    DiagonalConfig,
    PermutedBlockDiagonalConfig,
    SparseConfig,
)

STRUCTURES = [
    DenseConfig(),
    BlockDiagonalConfig(num_blocks=4),
    DiagonalConfig(),
    PermutedBlockDiagonalConfig(num_blocks=4),
    BandedConfig(half_width=2),
    SparseConfig(density=0.3),
]
"""All whose numbers are entries of the matrix."""
CELLS = [
    ElmanConfig(),
    ElmanConfig(activation="relu"),
    ElmanConfig(activation="identity"),
    GRUConfig(),
    GRUConfig(reset="before"),
    LSTMConfig(),
]
"""All that have two biases, as torch's have."""
LENGTHS = torch.tensor([9, 4, 1])


def kind(x: object) -> str:
    return f"{getattr(x, 'kind', x)}{getattr(x, 'activation', '')}{getattr(x, 'reset', '').replace('after', '')}"


def inputs(width: int, frames: int = 9, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, frames, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_gates", [1, 3])
@pytest.mark.parametrize("structure", STRUCTURES, ids=kind)
def test_a_structure_equals_its_dense_matrix(structure, num_gates: int) -> None:
    built = structure.build(8, num_gates)
    h = inputs(8)
    torch.testing.assert_close(built(h), h @ built.dense().T)
    assert built.dense().shape == (num_gates * 8, 8)
    assert built.multiply_adds() == int((built.dense() != 0).sum())
    matrix = inputs(8, num_gates * 8, 1)[0]
    built.load_state_dict({"weight": built.part_of(matrix)})
    rest = built.rest_of(matrix)
    assert torch.equal(built.dense() + rest, matrix)
    assert int((rest != 0).sum()) == num_gates * 64 - built.multiply_adds()


@pytest.mark.parametrize("directions", ["forward", "concat", "sum"])
@pytest.mark.parametrize(("structure", "cell"), list(itertools.product(STRUCTURES, CELLS)), ids=kind)
def test_padding_changes_no_real_frame_of_the_stack(structure, cell, directions: str) -> None:
    config = RNNConfig(
        hidden_size=8, num_layers=2, cell=cell, structure=structure, directions=directions, residual=True
    )
    rnn = config.build(8).eval()
    x = inputs(8)
    clean, hidden = rnn(x, LENGTHS, all_layers=True)
    assert [h.shape for h in hidden] == [clean.shape] * 2
    dirty = torch.where(frame_mask(LENGTHS, 9)[..., None], x, torch.full((), 1e3))
    more = torch.cat([dirty, torch.full((3, 5, 8), 1e3)], 1)
    padded, _ = rnn(more, LENGTHS)
    torch.testing.assert_close(padded[:, :9], clean)
    assert not padded[~frame_mask(LENGTHS, 14)].any()
    for b, n in enumerate(LENGTHS.tolist()):
        alone, _ = rnn(x[b : b + 1, :n], LENGTHS[b : b + 1])
        torch.testing.assert_close(clean[b, :n], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
@pytest.mark.parametrize("config", [Conv1dConfig, Conv2dConfig], ids=["1d", "2d"])
def test_padding_changes_no_real_frame_of_the_subsampling(config, norm: str) -> None:
    layers = (ConvLayerConfig(channels=6, kernel=5, stride=2), ConvLayerConfig(channels=8, kernel=3, stride=3))
    made = config(layers=layers, norm=norm)
    net = made.build(20).train()
    x, lengths = inputs(20, 31), torch.tensor([31, 13, 1])
    y, frames = net(x, lengths)
    assert frames.tolist() == made.num_frames(lengths.numpy()).tolist() == [6, 3, 1]
    assert y.shape == (3, 6, net.output_size)
    dirty = torch.where(frame_mask(lengths, 31)[..., None], x, torch.full((), 1e3))
    padded, _ = net(torch.cat([dirty, torch.full((3, 9, 20), 1e3)], 1), lengths)
    torch.testing.assert_close(padded[:, :6] * frame_mask(frames, 6)[..., None], y)
    if norm != "batch":
        for b, n in enumerate(lengths.tolist()):
            alone, _ = net(x[b : b + 1, :n], lengths[b : b + 1])
            torch.testing.assert_close(y[b, : frames[b]], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["worker", "model"])
def test_padding_changes_no_real_frame_of_the_recogniser(corpus, where: str) -> None:
    task = recipe.load("speech/tones", overrides(corpus, corpus, f"data.features.where={where}"))
    model = task.build_model().eval()
    dataset = task.build_dataset("valid")
    batch = dataset.load(dataset.plan.epoch(0)[0].micro_batches[0])
    audio, lengths = batch["audio"], batch["lengths"]
    clean, frames, _ = model(audio, lengths)
    junk = torch.full((len(audio), 3200, *audio.shape[2:]), 7.0)
    padded, _, _ = model(torch.cat([audio, junk], 1), lengths)
    for b, n in enumerate(frames.tolist()):
        torch.testing.assert_close(padded[b, :n], clean[b, :n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", [c for c in CELLS if c.name in TORCH], ids=kind)
def test_torchs_loop_and_the_kernel_agree(cell) -> None:
    """One block is a dense matrix, so both paths of a layer compute the same, gradients too."""
    dense = RNNConfig(hidden_size=8, cell=cell, directions="concat", num_layers=1).build(5)
    block = RNNConfig(
        hidden_size=8, cell=cell, directions="concat", num_layers=1, structure=BlockDiagonalConfig(num_blocks=1)
    ).build(5)
    state = {k: v.view(block.state_dict()[k].shape) for k, v in dense.state_dict().items()}
    block.load_state_dict(state)
    x = inputs(5).requires_grad_()
    results = []
    for net in (dense, block):
        y, _ = net(x, LENGTHS)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.reshape(-1), b.reshape(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("structure", [DenseConfig(), BlockDiagonalConfig(num_blocks=4), DiagonalConfig()], ids=kind)
@pytest.mark.parametrize("cell", CELLS, ids=kind)
def test_one_line_says_why_a_net_without_the_kernels_is_slow(structure, cell, monkeypatch, caplog) -> None:
    """Whatever takes their place."""
    monkeypatch.setattr(kernels.cpu, "MISSING", "no compiler")
    say_once.cache_clear()
    rnn = RNNConfig(hidden_size=8, num_layers=2, structure=structure, cell=cell).build(6)
    with caplog.at_level("WARNING"):
        rnn(inputs(6), LENGTHS)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{cell.name}: ")
    assert line.endswith("slow: no compiler") or line.endswith("slow): no compiler")


@pytest.mark.parametrize(
    ("size", "rows", "equal", "training", "threads", "wanted"),
    [
        (256, 16, True, True, 1, True),
        (256, 16, False, True, 1, False),
        (256, 16, True, False, 1, False),
        (1024, 4, True, True, 1, False),
        (1024, 1, True, True, 1, True),
        (1024, 16, True, True, 1, True),
        (1024, 4, False, True, 2, True),
    ],
)
def test_a_dense_lstm_goes_to_whom_measurements_say(
    size: int, rows: int, equal: bool, training: bool, threads: int, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(kernels, "unsupported", lambda *_: None)
    with torch.device("meta"):
        weight = torch.empty(4, 1, size, size)
    assert torch_is_faster(LSTMConfig(), weight, rows, equal, training) is wanted
    assert not torch_is_faster(GRUConfig(), weight, rows, equal, training)


def test_a_scaled_stack_begins_as_a_shallow_one() -> None:
    """Each layer adds its output times the factors: ten times as much from ten times as large ones, to first order."""
    x, added = inputs(8), []
    for start in (1e-4, 1e-3):
        config = RNNConfig(hidden_size=8, num_layers=5, residual=True, residual_scale=start)
        rnn = config.build(8)
        initialise(rnn, 0)
        scales = [p for name, p in rnn.named_parameters() if name.startswith("scales.")]
        assert [p.tolist() for p in scales] == [pytest.approx([start] * 8)] * 5
        with torch.no_grad():
            added.append(rnn(x, LENGTHS)[0] - rnn.final_norm(x, None) * frame_mask(LENGTHS, 9)[..., None])
    torch.testing.assert_close(added[1], 10 * added[0], rtol=0, atol=0.02 * float(added[1].abs().max()))
    with pytest.raises(ValueError, match="with residual = false"):
        RNNConfig(residual_scale=0.1)


def test_the_middle_layer_has_labels_where_the_last_one_is_of_another_size() -> None:
    rnn = RNNConfig(hidden_size=6, last_size=4, num_layers=3, directions="concat")
    model = AcousticModel(AcousticConfig(rnn=rnn, intermediate_ctc=0.3), FeaturesConfig(num_bands=8).build(16000), 5)
    output, lengths, middle = model(inputs(8, 40), torch.tensor([40, 30, 20]))
    assert lengths.tolist() == [10, 8, 5]
    assert output.shape == middle.shape == (3, 10, 5)


def test_dropout_belongs_to_the_sample_and_the_layer() -> None:
    dropout = KeyedDropout(0.5, "a").train()
    x = torch.ones(3, 10, 6)
    keys = torch.tensor([11, 22, 33])
    y = dropout(x, keys)
    assert torch.equal(dropout(x.flip(0), keys.flip(0)).flip(0), y)
    assert torch.equal(dropout(torch.ones(3, 15, 6), keys)[:, :10], y)  # padding draws nothing from real frames
    assert not torch.equal(KeyedDropout(0.5, "b").train()(x, keys), y)
    assert not torch.equal(y[0], y[1])
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dropout.eval()(x, keys), x)


def test_batch_norm_takes_real_frames_only() -> None:
    norm = MaskedBatchNorm(6).train()
    x = inputs(6)
    mask = frame_mask(LENGTHS, 9)
    y = norm(x, mask)
    frames = y[mask]
    torch.testing.assert_close(frames.mean(0), torch.zeros(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(frames.var(0, unbiased=False), torch.ones(6), rtol=1e-3, atol=1e-3)
    before = norm.running_mean.clone()
    norm(x, torch.zeros_like(mask))  # a dummy: nothing in it counts
    assert norm.pending[-1] == 1
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("where", ["worker", "model"])
def test_what_is_not_valid_leaves_no_trace_in_the_statistics(corpus, where: str) -> None:
    more = ["model.rnn.norm=batch", "model.subsampling.norm=batch", f"data.features.where={where}"]
    task = recipe.load("speech/tones", overrides(corpus, corpus, *more))
    dataset = task.build_dataset("train")
    good = dataset.plan.epoch(0)[0].micro_batches[0]
    key = dataset.index.keys[good.samples[0]]
    alone = replace(good, samples=good.samples[1:], speeds=good.speeds[1:])
    model = task.build_model().train()
    norms = [m for m in model.modules() if isinstance(m, MaskedBatchNorm)]

    def pending(batch) -> list[torch.Tensor]:
        task.step(model, batch)
        sums = [m.pending.clone() for m in norms]
        for m in norms:
            m.pending.zero_()
        return sums

    assert not any(p.any() for p in pending(dataset.dummy()))
    want = pending(dataset.load(alone))
    read = dataset.waveform

    def bad(row: int, *_: object):
        if row == good.samples[0]:
            raise AudioError("bad")
        return read(row)

    dataset.waveform = bad
    with_bad = dataset.load(good)
    assert [fault.key for fault in with_bad["faults"]] == [key]
    for a, b in zip(pending(with_bad), want, strict=True):
        torch.testing.assert_close(a, b)


def test_weights_are_drawn_by_name() -> None:
    from trainer.engine import initialise

    small, large = RNNConfig(hidden_size=8, num_layers=1).build(5), RNNConfig(hidden_size=8, num_layers=3).build(5)
    for net in (small, large):
        torch.manual_seed(int(torch.randint(1000, ())))
        initialise(net, seed=3)
    for name, weight in small.state_dict().items():
        assert torch.equal(weight, large.state_dict()[name])
    other = RNNConfig(hidden_size=8, num_layers=1).build(5)
    initialise(other, seed=4)
    assert not torch.equal(other.layers[0][0].weight_ih, small.layers[0][0].weight_ih)
    assert isinstance(small, nn.Module)
