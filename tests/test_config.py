"""A configuration is typed, merged from files and arguments, and explains every mistake at once."""

import json
from pathlib import Path

import pytest

from trainer import config as configuration
from trainer import recipe
from trainer.__main__ import main
from trainer.errors import EXIT_USER_MISTAKE, UserError


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        ("optimizer.lrr=0.1", ["the command line", "optimizer.lrr", "unknown key", "optimizer.lr?"]),
        ("lr=0.1", ["unknown key", "did you mean optimizer.lr?"]),
        ("model.rnn.hidden_size=abc", ["model.rnn.hidden_size = 'abc'", "valid integer"]),
        ("model.rnn.cell.kind=lstmm", ["model.rnn.cell.kind = 'lstmm'", "did you mean lstm?"]),
        ("model.rnn.cell={kind: gru, forget_bias: 1}", ["model.rnn.cell.forget_bias", "unknown key"]),
        ("optimizer.lr=-1", ["optimizer.lr = -1", "greater than 0"]),
        ("recipe=speach", ["recipe = 'speach'", "did you mean speech?"]),
        ("model.rnn.structure={kind: block_diagonal, num_blocks: 7}", ["num_blocks = 7", "hidden_size = 96"]),
        ("max_epochs", ["max_epochs: is not an override"]),
        ("optimizer..lr=1", ["optimizer..lr=1: is not an override"]),
        ("optimizer={kind: rmsprop, betas: [0.9, 0.98]}", ["unknown key of kind rmsprop", "belongs to adamw"]),
        ("data.corpus.kind=foo", ["the command line: data.corpus.kind = 'foo'", "known here: an4, common_voice"]),
        ("data.corpus.kind=timitt", ["did you mean timit?"]),
        ("data.text.tokens.kind=words", ["data.text.tokens.kind = 'words'", "did you mean subwords?"]),
        ("data.text.map={ab: c}", ["data.text.map", "'ab' is not one character", "map each on its own"]),
        ("data.text={tokens: {kind: phones}, alphabet: a b a}", ["data.text.alphabet = 'a b a'", "a more than once"]),
        ("data.features.kind=mfcc", ["data.features.kind = 'mfcc'", "'log_mel' or 'precomputed'"]),
        (
            "data={features: {kind: precomputed}, augment: {speeds: [0.9, 1]}}",
            ["data: augment.speeds = [0.9, 1.0] with features.kind = precomputed", "leave the key out"],
        ),
        ("data.corpus={kind: digits, min_digits: 3}", ["data.corpus", "min_digits = 3 is above max_digits = 1"]),
        ("optimizer=adamw", ["optimizer = 'adamw'", "{kind: adamw}", "adamw, rmsprop"]),
        ("optimizer.betas=[2, 0.9]", ["optimizer.betas.0 = 2", "less than 1"]),
        ("data.text.alphabet=abca", ["data.text.alphabet = 'abca'", "'a' more than once"]),
        ('data.text.alphabet="a\\0"', ["data.text.alphabet", "'\\x00'", "take it out"]),
        ("data.features.window_ms=0.01", ["window_ms = 0.01", "equal to 1"]),
        ("data.features.hop_ms=0.01", ["hop_ms = 0.01", "equal to 1"]),
        ("data.augment.speeds=[]", ["speeds = []", "from 0.1 to 10"]),
        ("data.augment.speeds=[0]", ["speeds = [0]", "from 0.1 to 10"]),
        ("data.augment.speeds=[1, -1]", ["speeds = [1, -1]", "from 0.1 to 10"]),
        ("model={[1]: 2}", ["model = '{[1]: 2}'"]),
    ],
)
def test_a_mistake_names_key_value_and_cure(argument: str, wanted: list[str]) -> None:
    with pytest.raises(UserError) as error:
        recipe.load("speech/tones", [argument])
    for text in wanted:
        assert text in str(error.value)


def test_an_argument_that_is_not_yaml_is_a_text() -> None:
    assert recipe.load("speech/tones", ["name=2024-13-01"]).config.name == "2024-13-01"


def test_all_mistakes_are_told_at_once_with_their_files(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "recipe: speech\nseedd: 3\n")
    path = write(tmp_path, "run.yaml", "include: base.yaml\nmax_epochs: many\n")
    with pytest.raises(UserError) as error:
        recipe.load(path, ["plan.num_buckets=0"])
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert any("base.yaml: seedd" in line and "did you mean seed?" in line for line in lines)
    assert any("run.yaml: max_epochs = 'many'" in line for line in lines)
    assert any("the command line: plan.num_buckets = 0" in line for line in lines)


