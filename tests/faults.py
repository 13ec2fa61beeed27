"""Faults put into a run from outside: a folder for PYTHONPATH whose `sitecustomize` changes what a process does."""

from pathlib import Path

RAISE = """
from trainer.place import Board
at = Board.at
def fail(self, phase, step=None, *more, **named):
    at(self, phase, step, *more, **named)
    if phase == "forward" and self.place.step == 6 and os.environ.get("RANK") == "1":
        raise ValueError(f"a fault of the model, number {time.time()}")
Board.at = fail
"""
"""Rank 1 fails in the forward pass of step 6, whenever it comes there."""

MISTAKE = "from trainer.errors import UserError" + RAISE.replace("ValueError", "UserError")
"""Rank 1 alone finds a mistake of the user there."""

LOST = RAISE.replace(' and os.environ.get("RANK") == "1"', "").replace(
    'ValueError(f"a fault of the model, number {time.time()}")', 'RuntimeError("Connection closed by peer, says gloo")'
)
"""Both ranks find that the other one is gone, and neither says why."""

HANG = """
from trainer import place
number = 0
def hang(self, name, value):
    global number
    object.__setattr__(self, name, value)
    number += name == "key" and value != ""
    if os.environ.get("RANK") == "1" and number > 80 and once():
        time.sleep(1000)
place.Reading = type("Hanging", (place.Reading,), {"__setattr__": hang})
"""
"""A loader of rank 1 reads one of its samples for ever, the first time: each is looked at twice."""

HEAD = """
import os, pathlib, time
FOLDER = pathlib.Path(__file__).parent
def once():
    try:
        (FOLDER / "happened").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
"""


def put(folder: Path, fault: str) -> str:
    """Make the folder; what PYTHONPATH must begin with."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(HEAD + fault)
    return str(folder)
