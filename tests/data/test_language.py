"""Texts are read from every layout, tokens go to numbers and back, and the counts are the published ones."""

import io
import json
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from trainer.data import language, rdata
from trainer.data.language import LanguageDataConfig, Prepared
from trainer.data.stream import StreamConfig
from trainer.data.texts import PACKAGE, SPLITS
from trainer.data.vocabulary import END, UNKNOWN, CharactersConfig, SubwordsConfig, WordsConfig
from trainer.errors import UserError

TEXTS = {
    "train": "the cat sat\nthe dog\n\nthe cat\n" + "a bat and a rat\n" * 90,
    "valid": "the rat\n",
    "test": "the cat saw\na dog\n",
}
SHARED = Path(__file__).parents[2] / "../shared/data/language"


def quiet(what: str, done: int, total: int) -> None:
    pass


def config(folder: Path, **options) -> LanguageDataConfig:
    return LanguageDataConfig(path=folder / "made", **options)


def write_corpus(folder: Path, kind: str) -> dict:
    """A corpus of a layout; the `corpus` that finds it."""
    folder.mkdir()
    whole = "".join(TEXTS[split] for split in SPLITS)
    if kind in ("text8", "enwik8"):
        with zipfile.ZipFile(folder / f"{kind}.zip", "w") as archive:
            archive.writestr(kind, whole)
        return {"kind": kind, "path": folder, "sizes": [len(TEXTS[split]) for split in SPLITS]}
    names = {"ptb": "ptb.{}.txt", "wikitext": "wiki.{}.tokens", "files": "{}.txt"}
    for split, text in TEXTS.items():
        padded = "".join(f" {line} \n" for line in text.splitlines())  # as PTB and WikiText have it
        padded += " \n" * (kind == "wikitext")  # whose files end with a line that is empty
        (folder / names[kind].format(split)).write_text(padded)
    if kind == "files":
        return {"kind": kind, **{split: folder / f"{split}.txt" for split in SPLITS}}
    return {"kind": kind, "path": folder}


@pytest.mark.parametrize("kind", ["ptb", "wikitext", "text8", "enwik8", "files"])
def test_each_layout_gives_the_same_texts(tmp_path: Path, kind: str) -> None:
    made = config(tmp_path, corpus=write_corpus(tmp_path / "corpus", kind))
    counts = language.prepare(made, quiet)
    prepared = Prepared.open(made)
    last = "\n" * (kind == "wikitext")
    for split in SPLITS:
        assert prepared.vocabulary.decode(prepared.tokens(split)) == TEXTS[split] + last
        assert counts[split].characters == counts[split].tokens == len(TEXTS[split] + last)
    data = prepared.dataset("test", StreamConfig(), 0)
    assert data.units == {"characters": 1.0, "words": (7 + len(last)) / counts["test"].tokens}


TOKENS = [
    CharactersConfig(),
    WordsConfig(),
    WordsConfig(split="punctuation", size=7),
    SubwordsConfig(size=275),
    SubwordsConfig(size=275, model="bpe"),
]


@pytest.mark.parametrize("tokens", TOKENS, ids=lambda t: f"{t.kind}-{getattr(t, 'model', getattr(t, 'split', ''))}")
def test_tokens_go_to_numbers_and_back_the_frequent_ones_first(tokens) -> None:
    vocabulary = tokens.learn(TEXTS)
    again = tokens.load(vocabulary.save())
    assert again.identity == vocabulary.identity
    numbers = again.encode(TEXTS["train"])
    assert numbers.max() < len(vocabulary)
    if tokens.kind != "subwords":
        counts = np.bincount(numbers, minlength=len(vocabulary))
        counts = np.delete(counts, [vocabulary.unknown] if vocabulary.unknown is not None else [])
        assert (np.diff(counts) <= 0).all()
    known = vocabulary.unknown is None or getattr(tokens, "size", None) is None
    if known:
        assert vocabulary.decode(numbers) == TEXTS["train"]
        assert vocabulary.decode(vocabulary.encode("the cat")).rstrip("\n") == "the cat"
    if tokens.kind != "characters":
        assert (numbers == vocabulary.start).sum() == TEXTS["train"].count("\n")


