"""`python -m trainer VERB ...`: finds the verb, prints a user's mistake as one message, returns the exit code."""

import argparse
import importlib
import pkgutil
import sys

from trainer import verbs
from trainer.errors import EXIT_REQUEUE, EXIT_USER_MISTAKE, RequeueError, UserError
from trainer.launch import die_with_spawner, tell


def main(arguments: list[str]) -> int:
    """Run a verb.

    Returns:
        the exit code, see `trainer.errors`.
    """
    names = sorted(m.name for m in pkgutil.iter_modules(verbs.__path__))
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print_help(names)
        return 0
    verb, rest = arguments[0].replace("-", "_"), arguments[1:]
    try:
        if verb not in names:
            import difflib

            near = difflib.get_close_matches(verb, names, n=1)
            hint = f"did you mean {near[0]}?" if near else "known verbs: " + ", ".join(names)
            raise UserError(f"{arguments[0]}: there is no such verb; {hint}")
        module = importlib.import_module(f"trainer.verbs.{verb}")
        parser = argparse.ArgumentParser(
            prog=f"./launch.sh {arguments[0]}",
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parser)
        code: int = module.main(parser.parse_args(rest))
        return code
    except UserError as error:
        tell(str(error))
        return EXIT_USER_MISTAKE
    except RequeueError:
        return EXIT_REQUEUE
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def print_help(names: list[str]) -> None:
    """The list of verbs, each with the first line of its module's text."""
    print("usage: ./launch.sh [VERB [ARGUMENTS]]\n\nWithout a verb: the whole story on the default recipe.\n")
    for name in names:
        text = importlib.util.find_spec(f"trainer.verbs.{name}")
        first = _first_line(text.origin) if text and text.origin else ""
        print(f"  {name.replace('_', '-'):14s} {first}")
    print("  test           the test suite (pytest's arguments)\n\n./launch.sh VERB --help says more.")


def _first_line(path: str) -> str:
    """First line of a module's docstring, without importing what it imports."""
    import ast

    with open(path, encoding="utf-8") as file:
        text = ast.get_docstring(ast.parse(file.read())) or ""
    return text.partition("\n")[0]


if __name__ == "__main__":
    die_with_spawner()
    sys.exit(main(sys.argv[1:]))
