"""`python -m trainer VERB ...`: finds the verb, prints a user's mistake as one message, returns the exit code."""

import argparse
import atexit
import contextlib
import importlib
import os
import pkgutil
import sys
from pathlib import Path
from typing import NoReturn

from trainer import verbs
from trainer.config import show
from trainer.errors import EXIT_DONE, EXIT_OUR_FAULT, EXIT_REQUEUE, EXIT_USER_MISTAKE, RequeueError, UserError
from trainer.launch import follow_parent, tell

HIDDEN = {"host", "story"}
"""Verbs that `--help` does not list: what `./launch.sh` alone runs, and what a front end starts on each host."""
PRINTING = {"-h", "--help", "help", "plan", "schema"}
"""Verbs that are done when nobody reads any more, as in `schema | head`."""


def main(arguments: list[str]) -> int:
    """Run a verb.

    Returns:
        the exit code, see `trainer.errors`.
    """
    verb = arguments[0] if arguments else "help"
    try:
        code = run(verb, arguments[1:])
        sys.stdout.flush()
        return code
    except UserError as error:
        tell(str(error))
        return EXIT_USER_MISTAKE
    except PermissionError as error:  # of any file, in whatever verb: the user's to mend
        what = show(Path(os.fsdecode(error.filename))) if error.filename is not None else verb
        tell(f"{what}: {error.strerror}; give yourself the right to it, or name another place")
        return EXIT_USER_MISTAKE
    except RequeueError:
        return EXIT_REQUEUE
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise  # else it is rich's answer to a closed pipe
        for stream in (sys.stdout, sys.stderr):  # else what is left in them is tried, and fails, at the very end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return EXIT_DONE if verb in PRINTING else EXIT_OUR_FAULT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def run(verb: str, rest: list[str]) -> int:
    """Run a verb with its arguments; returns the exit code.

    Raises:
        UserError: there is no such verb, and what the verb raises.
    """
    _check_environment()
    names = sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(verbs.__path__))
    known = [name for name in names if name not in HIDDEN]
    if verb in ("-h", "--help", "help"):
        print_help(known)
        return EXIT_DONE
    if verb not in names:
        import difflib

        near = difflib.get_close_matches(verb, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "known verbs: " + ", ".join(known)
        raise UserError(f"{verb}: there is no such verb; {hint}")
    module = importlib.import_module(f"trainer.verbs.{verb.replace('-', '_')}")
    parser = argparse.ArgumentParser(
        prog=f"./launch.sh {verb}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    arguments, left = parser.parse_known_args(rest)
    if left:  # argparse takes CONFIG and what follows it only where no option stands between them
        if not hasattr(arguments, "overrides") or any(text.startswith("-") or "=" not in text for text in left):
            parser.error(f"unrecognized arguments: {' '.join(left)}")
        arguments.overrides += left
    code: int = module.main(arguments)
    return code


def _check_environment() -> None:
    """See to it that the kernels can be imported: they read a variable of the environment meanwhile.

    Raises:
        UserError: it is set to something else than they know.
    """
    if "OSTINATO_CPU" in os.environ:
        try:
            from kernels import cpu

            cpu.instruction_set()
        except ValueError as error:
            raise UserError(f"the environment: {error}; set that, or nothing") from error


def print_help(names: list[str]) -> None:
    """The list of verbs, each with the first line of its module's text."""
    print("usage: ./launch.sh [VERB [ARGUMENTS]]\n\nWithout a verb: the whole story on the default recipe.\n")
    for name in names:
        text = importlib.util.find_spec(f"trainer.verbs.{name.replace('-', '_')}")
        first = _first_line(text.origin) if text and text.origin else ""
        print(f"  {name:14s} {first}")
    print("  test           the test suite (pytest's arguments)\n\n./launch.sh VERB --help says more.")


def _first_line(path: str) -> str:
    """First line of a module's docstring, without importing what it imports."""
    import ast

    with open(path, encoding="utf-8") as file:
        text = ast.get_docstring(ast.parse(file.read())) or ""
    return text.partition("\n")[0]


def leave(code: int) -> NoReturn:
    """End the process once everything is done and said, without taking the C++ libraries down.

    A rank that had saved once aborted while they were taken down ("terminate called without an active exception": a
    thread that was still joinable, most likely of torch's process group), and its exit code was lost.
    """
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):  # a closed pipe has been dealt with
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    follow_parent()
    try:
        exit_code = main(sys.argv[1:])
    except SystemExit as error:
        exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
    leave(exit_code)
