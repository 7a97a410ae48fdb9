"""The recipes and launch configs that come with hf_dms."""

from __future__ import annotations

from pathlib import Path

from ..errors import HfDmsError


def packaged_recipes() -> Path:
    """The folder of the recipes that come with hf_dms, installed or in the source tree."""
    here = Path(__file__).parents[1]
    return here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"


def list_of_recipes() -> str:
    """The folder, and a line for each recipe: its name and the first line of its header."""
    names = recipe_names()
    width = max(map(len, names))
    lines = [str(packaged_recipes())]
    for name in names:
        first = (packaged_recipes() / name).read_text(encoding="utf-8").splitlines()[0]
        lines.append(f"  {name:{width}}  {first.removeprefix('# ')}")
    return "\n".join(lines)


def recipe_names() -> list[str]:
    """Names of the recipes that come with hf_dms, for `load_recipe`: first those of searches, then of comparisons."""
    folder = packaged_recipes()
    searches, comparisons = (sorted(folder.glob(pattern)) for pattern in ("*.yaml", "compare/*.yaml"))
    return [file.relative_to(folder).as_posix() for file in (*searches, *comparisons)]


def launch_config(name: str) -> str:
    """The content of an accelerate config for several processes.

    Args:
        name: `ddp`, `fsdp2` or `zero2`.

    Raises:
        HfDmsError: there is no such config.
    """
    folder = packaged_recipes() / "accelerate"
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    if name not in names:
        raise HfDmsError(f"There is no launch config '{name}'. There are {', '.join(names)}.")
    return (folder / f"{name}.yaml").read_text(encoding="utf-8")
