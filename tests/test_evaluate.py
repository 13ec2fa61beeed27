"""What `evaluate` says of a run, and what it refuses to say."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import fit, overrides, run_ranks
from trainer import recipe
from trainer.verbs import evaluate

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("runs")
    return run_ranks(1, fit, overrides(corpus, folder, "name=run", "max_steps=1"))[0]["run"]


def evaluated(ranks: Any, run: Path, *arguments: str) -> dict[str, Any]:
    """What the verb writes; a mistake of the user is raised."""
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    assert evaluate.main(parser.parse_args([str(run), *arguments])) == 0
    return json.loads((run / "evaluation" / "test.json").read_text())


def test_another_model_or_alphabet_is_a_mistake(run: Path, tmp_path: Path) -> None:
    other = overrides(tmp_path / "other", tmp_path, "data.corpus.alphabet=hgfedcba")
    recipe.load("speech/tones", [*other, "data.text.alphabet=' hgfedcba'"]).prepare()
    with pytest.raises(RuntimeError, match=r"alphabet: saved ' abcdefgh', now ' hgfedcba'"):
        run_ranks(1, evaluated, run, f"data.path={tmp_path / 'other'}")
    with pytest.raises(RuntimeError, match=r"do not fit this model:\noutput.weight: here \[10, 16"):
        run_ranks(1, evaluated, run, "model.rnn.hidden_size=8")