def test_a_word_that_training_lacks_is_unknown_or_refused() -> None:
    vocabulary = WordsConfig().learn(TEXTS)
    assert vocabulary.unknown is not None  # "saw" stands in the test text alone
    assert vocabulary.decode(vocabulary.encode("the saw\n")) == f"the {UNKNOWN}\n"
    closed = WordsConfig().learn({**TEXTS, "test": "the cat\n"})
    assert closed.unknown is None
    with pytest.raises(UserError, match="'saw': is not in the vocabulary"):
        closed.encode("the saw\n")
    with pytest.raises(UserError, match=r"data.tokens.size = 900: the text gives \d+ at most; lower it"):
        SubwordsConfig(size=900).learn(TEXTS)
    small = WordsConfig(size=4).learn(TEXTS)
    assert (len(small), {END, UNKNOWN} <= set(small.words)) == (4, True)
    with pytest.raises(UserError, match="'z': is in none of the texts"):
        CharactersConfig().learn(TEXTS).encode("z")
    assert WordsConfig(split="punctuation", lowercase=True).words("It's so, Anne!") == ["it's", "so", ",", "anne", "!"]


def test_prepared_once_and_refused_for_other_settings(tmp_path: Path) -> None:
    made = config(tmp_path, corpus=write_corpus(tmp_path / "corpus", "ptb"))
    with pytest.raises(UserError, match="holds no prepared text yet; run"):
        Prepared.open(made)
    language.prepare(made, quiet)
    (tmp_path / "corpus" / "ptb.test.txt").write_text("the text is another\n")
    assert language.prepare(made, quiet)["test"].tokens == len("the text is another\n")
    (tmp_path / "corpus" / "ptb.train.txt").unlink()  # not read again
    language.prepare(made, quiet)
    other = made.model_copy(update={"tokens": WordsConfig()})
    with pytest.raises(UserError, match=r"was prepared as .*characters.*, wanted .*words"):
        Prepared.open(other)
    with pytest.raises(UserError, match=r"data.corpus.path = .*: holds no ptb.train.txt and no train.txt"):
        language.prepare(other, quiet)
    with pytest.raises(UserError, match=r"data.corpus.path: is missing"):
        language.prepare(config(tmp_path / "x", corpus={"kind": "wikitext"}), quiet)
    (made.path / "train.npy").write_bytes(b"nothing")
    language.prepare(config(tmp_path, corpus=write_corpus(tmp_path / "two", "ptb")), quiet)


def test_a_full_disk_and_the_corpus_of_another_recipe_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(tmp_path, corpus=write_corpus(tmp_path / "corpus", "ptb"))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match=r"made: cannot be written: No space left on device; make room"):
            language.prepare(made, quiet)
    (made.path / "corpus.json").write_text('{"made_of": {}}')
    for use in (lambda: language.prepare(made, quiet), lambda: Prepared.open(made)):
        with pytest.raises(UserError, match=r"made: holds another recipe's corpus; name another folder"):
            use()


@pytest.mark.parametrize("damage", ["another member", "cut short"])
def test_an_archive_that_holds_no_text_is_told(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "text8.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other" if damage == "another member" else "text8", "some text " * 50)
    content = path.read_bytes()
    if damage == "cut short":
        path.write_bytes(content[:20] + b"?" * 30 + content[50:])
    with pytest.raises(UserError, match=r"text8.*: no text8 can be read from it \(.*\); fetch it again"):
        config(tmp_path, corpus={"kind": "text8", "path": path}).corpus.read(tmp_path, quiet)


def test_one_text_is_cut_into_three(tmp_path: Path) -> None:
    path = tmp_path / "all.txt"
    path.write_text("x" * 899 + "\n" + "y" * 49 + "\n" + "z" * 49 + "\n")
    texts = config(tmp_path, corpus={"kind": "files", "train": path}).corpus.read(tmp_path, quiet)
    assert [len(texts[split]) for split in SPLITS] == [900, 50, 50]
    assert texts["test"] == "z" * 49 + "\n"
    lines = "".join(f"line {i} with some words\n" for i in range(70))
    path.write_text("\ufeff" + lines, encoding="utf-8")  # with the mark that some editors write
    texts = config(tmp_path, corpus={"kind": "files", "train": path}).corpus.read(tmp_path, quiet)
    assert "".join(texts[split] for split in SPLITS) == lines
    assert all(texts[split].endswith("words\n") for split in SPLITS), "no line is cut"
    path.write_text("a line\n" + "some words " * 300 + "\nthe end\n")  # both places lie in one line
    texts = config(tmp_path, corpus={"kind": "files", "train": path}).corpus.read(tmp_path, quiet)
    assert len(texts["valid"]) > 100
    path.write_text("some words " * 300)
    texts = config(tmp_path, corpus={"kind": "files", "train": path}).corpus.read(tmp_path, quiet)
    assert {word for split in SPLITS for word in texts[split].split()} == {"some", "words"}, "no word is cut"


