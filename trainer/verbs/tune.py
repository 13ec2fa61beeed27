"""Chooses the weight and the word score of a beam search on the validation split, and records them.

    ./launch.sh tune speech-tones
    ./launch.sh tune speech-tones decoder.language_model='{kind: ngram, path: words.arpa, units: words}'

Writes RUN/decoder.yaml. After that `./launch.sh evaluate RUN decoder=tuned` decodes with it. The test split is not
looked at. Other keys of the decoder are taken as they are given.
"""

import argparse
from typing import Any

from trainer.verbs import add_run, find_run, open_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.epilog = "decoder.KEY=value and other key=value change the saved configuration"


def main(arguments: argparse.Namespace) -> int:
    from trainer.errors import UserError

    if any(text.startswith("split=") for text in arguments.overrides):
        raise UserError("the command line: split: a decoder is tuned on the validation split alone; leave it out")
    saved = find_run(arguments.run).saved_config().get("decoder")
    if isinstance(saved, dict) and saved.get("kind") == "greedy":
        arguments.overrides.insert(0, "decoder.kind=beam")  # before other keys of a beam search
    recipe: Any
    run, recipe, _ = open_run(arguments)
    decoder = getattr(recipe.config, "decoder", None)
    if decoder is None or decoder.kind == "greedy":
        raise UserError(f"{run.path.name}: the recipe {recipe.config.recipe} has no decoder with weights to tune")

    import time

    from rich.console import Console

    from trainer import checkpoint, distributed
    from trainer import config as configuration
    from trainer.config import show
    from trainer.decoding import tuning
    from trainer.evaluation import Evaluator
    from trainer.metrics import edits

    beam = recipe.decoder
    recipe.decoder = recorder = tuning.Recorder()
    best = checkpoint.best(run.checkpoints)
    ranks = distributed.start()
    try:
        evaluator = Evaluator(recipe, "valid", ranks)
        best.check_shapes(checkpoint.shapes_of(evaluator.model))
        best.check_labels(evaluator.dataset.identity)
        rows = evaluator.run(best.weights()).rows
    finally:
        distributed.stop()
    references = [row.columns["reference"].split() for row in rows]
    length = sum(map(len, references))
    if not length:
        raise UserError(f"{run.path.name}: no words of the split valid can be scored, so nothing tells decoders apart")
    greedy = sum(edits(r, row.columns["hypothesis"].split()).total for r, row in zip(references, rows, strict=True))

    def errors(weight: float, word_score: float) -> float:
        beam.set_weights(weight, word_score)
        found = (recipe.scored(recipe.tokens.decode(beam.best(u))) for u in recorder.utterances)
        return sum(edits(r, text.split()).total for r, text in zip(references, found, strict=True)) / length

    started = time.monotonic()
    console = Console()
    axes = (0, 1) if beam.makes_words else (0,)
    trials = tuning.search(errors, decoder.weight, decoder.word_score, axes=axes)
    chosen = tuning.best(trials)
    for trial in trials:
        line = f"weight {trial.weight:g}, word score {trial.word_score:g}: {100 * trial.error:.2f} %"
        console.print(line, highlight=False)
    seconds = time.monotonic() - started
    values = configuration.plain(decoder) | {"weight": chosen.weight, "word_score": chosen.word_score}
    facts = {
        "split": "valid",
        "samples": len(rows),
        "step": best.state["position"]["step"],
        "word_errors": round(chosen.error, 6),
        "word_errors_greedy": round(greedy / length, 6),
        "trials": len(trials),
    }
    tuning.record(run, values, facts)
    console.print(
        f"valid, {len(rows)} samples: greedy {100 * greedy / length:.2f} % of words wrong, with weight "
        f"{chosen.weight:g} and word score {chosen.word_score:g} {100 * chosen.error:.2f} % ({len(trials)} settings in "
        f"{seconds:.0f} s)",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"recorded in {show(run.path / tuning.FILE)}", highlight=False, soft_wrap=True)
    return 0
