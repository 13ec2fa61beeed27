"""Polyphonic music: which of the 88 keys of a piano sound in the next frame, given all frames before.

Keys are independent given the past, so the score is a sum of 88 cross-entropies: nats a frame, averaged over the frames
that exist. A net must beat two predictors without a memory, which `plan` names: the keys' own frequencies, and those
given each key's last frame.

Sources: Boulanger-Lewandowski, Bengio & Vincent 2012, arXiv:1206.6392 (task); Ognawala & Bayer 2014, arXiv:1410.5684
(noise and norms on it).
"""

import io
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import soundfile
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from kernels.moments import sigmoid_mean
from trainer import keyed
from trainer.data.dataset import Batch, Media
from trainer.data.generated import GeneratedConfig
from trainer.data.music import MusicConfig, MusicDataset, marginals, transitions
from trainer.data.parallel import Display
from trainer.data.scores import KEYS, LOWEST, Roll, to_midi, to_picture, to_sound
from trainer.errors import UserError
from trainer.metrics import Loss, Mean
from trainer.models.normalization import frame_mask
from trainer.models.readout import Output
from trainer.models.regularizers import fast_dropout
from trainer.models.rnn import RNNConfig
from trainer.recipe import Generated, Inputs, Recipe, Row, RunConfig, Split, State, StepOutput, Wish, wants_scores

USUAL_LENGTH = 128
PROMPT_FRAMES = 16
"""Of a piece that is gone on from."""
SAMPLE_RATE_HZ = 16000
NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")


class MusicModelConfig(RNNConfig):
    """A recurrent stack and 88 outputs."""

    output_bias: float | Literal["marginals"] = "marginals"
    """Where the outputs' bias starts: at the keys' frequencies in the training pieces, or at a number."""


class MusicRunConfig(RunConfig):
    """A run of the music recipe."""

    data: MusicConfig = MusicConfig()
    plan: GeneratedConfig = GeneratedConfig(micro_batch_samples=16)
    model: MusicModelConfig = MusicModelConfig()


class KeyOutput(Output):
    """A logit a key, whose bias starts at a place of its own.

    Args:
        start: gives the bias (88,), asked for when weights are drawn.
    """

    def __init__(self, input_size: int, start: Callable[[], Tensor]) -> None:
        self.start: Callable[[], Tensor] | None = None
        super().__init__(input_size, KEYS)
        self.start = start

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.start is not None:
            with torch.no_grad():
                self.bias.copy_(self.start())


class PianoRoll(nn.Module):
    """Frames to logits of the frames that follow.

    Shape:
        x: (B, T, 88), lengths: (B,), noise_keys: (B,) int64 or None -> (B, T, 88)
    """

    def __init__(self, config: MusicModelConfig, start: Callable[[], Tensor]) -> None:
        super().__init__()
        self.rnn = config.build(KEYS)
        self.output = KeyOutput(config.output_size, start)

    def forward(self, x: Tensor, lengths: Tensor, noise_keys: Tensor | None = None) -> Tensor:
        y, _ = self.rnn(x, lengths, noise_keys)
        if self.rnn.variance is None:
            logits: Tensor = self.output(y)
            return logits.float()
        moments = fast_dropout.affine(y, self.rnn.variance, self.output.weight, self.output.bias)
        fast = self.rnn.config.regularizers.fast_dropout
        exactly = fast is not None and fast.moments == "quadrature"
        mean = fast_dropout.sigmoid_mean_by_quadrature if exactly else sigmoid_mean
        return mean(*moments).float()


