"""Piano rolls: what is read, cut and padded is what is scored; predictors without a memory reach the known numbers; a
trained net writes a piece."""

import io
import json
from pathlib import Path
from typing import Any

import mido
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torch import nn

from recipes import music
from tests.helpers import fit, run_ranks
from trainer import recipe
from trainer.__main__ import main
from trainer.analysis import inputs, lipschitz, perturbations
from trainer.analysis.study import Options, curves_of, judge_of
from trainer.data import scores
from trainer.data.music import MusicDataset, marginals, transitions, transposed
from trainer.engine import initialise
from trainer.errors import EXIT_USER_MISTAKE, UserError
from trainer.evaluation import Evaluator
from trainer.models.normalization import frame_mask
from trainer.recipe import Wish

SETS = Path(__file__).parents[1] / "../shared/data/music"
TINY = ["tracking.wandb=disabled", "validation={samples: 0, table_rows: 0}", "model.hidden_size=16"]
TINY += ["plan={micro_batch_samples: 3, micro_batches_per_step: 2}", "model.initialization.kind=default"]
TINY += ["model.input_initialization.kind=default", "data.chunk_frames=10"]


def benchmark(config: str, *more: str) -> Any:
    loaded = recipe.load(config, [f"data.corpus.path={SETS}", *more])
    if not (SETS / f"{loaded.config.data.corpus.name}.mat").is_file():
        pytest.skip("the four benchmark sets are not at hand")
    return loaded