# R's serialisation, written by hand: what its manual says the bytes are


def _head(kind: int, extra: int = 0) -> bytes:
    return struct.pack(">i", kind | extra)


def _text(text: str) -> bytes:
    content = text.encode()
    return _head(9, 1 << 15) + struct.pack(">i", len(content)) + content


def _texts(values: list[str]) -> bytes:
    return _head(16) + struct.pack(">i", len(values)) + b"".join(map(_text, values))


def _integers(*values: int) -> bytes:
    return _head(13) + struct.pack(f">{1 + len(values)}i", len(values), *values)


def _named(values: dict[str, bytes]) -> bytes:
    attributes = _head(2, 0x400) + _head(1) + _text("names") + _texts(list(values)) + _head(254)
    return _head(19, 0x200) + struct.pack(">i", len(values)) + b"".join(values.values()) + attributes


def serialised(item: bytes) -> bytes:
    return b"X\n" + struct.pack(">iii", 2, 0x40200, 0x20300) + item


def write_package(folder: Path, objects: dict[str, list[str]]) -> None:
    folder.mkdir(parents=True)
    places, content = {}, b""
    for name, lines in objects.items():
        plain = serialised(_texts(lines))
        packed = struct.pack(">i", len(plain)) + zlib.compress(plain)
        places[name] = _integers(len(content), len(packed))
        content += packed
    listed = serialised(_named({"variables": _named(places), "references": _named({}), "compressed": _integers(1)}))
    (folder / "Rdata.rdx").write_bytes(zlib.compress(listed))
    (folder / "Rdata.rdb").write_bytes(content)


def test_the_data_of_an_r_package_are_read_and_damage_is_told(tmp_path: Path) -> None:
    objects = {"emma": ["EMMA", "", "Été"], "other": []}
    write_package(tmp_path / "data", objects)
    assert rdata.read_package(tmp_path / "data") == objects
    whole = serialised(_texts(["a", "b"]))
    for content in (
        whole[:-1],
        b"X\n\0",
        b"RDX3\n",
        serialised(_head(25)),
        b"\x78\x9c nothing",
        whole[:14] + b"\xff" * 9,
    ):
        with pytest.raises(rdata.RDataError):
            rdata.parse(content)


def test_one_novel_is_held_out_whole_and_paragraphs_are_joined(tmp_path: Path) -> None:
    names = ["emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility"]
    novels = {name: [name, "", *(["one", "two", "", ""] * 20)] for name in names}
    write_package((tmp_path / "raw" / PACKAGE.holds).parent, novels)
    made = LanguageDataConfig(path=tmp_path, corpus={"kind": "austen", "valid_share": 0.1})
    texts = made.corpus.read(tmp_path, quiet)
    assert texts["test"] == "persuasion\n" + "one two\n" * 20
    assert "persuasion" not in texts["train"] + texts["valid"]
    assert texts["train"].startswith("emma\none two\none two\n")
    assert texts["valid"] == "one two\n" * (2 * 5)


def published(name: str, **options) -> dict:
    if not SHARED.is_dir():
        pytest.skip("the texts are not beside this checkout")
    return {"corpus": {"kind": name, "path": SHARED}, **options}


@pytest.mark.parametrize(
    ("kind", "classes", "wanted"),
    [
        ("words", 10_000, (929_589, 73_760, 82_430)),
        ("characters", 50, (5_017_482, 393_042, 442_423)),
    ],
)
def test_penn_treebank_has_its_published_counts(tmp_path: Path, kind: str, classes: int, wanted: tuple) -> None:
    """Mikolov et al. 2010 (words) and 2012 (characters)."""
    made = config(tmp_path, **published("ptb", tokens={"kind": kind}))
    counts = language.prepare(made, quiet)
    assert tuple(counts[split].tokens for split in SPLITS) == wanted
    prepared = Prepared.open(made)
    assert len(prepared.vocabulary) == classes
    for split in SPLITS:
        plan = prepared.dataset(split, StreamConfig(), 0).plan
        assert plan.epoch(0).totals()["tokens"] == counts[split].tokens
    assert counts["test"].characters == 442_423
    facts = json.loads((made.path / "corpus.json").read_text())
    assert str(SHARED) not in json.dumps(facts)
    assert io.BytesIO(prepared.vocabulary.save()).getvalue()
