"""The README's commands do what it says, as a newcomer would type them."""

import os
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from trainer.config import PROJECT

README = (PROJECT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Lines of the shell blocks that need no download."""
    lines = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
    return [line for line in lines if line.startswith("./launch.sh ") and "tones" in line]


@pytest.mark.slow
@pytest.mark.distributed
def test_the_commands_of_the_readme(tmp_path: Path) -> None:
    try:
        metadata.version("ostinato")
    except metadata.PackageNotFoundError:
        pytest.skip("the project is not installed in this environment: run ./launch.sh test")
    lines = commands()
    assert [line.split()[1] for line in lines] == ["prepare", "train", "evaluate", "report"]
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix, "WANDB_MODE": "offline"}
    outputs = []
    for line in lines:
        # One pass is enough to see that every command finds what the one before it left.
        more = " max_epochs=1" if " train " in line else ""
        command = line.replace("./launch.sh", str(PROJECT / "launch.sh")) + more
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        outputs.append(done.stdout)
    assert "CER" in outputs[2]
    assert "report: runs/speech-tones/report.html" in outputs[3]
    assert (tmp_path / "runs" / "speech-tones" / "report.html").stat().st_size > 50_000


def test_every_verb_is_in_the_readme_and_explains_itself() -> None:
    done = subprocess.run([sys.executable, "-m", "trainer", "--help"], cwd=PROJECT, capture_output=True, text=True)
    verbs = re.findall(r"^  ([a-z-]+)\s+\S", done.stdout, re.M)
    known = "train prepare analyze evaluate generate export report plan doctor bench schema shards sweep reproduce test"
    known += " verify-resume transcribe ngram tune"
    assert set(known.split()) == set(verbs)
    for verb in verbs:
        assert f"`{verb}" in README, verb
    from trainer.__main__ import main

    for verb in set(verbs) - {"test"}:
        with pytest.raises(SystemExit) as ended:
            main([verb, "--help"])
        assert ended.value.code == 0


def test_the_examples_run() -> None:
    """Those in Python that can run as they stand."""
    ran = ""
    for path in (PROJECT / "README.md", PROJECT / "docs/kernels.md"):
        for example in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
            if "import " in example:
                exec(compile(example, path.name, "exec"), {})
                ran += example
    assert "to_torch" in ran
    assert "block_gru" in ran


def test_what_the_documents_prepare_plan_train_and_sweep_is_there() -> None:
    """Every such line of a shell block is read as far as its configuration; `speech/mine` is the reader's own."""
    from trainer import recipe
    from trainer.sweep import config, points

    found = set()
    for path in [PROJECT / "README.md", *(PROJECT / "docs").glob("*.md")]:
        for block in re.findall(r"```sh\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] != ["./launch.sh"] or len(words) < 3 or words[2] == "speech/mine":
                    continue
                verb, name, *more = words[1:]
                if verb in ("prepare", "plan", "train"):
                    own = ("nproc=", "world_size=", "utterances=")  # of the verb
                    recipe.load(name, [m for m in more if "=" in m and not m.startswith(own)])
                elif verb in ("sweep", "reproduce"):
                    file = name if verb == "sweep" else f"configs/sweeps/{name}.yaml"
                    points.points(config.load(PROJECT / file), "a")
                found.add(f"{path.name} {verb}")
    assert {"README.md sweep", "README.md train", "music.md prepare", "memory.md plan", "sweeps.md reproduce"} <= found


def test_the_file_of_a_sweep_in_the_documents_is_one(tmp_path: Path) -> None:
    from trainer import recipe
    from trainer.sweep import config, points

    (example,) = re.findall(r"```yaml\n(.*?)```", (PROJECT / "docs/sweeps.md").read_text(encoding="utf-8"), re.S)
    (tmp_path / "a.yaml").write_text(example, encoding="utf-8")
    every = points.points(config.load(tmp_path / "a.yaml"), "a")
    assert len(every) == 2 * 2 * 3
    recipe.load(every[-1].config, every[-1].overrides)


def test_the_settings_of_the_corpora_are_valid(tmp_path: Path) -> None:
    from trainer import recipe

    text = (PROJECT / "docs/corpora.md").read_text(encoding="utf-8")
    kinds = []
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", text, re.S)):
        path = tmp_path / f"{number}.yaml"
        path.write_text(f"recipe: speech\n{block}", encoding="utf-8")
        kinds.append(recipe.load(str(path), []).config.data.corpus.kind)  # type: ignore[attr-defined]
    assert kinds == ["kaldi", "manifest", "lhotse"]


def test_links_of_the_documents_lead_somewhere() -> None:
    for path in [PROJECT / "README.md", *(PROJECT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_command_of_the_documents_names_what_is_there() -> None:
    """Whatever takes a configuration loads it with the settings of the line; results.md tells of the past."""
    from trainer import recipe

    seen = set()
    for path in [PROJECT / "README.md", *(PROJECT / "docs").rglob("*.md")]:
        text = "" if path.name == "results.md" else path.read_text(encoding="utf-8").replace("\\\n", " ")
        for verb, config, rest in re.findall(r"launch\.sh (prepare|train|plan|bench \w+) (\w+/\w+)([^`\n#|]*)", text):
            given = [word for word in shlex.split(rest) if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
            given = [word for word in given if word.partition("=")[0] not in ("nproc", "world_size", "utterances")]
            if config != "speech/mine":  # the reader's
                recipe.load(config, given)
                seen.add((verb, config))
    assert {("train", "transducer/read_ru"), ("plan", "speech/read_ru_block")} <= seen
    assert ("bench memory", "speech/read_ru_deep") in seen


def test_every_corpus_is_in_the_table_and_its_command_loads() -> None:
    import typing

    from trainer import recipe
    from trainer.data.corpora import CorpusConfig

    text = (PROJECT / "docs" / "corpora.md").read_text(encoding="utf-8")
    kinds = {member.model_fields["kind"].default for member in typing.get_args(typing.get_args(CorpusConfig)[0])}
    assert set(re.findall(r"^\| [^|]* \| `(\w+)` \|", text, re.M)) - {"data.corpus.kind"} == kinds
    commands = re.findall(r"`prepare (speech/\w+)([^`]*)`", text)
    assert len(commands) == 10
    for config, arguments in commands:
        loaded = recipe.load(config, arguments.split()).config
        assert f"| `{loaded.data.corpus.kind}` |" in text
