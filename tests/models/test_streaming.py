"""Piece by piece gives what the whole gives, whatever the model and the pieces; what cannot is told by its key."""

import pytest
import torch
from torch import nn

from tests.models.test_family import MODRELU
from tests.models.test_models import CELLS, kind
from trainer.data.audio import FeaturesConfig
from trainer.engine import initialise
from trainer.models.acoustic import AcousticConfig, AcousticModel
from trainer.models.cells import ElmanConfig, GRUConfig, LSTMConfig
from trainer.models.encoders import Conv1dConfig, Conv2dConfig, ConvLayerConfig
from trainer.models.fixed_step import FixedStep
from trainer.models.initialization import IdentityConfig
from trainer.models.normalization import MaskedBatchNorm
from trainer.models.parametrizations import (
    BoundedConfig,
    CayleyConfig,
    ExponentialConfig,
    FreeConfig,
    HouseholderConfig,
    SoftOrthogonalConfig,
    SpectralNormConfig,
    SpectralRadiusConfig,
)
from trainer.models.regularizers import LaterConfig, RegularizersConfig
from trainer.models.regularizers.fast_dropout import FastDropoutConfig
from trainer.models.rnn import RNNConfig
from trainer.models.streaming import AcousticStream, for_inference
from trainer.models.structure import (
    BandedConfig,
    BlockDiagonalConfig,
    DenseConfig,
    DiagonalConfig,
    LowRankConfig,
    PermutedBlockDiagonalConfig,
    SparseConfig,
)

BLOCKS = BlockDiagonalConfig(num_blocks=3)
RECURRENCES = [
    *((cell, DenseConfig(), FreeConfig()) for cell in [*CELLS, MODRELU]),
    *((cell, BLOCKS, FreeConfig()) for cell in [MODRELU, GRUConfig(), LSTMConfig()]),
    *((cell, DiagonalConfig(), FreeConfig()) for cell in [GRUConfig(), LSTMConfig()]),
    (ElmanConfig(activation="relu"), DiagonalConfig(), BoundedConfig()),
    *((MODRELU, BLOCKS, rule) for rule in [CayleyConfig(), ExponentialConfig(), HouseholderConfig()]),
    *((GRUConfig(), DenseConfig(), rule) for rule in [CayleyConfig(), SoftOrthogonalConfig(), SpectralNormConfig()]),
    (ElmanConfig(), DenseConfig(), SpectralRadiusConfig()),
    *(
        (ElmanConfig(), structure, FreeConfig())
        for structure in [
            PermutedBlockDiagonalConfig(num_blocks=3),
            BandedConfig(half_width=2),
            LowRankConfig(rank=2),
            SparseConfig(density=0.3),
        ]
    ),
]
FRAMES = 41


def layer(kernel: int, stride: int) -> ConvLayerConfig:
    return ConvLayerConfig(channels=4, kernel=kernel, stride=stride)


def build(**options) -> AcousticModel:
    subsampling = options.pop("subsampling", Conv2dConfig(layers=(layer(3, 2), layer(3, 2)), projection=7))
    lookahead = options.pop("lookahead", 2)
    rnn = RNNConfig(**{"hidden_size": 12, "num_layers": 2, **options})
    config = AcousticConfig(subsampling=subsampling, rnn=rnn, lookahead_frames=lookahead, intermediate_ctc=0.3)
    model = AcousticModel(config, FeaturesConfig(num_bands=10).build(16000), 5)
    initialise(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        if model.lookahead is not None:  # it starts without a look ahead
            model.lookahead.weight.normal_(generator=generator)
        for module in model.modules():
            if isinstance(module, MaskedBatchNorm):
                module.running_mean.normal_(generator=generator)
    return model.eval()


def check(model: AcousticModel, size: int, frames: int = FRAMES) -> None:
    x = torch.randn(2, frames, 10, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want, lengths, _ = model(x, torch.full((2,), frames))
    stream = AcousticStream(for_inference(model))
    parts = [stream.push(piece) for piece in x.split(size, 1)]
    parts.append(stream.push(x[:, :0], last=True))
    got = torch.cat(parts, 1)
    assert got.shape == (2, int(lengths[0]), 5)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def residual(cell) -> dict:
    """Layers that add a part of what they compute to their input."""
    identity = {"initialization": IdentityConfig()} if cell == ElmanConfig(activation="identity") else {}
    return {"residual": True, "residual_scale": 0.5, **identity}


@pytest.mark.parametrize(("cell", "structure", "rule"), RECURRENCES, ids=kind)
def test_every_recurrence_runs_in_pieces(cell, structure, rule) -> None:
    initialization = {"initialization": IdentityConfig()} if cell == ElmanConfig(activation="identity") else {}
    check(
        build(
            cell=cell, structure=structure, parametrization=rule, residual=True, residual_scale=0.5, **initialization
        ),
        7,
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 16, 40, 41])
@pytest.mark.parametrize("lookahead", [0, 3])
def test_pieces_of_any_size(size: int, lookahead: int) -> None:
    check(build(lookahead=lookahead, norm="batch"), size)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 6, 17])
