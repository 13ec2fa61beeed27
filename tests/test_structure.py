"""The project's own order: imports point one way, names do not clash, words that must not appear do not."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config import PROJECT
from trainer.doctor import requirements

OWNERS = {
    "deepspeed": {"trainer/distributed.py"},
    "wandb": {"trainer/tracking.py"},
    "webdataset": {"trainer/data/packing.py", "trainer/bench/loader.py", "trainer/bench/plan.py"},
    "yaml": {"trainer/config.py"},
}
VERSIONS_ONLY = {"trainer/doctor.py", "trainer/report.py"}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return names


def sources(*folders: str) -> list[Path]:
    return [p for folder in folders for p in sorted((PROJECT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", sources("kernels", "trainer", "recipes"), ids=lambda p: str(p.relative_to(PROJECT)))
def test_imports_point_one_way(path: Path) -> None:
    place = path.relative_to(PROJECT).as_posix()
    found = imports(path)
    tops = {name.split(".")[0] for name in found}
    if place.startswith("kernels/"):
        assert not tops & {"trainer", "recipes", "tests"}
    if place.startswith("trainer/"):
        assert not tops & {"recipes", "tests"}
    if place.startswith("recipes/"):
        assert not any(name.startswith("recipes.") for name in found)
    if place.startswith("trainer/data/"):
        assert not any(name.startswith("trainer.models") for name in found)
    if place.startswith("trainer/models/"):
        assert not any(name.startswith("trainer.data") for name in found)
    for library, owners in OWNERS.items():
        if library in tops:
            assert place in owners | VERSIONS_ONLY, f"{library} belongs to {owners}"


def test_the_engine_knows_no_task() -> None:
    text = (PROJECT / "trainer/engine.py").read_text(encoding="utf-8").lower()
    for word in ("ctc", "transcript", "log_mel", "speech", "phone"):
        assert word not in text


def test_other_packages_of_these_names_may_be_looked_for() -> None:
    """transformers looks for Hugging Face's `kernels`, others for Coqui's `trainer`: ours must not confuse them."""
    code = (
        "import kernels, trainer, recipes, transformers\n"
        "from transformers import AutoModel, Trainer, BertConfig, BertModel\n"
        "BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))\n"
        f"assert kernels.__file__.startswith({str(PROJECT)!r}), kernels.__file__\n"
        f"assert trainer.__file__.startswith({str(PROJECT)!r}), trainer.__file__\n"
    )
    pytest.importorskip("transformers", reason="installed by the extra `dev`")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_distribution_is_called_ostinato() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == "ostinato"


MODULES = {
    "pyyaml": "yaml",
    "pillow": "PIL",
    "ufal-flashlight-text": "flashlight",
    "zlib-ng": "zlib_ng",
}  # packages whose module has another name
EXTRAS = {
    "botocore": "remote",
    "torchvision": "video",
    "av": "video",
    "sounddevice": "microphone",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
}
"""Imported only where the extra is asked for."""


def test_what_is_imported_is_declared() -> None:
    used = {name.split(".")[0] for path in sources("kernels", "trainer", "recipes") for name in imports(path)}
    # flashrnn and lhotse are rivals of `bench` for whoever has them.
    used -= {"kernels", "trainer", "recipes", "triton", "pydantic_core", "flashrnn", "lhotse"} | set(
        sys.stdlib_module_names
    )
    assert used == {MODULES.get(name, name) for name in requirements()} | set(EXTRAS)
    text = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    for name, extra in EXTRAS.items():
        assert re.search(rf'^{extra} = .*"{name}>=', text, re.M)
