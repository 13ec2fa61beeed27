"""How fast a language model trains beside what one would write with torch alone: tokens a second of whole steps.

The rival stands here in full: nn.Embedding, nn.LSTM, nn.Linear with cross-entropy or nn.AdaptiveLogSoftmaxWithLoss,
AdamW and clipping. Where our recurrence is block-diagonal the rival's is dense, of the same width.
"""

import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from kernels import keep_pages
from trainer import keyed
from trainer import recipe as recipes
from trainer.bench.timing import describe, interleaved
from trainer.data.dataset import Batch
from trainer.data.stream import NOTHING
from trainer.distributed import Ranks
from trainer.engine import Training
from trainer.models.convert import to_torch
from trainer.models.language import LanguageModel

VOCABULARY, TRAINING_WORDS, LINE_WORDS = 10_000, 120_000, 20
"""Words of the made-up text: as many kinds as in the Penn Treebank, as frequent as Zipf's law has it."""
CUTOFF, DIVIDE_BY, DROPOUT = 2000, 4, 0.3
BLOCKS = 8
CONTESTS = {
    "dense, 2 x 400, full softmax": (400, 1, False, 1.0),
    "dense, 2 x 650, full softmax": (650, 1, False, 1.0),
    f"{BLOCKS} blocks, 2 x 1024, full softmax": (1024, BLOCKS, False, 1.2),
    f"{BLOCKS} blocks, 2 x 1024, adaptive softmax": (1024, BLOCKS, True, 1.5),
    f"{BLOCKS} blocks, 2 x 1536, full softmax": (1536, BLOCKS, False, 1.2),
    f"{BLOCKS} blocks, 2 x 1536, adaptive softmax": (1536, BLOCKS, True, 1.5),
}
"""Units, blocks, whether the softmax is adaptive, and how many times as fast as the rival it is to be."""


class TorchModel(nn.Module):
    """The same model of torch's parts. The weights of a full softmax are the embedding's."""

    def __init__(self, size: int, adaptive: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size)
        self.lstm = nn.LSTM(size, size, num_layers=2, dropout=DROPOUT)
        self.dropout = nn.Dropout(DROPOUT)
        self.adaptive = None
        if adaptive:
            self.adaptive = nn.AdaptiveLogSoftmaxWithLoss(size, VOCABULARY, [CUTOFF], div_value=DIVIDE_BY)
        else:
            self.output = nn.Linear(size, VOCABULARY)
            self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.lstm(self.embedding(tokens.T), state)
        rows, wanted = self.dropout(y).flatten(0, 1), targets.T.flatten()
        if self.adaptive is not None:
            return self.adaptive(rows, wanted).loss, state
        return nn.functional.cross_entropy(self.output(rows), wanted), state


def write_text(folder: Path) -> None:
    """A text of random words in which the n-th word is as frequent as 1/n, each of them there at least once."""
    weights = np.cumsum(1 / np.arange(1, VOCABULARY - 1))
    for split, count in {"train": TRAINING_WORDS, "valid": 2000, "test": 2000}.items():
        drawn = keyed.table(np.arange(1), count, split, "zipf")[0]
        words = np.searchsorted(weights, drawn * weights[-1])
        if split == "train":
            words = np.append(words, np.arange(VOCABULARY - 2))
        lines = [" ".join(f"w{w}" for w in words[i : i + LINE_WORDS]) for i in range(0, len(words), LINE_WORDS)]
        (folder / f"{split}.txt").write_text("\n".join([*lines, "<unk>\n"]), encoding="utf-8")


