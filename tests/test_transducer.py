"""The transducer: its loss is that of all alignments, padding changes nothing, decoding follows the probabilities."""

import itertools

import pytest
import torch
from torchaudio.functional import rnnt_loss

from tests.helpers import fit, run_ranks
from trainer import recipe
from trainer.analysis import perturbations
from trainer.analysis.study import Options, curves_of, judge_of
from trainer.data.audio import FeaturesConfig
from trainer.engine import initialise
from trainer.errors import UserError
from trainer.models.acoustic import AcousticConfig, AcousticModel
from trainer.models.encoders import Conv1dConfig, ConvLayerConfig
from trainer.models.rnn import RNNConfig
from trainer.models.transducer import Transducer, TransducerConfig


def build() -> Transducer:
    subsampling = Conv1dConfig(layers=(ConvLayerConfig(channels=6),))
    encoder = AcousticConfig(subsampling=subsampling, rnn=RNNConfig(hidden_size=8, num_layers=1, directions="sum"))
    config = TransducerConfig(
        encoder=encoder, predictor=RNNConfig(hidden_size=7, num_layers=1, norm="none"), embedding_size=5, joint_size=9
    )
    model = Transducer(config, AcousticModel(encoder, FeaturesConfig(num_bands=10).build(16000), 4), 4)
    initialise(model, 0)
    torch.nn.init.normal_(model.output.weight, std=2.0, generator=torch.Generator().manual_seed(2))
    return model.eval()


@pytest.mark.parametrize(
    ("predictor", "wanted"),
    [
        ({"directions": "concat"}, "no label to come is known; take forward"),
        ({"cell": {"kind": "rnn"}, "norm": "none", "regularizers": {"fast_dropout": {}}}, "decoding has no moments"),
    ],
)
def test_a_predictor_that_cannot_go_on_is_refused(predictor: dict, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        TransducerConfig(predictor=predictor)


def test_the_loss_sums_over_all_alignments() -> None:
    """A blank moves on in time, the last one ends; written out for three frames and two labels."""
    model = build()
    x, labels = torch.randn(1, 6, 10, generator=torch.Generator().manual_seed(1)), torch.tensor([[2, 3]])
    with torch.no_grad():
        logits, _, lengths = model(x, torch.tensor([6]), labels)
    assert logits.shape == (1, 3, 3, 4)
    log_probs, total = logits[0].log_softmax(-1).double(), torch.tensor(0.0).double()
    for places in itertools.combinations_with_replacement(range(3), 2):  # the frame at which each label comes
        path, u = torch.tensor(0.0).double(), 0
        for t in range(3):
            while u < 2 and places[u] == t:
                path = path + log_probs[t, u, labels[0, u]]
                u += 1
            path = path + log_probs[t, u, 0]
        total = total + path.exp()
    want = rnnt_loss(logits, labels.int(), lengths.int(), torch.tensor([2]).int(), blank=0, reduction="none")
    assert float(want) == pytest.approx(-float(total.log()), rel=1e-4)


def test_padding_changes_neither_loss_nor_text() -> None:
    model = build()
    x = torch.randn(2, 30, 10, generator=torch.Generator().manual_seed(1))
    lengths, labels = torch.tensor([30, 12]), torch.tensor([[1, 2, 3], [3, 0, 0]])
    with torch.no_grad():
        logits, _, frames = model(x, lengths, labels)
        alone, _, _ = model(x[1:, :12], lengths[1:], labels[1:, :1])
    torch.testing.assert_close(logits[1, : int(frames[1]), :2], alone[0], rtol=1e-4, atol=1e-5)
    together = model.decode(x, lengths)
    assert together == [model.decode(x[:1], lengths[:1])[0], model.decode(x[1:, :12], lengths[1:])[0]]
    assert any(together)


def test_decoding_takes_the_likeliest_step_by_step() -> None:
    model = build()
    x = torch.randn(1, 20, 10, generator=torch.Generator().manual_seed(5))
    (found,) = model.decode(x, torch.tensor([20]))
    assert len(found) > 2
    with torch.no_grad():
        logits, _, _ = model(x, torch.tensor([20]), torch.tensor([found]))
    best, u = logits[0].argmax(-1), 0
    for t in range(best.shape[0]):
        for _ in range(model.config.most_labels):
            if best[t, u] == 0:
                break
            assert int(best[t, u]) == found[u]
            u += 1
    assert u == len(found)


def test_a_head_that_nothing_trains_is_refused() -> None:
    with pytest.raises(UserError, match=r"encoder\.intermediate_ctc = 0\.3: a transducer trains"):
        recipe.load("transducer/tones", ["model.encoder.intermediate_ctc=0.3"])


def test_it_trains(corpus, tmp_path) -> None:
    arguments = [
        f"data.path={corpus}", f"runs_dir={tmp_path}", "data.features.num_bands=20", "data.samples_per_shard=8",
        "data.corpus.num_utterances=60", "model.encoder.rnn.hidden_size=16", "model.predictor.hidden_size=8",
        "max_steps=3", "num_workers=0", "tracking.wandb=disabled", "validation.table_rows=0",
    ]  # fmt: skip
    (result,) = run_ranks(1, fit, arguments, "transducer/tones")
    assert {"transducer", "ctc", "cer", "wer", "loss"} <= result["values"].keys()
    task = recipe.load("transducer/tones", arguments)
    dataset, model = task.build_dataset("valid"), task.build_model().eval()
    batch = dataset.load(dataset.plan.epoch(0, [])[0].micro_batches[0])
    batch["speakers"] = ["anna", *[None] * (len(batch["keys"]) - 1)]
    with torch.no_grad():
        first, second = task.step(model, batch).rows[:2]
    assert first.facts == {"seconds": pytest.approx(float(batch["seconds"][0]), abs=1e-3), "speaker": "anna"}
    assert second.facts.keys() == {"seconds"}


def test_noise_and_attacks_reach_its_sound(corpus, tmp_path) -> None:
    arguments = [
        f"data.path={corpus}", "data.features.num_bands=20", "model.encoder.rnn.hidden_size=16",
        "model.predictor.hidden_size=8", "plan.micro_batch_seconds=5",
    ]  # fmt: skip
    task = recipe.load("transducer/tones", arguments)
    task = recipe.load("transducer/tones", [*arguments, *task.inputs().overrides])
    model = task.build_model().eval()
    initialise(model, 0)
    perturbations.plain_weights(model)
    judge = judge_of(task, model, "test", 2)
    for kind in ("gaussian", "pgd_l2"):
        (run,) = (run for name, run in curves_of(judge, Options(seeds=1, sizes=(0.0, 0.3))) if name == kind)
        none, some = run()
        assert none == judge.score()
        assert some["loss"] > none["loss"] if kind == "pgd_l2" else some["loss"] != none["loss"]
