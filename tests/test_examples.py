"""A table of a validation shows the worst, and what of it a person can hear, see and read."""

import re
from types import SimpleNamespace

from tests.helpers import overrides
from trainer import recipe
from trainer.engine import initialise
from trainer.examples import chosen, examples
from trainer.recipe import Row

TEXTS = {"reference": "ab", "hypothesis": "ac"}


def rows(keys: list[str]) -> list[Row]:
    heard = {"words": [{"word": "ac", "start": 0.08, "end": 0.2, "confidence": 0.5}]}
    return [Row(key, errors, 10, TEXTS, facts=heard) for errors, key in enumerate(keys)]


def test_half_of_a_table_is_the_worst_and_half_stays_the_same() -> None:
    made = rows([f"k{i:02d}" for i in range(30)])
    shown = [r.key for r in chosen(made, 7)]
    assert shown[:3] == ["k29", "k28", "k27"]
    assert len(set(shown)) == 7
    for r in made:  # another validation, with other errors, among them those of the same worst
        r.errors = 0 if r.key < "k27" else r.errors
    assert [r.key for r in chosen(made, 7)] == shown
    assert len(chosen(made[:2], 7)) == 2


def test_an_example_has_sound_alignment_words_and_what_the_net_gave(corpus, tmp_path, caplog) -> None:
    task = recipe.load("speech/tones", overrides(corpus, tmp_path))
    dataset, model = task.build_dataset("valid"), task.build_model().eval()
    initialise(model, 0)
    evaluator = SimpleNamespace(recipe=task, model=model, dataset=dataset)
    ((cells, media),) = examples(evaluator, rows(["nowhere", dataset.index.keys[0]]), 2)
    assert "nowhere is missing in the table" in caplog.text
    assert list(cells) == ["key", "error", "reference", "hypothesis", "aligned", "words"]
    assert cells["words"] == "ac 0.08-0.20 s"
    assert re.search(r"<style>.*<i>a<em>b</em></i>.*title=\"0.08 to 0.20 s, confidence 0.50\"", cells["aligned"], re.S)
    assert len(media.audio) > 1000
    assert media.outputs.shape == (len(task.tokens), task.num_output_frames(media.image.shape[1]))
    assert abs(media.outputs.sum(0) - 1).max() < 1e-4
    assert media.classes[:3] == ("<blank>", "▁", "a")
