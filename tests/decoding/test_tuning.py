"""The search for weights goes downhill, tries nothing twice, and what it records is taken as it is."""

from pathlib import Path

import pytest

from trainer import config as configuration
from trainer.decoding import BeamConfig
from trainer.decoding.tuning import best, record, search, with_recorded
from trainer.errors import UserError
from trainer.run import RunDirectory


@pytest.mark.parametrize("goal", [(0.9, 1.5), (0.0, -2.0), (0.6, 0.0)], ids=str)
def test_the_lowest_point_of_a_bowl_is_found(goal: tuple[float, float]) -> None:
    asked = []

    def errors(weight: float, word_score: float) -> float:
        asked.append((weight, word_score))
        return (weight - goal[0]) ** 2 + 0.1 * (word_score - goal[1]) ** 2

    found = best(search(errors, 0.6, 0.0))
    assert abs(found.weight - goal[0]) <= 0.1
    assert abs(found.word_score - goal[1]) <= 0.25
    assert len(asked) == len(set(asked)) < 40
    assert all(weight >= 0 for weight, _ in asked)
    assert {trial.word_score for trial in search(errors, 0.6, 0.5, axes=(0,))} == {0.5}


def test_what_is_recorded_is_what_decodes(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(UserError, match=r"decoder.yaml: is missing; decoder=tuned needs"):
        with_recorded(["decoder=tuned"], run)
    decoder = BeamConfig(weight=0.35, word_score=-0.5, language_model=None)
    record(run, configuration.plain(decoder), {"split": "valid"})
    source = configuration.Source()
    source.set("decoder", {"kind": "beam", "weight": 9.0, "language_model": {"kind": "run", "run": "x"}}, "the run")
    given = with_recorded(["seed=3", "decoder=tuned"], run)
    assert given[0] == "seed=3"
    configuration.override(source, given)
    assert BeamConfig.model_validate(source.values["decoder"]) == decoder
    (tmp_path / "decoder.yaml").write_text("decoder: 3\n")
    with pytest.raises(UserError, match="is not what `tune` writes"):
        with_recorded(["decoder=tuned"], run)