@pytest.fixture(scope="module")
def midi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of MIDI files, one of which is broken; rolls are made."""
    folder = tmp_path_factory.mktemp("midi")
    random = np.random.default_rng(0)
    for i in range(24):
        roll = np.zeros((14 + i, scores.KEYS), dtype=np.uint8)
        for t in range(0, len(roll), 2):
            roll[t : t + 2, random.choice(np.arange(30, 50), 3, replace=False)] = 1
        (folder / f"{i}.mid").write_bytes(scores.to_midi(roll))
    (folder / "broken.mid").write_bytes(b"MThd nothing of the kind")
    assert main(["prepare", "music/midi", *arguments(folder)]) == 0
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    return [*TINY, f"data.path={folder}/rolls", f"data.corpus.path={folder}", *more]


# What is read


def test_nats_are_the_binary_cross_entropy() -> None:
    """Of any logit, values and gradients; logits of a net with no weights, 0, too."""
    logits = torch.cat([torch.zeros(1), torch.randn(200) * 5, torch.tensor([100.0, -100.0, 30.0, -30.0])])
    logits = logits.expand(2, 3, -1).clone().requires_grad_()
    targets = torch.rand(logits.shape).round()
    exact = logits.detach().double().requires_grad_()
    per_key = nn.functional.binary_cross_entropy_with_logits(exact, targets.double(), reduction="none")
    weights = torch.rand(2, 3)
    nats = music.KeyNats.apply(logits, targets)
    torch.testing.assert_close(nats.double(), per_key.sum(-1), rtol=1e-6, atol=1e-5)
    (nats * weights).sum().backward()
    (per_key.sum(-1) * weights).sum().backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-6, atol=1e-6)


def test_a_roll_survives_a_midi_file(tmp_path: Path) -> None:
    roll = np.zeros((9, scores.KEYS), dtype=np.uint8)
    roll[[0, 1, 2, 5, 8], 40] = 1
    roll[3:7, 0] = roll[2:, 87] = 1
    (tmp_path / "a.mid").write_bytes(scores.to_midi(roll))
    assert np.array_equal(scores._midi(("a", str(tmp_path / "a.mid"), 2)), roll)
    notes = [m for m in mido.MidiFile(tmp_path / "a.mid").tracks[0] if m.type == "note_on" and m.velocity]
    assert len(notes) == 5  # three frames in a row are one note
    assert {n.note for n in notes} == {21, 61, 108}


def test_drums_pedals_and_other_channels(tmp_path: Path) -> None:
    file, track = mido.MidiFile(ticks_per_beat=96), mido.MidiTrack()
    file.tracks.append(track)
    for text in (
        "note_on channel=9 note=40 velocity=9 time=0",  # a drum
        "note_on channel=0 note=60 velocity=9 time=48",
        "note_on channel=1 note=60 velocity=9 time=48",  # the same key in another voice
        "note_off channel=0 note=60 time=48",
        "control_change channel=0 control=64 value=127 time=0",
        "note_on channel=1 note=60 velocity=0 time=96",
        "note_on channel=0 note=10 velocity=9 time=0",  # below the piano
        "note_on channel=0 note=72 velocity=9 time=0",  # never ends: left out
    ):
        track.append(mido.Message.from_str(text))
    file.save(tmp_path / "a.mid")
    roll = scores._midi(("a", str(tmp_path / "a.mid"), 2))
    assert np.argwhere(roll).tolist() == [[t, 39] for t in (1, 2, 3, 4)]


def test_a_broken_file_is_told_and_left_out(midi: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "music/midi", *arguments(midi)]) == 0
    shown = capsys.readouterr().out
    assert "24 pieces" in shown
    assert "left out: broken.mid:" in shown
    pieces = recipe.load("music/midi", arguments(midi)).config.data.pieces()
    assert {p.split for p in pieces} == {"train", "valid", "test"}
    assert all(p.split == scores.split_of(p.name) for p in pieces)


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (["data.path=/nowhere"], "holds no piano rolls yet; run `./launch.sh prepare CONFIG` first"),
        (["data.corpus.frames_per_quarter=4"], "holds another corpus"),
        (["data.corpus={kind: benchmark, path: /nowhere}"], "data.corpus.path = /nowhere: holds no JSB_Chorales.mat"),
    ],
)
def test_mistakes_are_named_with_the_cure(midi: Path, more: list[str], wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        recipe.load("music/midi", arguments(midi, *more)).build_dataset("train")
    (midi / "rolls" / "bad").mkdir(exist_ok=True)
    (midi / "rolls" / "bad" / "rolls.npz").write_bytes(b"PK nothing")
    with pytest.raises(UserError, match=r"rolls.npz: is damaged"):
        recipe.load("music/midi", arguments(midi, f"data.path={midi}/rolls/bad")).build_dataset("train")


# What is trained and scored


def test_chunks_hold_every_prediction_once(midi: Path) -> None:
    made = recipe.load("music/midi", arguments(midi, "data.transpose=0"))
    train, test = made.build_dataset("train"), made.build_dataset("test")
    for dataset, whole in ((train, False), (test, True)):
        assert isinstance(dataset, MusicDataset)
        assert sum(n for *_, n in dataset.chunks) == sum(len(p.roll) - 1 for p in dataset.pieces)
        assert (len(dataset) == len(dataset.pieces)) == whole
        for step in dataset.plan.epoch(0):
            seen = 0
            for micro_batch in step.micro_batches:
                batch = dataset.load(micro_batch)
                seen += int(batch["lengths"].sum())
                for row, sample in enumerate(micro_batch.samples):
                    number, start, count = dataset.chunks[sample]
                    roll = torch.from_numpy(dataset.pieces[number].roll[start : start + count + 1]).float()
                    assert torch.equal(batch["inputs"][row, :count], roll[:-1])
                    assert torch.equal(batch["targets"][row, :count], roll[1:])
            assert seen == step.counts["frames"]
    assert max(n for *_, n in train.chunks) == 10
    orders = [[m.samples for s in train.plan.epoch(e) for m in s.micro_batches] for e in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(i for part in orders[2] for i in part) == list(range(len(train)))


def test_transposition_moves_a_piece_as_a_whole(midi: Path) -> None:
    train = recipe.load("music/midi", arguments(midi)).build_dataset("train")
    shifts = set()
    for epoch in range(6):
        for number, start, _ in train.chunks:
            sample = train.chunks.index((number, start, _))
            roll, plain = train.roll(sample, epoch), train.pieces[number].roll[start : start + _ + 1]
            by = int(np.flatnonzero(roll.any(0))[0] - np.flatnonzero(plain.any(0))[0])
            assert np.array_equal(np.roll(plain, by, 1), roll)
            shifts.add((number, epoch, by))
    assert {by for *_, by in shifts} == set(range(-5, 6))
    assert len({(n, e) for n, e, _ in shifts}) == len(shifts)  # chunks of a piece alike
    edge = np.zeros((2, scores.KEYS), dtype=np.uint8)
    edge[:, 86] = 1
    assert transposed(edge, edge, 5)[:, 87].all()


@torch.no_grad()
def test_padding_is_not_in_the_mean(midi: Path) -> None:
    made = recipe.load("music/midi", arguments(midi))
    model, dataset = made.build_model().eval(), made.build_dataset("test")
    initialise(model, 0)
    (step,) = dataset.plan.epoch(0)[:1]
    batch = dataset.load(step.micro_batches[0])
    assert len(set(batch["lengths"].tolist())) > 1
    found = made.step(model, batch)
    single = []
    for row, n in enumerate(batch["lengths"].tolist()):
        alone = {k: v[row : row + 1, :n] for k, v in batch.items() if k in ("inputs", "targets")}
        alone |= {k: batch[k][row : row + 1] for k in ("lengths", "valid", "noise_keys", "keys")}
        single.append(made.step(model, alone))
    nll = found.losses["nll"]
    assert nll.count == sum(s.losses["nll"].count for s in single) == sum(batch["lengths"])
    torch.testing.assert_close(nll.sum, sum(s.losses["nll"].sum for s in single))
    accuracy = [s.metrics["frame_accuracy"] for s in single]
    assert found.metrics["frame_accuracy"].count == sum(a.count for a in accuracy)
    dummy = made.step(model, dataset.dummy())
    assert dummy.losses["nll"].count == float(dummy.losses["nll"].sum) == 0


def test_a_roll_bears_noise_attacks_and_flips(midi: Path) -> None:
    loaded = recipe.load("music/midi", arguments(midi))
    model = loaded.build_model().eval()
    initialise(model, 0)
    perturbations.plain_weights(model)
    judge = judge_of(loaded, model, "test", 3)
    bounds = loaded.inputs()
    clean = judge.score()
    for kind in inputs.attacks(bounds):
        scores = inputs.attack_curve(judge, bounds, kind, (0.0, 0.02, 0.1))
        assert scores[0] == clean
        assert scores[0]["loss"] < scores[1]["loss"] < scores[2]["loss"], kind
    for kind in inputs.noises(bounds):
        noisy = inputs.noisy(judge.batches[0], bounds, kind, 0.1, 0)
        assert torch.equal(noisy["targets"], judge.batches[0]["targets"])  # what is to be predicted stays as it was
        assert 0 <= float(noisy["inputs"].min()) <= float(noisy["inputs"].max()) <= 1
    assert {"flips", "flips_worst"} <= {kind for kind, _ in curves_of(judge, Options(seeds=1))}
    x, lengths = judge.batches[0]["inputs"], judge.batches[0]["lengths"]
    constant, why = lipschitz.bound(model, x.shape[1])
    assert not why
    e = (
        0.01
        * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        * frame_mask(lengths, x.shape[1])[..., None]
    )
    with torch.no_grad():
        moved = model(x + e, lengths) - model(x, lengths)
    assert float((moved.flatten(1).norm(dim=1) / e.flatten(1).norm(dim=1)).max()) <= constant < torch.inf


def test_outputs_start_at_the_frequencies_of_the_keys(midi: Path) -> None:
    made = recipe.load("music/midi", arguments(midi))
    model = made.build_model()
    initialise(model, 0)
    rolls = [p.roll for p in made.config.data.pieces() if p.split == "train"]
    np.testing.assert_allclose(torch.sigmoid(model.output.bias).detach(), marginals(rolls), rtol=1e-5)
    fixed = recipe.load("music/midi", arguments(midi, "model.output_bias=-0.8")).build_model()
    initialise(fixed, 0)
    assert (fixed.output.bias == -0.8).all()


class WithoutMemory(nn.Module):
    """Logits by each key's last frame: (2, 88) probabilities."""

    def __init__(self, chances: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("logits", torch.from_numpy(chances).logit().float())

    def forward(self, x: torch.Tensor, lengths: torch.Tensor, noise_keys: Any) -> torch.Tensor:
        return torch.where(x > 0, self.logits[1], self.logits[0])


FACTS = [
    ("music/jsb", 11.0925, 10.4919, (229, 76, 77), 4725),
    ("music/nottingham", 10.2608, 5.1532, (694, 173, 170), 44463),
    ("music/musedata", 11.5142, 8.5592, (524, 135, 124), 64339),
    ("music/piano_midi", 11.0517, 8.2644, (87, 12, 25), 19036),
]


@pytest.mark.parametrize(("config", "marginal", "markov", "pieces", "frames"), FACTS, ids=[f[0][6:] for f in FACTS])
def test_the_evaluator_returns_what_needs_no_memory(
    config: str, marginal: float, markov: float, pieces: tuple[int, ...], frames: int, ranks: Any
) -> None:
    """Through the recipe's step and the engine's evaluator, on the sets of Boulanger-Lewandowski et al."""
    made = benchmark(config)
    found = made.config.data.pieces()
    assert tuple(sum(p.split == s for p in found) for s in ("train", "valid", "test")) == pieces
    assert sum(len(p.roll) for p in found if p.split == "test") == frames
    train, test = ([p.roll for p in found if p.split == split] for split in ("train", "test"))
    for chances, wanted in ((np.stack([marginals(train)] * 2), marginal), (transitions(train), markov)):
        net = WithoutMemory(chances)
        made.build_model = lambda net=net: net
        values = Evaluator(made, "test", ranks).run(net.state_dict()).values
        assert values["nll"] == pytest.approx(wanted, abs=5e-4)
    assert music.floors(train, test) == pytest.approx((marginal, markov), abs=5e-5)


@pytest.fixture
def ranks() -> Any:
    from trainer import distributed

    yield distributed.start()
    distributed.stop()


# A run


def test_half_way_and_resumed_is_the_whole_on_any_number_of_ranks(midi: Path, tmp_path: Path) -> None:
    def trained(ranks: int, name: str, *steps: int) -> dict[str, Any]:
        for number in steps:
            more = arguments(midi, f"runs_dir={tmp_path}", f"name={name}", f"max_steps={number}")
            more += ["model.regularizers.noise.hidden=0.1", "data.transpose=2"]
            result = run_ranks(ranks, fit, more, "music/midi")[0]
        return result

    whole, resumed, two = trained(1, "whole", 6), trained(1, "resumed", 3, 6), trained(2, "two", 6)
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-4, atol=1e-6)
    assert main(["evaluate", str(tmp_path / "whole")]) == 0
    scored = json.loads((tmp_path / "whole/evaluation/test.json").read_text())
    assert scored["metrics"]["nll"] < 30
    assert main(["generate", str(tmp_path / "whole"), "count=2", "length=12", "temperature=0.9"]) == 0
    folder = tmp_path / "whole/generated"
    names = {p.name for p in folder.iterdir()}
    assert names == {f"{s}.{e}" for s in (0, 1) for e in ("txt", "mid", "png", "wav")}
    roll = scores._midi(("0", str(folder / "0.mid"), 2))
    assert len(roll) <= 13
    assert Image.open(folder / "0.png").size == (13 * 4, 88 * 4)
    assert soundfile.info(folder / "0.wav").duration == pytest.approx(13 / 4)
    assert (folder / "0.txt").read_text().startswith("13 frames, ")
    assert main(["report", str(tmp_path / "whole")]) == 0
    page = (tmp_path / "whole/report.html").read_text()
    assert '<a download="0.mid"' in page
    assert page.count("data:audio/wav") == 2


