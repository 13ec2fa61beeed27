"""A run's best checkpoint for elsewhere: a plain state dict, and its streaming step for other runtimes.

    ./launch.sh export speech-tones                 into runs/speech-tones/export/
    ./launch.sh export speech-tones to=/some/folder
    ./launch.sh export speech-read_ru_streaming split=test utterances=100 chunk_ms=80

weights.pt is what `torch.load(..., weights_only=True)` reads wherever there is torch: names to whole tensors, averaged
over the last steps if the run keeps an average. config.yaml is the run's configuration, and export.json says what the
outputs stand for, which step the weights are of, and their SHA-256. `trainer.load(FOLDER)` and `transcribe FOLDER`
take the folder; the data are not needed.

Of a recogniser that can stream: step.pt2 (torch.export), step.onnx and step_int8.onnx (with the extra `onnx`), each a
step over chunk_ms of sound, checked against PyTorch; a table tells their sizes, speeds on one thread and errors on some
utterances of a split, where the corpus is there.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.verbs import find_run, number, positive, take

if TYPE_CHECKING:
    from trainer.deployment import Utterance
    from trainer.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory, or its name under runs/")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="to=FOLDER (default: export/ of the run)")
    parser.epilog = (
        "split=test, utterances=50: by which errors are counted, 0 for none; chunk_ms=80: sound a step, in whole "
        "output frames; other key=value, such as data.path=..., change the saved configuration"
    )


def main(arguments: argparse.Namespace) -> int:
    from trainer.config import show
    from trainer.decoding.tuning import with_recorded
    from trainer.errors import UserError
    from trainer.recipe import Recipe, of_trained
    from trainer.transfer import export

    to, overrides = take(arguments.overrides, "to")
    chunk, overrides = take(overrides, "chunk_ms")
    split, overrides = take(overrides, "split")
    count, overrides = take(overrides, "utterances")
    chunk_ms, utterances = positive(chunk, "chunk_ms") or 80, int(number(count, "utterances", 50, whole=True))
    if split not in (None, "train", "valid", "test"):
        raise UserError(f"the command line: split = {split!r}: wanted train, valid or test")
    run = find_run(arguments.run)
    recipe = of_trained(run.saved_config(), show(run.config), with_recorded(overrides, run))
    folder = Path(to) if to else run.path / "export"
    facts = export(run, folder, recipe.config)
    print(f"{show(folder / 'weights.pt')}: {facts['numbers']:,} numbers, step {facts['step']}")
    if type(recipe).recogniser is not Recipe.recogniser:
        _deploy(recipe, folder, chunk_ms, split or "test", utterances)
    return 0


def _deploy(recipe: "Recipe[Any]", folder: Path, chunk_ms: int, split: str, count: int) -> None:
    """The step of a recogniser, in all its forms, and their table."""
    from dataclasses import asdict

    import torch
    from rich.console import Console
    from rich.table import Table

    from trainer import deployment
    from trainer.errors import UserError
    from trainer.recogniser import open_weights

    _, weights, labels, _ = open_weights(folder)
    try:
        recogniser = recipe.recogniser(weights, labels, folder)
        reason = recogniser.cannot_stream()
    except UserError as error:  # features without sound, or a decoder that cannot be had here
        reason = str(error)
    if reason is not None:
        print(f"no streaming step: {reason}")
        return
    frames = deployment.chunk_frames(recogniser, chunk_ms)
    samples = frames * recogniser.features.hop
    known: list[Utterance] = []
    try:
        known = recipe.utterances(split, count) if count else []  # type: ignore[arg-type]
    except UserError as error:
        print(f"no errors counted: {error}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = deployment.deploy(recogniser, folder, frames, known, print)
    finally:
        torch.set_num_threads(threads)
    told = f"{len(known)} utterances of {split}" if known else "no errors counted"
    table = Table(title=f"A chunk of {1000 * samples / recogniser.sample_rate_hz:.4g} ms, one thread; {told}")
    for heading in ("", "MB", "ms a chunk", "real-time factor", "difference", "CER %", "WER %"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        rates = ["" if rate is None else f"{100 * rate:.2f}" for rate in (row.cer, row.wer)]
        speed = (f"{row.milliseconds:.2f}", f"{row.real_time_factor:.4f}", f"{row.difference:.1e}")
        table.add_row(row.name, f"{row.megabytes:.2f}", *speed, *rates)
    Console().print(table)
    facts = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    facts |= {"chunk_samples": samples, "sample_rate_hz": recogniser.sample_rate_hz}
    facts |= {"forms": [asdict(row) for row in rows]}
    (folder / "export.json").write_text(json.dumps(facts, ensure_ascii=False, indent=1), encoding="utf-8")
