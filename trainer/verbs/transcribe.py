"""Text of sound: files, standard input or a microphone, with partial results while it comes.

    ./launch.sh transcribe speech-read_ru_streaming hello.wav talk.flac
    arecord -f S16_LE -r 16000 -t raw | ./launch.sh transcribe speech-read_ru_streaming -
    ./launch.sh transcribe speech-read_ru_streaming microphone

`-` is standard input: WAV, or 16-bit samples of one channel (--rate says how many a second, if not the model's).
`microphone` needs the extra of that name. A model that runs forward gets the sound chunk by chunk; a line is printed
whenever the text changes, with how far the decided part lies behind the sound that came. One that needs the whole of a
recording (both directions) takes files alone, long ones in windows. `--words` adds time and confidence of each word.
"""

import argparse
import contextlib
import re
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.decoding.alignment import Word
    from trainer.recogniser import Recogniser

KEY = re.compile(r"[a-z_]+(\.[a-z_]+)*=")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory or its name under runs/, or an exported folder")
    parser.add_argument(
        "sound", metavar="SOUND", nargs="+", help="files, - or microphone; key=value change the run's settings"
    )
    parser.set_defaults(overrides=[])  # those that stand behind an option
    parser.add_argument("--chunk-ms", type=float, default=80.0, help="sound that is taken at a time (default 80)")
    parser.add_argument("--rate", type=int, help="samples a second of standard input without a header")
    parser.add_argument("--final", action="store_true", help="no partial results")
    parser.add_argument("--words", action="store_true", help="each word with its start, end and confidence, too")
    parser.add_argument("--threads", type=int, default=1, help="of the processor (default 1)")


def main(arguments: argparse.Namespace) -> int:
    from trainer.errors import UserError

    for name, most in (("chunk_ms", 60_000), ("rate", 10**6), ("threads", 1024)):
        if (value := getattr(arguments, name)) is not None and not 0 < value <= most:  # nan is not, either
            raise UserError(f"--{name.replace('_', '-')} {value}: wanted more than 0 and at most {most}")

    import torch

    from trainer import sounds
    from trainer.recogniser import load

    torch.set_num_threads(arguments.threads)
    overrides = [name for name in arguments.sound if KEY.match(name) and not Path(name).exists()]
    arguments.sound = [name for name in arguments.sound if name not in overrides]
    recogniser = load(arguments.run, [*overrides, *arguments.overrides])
    seconds = arguments.chunk_ms / 1000
    for name in arguments.sound:
        live = name in ("-", "microphone")
        reason = recogniser.cannot_stream()
        if live and reason is not None:
            raise UserError(f"{name}: {arguments.run} cannot run while sound comes: {reason}")
        rate = recogniser.sample_rate_hz
        if name == "-":
            blocks = sounds.of_stream(sys.stdin.buffer, rate, seconds, arguments.rate)
        elif name == "microphone":
            blocks = sounds.of_microphone(rate, seconds)
        else:
            blocks = sounds.of_file(Path(name), rate, seconds)
        if reason is None:
            _stream(recogniser, name, blocks, not arguments.final, live, arguments.words)
        else:
            _whole(recogniser, name, blocks, arguments.words)
    return 0


def _print(name: str, text: str, words: "list[Word]") -> None:
    print(f"{name}: {text}", flush=True)
    for word in words:
        print(f"{word.start:8.2f} {word.end:8.2f}  {word.confidence:.2f}  {word.word}", flush=True)


def _stream(
    recogniser: "Recogniser", name: str, blocks: "Iterator[Tensor]", partial: bool, live: bool, words: bool
) -> None:
    """One recording, chunk by chunk; a live one ends with Ctrl-C, too."""
    stream = recogniser.stream(timed=words)
    shown, times = "", []
    first: tuple[float, float] | None = None
    with contextlib.suppress(*([KeyboardInterrupt] if live else [])):
        for block in blocks:
            start = time.perf_counter()
            text = stream.push(block)
            times.append(time.perf_counter() - start)
            if text != shown:
                if first is None and stream.heard.first_frame is not None:
                    first = (stream.seconds, stream.seconds - stream.heard.first_frame * recogniser.frame_seconds)
                if partial:
                    print(
                        f"{stream.seconds:8.2f} s  {stream.behind_seconds:4.2f} s behind  {1000 * times[-1]:5.1f} ms  "
                        f"{text[-80:]}",
                        flush=True,
                    )
                shown = text
    start = time.perf_counter()
    text = stream.finish()
    work = sum(times) + time.perf_counter() - start
    _print(name, text, stream.words)
    told = f"{stream.seconds:.2f} s of sound in {work:.3f} s: real-time factor {work / max(stream.seconds, 1e-9):.4f}"
    if times:
        told += f"; a chunk takes {1000 * statistics.median(times):.2f} ms, the longest {1000 * max(times):.2f}"
    if first is not None:
        told += f"; first result after {first[0]:.2f} s, {first[1]:.2f} s behind the frame of its first letter"
    print(told, file=sys.stderr, flush=True)


def _whole(recogniser: "Recogniser", name: str, blocks: "Iterator[Tensor]", words: bool) -> None:
    """One recording by a model that needs the whole of it."""
    heard = recogniser.hypothesis(timed=words)
    start = time.perf_counter()
    for part in recogniser.pieces(blocks):
        heard.push(part)
    heard.finish()
    work = time.perf_counter() - start
    seconds = heard.frames * recogniser.frame_seconds
    _print(name, recogniser.tokens.decode(heard.labels), heard.words(recogniser.tokens))
    print(
        f"{seconds:.2f} s of sound in {work:.3f} s, reading and all: real-time factor {work / max(seconds, 1e-9):.4f}; "
        f"no partial results: {recogniser.cannot_stream()}",
        file=sys.stderr,
        flush=True,
    )