@pytest.mark.parametrize("kernels", [[(3, 2), (5, 2)], [(1, 3), (7, 1)], [(11, 4)], [(5, 1), (3, 3), (1, 1)]], ids=str)
@pytest.mark.parametrize("config", [Conv1dConfig, Conv2dConfig], ids=["1d", "2d"])
def test_convolutions_of_every_shape(config, kernels, frames: int) -> None:
    subsampling = config(layers=tuple(layer(*k) for k in kernels), norm="layer", activation="gelu")
    model = build(subsampling=subsampling)
    for size in (1, 4):
        check(model, size, frames)


def test_zoneout_takes_its_mean_in_pieces() -> None:
    later = LaterConfig(zoneout=0.2, zoneout_cell=0.1)
    check(build(cell=LSTMConfig(), regularizers=RegularizersConfig(later=later)), 9)


def test_features_come_in_pieces() -> None:
    log_mel = FeaturesConfig(num_bands=10).build(16000)
    log_mel.mean.normal_(generator=torch.Generator().manual_seed(0))
    for samples in (1, 300, 512, 671, 672, 5000):
        wave = torch.rand(samples, generator=torch.Generator().manual_seed(1)) - 0.5
        for size in (1, 100, 160, 999):
            if samples / size < 1000:
                stream = log_mel.stream()
                parts = [stream.push(piece) for piece in wave.split(size)] + [stream.push(wave[:0], last=True)]
                assert torch.equal(torch.cat(parts), log_mel.clip(wave))


def test_what_cannot_stream_is_told_by_its_key() -> None:
    for options, key in (
        ({"directions": "sum"}, "model.rnn.directions = sum"),
        (
            {
                "norm": "none",
                "cell": ElmanConfig(),
                "regularizers": RegularizersConfig(fast_dropout=FastDropoutConfig()),
            },
            "model.rnn.regularizers.fast_dropout",
        ),
    ):
        with pytest.raises(ValueError, match=key):
            AcousticStream(build(**options))


def test_the_copy_for_inference_forms_no_matrix_anew() -> None:
    model = build(cell=MODRELU, structure=BLOCKS, parametrization=CayleyConfig())
    copy = for_inference(model)
    assert not [name for name, _ in copy.named_modules() if "parametrizations" in name]
    assert [name for name, _ in model.named_modules() if "parametrizations" in name]
    assert all(isinstance(m, nn.Module) and not m.training for m in copy.modules())


def check_fixed(model: AcousticModel, frames: int, samples: int = 4321) -> None:
    """The step of fixed shapes, from sound, against the pass over the whole."""
    wave = torch.rand(samples, generator=torch.Generator().manual_seed(4)) - 0.5
    features = model.log_mel.clip(wave)[None]
    with torch.no_grad():
        want, _, _ = model(features, torch.tensor([features.shape[1]]))
    step = FixedStep(for_inference(model), frames)
    state, found = list(step.start().values()), []
    size = step.chunk_samples
    for piece in [*wave.split(size), *[wave[:0]] * step.flush_chunks]:
        chunk = nn.functional.pad(piece, (0, size - len(piece)))[None]
        log_probs, present, *state = step(chunk, torch.tensor([len(piece)]), *state)
        assert log_probs.shape == (1, frames // step.stride, 5)
        found.append(log_probs[0, present])
    got = torch.cat(found)
    assert got.shape == want.shape[1:]
    torch.testing.assert_close(got, want[0], rtol=0, atol=1e-4)  # its spectrum is a product with sines


@pytest.mark.parametrize(("cell", "structure", "rule"), RECURRENCES, ids=kind)
def test_the_step_of_fixed_shapes_computes_every_recurrence(cell, structure, rule) -> None:
    initialization = {"initialization": IdentityConfig()} if cell == ElmanConfig(activation="identity") else {}
    check_fixed(
        build(
            cell=cell, structure=structure, parametrization=rule, residual=True, residual_scale=0.5, **initialization
        ),
        8,
    )


@pytest.mark.parametrize("frames", [12, 24])
@pytest.mark.parametrize("kernels", [[(3, 2), (5, 2)], [(1, 3), (7, 1)], [(11, 4)], [(5, 1), (3, 3), (1, 1)]], ids=str)
@pytest.mark.parametrize("config", [Conv1dConfig, Conv2dConfig], ids=["1d", "2d"])
def test_the_step_of_fixed_shapes_computes_every_convolution(config, kernels, frames: int) -> None:
    subsampling = config(layers=tuple(layer(*k) for k in kernels), norm="batch", activation="gelu")
    for lookahead, samples in ((0, 512), (3, 5000)):
        check_fixed(build(subsampling=subsampling, lookahead=lookahead), frames, samples)