def test_a_piece_follows_from_its_seed_and_its_beginning(midi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe.load("music/midi", arguments(midi))
    model = made.build_model().eval()
    initialise(model, 0)
    with torch.inference_mode():
        one, same, other = (made.generate(model, Wish(seed, 20)).files[".mid"] for seed in (4, 4, 5))
        cold = made.generate(model, Wish(4, 20, temperature=1e-3))
        gone_on = made.generate(model, Wish(0, 5, prompt="1"))
    assert one == same != other
    assert cold.text.startswith("21 frames, 0.")  # all keys are unlikely
    given = [p.roll for p in made.config.data.pieces() if p.split == "test"][1]
    length = min(16, len(given))
    assert Image.open(io.BytesIO(gone_on.files[".png"])).size[0] == (length + 5) * 4
    assert np.array_equal(gone_on.media.picture[::4, : length * 4 : 4] == 30, given[:length].T[::-1] > 0)
    with pytest.raises(UserError, match="prompt = 'x': wanted the number of a test piece"):
        made.generate(model, Wish(0, 5, prompt="x"))
    faster = recipe.load("music/midi", arguments(midi, "data.corpus.frames_per_quarter=4"))
    monkeypatch.setattr(faster, "_rolls", lambda split: [given])
    with torch.inference_mode():
        files = faster.generate(model, Wish(4, 20)).files
    assert soundfile.info(io.BytesIO(files[".wav"])).duration == pytest.approx(21 / 8)  # a quarter is half a second
    assert mido.MidiFile(file=io.BytesIO(files[".mid"])).length == pytest.approx(21 / 8)


def test_a_plan_names_what_is_to_beat(midi: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "music/midi", *arguments(midi)]) == 0
    assert "nats a frame of the test by the keys' frequencies" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_corpus_without_pieces_of_a_split_is_named(midi: Path, tmp_path: Path, split: str) -> None:
    made = recipe.load("music/midi", arguments(midi))
    data = made.config.data
    scores.write_cache(tmp_path, data.corpus, [p for p in data.pieces() if p.split != split])
    few = recipe.load("music/midi", arguments(midi, f"data.path={tmp_path}"))
    with pytest.raises(UserError, match=f"has no piece for the split {split}"):
        few.describe(few.build_model())


