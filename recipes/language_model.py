"""Language models: the next word, character or piece of a word, from a text that is read on and on.

Source: Mikolov et al. 2010; settings after Zaremba et al. 2014, arXiv:1409.2329, and Merity et al. 2018,
arXiv:1708.02182.
"""

import math
from functools import cached_property

import torch
from rich.console import Console
from torch import nn

from trainer import keyed
from trainer.data.dataset import Batch
from trainer.data.language import LanguageDataConfig, Prepared, prepare
from trainer.data.parallel import Display
from trainer.data.stream import NOTHING, StreamConfig, StreamDataset
from trainer.data.vocabulary import Vocabulary
from trainer.metrics import Loss, Mean
from trainer.models.language import LanguageModel, LanguageModelConfig
from trainer.recipe import Generated, Recipe, RunConfig, Split, State, StepOutput, Wish, wants_scores
from trainer.scoring import Scorer

LENGTHS = {"characters": 600, "words": 100, "subwords": 150}
"""Tokens of a generated text where nobody says how many."""


class LanguageRunConfig(RunConfig):
    """A run of the language recipe."""

    data: LanguageDataConfig = LanguageDataConfig()
    plan: StreamConfig = StreamConfig()
    model: LanguageModelConfig = LanguageModelConfig()


class Language(Recipe[LanguageRunConfig]):
    """Tokens from those before them; the best checkpoint is that of the lowest cross-entropy."""

    monitor = "nats"
    heads = ("embedding", "output")

    def prepare(self) -> None:
        console = Console()
        with Display(console) as progress:
            counts = prepare(self.config.data, progress)
        for split, c in counts.items():
            console.print(f"{split}: {c.tokens:,} tokens, {c.characters:,} characters", highlight=False)

    @cached_property
    def prepared(self) -> Prepared:
        """The corpus."""
        return Prepared.open(self.config.data)

    @property
    def vocabulary(self) -> Vocabulary:
        """What the numbers of the tokens mean."""
        return self.prepared.vocabulary

    def build_model(self) -> LanguageModel:
        return self.config.model.build(len(self.vocabulary))

    def build_dataset(self, split: Split) -> StreamDataset:
        return self.prepared.dataset(split, self.config.plan, self.config.seed)

    def describe(self, model: nn.Module) -> dict[str, str]:
        assert isinstance(model, LanguageModel)
        kind = self.config.data.tokens.kind
        return {**model.rnn.describe(), "vocabulary": f"{len(self.vocabulary):,} {kind}"}

    def step(self, model: nn.Module, batch: Batch, state: State | None = None) -> StepOutput:
        targets = batch["targets"]
        nats, state = model(batch["inputs"], targets, state, batch["noise_keys"])
        count = float((targets != NOTHING).sum())
        output = StepOutput({"nats": Loss(nats, count, "tokens")}, state=state)
        if wants_scores(model):
            units = batch["units"]
            output.metrics["bits_per_character"] = Mean(nats / math.log(2), count * units["characters"])
            if self.config.data.tokens.kind == "subwords":
                output.metrics["nats_per_word"] = Mean(nats, count * units["words"])
        return output

    def derive(self, values: dict[str, float]) -> dict[str, float]:
        """The perplexities: exp of the cross-entropies."""
        names = {"nats": "perplexity", "nats_per_word": "word_perplexity"}
        return {name: math.exp(min(values[mean], 700.0)) for mean, name in names.items() if mean in values}

    def generate(self, model: nn.Module, wish: Wish) -> Generated:
        """A text that goes on from the prompt, or from the beginning of a line; `<unk>` is never drawn."""
        assert isinstance(model, LanguageModel)
        vocabulary = self.vocabulary
        scorer = Scorer(model, vocabulary)
        prompt = (wish.prompt or "").replace("\\n", "\n")
        tokens = vocabulary.encode(prompt).tolist() if prompt else []
        if tokens and not prompt.endswith("\n") and tokens[-1] == vocabulary.start:
            tokens.pop()  # the line goes on
        log_probabilities, state = scorer.start(1)
        for token in tokens:
            log_probabilities, state = scorer.step(torch.tensor([token]), state)
        for number in range(wish.length or LENGTHS[self.config.data.tokens.kind]):
            log_p = log_probabilities[0].double().cpu()
            if vocabulary.unknown is not None:
                log_p[vocabulary.unknown] = -math.inf
            if wish.temperature:
                cumulated = (log_p / wish.temperature).softmax(-1).cumsum(-1)
                drawn = keyed.number(wish.seed, number, "generate") * float(cumulated[-1])
                tokens.append(int(torch.searchsorted(cumulated, drawn, right=True)))
            else:
                tokens.append(int(log_p.argmax()))
            log_probabilities, state = scorer.step(torch.tensor(tokens[-1:]), state)
        return Generated(vocabulary.decode(tokens), files={})


recipe = Language
