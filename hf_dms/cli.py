"""The command line: `hf-dms prune RECIPE`, `hf-dms validate RECIPE...`, `hf-dms archs [NAME]`.

Nothing heavy is imported before a command runs, so that `hf-dms --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys

from ._register import register


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: default `sys.argv[1:]`.

    Returns:
        The exit code: 0, or 2 for a mistake that the message says how to mend.
    """
    options = _parser().parse_args(arguments)
    register()
    try:
        return options.run(options)
    except ValueError as error:
        if os.environ.get("HF_DMS_TRACEBACK"):
            raise
        print(f"hf-dms: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-dms", description="Learn how wide and deep a Transformers model should be, and cut it to that size."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    prune = commands.add_parser("prune", help="search, cut, verify, save and measure, as a recipe says")
    prune.add_argument("recipe", help="a YAML file, or the name of a recipe that comes with hf_dms")
    prune.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")
    prune.set_defaults(run=_prune)
    validate = commands.add_parser("validate", help="check recipes, the model and the data they name, without running")
    validate.add_argument("recipes", nargs="+", metavar="recipe", help="YAML files, and section.key=value overrides")
    validate.set_defaults(run=_validate)
    archs = commands.add_parser("archs", help="the supported architectures and their dims")
    archs.add_argument("name", nargs="?", help="one of them, in full")
    archs.set_defaults(run=_archs)
    return parser


def _prune(options: argparse.Namespace) -> int:
    from .recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    from .pipeline import run  # torch and transformers, once the recipe itself is sound
    from .report import loading_lines

    report = run(recipe)
    if report is None:
        print(f"{recipe.output.path} is finished already. For another run set output.overwrite: true.")
        return 0
    if report["sample"]:
        print(f"\nIt continues:\n    {report['sample']}")
    print(f"\nSaved to {recipe.output.path} ({report['model_class']}). Load it with\n")
    print(loading_lines(recipe.task, report["model_class"], recipe.output.path))
    return 0


def _validate(options: argparse.Namespace) -> int:
    from .recipe import check_recipe, load_recipe

    overrides = [word for word in options.recipes if "=" in word]
    wrong = 0
    for path in options.recipes:
        if path in overrides:
            continue
        try:
            check_recipe(load_recipe(path, overrides))
            print(f"{path}: ok")
        except ValueError as error:
            wrong += 1
            print(f"{path}: {error}", file=sys.stderr)
    return 2 if wrong else 0


def _archs(options: argparse.Namespace) -> int:
    from .archs import ARCHS

    if options.name is not None and options.name not in ARCHS:
        raise ValueError(f"There is no architecture '{options.name}'. Supported: {', '.join(sorted(ARCHS))}.")
    for name, spec in sorted(ARCHS.items()):
        if options.name in (None, name):
            print(f"{name}: prunes {', '.join(spec.prunable)}")
            if options.name:
                print("\n".join(f"  {parameter}: {axes}" for parameter, axes in spec.params.items()))
                for head, lines in spec.heads.items():
                    print("\n".join(f"  {parameter}: {axes}  (…{head})" for parameter, axes in lines.items()))
    return 0
