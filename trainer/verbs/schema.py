"""Prints the JSON schema of the configurations, so that an editor completes the YAML.

./launch.sh schema > ostinato.schema.json      all recipes
./launch.sh schema speech                      one
"""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="a file in recipes/; all of them if left out")


def main(arguments: argparse.Namespace) -> int:
    from pydantic import TypeAdapter

    from trainer.recipe import find_recipe, known_recipes

    names = [arguments.recipe] if arguments.recipe else known_recipes()
    schemas = {}
    for name in names:
        schema = TypeAdapter(find_recipe(name, "the command line").config_class()).json_schema()
        schema["properties"]["recipe"] = {"const": name}
        schema["properties"]["include"] = {
            "description": "Files beside this one whose keys come first.",
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        }
        schemas[name] = schema
    whole = schemas[names[0]] if len(names) == 1 else {"oneOf": list(schemas.values())}
    print(json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **whole}, indent=1))
    return 0