class KeyNats(torch.autograd.Function):
    """Cross-entropy of each frame, summed over the keys: `torch.nn.functional.binary_cross_entropy_with_logits` without
    log1p, which on a CPU takes ten times as long as log.

    Shape:
        logits, targets: (B, T, 88) -> (B, T), in nats
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        # max(x, 0) - x y + log(1 + exp(-|x|)), whose last term is -log(sigmoid(|x|)) and never that of a small number.
        return (logits.relu() - logits * targets - logits.abs().sigmoid_().log_()).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        return (logits.sigmoid() - targets) * grad[..., None], None


class Music(Recipe[MusicRunConfig]):
    """Frames from frames; the best checkpoint is that of the fewest nats a frame."""

    monitor = "nll"

    def prepare(self) -> None:
        with Display(Console()) as progress:
            said = self.config.data.prepare(progress)
        print(said)

    def build_model(self) -> PianoRoll:
        return PianoRoll(self.config.model, self._output_bias)

    def _output_bias(self) -> Tensor:
        start = self.config.model.output_bias
        if start != "marginals":
            return torch.full((KEYS,), start)
        return torch.from_numpy(marginals(self._rolls("train"))).logit().float()

    def _rolls(self, split: Split) -> list[Roll]:
        found = [p.roll for p in self.config.data.pieces() if p.split == split]
        if not found:
            raise UserError(
                f"data.corpus: has no piece for the split {split}, which its name decides; give it more pieces"
            )
        return found

    def build_dataset(self, split: Split) -> MusicDataset:
        config = self.config
        return MusicDataset(config.data, split, config.plan, config.seed)

    def inputs(self) -> Inputs:
        return Inputs("inputs", low=0.0, high=1.0, binary=True)

    def describe(self, model: nn.Module) -> dict[str, str]:
        assert isinstance(model, PianoRoll)
        marginal, markov = floors(self._rolls("train"), self._rolls("test"))
        beat = f"{marginal:.2f} nats a frame of the test by the keys' frequencies, {markov:.2f} by their last frame too"
        return {**model.rnn.describe(), "to beat": beat}

    def step(self, model: nn.Module, batch: Batch, state: State | None = None) -> StepOutput:
        targets, lengths = batch["targets"], batch["lengths"] * batch["valid"]
        logits = model(batch["inputs"], lengths, batch["noise_keys"])  # (B, T, 88)
        mask = frame_mask(lengths, targets.shape[1])
        frames: Tensor = KeyNats.apply(logits, targets)
        nats = (frames * mask).sum(1)  # (B,)
        count = float(lengths.sum())
        output = StepOutput({"nll": Loss(nats.sum(), count, "frames")})
        if wants_scores(model):
            guesses, real = (logits > 0) & mask[..., None], (targets > 0) & mask[..., None]
            right, either = ((x.sum((1, 2)).tolist()) for x in (guesses & real, guesses | real))
            # Of the keys that sound or are said to, those that are both (Bay, Ehmann & Downie 2009).
            output.metrics["frame_accuracy"] = Mean(float(sum(right)), float(sum(either)))
            output.rows = [
                Row(key, e - r, e, {"frames": str(n), "nats a frame": f"{loss / max(n, 1):.2f}"})
                for key, r, e, n, loss, valid in zip(
                    batch["keys"], right, either, lengths.tolist(), nats.tolist(), batch["valid"].tolist(), strict=True
                )
                if valid
            ]
        return output

    def generate(self, model: nn.Module, wish: Wish) -> Generated:
        """A piece, key by key from its probability. It goes on from the first frame of a training piece that the seed
        draws; `prompt=N` takes the first frames of test piece N instead."""
        if wish.prompt is None:
            rolls = self._rolls("train")
            start = rolls[keyed.key(wish.seed, "start") % len(rolls)][:1]
        else:
            rolls = self._rolls("test")
            if not (wish.prompt.isdecimal() and int(wish.prompt) < len(rolls)):
                raise UserError(f"prompt = {wish.prompt!r}: wanted the number of a test piece, 0 to {len(rolls) - 1}")
            start = rolls[int(wish.prompt)][:PROMPT_FRAMES]
        device = next(model.parameters()).device
        frames = torch.zeros(1, len(start) + (wish.length or USUAL_LENGTH), KEYS, device=device)
        frames[0, : len(start)] = torch.from_numpy(start)
        draws = torch.rand(frames.shape[1:], generator=keyed.generator(wish.seed, "generate")).to(device)
        for t in range(len(start), frames.shape[1]):
            logits = model(frames[:, :t], torch.tensor([t], device=device))[0, -1]
            frames[0, t] = draws[t] < torch.sigmoid(logits / max(wish.temperature, 1e-3))
        return written(frames[0].byte().cpu().numpy(), self.config.data.corpus.frames_per_quarter)


def written(roll: Roll, frames_per_quarter: int) -> Generated:
    """A roll to hear, to see and to read about."""
    used = (np.flatnonzero(roll.any(0)) + LOWEST).tolist() or [LOWEST]
    low, high = (f"{NAMES[n % 12]}{n // 12 - 1}" for n in (used[0], used[-1]))
    sound, picture = to_sound(roll, frames_per_quarter, SAMPLE_RATE_HZ), to_picture(roll)
    wav, png = io.BytesIO(), io.BytesIO()
    soundfile.write(wav, sound, SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    Image.fromarray(picture).save(png, "PNG")
    return Generated(
        f"{len(roll)} frames, {roll.sum() / len(roll):.1f} notes a frame, {low} to {high}",
        {".mid": to_midi(roll, frames_per_quarter), ".png": png.getvalue(), ".wav": wav.getvalue()},
        Media(sound, SAMPLE_RATE_HZ, picture=picture),
    )


def floors(train: list[Roll], test: list[Roll]) -> tuple[float, float]:
    """Nats a frame of the test without a memory: by the keys' frequencies in training, and given their last frame."""
    seen, before = np.concatenate([r[1:] for r in test]), np.concatenate([r[:-1] for r in test])
    moved = transitions(train)
    guesses = (np.broadcast_to(marginals(train), seen.shape), np.where(before > 0, moved[1], moved[0]))
    first, second = (float(-np.log(np.where(seen > 0, p, 1 - p)).sum(1).mean()) for p in guesses)
    return first, second


recipe = Music
