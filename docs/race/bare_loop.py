"""(a) A bare PyTorch loop: features computed beforehand, batches of clips of like length, `nn.LSTM` from oneDNN.

    python docs/race/bare_loop.py --data data/read_ru --passes 14 --threads 2

Prints a JSON object a pass: passes, seconds of training so far, audio-hours so far, CER on the test split.
"""

import json
import random
import time

import common
import torch
import torchaudio
from torch import Tensor, nn


def features(wave: Tensor, mel: nn.Module) -> Tensor:
    return (mel(wave) + 1e-6).log().T


def batches(lengths: list[int], limit: int) -> list[list[int]]:
    """Clips of like length together, as many as come to `limit` frames."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    found: list[list[int]] = [[]]
    for i in order:
        if found[-1] and (len(found[-1]) + 1) * lengths[i] > limit:
            found.append([])
        found[-1].append(i)
    return found


def main() -> None:
    arguments = common.options(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    draw = random.Random(arguments.seed)

    mel = torchaudio.transforms.MelSpectrogram(common.SAMPLE_RATE_HZ, 512, 400, 160, n_mels=80, center=False)
    train, test = [], []
    for wave, text in common.utterances(arguments.data, "train"):
        copies = []
        for speed in common.SPEEDS:
            faster = wave
            if speed != 1.0:
                faster = torchaudio.functional.resample(wave, round(100 * speed), 100)
            copies.append(features(faster, mel))
        train.append((copies, torch.tensor(common.labels(text)), len(wave) / common.SAMPLE_RATE_HZ))
    for wave, text in common.utterances(arguments.data, "test"):
        test.append((features(wave, mel), text))
    everything = torch.cat([copies[1] for copies, _, _ in train])
    mean, deviation = everything.mean(0), everything.std(0)
    hours = sum(seconds for _, _, seconds in train) / 3600

    net = common.Net()
    optimizer = torch.optim.AdamW(net.parameters(), common.PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    time_mask = torchaudio.transforms.TimeMasking(20, iid_masks=True, p=0.2)
    band_mask = torchaudio.transforms.FrequencyMasking(10, iid_masks=True)
    plan = batches([len(copies[1]) for copies, _, _ in train], round(common.BATCH_SECONDS * 100))
    total, step, spent = arguments.passes * len(plan), 0, 0.0
    for number in range(1, arguments.passes + 1):
        net.train()
        start = time.perf_counter()
        for indices in draw.sample(plan, len(plan)):
            chosen = [draw.choice(train[i][0]) for i in indices]
            lengths = torch.tensor([len(x) for x in chosen])
            x = nn.utils.rnn.pad_sequence([(x - mean) / deviation for x in chosen], batch_first=True)
            x = x.unsqueeze(1).transpose(2, 3)
            for _ in range(3):
                x = time_mask(x)
            for _ in range(2):
                x = band_mask(x)
            x = x.transpose(2, 3).squeeze(1)
            targets = [train[i][1] for i in indices]
            for group in optimizer.param_groups:
                group["lr"] = common.rate(step, total)
            loss = nn.functional.ctc_loss(
                net(x).transpose(0, 1),
                torch.cat(targets),
                common.num_output_frames(lengths),
                torch.tensor([len(t) for t in targets]),
                reduction="sum",
            ) / sum(len(t) for t in targets)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            step += 1
        spent += time.perf_counter() - start
        net.eval()
        with torch.inference_mode():
            pairs = [(text, common.greedy(net(((x - mean) / deviation)[None])[0])) for x, text in test]
        row = {"passes": number, "seconds": spent, "hours": number * hours, "cer": common.cer(pairs)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