def test_quadrature_reaches_the_output(midi: Path) -> None:
    nats = {}
    for moments in ("closed", "quadrature"):
        fast = ["model.regularizers.fast_dropout.moments=" + moments, "model.cell={kind: rnn, activation: relu}"]
        made = recipe.load("music/midi", arguments(midi, *fast, "model.input_range=1"))
        model, dataset = made.build_model().eval(), made.build_dataset("test")
        initialise(model, 0)
        torch.nn.init.normal_(model.output.weight, generator=torch.Generator().manual_seed(0))
        batch = dataset.load(dataset.plan.epoch(0)[0].micro_batches[0])
        nats[moments] = float(made.step(model, batch).losses["nll"].sum.detach())
    assert nats["closed"] != pytest.approx(nats["quadrature"], rel=1e-4)  # a relu's moments are closed in both


def test_a_chorale_is_read() -> None:
    """One of the default corpus: it opens and ends on a chord of G, in four voices."""
    pytest.importorskip("music21")
    roll = scores._chorale(("", "bach/bwv269", 2))
    assert not isinstance(roll, str), roll
    for frame in (roll[0], roll[-1]):
        assert (np.flatnonzero(frame) + scores.LOWEST).tolist() == [43, 59, 62, 67]
    assert roll.shape == (126, scores.KEYS)
    assert 3.9 < roll.sum() / len(roll) <= 4


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("length=0", "length = '0'"),
        ("temperature=1e-300", "wanted 0, or 1e-06 at least"),
        ("temperature=-1", "temperature = '-1'"),
        ("seed=x", "seed = 'x': wanted a whole"),
    ],
)
def test_wishes_that_cannot_be_met(given: str, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "nowhere", given]) == EXIT_USER_MISTAKE
    assert wanted in capsys.readouterr().err


def test_other_recipes_have_nothing_to_generate() -> None:
    made = recipe.load("copying/t1000")
    with pytest.raises(UserError, match="the recipe copying has nothing to generate"):
        made.generate(made.build_model(), Wish())
