"""Fixtures: a corpus of generated tones, prepared once a session."""

from pathlib import Path

import pytest

from tests.helpers import overrides


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a prepared corpus of 60 short utterances; treat it as read-only."""
    from trainer import recipe

    folder = tmp_path_factory.mktemp("corpus") / "tones"
    recipe.load("speech/tones", overrides(folder, folder)).prepare()
    return folder
