"""A recogniser for other runtimes: its streaming step by torch.export and as ONNX, in float32 and in eight bits.

Each file is loaded again and run over the same sound as the recogniser itself, so that what is told of it is what the
file does.
"""

import contextlib
import copy
import io
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.text import Tokens
from trainer.metrics import edits
from trainer.models.fixed_step import FixedStep
from trainer.models.streaming import AcousticStream
from trainer.recogniser import Recogniser

Call = Callable[[Sequence[Tensor]], list[Tensor]]
"""Inputs of a step -> its outputs."""
CHECKED_SECONDS = 4.0
TOLERANCE = 1e-3
"""Of log-probabilities in float32, between runtimes."""


@dataclass
class Row:
    """What one way to run the model takes, and how it does."""

    name: str
    megabytes: float
    milliseconds: float
    """Median of a chunk."""
    real_time_factor: float
    difference: float
    """Largest one of a log-probability that counts (over 1e-4), against the recogniser in PyTorch."""
    cer: float | None = None
    wer: float | None = None


@dataclass
class Runner:
    """A step over whole recordings.

    Args:
        step: gives shapes and the start.
        call: what computes it.
    """

    step: FixedStep
    call: Call

    def __call__(self, wave: Tensor, times: list[float] | None = None) -> Tensor:
        """Samples (N,) -> log-probabilities (T, V)."""
        size = self.step.chunk_samples
        state, found = list(self.step.start().values()), []
        for piece in [*wave.split(size), *[wave[:0]] * self.step.flush_chunks]:
            chunk = nn.functional.pad(piece, (0, size - len(piece)))[None]
            start = time.perf_counter()
            log_probs, present, *state = self.call([chunk, torch.tensor([len(piece)]), *state])
            if times is not None:
                times.append(time.perf_counter() - start)
            found.append(log_probs[0, present])
        return torch.cat(found)


def chunk_frames(recogniser: Recogniser, chunk_ms: float) -> int:
    """Feature frames of a chunk: those of as many whole output frames as come nearest, one at least."""
    stride = recogniser.hop // recogniser.features.hop
    return stride * max(1, round(chunk_ms / 1000 / recogniser.frame_seconds))


def names(step: FixedStep) -> tuple[list[str], list[str]]:
    """Of the inputs and outputs: samples, valid and the state; log_probs, present and the state again."""
    state = list(step.start())
    return ["samples", "valid", *state], ["log_probs", "present", *(f"{name}_out" for name in state)]


def write_exported(step: FixedStep, path: Path) -> Call:
    """By torch.export, as a .pt2 file; returns what that computes when it is loaded again."""
    inputs = _example(step)
    with torch.no_grad(), _quiet():
        torch.export.save(torch.export.export(step, inputs), path)
    loaded = torch.export.load(path).module()

    @torch.inference_mode()
    def call(given: Sequence[Tensor]) -> list[Tensor]:
        return list(loaded(*given))

    return call


