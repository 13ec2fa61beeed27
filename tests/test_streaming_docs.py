"""The commands of docs/streaming.md, as somebody would type them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.test_recogniser import sound
from trainer.config import PROJECT

TEXT = (PROJECT / "docs" / "streaming.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_streaming_model_from_training_to_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript", reason="installed by the extra `onnx`")
    soundfile.write(tmp_path / "hello.wav", sound(2.0), 16000, subtype="PCM_16")
    block = re.findall(r"```sh\n(.*?)```", TEXT, re.S)[0].splitlines()
    assert [line.split()[1] for line in block] == ["prepare", "train", "transcribe", "export"]
    environment = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": str(PROJECT)}
    outputs = []
    for line in block:
        more = ["max_steps=4", "model.rnn.hidden_size=24", "validation.every_steps=50"] if " train " in line else []
        more += ["data.corpus.num_utterances=60"] if " train " in line or " prepare " in line else []
        command = [sys.executable, "-m", "trainer", *line.split()[1:], *more]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        outputs.append(done.stdout + done.stderr)
    assert "hello.wav: " in outputs[2]
    assert "real-time factor" in outputs[2]
    assert "ONNX, int8" in outputs[3]
    (block,) = re.findall(r"```text\n(.*?)```", TEXT, re.S)
    monkeypatch.chdir(tmp_path)
    heard: list[str] = []
    exec(block, {"chunks": np.array_split(sound(2.0), 9), "print": lambda *words: heard.append(words[0])})
    assert len(heard) >= 11
    assert outputs[2].count(f"hello.wav: {heard[0]}\n") == 1
    facts = json.loads((tmp_path / "runs/tones-streaming/export/export.json").read_text())
    assert [form["cer"] is None for form in facts["forms"]] == [False, True, False, False]
    for name in re.findall(r"`(\w+\.(?:pt2?|onnx|yaml|json))`", TEXT):
        assert (tmp_path / "runs/tones-streaming/export" / name).is_file(), name
