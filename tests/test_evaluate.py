"""What `evaluate` says of a run, and what it refuses to say."""

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import test_language_model as language
from tests.helpers import TINY, fit, overrides, run_ranks, spoil
from trainer import recipe
from trainer.__main__ import main
from trainer.__main__ import run as started
from trainer.config import PROJECT
from trainer.evaluation import read_evaluation
from trainer.run import read_lines
from trainer.verbs import evaluate

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("runs")
    return run_ranks(1, fit, overrides(corpus, folder, "name=run", "max_steps=1"))[0]["run"]


def evaluated(ranks: Any, run: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """What the verb writes and prints; a mistake of the user is raised."""
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert evaluate.main(parser.parse_args([str(run), *arguments])) == 0
    return json.loads((run / "evaluation" / "test.json").read_text()), output.getvalue()


def test_another_model_or_alphabet_is_a_mistake(run: Path, tmp_path: Path) -> None:
    other = overrides(tmp_path / "other", tmp_path, "data.corpus.alphabet=hgfedcba")
    recipe.load("speech/tones", [*other, "data.text.alphabet=' hgfedcba'"]).prepare()
    with pytest.raises(RuntimeError, match=r"alphabet: saved ' abcdefgh', now ' hgfedcba'"):
        run_ranks(1, evaluated, run, f"data.path={tmp_path / 'other'}")
    with pytest.raises(RuntimeError, match=r"model.rnn.hidden_size = 8: the run was trained with 16"):
        run_ranks(1, evaluated, run, "model.rnn.hidden_size=8")
    with pytest.raises(RuntimeError, match=r"alphabet: saved ' abcdefgh', now ' hgfedcba'"):
        run_ranks(1, tuned, run, f"data.path={tmp_path / 'other'}")


def tuned(ranks: Any, run: Path, *arguments: str) -> None:
    started("tune", [str(run), "decoder.language_model=null", *arguments])


def test_no_decoder_is_recorded_where_nothing_can_be_scored(run: Path) -> None:
    with pytest.raises(RuntimeError, match="no words of the split valid can be scored"):
        run_ranks(1, tuned, run, "plan.max_seconds=0.1")
    assert not (run / "decoder.yaml").exists()


def test_what_was_not_scored_is_told(run: Path, corpus: Path, tmp_path: Path) -> None:
    """A damaged clip and those that are too long for the plan, in the file and on the console."""
    data = shutil.copytree(corpus, tmp_path / "data")
    keys = spoil(data / "test", 1)
    ((result, told),) = run_ranks(1, evaluated, run, f"data.path={data}", "plan.max_seconds=2.2")
    reasons = {row["key"]: row["reason"] for row in result["left_out"]}
    found = reasons.pop(keys[0])
    assert found in ("not audio", "checksum differs from the index")  # as the decoder sees it
    assert set(reasons.values()) == {"longer than 2.2 s"}
    assert (result["scored"], result["total"]) == (6 - len(reasons), 7)
    assert f"{result['scored']} of 7 samples scored" in told
    assert f"left out: {len(reasons)} longer than 2.2 s, 1 {found}" in told
    (row,) = read_lines(run / "quarantine.jsonl")
    assert (row["key"], row["split"]) == (keys[0], "test")

    spoil(data / "test", 7)  # mends the first
    with pytest.raises(RuntimeError, match="6 bad samples of 7, more than max_bad_share"):
        run_ranks(1, evaluated, run, f"data.path={data}")


def test_a_run_of_a_language_model_searches_and_rescores(run: Path, tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("ab cd\nef gh\n" * 60)
    corpus = ", ".join(f"{split}: {tmp_path / split}.txt" for split in ("train", "valid", "test"))
    more = [f"data.path={tmp_path / 'made'}", f"data.corpus={{kind: files, {corpus}}}", f"runs_dir={tmp_path}"]
    recipe.load(language.CONFIG, more).prepare()
    run_ranks(1, fit, [*language.SIZES, *more, "name=lm", "max_steps=1"], language.CONFIG)
    lm = f"run: {tmp_path / 'lm'}"
    asked = ("decoder.kind=beam", "decoder.beam_size=3", f"decoder.language_model={{kind: run, {lm}}}")
    ((result, told),) = run_ranks(1, evaluated, run, *asked, f"decoder.rescore={{{lm}, candidates: 3}}")
    assert result["scored"] == 7
    assert "CER " in told


def commands() -> list[list[str]]:
    """Those of docs/recognition.md, without ./launch.sh."""
    text = (PROJECT / "docs/recognition.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sh\n(.*?)```", text, re.S)
    return [shlex.split(line)[1:] for line in block.splitlines()]


def typed(ranks: Any, folder: Path, data: Path) -> str:
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        for command in commands():
            more = [*TINY, f"data.path={data}"] if command[0] == "ngram" else []
            assert main([*command, *more]) == 0, command
    return output.getvalue()


def test_the_commands_of_the_document_and_what_they_leave(run: Path, corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "runs" / "speech-tones")
    (told,) = run_ranks(1, typed, tmp_path, corpus)
    assert "95 % interval" in told
    assert "paired bootstrap" in told
    assert "recorded in runs/speech-tones/decoder.yaml" in told
    found = read_evaluation(tmp_path / "runs/speech-tones/evaluation/test.json")
    assert set(found["errors"]) == {"cer", "wer"}
    assert "decoder=tuned" in found["settings"]  # the report says so beside the figure
    assert ", decoder=tuned" in told
    assert all(row["facts"]["seconds"] > 0 for row in found["rows"])
    for row in found["rows"]:
        words = row["facts"]["words"]
        assert [word["word"] for word in words] == row["columns"]["hypothesis"].split()
        assert all(0 <= word["start"] < word["end"] <= row["facts"]["seconds"] + 0.1 for word in words)
    page = (tmp_path / "runs/speech-tones/evaluation/test.html").read_text(encoding="utf-8")
    assert "<audio" in page
    assert 'class="image outputs"' in page
    assert "<script" not in page