def write_onnx(step: FixedStep, path: Path) -> Call:
    """As ONNX; returns what onnxruntime computes with it."""
    inputs, outputs = names(step)
    with torch.no_grad(), _quiet():
        torch.onnx.export(
            copy.deepcopy(step),
            _example(step),
            path,
            input_names=inputs,
            output_names=outputs,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    return open_onnx(path)


def write_int8(onnx_path: Path, path: Path) -> Call:
    """An ONNX step with the model's matrices in eight bits, inputs rounded as they come (dynamic quantisation).

    The spectrum stays as it is: energies span more than eight bits. Of a weight's eight bits seven are used, since
    processors without VNNI add two products in sixteen bits, which overflow with more.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    spectrum = [node.name for node in onnx.load(onnx_path).graph.node if {*node.input} & {"cosines_and_sines", "mel"}]
    with _quiet():
        quantize_dynamic(
            onnx_path,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=spectrum,
        )
    return open_onnx(path)


def open_onnx(path: Path) -> Call:
    """What onnxruntime computes on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = [i.name for i in session.get_inputs()]

    def call(given: Sequence[Tensor]) -> list[Tensor]:
        values = {name: value.numpy() for name, value in zip(inputs, given, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, values)]

    return call


def has_onnx() -> str | None:
    """Why ONNX files cannot be written, None if they can."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        return f"{error}; pip install 'ostinato[onnx]'"
    return None


def _example(step: FixedStep) -> tuple[Tensor, ...]:
    valid = torch.tensor([step.chunk_samples])
    return (torch.zeros(1, step.chunk_samples), valid, *step.start().values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters talk of their own affairs."""
    level = logging.getLogger().level
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        logging.getLogger().setLevel(level)


Utterance = tuple[Tensor, str]
"""Samples (N,) and what was said."""


def deploy(
    recogniser: Recogniser, folder: Path, chunk_frames: int, utterances: Sequence[Utterance], say: Callable[[str], None]
) -> list[Row]:
    """Write every form of a recogniser's streaming step, and measure each.

    Args:
        folder: is there.
        chunk_frames: of the step.
        utterances: by which error rates are found; none: there are no data, and noise tells differences and times.

    Returns:
        a row each; the first is the recogniser in PyTorch.

    Raises:
        AssertionError: a file in float32 does not compute what the recogniser does.
    """
    step = FixedStep(recogniser.model, chunk_frames)
    weights = sum(p.numel() * p.element_size() for p in recogniser.model.parameters())
    rows = [_measure("PyTorch, kernels", weights, _streamed(recogniser, step), recogniser, utterances)]
    forms: list[tuple[str, Path, Callable[[Path], Call]]] = [
        ("torch.export", folder / "step.pt2", lambda path: write_exported(step, path))
    ]
    if (reason := has_onnx()) is None:
        onnx = folder / "step.onnx"
        forms.append(("ONNX", onnx, lambda path: write_onnx(step, path)))
        forms.append(("ONNX, int8", folder / "step_int8.onnx", lambda path: write_int8(onnx, path)))
    else:
        say(f"no ONNX: {reason}")
    for name, path, write in forms:
        call = write(path)
        known = [] if name == "torch.export" else utterances  # slow, and equal
        rows.append(_measure(name, path.stat().st_size, Runner(step, call), recogniser, known))
        if "int8" not in name and not rows[-1].difference < TOLERANCE:
            raise AssertionError(f"{path}: differs from the recogniser by {rows[-1].difference:.1e} in log-probability")
    return rows


def _streamed(recogniser: Recogniser, step: FixedStep) -> Callable[[Tensor, list[float] | None], Tensor]:
    """The recogniser itself, chunk by chunk."""

    def run(wave: Tensor, times: list[float] | None = None) -> Tensor:
        features, model, found = recogniser.features.stream(), AcousticStream(recogniser.model), []
        for piece in wave.split(step.chunk_samples):
            start = time.perf_counter()
            found.append(model.push(features.push(piece)[None])[0])
            if times is not None:
                times.append(time.perf_counter() - start)
        return torch.cat([*found, model.push(features.push(wave[:0], last=True)[None], last=True)[0]])

    return run


def _measure(
    name: str,
    num_bytes: int,
    run: Callable[[Tensor, list[float] | None], Tensor],
    recogniser: Recogniser,
    utterances: Sequence[Utterance],
) -> Row:
    """Size, speed, difference and errors of one way to run the model."""
    noise = (
        torch.rand(int(CHECKED_SECONDS * recogniser.sample_rate_hz), generator=torch.Generator().manual_seed(0)) - 0.5
    )
    wave = utterances[0][0] if utterances else noise
    want = recogniser.log_probs(wave)
    times: list[float] = []
    got = run(wave, times)
    heard = (want > -9.2) | (got > -9.2)
    difference = float((got - want)[heard].abs().max())
    row = Row(
        name,
        num_bytes / 1e6,
        1000 * statistics.median(times),
        sum(times) / (len(wave) / recogniser.sample_rate_hz),
        difference,
    )
    if utterances:
        texts = [_text(run(wave, None), recogniser, recogniser.tokens) for wave, _ in utterances]
        pairs = [(said, text) for (_, said), text in zip(utterances, texts, strict=True)]
        row.cer = _rate((list(said), list(text)) for said, text in pairs)
        row.wer = _rate((said.split(), text.split()) for said, text in pairs)
    return row


def _text(log_probs: Tensor, recogniser: Recogniser, tokens: Tokens) -> str:
    heard = recogniser.hypothesis()
    heard.push(log_probs)
    heard.finish()
    return tokens.decode(heard.labels)


def _rate(pairs: Any) -> float:
    errors = [edits(a, b) for a, b in pairs]
    return sum(e.total for e in errors) / max(1, sum(e.length for e in errors))