def test_files_and_arguments_are_merged_in_order(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "recipe: speech\nseed: 1\noptimizer: {kind: adamw, lr: 1e-3, clip_norm: 2}\n")
    path = write(tmp_path, "run.yaml", "include: [base.yaml]\nseed: 2\noptimizer: {lr: 2e-3}\n")
    config = recipe.load(path, ["optimizer.clip_norm=3"]).config
    assert (config.seed, config.optimizer.lr, config.optimizer.clip_norm) == (2, 2e-3, 3)
    assert config.name == "run"


def test_another_kind_replaces_the_whole_mapping(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", "recipe: speech\noptimizer: {kind: adamw, betas: [0.8, 0.9]}\n")
    config = recipe.load(path, ["optimizer={kind: rmsprop, alpha: 0.5}"]).config
    assert config.optimizer.kind == "rmsprop"
    assert config.optimizer.alpha == 0.5


@pytest.mark.parametrize(
    "arguments", [["optimizer.kind=rmsprop", "optimizer.alpha=0.5"], ["optimizer.alpha=0.5", "optimizer.kind=rmsprop"]]
)
def test_another_kind_is_one_argument(arguments: list[str]) -> None:
    """What the file has set for the other kind goes, what the command line says stays, whatever its order."""
    config = recipe.load("speech/read_ru", [*arguments, "model.rnn.cell.kind=gru"]).config
    assert (config.optimizer.kind, config.optimizer.alpha) == ("rmsprop", 0.5)
    assert config.model.rnn.cell.kind == "gru"
    assert recipe.load("speech/read_ru", ["optimizer.kind=adamw"]).config.optimizer.betas == (0.9, 0.98)


def test_another_kind_in_an_including_file_replaces_that_of_the_included(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "recipe: speech\noptimizer: {betas: [0.8, 0.9], kind: adamw}\n")
    path = write(tmp_path, "run.yaml", "include: base.yaml\noptimizer: {alpha: 0.5, kind: rmsprop}\n")
    assert recipe.load(path).config.optimizer.alpha == 0.5


def test_a_mapping_without_a_kind_lists_the_kinds(tmp_path: Path) -> None:
    path = write(tmp_path, "run.yaml", "recipe: speech\noptimizer: {lr: 1}\n")
    with pytest.raises(UserError) as error:
        recipe.load(path, ["data.corpus.num_utterances=3"])
    assert "optimizer: needs a `kind`: one of adamw, rmsprop" in str(error.value)
    assert "the command line: data.corpus: needs a `kind`: one of festvox_ru" in str(error.value)


def test_a_key_is_never_suggested_for_itself(tmp_path: Path) -> None:
    text = "recipe: speech\ndata: {1: 2}\nmodel: {subsampling: {kind: conv1d, layers: [{chanels: 3}]}}\n"
    with pytest.raises(UserError) as error:
        recipe.load(write(tmp_path, "run.yaml", text), ["optimizer={kind: rmsprop, betas: 1}"])
    for line in str(error.value).splitlines():
        key = line.split(": ")[1]
        assert f"did you mean {key}?" not in line, line
    assert "layers.0.chanels: unknown key; did you mean model.subsampling.layers.0.channels?" in str(error.value)


def test_a_name_in_a_free_mapping_may_hold_a_dot(tmp_path: Path) -> None:
    text = "recipe: speech\ndata: {text: {map: {'.': '', 'é': e}}}\n"
    config = recipe.load(write(tmp_path, "run.yaml", text), ["data.text.map={'?': ''}"]).config
    assert config.data.text.map == {".": "", "é": "e", "?": ""}


def test_an_anchor_may_be_merged(tmp_path: Path) -> None:
    text = "recipe: speech\ndata: {text: &text {lowercase: false}}\nmodel: {rnn: {hidden_size: 8}}\n"
    path = write(tmp_path, "run.yaml", text + "plan: {<<: {num_buckets: 3}, window_shards: 2}\n")
    config = recipe.load(path).config
    assert (config.plan.num_buckets, config.plan.window_shards) == (3, 2)


@pytest.mark.parametrize("literal", ["1e-3", "1.0e-3", "0.001"])
def test_a_number_may_be_written_as_people_do(literal: str) -> None:
    assert recipe.load("speech/tones", [f"optimizer.lr={literal}"]).config.optimizer.lr == 1e-3


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("recipe: speech\nseed: 1\nseed: 2\n", "'seed' is given twice"),
        ("recipe: [speech\n", "is not YAML"),
        ("include: nowhere.yaml\nrecipe: speech\n", "nowhere.yaml: there is no such file"),
        ("include: run.yaml\n", "includes itself"),
        ("include: 3\n", "include = 3: wanted a file"),
        ("include: [3]\n", r"include = \[3\]: wanted a file"),
        ("include:\n", "include = None: wanted a file"),
        ("recipe: speech\n? [a, b]\n: c\n", "line 2: a key must be text"),
        ("recipe: speech\nname: 2024-13-01\n", "is not YAML: month must be in"),
        ("- 1\n", "holds list"),
        ("seed: 1\n", "recipe: is missing"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, wanted: str) -> None:
    path = write(tmp_path, "run.yaml", text)
    with pytest.raises(UserError, match=wanted) as error:
        recipe.load(path)
    assert "run.yaml" in str(error.value)


def test_an_unknown_config_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean speech/tones\?"):
        recipe.load("speech/tone")
    with pytest.raises(UserError, match=r"xxx\.\.\.: there is no such config"):
        recipe.load("x" * 300)


def test_a_mistake_ends_with_code_2_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "speech/tones", "optimizer.lrr=1"]) == EXIT_USER_MISTAKE
    shown = capsys.readouterr().err
    assert "optimizer.lrr" in shown
    assert "Traceback" not in shown
    assert main(["trian"]) == EXIT_USER_MISTAKE
    assert "did you mean train?" in capsys.readouterr().err


