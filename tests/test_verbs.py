"""Verbs answer a user's mistake in one message: wrong numbers, a run that is damaged or of another configuration."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from kernels import cpu
from tests.helpers import overrides
from trainer import checkpoint, recipe
from trainer import config as configuration
from trainer.__main__ import main
from trainer.errors import EXIT_USER_MISTAKE, UserError
from trainer.run import RunDirectory


@pytest.fixture
def run(corpus: Path, tmp_path: Path) -> Path:
    """A run directory that holds its configuration and nothing else."""
    config = recipe.load("speech/tones", overrides(corpus, tmp_path)).config
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text(configuration.dump_yaml(configuration.plain(config)), encoding="utf-8")
    return path


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == EXIT_USER_MISTAKE
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown


@pytest.mark.parametrize("verb", ["evaluate", "report"])
@pytest.mark.parametrize("content", [b"seed: [1", b"? [a]\n: 1\n", b"name: \xff"], ids=["open", "key", "not text"])
def test_a_damaged_configuration_of_a_run_is_named(
    capsys: pytest.CaptureFixture[str], run: Path, verb: str, content: bytes
) -> None:
    (run / "config.yaml").write_bytes(content)
    assert "config.yaml" in mistake(capsys, verb, str(run))


def test_a_trained_model_keeps_its_shape(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    shown = mistake(capsys, "evaluate", str(run), "model.rnn.hidden_size=32")
    assert "the command line: model.rnn.hidden_size = 32: the run was trained with 16" in shown
    assert "holds no checkpoint" in mistake(capsys, "evaluate", str(run), "plan.micro_batch_seconds=9")


def test_a_run_of_another_alphabet_is_not_evaluated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, corpus: Path, run: Path
) -> None:
    model = recipe.load("speech/tones", overrides(corpus, run)).build_model()
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    monkeypatch.setattr(checkpoint, "newest", lambda folder: SimpleNamespace(state={"shapes": shapes}))
    shown = mistake(capsys, "evaluate", str(run), "data.text.alphabet=abc")
    assert "output.bias is [10] in its checkpoint, [4] with the data of this configuration" in shown
    assert "data.path=" in shown


def test_a_name_that_no_folder_can_have_is_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert "xxx: is no" in mistake(capsys, "evaluate", "x" * 300)


def test_an_instruction_set_that_nobody_knows_is_a_mistake(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "instruction_set", cpu.instruction_set.__wrapped__)
    monkeypatch.setenv("OSTINATO_CPU", "avx")
    assert "OSTINATO_CPU='avx', wanted one of portable, avx2, avx512; set that" in mistake(capsys, "schema")


@pytest.mark.parametrize("number", ["0", "-1", "x", "²", "1.5"])
def test_a_number_of_processes_is_checked(capsys: pytest.CaptureFixture[str], number: str) -> None:
    assert f"world_size = '{number}': wanted a whole number" in mistake(
        capsys, "plan", "speech/tones", f"world_size={number}"
    )


def test_a_name_is_no_markup(capsys: pytest.CaptureFixture[str], corpus: Path, tmp_path: Path) -> None:
    assert main(["plan", "speech/tones", *overrides(corpus, tmp_path, 'name="[/red]"')]) == 0
    assert "[/red], epoch 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("world_size", "wanted"),
    [
        (6, "ranks 4 to 5 have nothing to do in any step"),
        (5, "rank 4 has nothing to do"),
        (3, "keep the ranks in step; make plan.micro_batches_per_step a multiple of the 3 processes, e.g. 6"),
        (2, None),
    ],
)
def test_idle_ranks_are_told_before_anything_starts(
    capsys: pytest.CaptureFixture[str], corpus: Path, tmp_path: Path, world_size: int, wanted: str | None
) -> None:
    arguments = overrides(corpus, tmp_path, "plan.max_seconds=2.5", f"world_size={world_size}")
    assert main(["plan", "speech/tones", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "longer than 2.5 s" in shown
    assert "forward and backward take" in " ".join(shown.replace("│", " ").split())
    left_out, *warnings = [line for line in shown.splitlines() if line.startswith("warning:") and "padding" not in line]
    assert "of the samples are left out, see above; mend the data" in left_out
    assert (wanted in warnings[0]) if wanted else not warnings


@pytest.mark.parametrize(
    "command",
    [
        ("shards", "lint", ".", "--json"),
        ("shards", "stats", ".", "--picture"),
        ("shards", "preview", ".", "--page"),
        ("bench", "kernels", "--only=none", "--json"),
        ("bench", "kernels", "--only=none", "--picture"),
    ],
    ids=" ".join,
)
def test_a_file_that_cannot_be_written_is_told_before_the_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: tuple[str, ...]
) -> None:
    shown = mistake(capsys, *command, str(tmp_path / "none" / "file"))
    assert f"{command[-1]} {tmp_path}/none/file: cannot be written: No such file or directory; name another" in shown


@pytest.mark.parametrize("left", ["metrics.jsonl", "ledger/rank-00000.jsonl", "checkpoints/step-00000001"])
def test_a_start_that_was_refused_holds_nobody_to_its_settings(tmp_path: Path, left: str) -> None:
    first, second = (recipe.load("copying/t1000", [f"model.hidden_size={size}"]).config for size in (8, 9))
    RunDirectory(tmp_path / "run").claim(first)
    RunDirectory(tmp_path / "run").save_config(first)
    RunDirectory(tmp_path / "run").claim(second)
    RunDirectory(tmp_path / "run").save_config(second)
    assert RunDirectory(tmp_path / "run").saved_config()["model"]["hidden_size"] == 9
    (tmp_path / "run" / left).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / left).touch()
    with pytest.raises(UserError, match=r"model.hidden_size = 9, now 8\n.*put the values back"):
        RunDirectory(tmp_path / "run").claim(first)


def test_a_file_that_may_not_be_read_is_the_users_to_mend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As root one may read everything, so the refusal is made."""

    def refuse(path: Path, *arguments: object, **named: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "corpus.json").write_text("{}")
    monkeypatch.setattr(Path, "read_text", refuse)
    assert main(["shards", "lint", str(tmp_path)]) == EXIT_USER_MISTAKE
    assert capsys.readouterr().err.strip().endswith("give yourself the right to it, or name another place")