def run(ranks: Ranks, overrides: list[str], repetitions: int, steps: int, only: str) -> dict[str, dict[str, Any]]:
    """Every contest: tokens a second of ours and of the rival, and the ratios.

    Args:
        overrides: keys of the configuration, e.g. plan.micro_batch_streams.
        steps: of a repetition.
        only: contests with this text in their names.
    """
    keep_pages()  # as `train` does; the rival has it too
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder)
        files = ", ".join(f"{split}: {folder}/{split}.txt" for split in ("train", "valid", "test"))
        common = [
            f"data.path={folder}/text",
            f"data.corpus={{kind: files, {files}}}",
            f"runs_dir={folder}",
            "tracking.wandb=disabled",
            "tracking.log_every_steps=1000",
            f"model.rnn.dropout={DROPOUT}",
            "model.rnn.num_layers=2",
        ]
        recipes.load("language_model/ptb", common).prepare()
        for number, (title, (size, blocks, adaptive, wanted)) in enumerate(CONTESTS.items()):
            if only not in title:
                continue
            own = [f"name=run{number}", f"model.embedding_size={size}", f"model.rnn.hidden_size={size}"]
            if blocks > 1:
                own += [f"model.rnn.structure={{kind: block_diagonal, num_blocks: {blocks}}}"]
            if adaptive:
                own += [f"model.softmax={{kind: adaptive, cutoffs: [{CUTOFF}], divide_by: {DIVIDE_BY}}}"]
                own += ["model.tied=false"]
            rows[title] = {**_contest(ranks, [*common, *own, *overrides], size, adaptive, repetitions, steps)}
            rows[title]["wanted"] = f">= {wanted:g}"
    return rows


def _contest(
    ranks: Ranks, arguments: list[str], size: int, adaptive: bool, repetitions: int, num_steps: int
) -> dict[str, Any]:
    ours = Training(recipes.load("language_model/ptb", arguments), ranks)
    steps = ours.dataset.plan.epoch(0)[:num_steps]
    loaded = [[ours.dataset.load(m) for m in step.micro_batches] for step in steps]
    config = ours.config
    model = TorchModel(size, adaptive)
    _compare(ours, model, loaded[0][0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr)

    def engine() -> None:
        ours.carried.clear()
        for step, batches in zip(steps, loaded, strict=True):
            ours.step(step, batches, 0.0)

    def rival() -> None:
        states: list[Any] = [None] * len(loaded[0])
        for batches in loaded:
            optimizer.zero_grad(set_to_none=True)
            for i, batch in enumerate(batches):
                loss, state = model(batch["inputs"], batch["targets"], states[i])
                states[i] = tuple(s.detach() for s in state)
                (loss / len(batches)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
            optimizer.step()

    times = interleaved({"ours": engine, "rival": rival}, repetitions)
    ours.close(0)
    tokens = sum(int((b["targets"] != NOTHING).sum()) for batches in loaded for b in batches)
    mine, theirs = times["ours"], times["rival"]
    return {
        "tokens_per_second": [tokens / describe(t.seconds)["median"] for t in (mine, theirs)],
        "milliseconds_a_step": [1000 * describe(t.seconds)["median"] / len(steps) for t in (mine, theirs)],
        "clock": describe(theirs.over(mine)),
        "processor": describe(theirs.cpu_over(mine)),
    }


@torch.no_grad()
def _compare(ours: Training, rival: TorchModel, batch: Batch) -> None:
    """Give the rival our weights, and see that it computes our loss.

    Raises:
        AssertionError: it computes another.
    """
    net = ours.trained.module
    assert isinstance(net, LanguageModel)
    output: Any = net.output
    rival.embedding.weight.copy_(net.embedding.weight)
    rival.lstm.load_state_dict(to_torch(net.rnn)[0].state_dict())
    if rival.adaptive is None:
        rival.output.bias.copy_(output.bias)
    else:
        rival.adaptive.head.weight.copy_(output.head)  # it has no biases, and ours start at 0
        down, tail = cast(Any, rival.adaptive.tail[0])
        down.weight.copy_(output.down_0)
        tail.weight.copy_(output.tail_0)
    net.eval()
    rival.eval()
    loss = ours.recipe.step(net, batch).losses["nats"]
    theirs, _ = rival(batch["inputs"], batch["targets"], None)
    if not torch.allclose(loss.sum / loss.count, theirs, rtol=1e-4):
        raise AssertionError(f"the rival computes {float(theirs)}, we {float(loss.sum / loss.count)}")
    net.train()
    rival.train()
