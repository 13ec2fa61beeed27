"""The language recipe: exact counts, the same samples on any number of processes, exact resumes, texts, the scorer."""

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.test_language import SHARED, TEXTS
from tests.helpers import fit, run_ranks
from trainer import recipe
from trainer.__main__ import main
from trainer.analysis.perturbations import BEFORE, plain_weights, state_curve
from trainer.analysis.study import judge_of
from trainer.config import PROJECT
from trainer.data.stream import NOTHING
from trainer.errors import UserError
from trainer.recipe import Wish
from trainer.run import read_ledger, read_lines
from trainer.scoring import Scorer

CONFIG = "language_model/austen_characters"
SIZES = [
    "tracking.wandb=disabled",
    "tracking.log_every_steps=1",
    "plan={micro_batch_streams: 2, micro_batches_per_step: 3, window: 12, jitter: 2, evaluation_streams: 3}",
    "model.embedding_size=12",
    "model.rnn.hidden_size=12",
    "schedule.warmup_steps=0",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for split, content in TEXTS.items():
        (folder / f"{split}.txt").write_text(content)
    recipe.load(CONFIG, [f"data.path={folder}/made", files(folder)]).prepare()
    return folder


def files(folder: Path) -> str:
    return f"data.corpus={{kind: files, {', '.join(f'{s}: {folder}/{s}.txt' for s in TEXTS)}}}"


def tiny(text: Path, runs: Path, *more: str) -> list[str]:
    return [*SIZES, f"data.path={text}/made", files(text), f"runs_dir={runs}", "name=run", *more]


@torch.no_grad()
def test_a_dummy_counts_nothing_and_a_state_has_the_rows_of_its_batch(text: Path, tmp_path: Path) -> None:
    made = recipe.load(CONFIG, tiny(text, tmp_path))
    model, dataset = made.build_model().eval(), made.build_dataset("train")
    output = made.step(model, dataset.dummy())
    for found in [*output.losses.values(), *output.metrics.values()]:
        assert float(torch.as_tensor(found.sum).detach()) == found.count == 0
    output = made.step(model, dataset.load(dataset.plan.epoch(0)[0].micro_batches[0]))
    assert {name: tuple(t.shape) for name, t in output.state.items()} == dict.fromkeys(
        ("0.h", "0.c", "1.h", "1.c"), (2, 12)
    )


@pytest.mark.distributed
def test_half_way_and_resumed_is_the_whole_and_the_ledger_is_that_of_two_processes(text: Path, tmp_path: Path) -> None:
    """Over the end of an epoch, with dropout of every kind and windows that vary."""
    regularizers = (
        "model.rnn.regularizers={dropout: {connections: 0.3}, later: {variational: {input: 0.2, output: 0.2}, "
        "activation: 1.0, temporal_activation: 1.0}}"
    )
    more = [regularizers, "model.embedding_dropout=0.2", "model.output_dropout=0.2", "schedule={kind: constant}"]

    def trained(runs: str, processes: int, *steps: int) -> dict[str, Any]:
        for number in steps:
            arguments = tiny(text, tmp_path / runs, *more, f"max_steps={number}", "max_epochs=9")
            result = run_ranks(processes, fit, arguments, CONFIG)[0]
        return result | {"ledger": read_ledger(result["run"] / "ledger")}

    steps = len(recipe.load(CONFIG, tiny(text, tmp_path)).build_dataset("train").plan.epoch(0))
    whole = trained("whole", 1, steps + 4)
    resumed = trained("resumed", 1, 3, steps + 2, steps + 4)
    assert resumed["ledger"] == whole["ledger"]
    assert all(torch.equal(resumed["raw"][name], w) for name, w in whole["raw"].items())
    assert resumed["values"] == whole["values"]
    moved = trained("moved", 2, 3, steps + 4)
    assert moved["ledger"] == whole["ledger"]
    for name, w in whole["raw"].items():
        torch.testing.assert_close(moved["raw"][name], w, rtol=1e-3, atol=1e-4)
    assert moved["values"]["nats"] == pytest.approx(whole["values"]["nats"], rel=1e-4)


def by_hand(made: Any, model: Any, split: str) -> tuple[float, int]:
    """Nats of every token of a split, from one long row a stream."""
    prepared = made.prepared
    tokens = torch.from_numpy(prepared.tokens(split).astype("int64"))
    plan = prepared.dataset(split, made.config.plan, 0).plan
    total, count = 0.0, 0
    for start, length in zip(plan.starts.tolist(), plan.lengths.tolist(), strict=True):
        before = tokens[start - 1] if start else torch.tensor(prepared.vocabulary.start)
        row = torch.cat([before[None], tokens[start : start + length]])
        with torch.inference_mode():
            log_p, _ = model(row[None, :-1])
        total -= float(log_p[0].gather(1, row[1:, None]).double().sum())
        count += length
    return total, count


def test_evaluation_counts_every_token_and_a_run_generates_and_scores(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tiny(text, tmp_path, "max_steps=2", "validation.samples=1", "schedule={kind: constant}")
    run_ranks(1, fit, arguments, CONFIG)
    made, run = recipe.load(CONFIG, arguments), tmp_path / "run"
    rows = [row for row in read_lines(run / "metrics.jsonl") if row["kind"] == "train"]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    shares = [step.lr_share for step in made.build_dataset("train").plan.epoch(0)[:2]]
    assert shares[0] != shares[1]
    assert [row["lr"] for row in rows] == [pytest.approx(made.config.optimizer.lr * share) for share in shares]
    assert main(["evaluate", str(run)]) == 0
    found = json.loads((run / "evaluation" / "test.json").read_text())["metrics"]
    scorer = Scorer.load(run)
    total, count = by_hand(made, scorer.model, "test")
    assert count == len(TEXTS["test"])
    assert found["nats"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["bits_per_character"] == pytest.approx(total / count / math.log(2), rel=1e-5)

    capsys.readouterr()
    assert main(["generate", str(run), "length=20", "prompt=the", "seed=3"]) == 0
    written = (run / "generated" / "3.txt").read_text()
    assert written.startswith("the")
    assert len(written) == 23
    assert written in capsys.readouterr().out
    model = scorer.model
    assert made.generate(model, Wish(3, 20, prompt="the")).text == written
    assert made.generate(model, Wish(4, 20, prompt="the")).text != written
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert f"<td>bits per character</td><td class=number>{found['bits_per_character']:.5g}</td>" in page
    assert "tokens a second" in page
    assert written in page
    best = made.generate(model, Wish(5, 6, temperature=0.0)).text
    log_p, _ = scorer.start(1)
    assert best[0] == scorer.vocabulary.decode([int(log_p.argmax())])
    tokens = torch.from_numpy(scorer.vocabulary.encode("the cat").astype("int64"))[None]
    assert scorer.score(tokens, torch.tensor([7])).sum() < 0
    assert main(["analyze", str(run), "samples=9", "sizes=0.1"]) == 0
    clean = json.loads((run / "analysis" / "analysis.json").read_text())["summary"]["clean"]
    assert clean == pytest.approx(found[made.monitor], rel=1e-5)


def test_the_commands_of_the_page_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of docs/language.md in order, with a small text and model, and its example of a scorer."""
    monkeypatch.chdir(tmp_path)
    page, readme = (PROJECT / "docs/language.md").read_text(), (PROJECT / "README.md").read_text()
    shown = [line for block in re.findall(r"```sh\n(.*?)```", page, re.S) for line in block.splitlines()]
    own = [line for line in readme.splitlines() if line.startswith("./launch.sh") and "austen_characters" in line]
    shown += [line for line in own if line not in shown]
    shown.append(
        "./launch.sh evaluate language_model-austen_characters " + re.search(r"`evaluate RUN ([^`]*)`", page)[1]
    )
    whole = {**TEXTS, "train": TEXTS["train"] + "It is a truth\n"}
    for split, content in whole.items():
        (tmp_path / f"{split}.txt").write_text(content)
    more = [*SIZES, f"data.path={tmp_path}/made", files(tmp_path), "max_steps=2"]
    found = {}
    for verb, what, *given in (shlex.split(line)[1:] for line in shown):
        assert main([verb, what, *given, *(more if verb in ("prepare", "train") else [])]) == 0, verb
        if verb == "evaluate":
            result = json.loads((tmp_path / "runs" / what / "evaluation/test.json").read_text())
            found[" ".join(given)] = result["metrics"]["nats"]
        assert verb != "generate" or "It is a truth" in capsys.readouterr().out
    assert len(found) == 2
    assert found[""] != found["plan.evaluation_streams=1"]  # fewer pieces begin without a state

    (example,) = re.findall(r"```python\n(.*?)```", page, re.S)
    scope: dict[str, Any] = {"tokens": torch.tensor([0, 1, 2, 3]), "rows": torch.tensor([3, 3, 0, 1])}
    *steps, last = example.replace("language_model-ptb", "language_model-austen_characters").strip().splitlines()
    exec("\n".join(steps), scope)
    exec(last, scope | {"tokens": torch.tensor([[0, 1, 2], [3, 4, 5]]), "lengths": torch.tensor([3, 2])})
    assert scope["log_probabilities"].shape == (4, len(scope["scorer"].vocabulary))


def test_an_analysis_scores_windows_of_a_stream_as_an_evaluation_does(text: Path, tmp_path: Path) -> None:
    made = recipe.load(CONFIG, tiny(text, tmp_path))
    model = made.build_model().eval()
    with torch.no_grad():
        for p in model.rnn.parameters():
            p.mul_(3.0)  # a net that remembers
    plain_weights(model)
    whole, some = (judge_of(made, model, "train", samples) for samples in (10**6, 3))
    total, count = by_hand(made, model, "train")
    assert whole.score()["loss"] == pytest.approx(total / count, rel=1e-6)
    own = {tuple(batch["keys"]): batch[BEFORE] for batch in whole.batches if BEFORE in batch}
    assert 0 < len(own) < len(whole.batches)  # the first windows have none
    assert len(some.batches) < len(whole.batches)
    for batch in some.batches:
        assert all(torch.equal(own[tuple(batch["keys"])][name], s) for name, s in batch.get(BEFORE, {}).items())
    clean, moved = state_curve(whole, (0.0, 0.5), 0, attack=True)
    assert clean == whole.score()
    assert moved["loss"] > clean["loss"]


@torch.no_grad()
def test_words_have_bits_of_characters_and_unknown_ones_are_never_written(text: Path, tmp_path: Path) -> None:
    arguments = [f"data.path={tmp_path}/words", "data.tokens={kind: words}", "model.tied=true"]
    made = recipe.load(CONFIG, [*tiny(text, tmp_path), *arguments])
    made.prepare()
    model, dataset = made.build_model().eval(), made.build_dataset("test")
    (micro_batch,) = {m.number: m for m in dataset.plan.epoch(0)[0].micro_batches if m.number == 0}.values()
    batch = dataset.load(micro_batch)
    output = made.step(model, batch)
    tokens = int((batch["targets"] != NOTHING).sum())
    assert output.metrics["bits_per_character"].count == pytest.approx(tokens * len(TEXTS["test"]) / 7)
    with torch.no_grad():
        model.output.bias[made.vocabulary.unknown] = 50.0
    assert "<unk>" not in made.generate(model, Wish(0, 50)).text


def test_a_cluster_behind_the_vocabulary_is_told(text: Path, tmp_path: Path) -> None:
    made = recipe.load(CONFIG, tiny(text, tmp_path, "model.softmax={kind: adaptive, cutoffs: [5, 900]}"))
    with pytest.raises(UserError, match=r"model.softmax.cutoffs = \[5, 900\]: wanted all below \d+, the size"):
        made.build_model()


def test_awd_lstm_has_its_published_weights() -> None:
    config = recipe.load("language_model/awd_lstm").config.model
    with torch.device("meta"):
        model = config.build(10_000)
    assert sum(p.numel() for p in model.parameters()) == 24_221_600


def test_another_vocabulary_of_the_same_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Characters are numbered by how often they are: with another text the same numbers mean other ones."""
    for split, content in TEXTS.items():
        (tmp_path / f"{split}.txt").write_text(content)
    arguments = tiny(tmp_path, tmp_path / "runs", "max_steps=1")
    recipe.load(CONFIG, arguments).prepare()
    run_ranks(1, fit, arguments, CONFIG)
    run = tmp_path / "runs/run"
    Scorer.load(run)
    assert main(["generate", str(run), "length=3"]) == 0
    rarest = min(set(TEXTS["train"]) - {"\n"}, key=TEXTS["train"].count)
    (tmp_path / "train.txt").write_text(TEXTS["train"] + rarest * 10 * len(TEXTS["train"]))
    recipe.load(CONFIG, arguments).prepare()
    assert main(["generate", str(run), "length=3"]) == 2
    assert "train: tokens: saved " in capsys.readouterr().err
    with pytest.raises(UserError, match=r"train: tokens: saved .*\n.*this is other data"):
        Scorer.load(run)


@pytest.mark.distributed
def test_a_refused_start_leaves_a_finished_run_as_it_is(text: Path, tmp_path: Path) -> None:
    arguments = tiny(text, tmp_path, "max_steps=1")
    run = run_ranks(1, fit, arguments, CONFIG)[0]["run"]
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(RuntimeError, match="holds no prepared text"):
        run_ranks(1, fit, [*arguments, f"data.path={tmp_path}/nowhere"], CONFIG)
    assert (run / "config.yaml").read_bytes() == before
    assert main(["evaluate", str(run)]) == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [("train.npy", b""), ("train.npy", b"no array"), ("vocabulary", b"[]"), ("vocabulary", b"\xff")],
)
def test_a_damaged_text_is_to_be_prepared_again(tmp_path: Path, name: str, content: bytes) -> None:
    for split, lines in TEXTS.items():
        (tmp_path / f"{split}.txt").write_text(lines)
    arguments = tiny(tmp_path, tmp_path / "runs", "data.tokens={kind: words}")
    recipe.load(CONFIG, arguments).prepare()
    (tmp_path / "made" / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: cannot be read .*; delete corpus\.json beside it and run"):
        recipe.load(CONFIG, arguments).build_dataset("train")


def test_a_prompt_that_is_no_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path), "prompt=the\udcff"]) == 2
    assert "prompt = 'the\\udcff': is not UTF-8" in capsys.readouterr().err


