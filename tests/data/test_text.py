"""Transcripts become labels and come back; what is outside the alphabet follows the rule and is counted."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.data import layouts
from trainer.data.corpora.manifest import ManifestConfig
from trainer.data.index import Index
from trainer.data.prepare import prepare
from trainer.data.prepared import Prepared, SpeechDataConfig, build_tokens
from trainer.data.text import (
    BLANK,
    SUBWORDS_FILE,
    Characters,
    Phones,
    PhonesConfig,
    Subwords,
    SubwordsConfig,
    TextConfig,
    Tokens,
    UnknownCharacterError,
    ctc_frames,
)
from trainer.errors import UserError

SENTENCES = [
    "she sells sea shells on the sea shore",
    "the shells she sells are sea shells for sure",
    "for if she sells sea shells on the sea shore",
    "then i am sure she sells sea shore shells",
]
MODEL = SubwordsConfig(vocabulary_size=24).train(SENTENCES)

TOKENS: dict[str, tuple[Tokens, str, str]] = {
    "characters": (Characters(" abcdefhlnorstu'"), "don't sell", "don't sell z"),
    "phones": (Phones("sil aa ah b"), "sil b aa b sil", "sil zz"),
    "subwords": (Subwords(MODEL), "she sells sure shore", "she sells жar"),
}
"""Tokens, a text that they can write, and one that they cannot."""


@pytest.mark.parametrize("name", TOKENS)
def test_labels_come_back_as_the_text(name: str) -> None:
    tokens, text, outside = TOKENS[name]
    labels = tokens.encode(text)
    assert all(0 < label < len(tokens) for label in labels)
    assert tokens.decode(labels) == tokens.decode([BLANK, *labels, BLANK]) == text
    assert tokens.decode([]) == ""
    with pytest.raises(UnknownCharacterError):
        tokens.encode(outside)
    again = pickle.loads(pickle.dumps(tokens))  # as loader processes get them
    assert (again.encode(text), again.identity) == (labels, tokens.identity)


def test_labels_of_another_meaning_have_another_identity() -> None:
    other = Subwords(SubwordsConfig(vocabulary_size=24, model="bpe").train(SENTENCES))
    assert len(other) == len(TOKENS["subwords"][0])
    assert other.identity != TOKENS["subwords"][0].identity
    assert Phones("a b").identity != Phones("b a").identity


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_a_vocabulary_is_a_function_of_the_texts(model: Any) -> None:
    config = SubwordsConfig(vocabulary_size=24, model=model)
    assert config.train(SENTENCES) == config.train(SENTENCES)
    tokens = Subwords(config.train(SENTENCES))
    assert len(tokens) == 24
    assert len(tokens.encode(SENTENCES[0])) < len(SENTENCES[0]) / 2, "pieces are longer than characters"


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (5000, r"vocabulary_size = 5000: the training transcripts give \d+ at most; lower it"),
        (4, "each needs a piece; ra"),
    ],
)
def test_a_vocabulary_of_another_size_than_the_texts_give_is_a_mistake(size: int, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        SubwordsConfig(vocabulary_size=size).train(SENTENCES)


def test_ctc_needs_a_frame_between_equal_labels() -> None:
    assert ctc_frames("hello") == 6
    assert ctc_frames([1, 1, 1, 2]) == 6
    assert ctc_frames([]) == 0


def test_phones_are_scored_as_they_are_told() -> None:
    assert PhonesConfig(scored_as={"cl": "sil", "q": ""}).scored("cl ah q b") == ["sil", "ah", "b"]


@pytest.mark.parametrize(
    ("settings", "text", "wanted", "outside"),
    [
        ({}, "Don't  STOP", "don't stop", {}),
        ({"lowercase": False}, "Don't  STOP", "Don't STOP", {}),
        ({"alphabet": " abc", "unknown": "drop"}, "A-b, c!-", "ab c", {"-": 2, ",": 1, "!": 1}),
        ({"alphabet": " abc", "unknown": "space"}, "A-b, c!-", "a b c", {"-": 2, ",": 1, "!": 1}),
        (
            {"alphabet": " abce", "unknown": "drop", "map": {"é": "e", "-": " ", "1": " a b "}},
            "é-1x",
            "e a b",
            {"x": 1},
        ),
        ({"alphabet": "abc", "unknown": "drop"}, "a b - c", "abc", {"-": 1, " ": 2}),
        ({"tokens": PhonesConfig()}, "SIL  aa B", "sil aa b", {}),
        ({"tokens": PhonesConfig(), "alphabet": "sil b", "unknown": "drop"}, "sil bb b ", "sil b", {"bb": 1}),
        ({"tokens": PhonesConfig(), "map": {"q": "", "ax-h": "ah"}, "lowercase": False}, "Q q ax-h", "Q ah", {}),
    ],
)
def test_a_text_is_normalised(settings: dict[str, Any], text: str, wanted: str, outside: dict[str, int]) -> None:
    config = TextConfig(**settings)
    got, found = config.normalise(text, config.alphabet)
    assert (got, dict(found)) == (wanted, outside)


# --- through prepare --------------------------------------------------------------------------------------------------


def corpus(root: Path, texts: dict[str, list[str]], **text: Any) -> SpeechDataConfig:
    """Settings of a corpus of these texts, whose recordings are all the same."""
    if not (root / "a.wav").exists():  # written again it would be a new recording
        layouts.noise(root / "a.wav", 8000, 2.0)
    rows = [
        {"audio": "a.wav", "text": t, "split": split, "key": f"{split}{number}"}
        for split, group in texts.items()
        for number, t in enumerate(group)
    ]
    layouts.lines(root / "all.jsonl", *(json.dumps(row, ensure_ascii=False) for row in rows))
    return SpeechDataConfig(
        corpus=ManifestConfig(files=(root / "all.jsonl",)),
        path=root / "made",
        sample_rate_hz=8000,
        text=TextConfig(**text),
    )


TEXTS = {"train": ["ab", "ba", "a b"], "valid": ["a-b", "b-é"], "test": ["ab!"]}


@pytest.mark.parametrize(("rule", "wanted"), [("drop", ["ab", "b"]), ("space", ["a b", "b"])])
def test_the_rule_holds_for_letters_that_training_has_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rule: str, wanted: list[str]
) -> None:
    config = corpus(tmp_path, TEXTS, unknown=rule)
    prepared = prepare(config, processes=1)
    assert prepared.alphabet == " ab"
    assert prepared.outside_alphabet == {"-": 2, "é": 1, "!": 1}
    shown = capsys.readouterr().out
    assert "'-' 2 in 2 utterances, 'é' 1 in 1 utterances, '!' 1 in 1 utterances" in shown
    assert ("dropped" if rule == "drop" else "a space instead") in shown
    index = Index.load(config.path / "valid", 8000)
    assert index.label_length.tolist() == [len(text) for text in wanted]


def test_a_mapped_letter_is_not_unknown(tmp_path: Path) -> None:
    prepared = prepare(corpus(tmp_path, TEXTS, map={"-": " ", "é": "a", "!": ""}), processes=1)
    assert (prepared.alphabet, prepared.outside_alphabet) == (" ab", {})


def test_unknown_letters_are_an_error_with_counts(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        prepare(corpus(tmp_path, TEXTS), processes=1)
    lines = str(caught.value).splitlines()
    assert "line 4: key valid0: text = 'a-b': holds '-', which the alphabet of the training texts has not" in lines[0]
    assert "outside the alphabet (an error): '-' 2 in 2 utterances, 'é' 1 in" in lines[-2]


SUBWORDS = {"tokens": SubwordsConfig(vocabulary_size=24)}
SPLIT_SENTENCES = {"train": SENTENCES, "valid": ["she sells shore"], "test": ["the sea is sure"]}


def test_subwords_are_learnt_once_from_training_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = corpus(tmp_path, SPLIT_SENTENCES, **SUBWORDS)
    prepared = prepare(config, processes=1)
    model = (config.path / SUBWORDS_FILE).read_bytes()
    assert model == MODEL, "valid and test are not in it"
    tokens = build_tokens(config, prepared)
    index = Index.load(config.path / "train", 8000)
    assert index.label_length.tolist() == [len(tokens.encode(text)) for text in SENTENCES]
    assert index.ctc_frames.tolist() == [ctc_frames(tokens.encode(text)) for text in SENTENCES]

    with monkeypatch.context() as patch:
        patch.setattr(SubwordsConfig, "train", lambda *a: pytest.fail("it is learnt already"))
        capsys.readouterr()
        prepare(config, processes=1)
    assert "up to date" in capsys.readouterr().out

    (config.path / SUBWORDS_FILE).write_bytes(SubwordsConfig(vocabulary_size=20).train(SENTENCES))
    with pytest.raises(UserError, match="is not the vocabulary that"):
        build_tokens(config, Prepared.load(config.path))
    (config.path / SUBWORDS_FILE).write_bytes(b"nothing")
    with pytest.raises(UserError, match="is no vocabulary; delete it"):
        build_tokens(config, prepared)
    prepare(config, processes=1)
    assert (config.path / SUBWORDS_FILE).read_bytes() == model


def test_other_labels_write_the_shards_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(corpus(tmp_path, SPLIT_SENTENCES), processes=1)
    capsys.readouterr()
    prepare(corpus(tmp_path, SPLIT_SENTENCES, **SUBWORDS), processes=1)
    assert "3 of 3 shards written" in capsys.readouterr().out


def test_more_pieces_than_the_texts_give_is_a_mistake(tmp_path: Path) -> None:
    config = corpus(tmp_path, SPLIT_SENTENCES, tokens=SubwordsConfig(vocabulary_size=5000))
    with pytest.raises(UserError, match=r"^data\.text\.tokens\.vocabulary_size = 5000"):
        prepare(config, processes=1)
    bad = {**SPLIT_SENTENCES, "test": ["   "]}
    config = corpus(tmp_path, bad, tokens=SubwordsConfig(vocabulary_size=5000))
    with pytest.raises(UserError, match=r"line 6: key test0: text = .*\n.*vocabulary_size = 5000"):
        prepare(config, processes=1)
