"""Fixtures: a corpus of generated tones, prepared once a session. The chaos suite runs when it is asked for."""

from pathlib import Path

import pytest

from tests.helpers import overrides


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "chaos" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("chaos")])
        items[:] = [item for item in items if not item.get_closest_marker("chaos")]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a prepared corpus of 60 short utterances; treat it as read-only."""
    from trainer import recipe

    folder = tmp_path_factory.mktemp("corpus") / "tones"
    recipe.load("speech/tones", overrides(folder, folder)).prepare()
    return folder