def test_a_run_of_another_recipe_is_no_scorer(tmp_path: Path) -> None:
    sizes = ["data.delay_steps=4", "data.num_train=8", "data.num_valid=4", "model.hidden_size=6"]
    run_ranks(1, fit, [*sizes, "tracking.wandb=disabled", f"runs_dir={tmp_path}", "max_steps=1"], "copying/t1000")
    with pytest.raises(UserError, match="recipe = copying: wanted a run of a language model"):
        Scorer.load(tmp_path / "copying-t1000")


def test_penn_treebank_is_evaluated_on_its_82430_tokens(tmp_path: Path) -> None:
    """With a model that gives every word the same probability, the perplexity is the size of the vocabulary."""
    if not SHARED.is_dir():
        pytest.skip("the Penn Treebank is not beside this checkout")
    arguments = [f"data.corpus.path={SHARED}", f"data.path={tmp_path}", "model.embedding_size=4"]
    made = recipe.load("language_model/ptb", [*arguments, "model.rnn.hidden_size=4", "plan.evaluation_streams=100"])
    made.prepare()
    model, dataset = made.build_model().eval(), made.build_dataset("test")
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    batches = [dataset.load(m) for step in dataset.plan.epoch(0) for m in step.micro_batches]
    assert sum(int((batch["targets"] != NOTHING).sum()) for batch in batches) == 82_430
    with torch.inference_mode():
        loss = made.step(model, batches[-1]).losses["nats"]
    assert loss.count < batches[-1]["targets"].numel()  # the last window is not full
    assert made.derive({"nats": float(loss.sum) / loss.count})["perplexity"] == pytest.approx(10_000, rel=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("softmax", ["{kind: full}", "{kind: adaptive, cutoffs: [5]}"])
def test_tied_weights_train_alike_at_every_stage(text: Path, tmp_path: Path, softmax: str) -> None:
    """With more than 10,000 of them, which stage 3 keeps in pieces."""
    more = [f"model.softmax={softmax}", "model.tied=true", "model.embedding_size=900", "max_steps=3"]
    found = []
    for stage, processes in ((0, 1), (1, 2), (3, 2)):
        arguments = tiny(text, tmp_path / str(stage), *more, f"zero.stage={stage}")
        found.append(run_ranks(processes, fit, arguments, CONFIG)[0])
    for other in found[1:]:
        assert other["values"]["nats"] == pytest.approx(found[0]["values"]["nats"], rel=1e-5)
        assert torch.equal(other["weights"]["output.weight"], other["weights"]["embedding.weight"])
