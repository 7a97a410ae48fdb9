"""What each command of `hf-dms` does with its parsed arguments (cli.py). Each function returns the exit code.

torch and transformers are imported within the functions, so that `hf-dms --help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from .errors import HfDmsError


def show(options: argparse.Namespace, words: str, result: Any) -> None:
    """Print the result of a command: in words, or with --json as data."""
    if options.json:
        print(json.dumps(result, indent=2, ensure_ascii=False), file=options.stdout, flush=True)
    else:
        print(words, flush=True)


def run_prune(options: argparse.Namespace) -> int:
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
        show(options, f"\nSaved to {output.path} ({cut['model_class']}).", cut | {"path": output.path})
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
        show(options, "", read(recipe.output.path)[0])
    end_processes()
    return 0


def run_validate(options: argparse.Namespace) -> int:
    from .experiment.cells import cells_of
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
        show(options, "", found)
    return 0 if all(row["ok"] for row in found) else 2


def run_eval(options: argparse.Namespace) -> int:
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
            show(options, "", rows)
    return 0


def run_compare(options: argparse.Namespace) -> int:
    from .experiment.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    from .experiment.allocator import keep_freed_memory_
    from .experiment.compare import compare  # torch and transformers, once the recipe itself is sound

    keep_freed_memory_()
    table = compare(recipe)
    with open(os.path.join(recipe.output.path, "table.json"), encoding="utf-8") as file:
        show(options, table, json.load(file))
    return 0


def run_report(options: argparse.Namespace) -> int:
    from .report import page

    words = page.show(options.path, options.html, options.figures)
    show(options, words, page.as_data(options.path) if options.json else None)
    return 0


def run_bench(options: argparse.Namespace) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler logs on stderr
    from .measure.bench import bench, bench_table

    names = ("path", "baseline", "sequence_length", "new_tokens", "repeats", "dtype", "device")
    result = bench(**{name: getattr(options, name) for name in names}, batch_sizes=tuple(options.batch_sizes))
    show(options, bench_table(result), result)
    return 0


def run_push(options: argparse.Namespace) -> int:
    from .checkpoint.hub import push

    place = {"private": options.private, "revision": options.revision}
    address = push(options.path, options.repo, **place, commit_message=options.message)
    show(options, f"Pushed to {address}", {"url": address})
    return 0


def run_fetch(options: argparse.Namespace) -> int:
    # Nothing here needs the Hub. Without this, transformers asks it about each folder that is loaded.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from .experiment.fetch import ASSETS, fetch

    if options.name is None:
        about = {name: asset.about for name, asset in ASSETS.items()}
        show(options, "\n".join(f"{name}: {words}" for name, words in about.items()), about)
        return 0
    folder = fetch(options.name, options.folder)
    files = sorted(file.name for file in folder.iterdir())
    show(options, f"{folder}: {', '.join(files)}", {"folder": str(folder), "files": files})
    return 0


def run_recipes(options: argparse.Namespace) -> int:
    from .experiment.packaged import list_of_recipes, packaged_recipes, recipe_names

    show(options, list_of_recipes(), {"folder": str(packaged_recipes()), "recipes": recipe_names()})
    return 0


def run_launch_config(options: argparse.Namespace) -> int:
    from .experiment.packaged import launch_config

    content = launch_config(options.name)
    if options.file is None:
        show(options, content.rstrip("\n"), content)
    elif os.path.exists(options.file):
        raise HfDmsError(f"{options.file} exists. Choose another file, or remove it.")
    else:
        os.makedirs(os.path.dirname(options.file) or ".", exist_ok=True)
        with open(options.file, "w", encoding="utf-8") as file:
            file.write(content)
        show(options, f"Wrote {options.file}.", {"file": options.file})
    return 0


def run_archs(options: argparse.Namespace) -> int:
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
    show(options, "\n".join(lines), found)
    return 0