def test_resume_may_change_some_keys_and_no_others() -> None:
    first = recipe.load("speech/tones").config
    saved = configuration.plain(first)
    free = [
        "max_epochs=99",
        "num_workers=3",
        "tracking.log_every_steps=7",
        "zero.stage=1",
        "checkpoint.keep_last=9",
        "data.path=elsewhere",
        "runs_dir=other",
        "validation.every_steps=5",
    ]
    assert configuration.differences(saved, recipe.load("speech/tones", free).config) == []
    other = recipe.load("speech/tones", ["seed=1", "model.rnn.hidden_size=64", "plan.num_buckets=9"]).config
    names = [name for name, _, _ in configuration.differences(saved, other)]
    assert names == ["model.rnn.hidden_size", "plan.num_buckets", "seed"]


def test_a_key_that_is_new_has_its_default_in_an_older_run() -> None:
    config = recipe.load("speech/tones").config
    saved = configuration.plain(config)
    del saved["precision"], saved["optimizer"]["eps"], saved["model"]["rnn"]["cell"]
    assert configuration.differences(saved, config) == []
    other = recipe.load("speech/tones", ["precision=bf16"]).config
    assert configuration.differences(saved, other) == [("precision", "fp32", "bf16")]
    gone = {**configuration.plain(config), "was_once": 3}
    assert configuration.differences(gone, config) == [("was_once", 3, "(absent)")]


def test_a_saved_configuration_is_the_same_when_read_again(tmp_path: Path) -> None:
    config = recipe.load("speech/tones").config
    path = tmp_path / "config.yaml"
    path.write_text(configuration.dump_yaml(configuration.plain(config)), encoding="utf-8")
    again = recipe.from_plain(configuration.load_yaml(path), "config.yaml").config
    assert again == config


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe", b"when: 2024-13-01"], ids=["cut", "not text", "no date"])
def test_a_damaged_configuration_of_a_run_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"config.yaml: is not YAML that can be read: (.|\n)*name=OTHER"):
        configuration.load_yaml(path)


def test_schema_is_json_with_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "speech"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"]["recipe"] == {"const": "speech"}
    assert "max_epochs" in schema["properties"]
    assert "description" in schema["$defs"]["AdamWConfig"]["properties"]["average_decay"]


@pytest.mark.parametrize("path", sorted((configuration.PROJECT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_in_the_project_is_valid(path: Path) -> None:
    if f"{path.parent.name}/" in configuration.NO_RUN:
        pytest.skip("a part that other files include, or a sweep")
    recipe.load(str(path))
