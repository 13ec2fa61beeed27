"""The race: this project's recipe, a bare PyTorch loop and SpeechBrain train on the same data in turns.

    pip install speechbrain
    ./launch.sh prepare speech/read_ru
    python docs/race/race.py --rounds 3 --passes 3               # speed: short trainings, each system in each round
    python docs/race/race.py --rounds 3 --passes 40 --json race.json   # error rates too, a seed a round

Speed is audio-hours of the corpus passed in an hour of training: reading, features, forward, backward, optimizer;
without start-up and validation, and without the first pass. Every system has both cores in the way that is fastest for
it: threads in one process for the rivals, one process a core for ours.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RIVALS = {
    "bare loop, nn.LSTM": ["bare_loop.py"],
    "SpeechBrain, nn.LSTM": ["brain.py", "--network", "lstm"],
    "SpeechBrain, CRDNN": ["brain.py", "--network", "crdnn"],
}
BASE = [
    "data.augment.speeds=[0.9, 1.0, 1.1]",
    "data.augment.time_masks=3",
    "data.augment.time_mask_frames=20",
    "data.augment.frequency_masks=2",
    "data.augment.frequency_mask_bands=10",
    "optimizer.weight_decay=0.01",
    "optimizer.average_decay=0.995",
    "model.rnn.num_layers=3",
    "model.rnn.dropout=0.1",
    "model.input_dropout=0.1",
]
"""Ours with the settings of `base/speech_small`, which the rivals have: the default recipe has more of everything."""


def rival(script: list[str], arguments: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    command = [sys.executable, str(HERE / script[0]), *script[1:], "--data", str(arguments.data)]
    command += ["--passes", str(arguments.passes), "--threads", str(arguments.cores), "--seed", str(seed)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def ours(config: str, arguments: argparse.Namespace, seed: int, hours: float) -> list[dict[str, Any]]:
    """Rows like those of the rivals; the error rate in the last one alone, of the best checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"runs_dir={folder}", "name=race", f"seed={seed}", f"max_epochs={arguments.passes}"]
        settings += [
            *BASE,
            f"nproc={arguments.cores}",
            f"data.path={arguments.data.resolve()}",
            "tracking.wandb=disabled",
        ]
        for verb in (["train", config, *settings], ["evaluate", f"{folder}/race"]):
            subprocess.run([sys.executable, "-m", "trainer", *verb], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        rows = [json.loads(line) for line in (Path(folder) / "race" / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if row["kind"] == "train"]
        evaluation = next((Path(folder) / "race" / "evaluation").rglob("*.json"))
        cer = json.loads(evaluation.read_text())["metrics"]["cer"]
    found, seconds = [], 0.0
    for epoch in range(arguments.passes):
        seconds += sum(row["step_seconds"] for row in steps if row["epoch"] == epoch)
        found.append({"passes": epoch + 1, "seconds": seconds, "hours": (epoch + 1) * hours, "cer": None})
    found[-1]["cer"] = cer
    return found


def speed(rows: list[dict[str, Any]]) -> float:
    """Hours of sound an hour, without the first pass where there are more."""
    first = rows[0] if len(rows) > 1 else {"hours": 0.0, "seconds": 0.0}
    return 3600 * (rows[-1]["hours"] - first["hours"]) / (rows[-1]["seconds"] - first["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "read_ru")
    parser.add_argument("--config", nargs="+", default=["speech/read_ru", "speech/read_ru_block"], help="of ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, list[list[dict[str, Any]]]] = {}
    for seed in range(arguments.rounds):
        for name, script in RIVALS.items():
            results.setdefault(name, []).append(rival(script, arguments, seed))
        hours = results["bare loop, nn.LSTM"][0][0]["hours"]
        for config in arguments.config:
            results.setdefault(config, []).append(ours(config, arguments, seed, hours))
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))
        print(f"round {seed + 1} of {arguments.rounds}", *table(results), sep="\n", flush=True)


def table(results: dict[str, list[list[dict[str, Any]]]]) -> list[str]:
    """Medians, with the least and the greatest ratio of one round."""
    lines = [
        "| system | x real time | over the bare loop | over SpeechBrain | CER |",
        "| --- | --- | --- | --- | --- |",
    ]
    speeds = {name: [speed(rows) for rows in rounds] for name, rounds in results.items()}
    for name, own in speeds.items():
        cells = [name, f"{statistics.median(own):.0f}"]
        for other in list(RIVALS)[:2]:
            ratios = [a / b for a, b in zip(own, speeds[other], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
        errors = [f"{100 * rows[-1]['cer']:.1f} %" for rows in results[name]]
        lines.append("| " + " | ".join([*cells, ", ".join(errors)]) + " |")
    return lines


if __name__ == "__main__":
    main()
