"""(b) SpeechBrain: its Brain, Fbank, normalisation, speed perturbation, masks and dynamic batches, around the network
of (a) or its own CRDNN.

    pip install speechbrain
    python docs/race/brain.py --data data/read_ru --passes 14 --threads 2 --network lstm

Prints a JSON object a pass: passes, seconds of training so far, audio-hours so far, CER on the test split.
"""

import json
import time
from typing import Any

import common
import speechbrain as sb
import torch
from speechbrain.augment.freq_domain import SpectrogramDrop
from speechbrain.augment.time_domain import SpeedPerturb
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataset import DynamicItemDataset
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.CRDNN import CRDNN
from speechbrain.processing.features import InputNormalization
from torch import Tensor, nn


class Stock(nn.Module):
    """CRDNN as it comes, with time subsampled by 4 and a linear map to the labels."""

    def __init__(self) -> None:
        super().__init__()
        self.crdnn = CRDNN(input_shape=[None, None, 80], time_pooling=True, time_pooling_size=4)
        self.output = nn.LazyLinear(1 + len(common.ALPHABET))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.crdnn(x)).log_softmax(-1)


class Recogniser(sb.Brain):
    total_steps = 0
    hours = 0.0
    spent = 0.0

    def compute_forward(self, batch: Any, stage: sb.Stage) -> tuple[Tensor, Tensor]:
        waves, lengths = batch.wave
        if stage == sb.Stage.TRAIN:
            waves = self.hparams.speed(waves)
        x = self.modules.normalise(self.hparams.fbank(waves), lengths, epoch=self.number)
        if stage == sb.Stage.TRAIN:
            x = self.hparams.time_mask(x)
            x = self.hparams.band_mask(x)
        return self.modules.net(x), lengths

    def compute_objectives(self, predictions: tuple[Tensor, Tensor], batch: Any, stage: sb.Stage) -> Tensor:
        log_probs, lengths = predictions
        labels, label_lengths = batch.labels
        if stage != sb.Stage.TRAIN:
            frames = (lengths * log_probs.shape[1]).round().long().tolist()
            for text, row, n in zip(batch.text, log_probs, frames, strict=True):
                self.pairs.append((text, common.greedy(row[:n])))
        return sb.nnet.losses.ctc_loss(log_probs, labels, lengths, label_lengths, 0, reduction="mean")

    def on_fit_batch_start(self, batch: Any, should_step: bool) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = common.rate(self.optimizer_step, self.total_steps)

    def on_stage_start(self, stage: sb.Stage, epoch: int | None = None) -> None:
        self.pairs: list[tuple[str, str]] = []
        self.number = epoch or 1
        self.started = time.perf_counter()

    def on_stage_end(self, stage: sb.Stage, stage_loss: float, epoch: int | None = None) -> None:
        if stage == sb.Stage.TRAIN:
            self.spent += time.perf_counter() - self.started
            return
        row = {"passes": epoch, "seconds": self.spent, "hours": epoch * self.hours, "cer": common.cer(self.pairs)}
        print(json.dumps(row), flush=True)


def dataset(found: list[tuple[Tensor, str]]) -> DynamicItemDataset:
    rows = {
        str(i): {
            "wave": wave,
            "text": text,
            "labels": torch.tensor(common.labels(text)),
            "duration": len(wave) / common.SAMPLE_RATE_HZ,
        }
        for i, (wave, text) in enumerate(found)
    }
    return DynamicItemDataset(rows, output_keys=["id", "wave", "text", "labels"])


def main() -> None:
    parser = common.options(__doc__.splitlines()[0])
    parser.add_argument("--network", choices=["lstm", "crdnn"], default="lstm")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    found = common.utterances(arguments.data, "train")
    train, test = dataset(found), dataset(common.utterances(arguments.data, "test"))
    sampler = DynamicBatchSampler(
        train,
        max_batch_length=common.BATCH_SECONDS,
        num_buckets=30,
        length_func=lambda row: row["duration"],
        shuffle=True,
        seed=arguments.seed,
        lengths_list=[len(wave) / common.SAMPLE_RATE_HZ for wave, _ in found],
    )
    loader = torch.utils.data.DataLoader(train, batch_sampler=sampler, collate_fn=PaddedBatch)
    net = common.Net() if arguments.network == "lstm" else Stock()
    net(torch.zeros(1, 400, 80))  # makes the layers whose size was left open
    brain = Recogniser(
        modules={"net": net, "normalise": InputNormalization()},
        opt_class=lambda p: torch.optim.AdamW(p, common.PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01),
        hparams={
            "fbank": Fbank(n_mels=80, n_fft=512),
            "speed": SpeedPerturb(common.SAMPLE_RATE_HZ, [round(100 * speed) for speed in common.SPEEDS]),
            "time_mask": SpectrogramDrop(1, 20, 3, 3, dim=1),
            "band_mask": SpectrogramDrop(1, 10, 2, 2, dim=2),
        },
        run_opts={"device": "cpu", "max_grad_norm": 1.0, "noprogressbar": True},
    )
    brain.total_steps = arguments.passes * len(sampler)
    brain.hours = sum(len(wave) for wave, _ in found) / common.SAMPLE_RATE_HZ / 3600
    tests = torch.utils.data.DataLoader(test, batch_size=8, collate_fn=PaddedBatch)
    brain.fit(range(1, arguments.passes + 1), loader, tests)


if __name__ == "__main__":
    main()
