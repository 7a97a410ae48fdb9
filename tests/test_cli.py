"""The command line in its own process."""

import subprocess
import sys

import pytest

from hf_dms.archs.registry import ARCHS
from hf_dms.cli import main


def test_help_needs_neither_torch_nor_transformers(tmp_path):
    script = tmp_path / "hf-dms"
    script.write_text(
        "import sys\nfrom hf_dms.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'yaml'} & set(sys.modules), 'heavy imports'\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "prune" in done.stdout


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "hf_dms", "archs", "llama"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "llama: prunes kv, mlp, hidden, layers" in done.stdout


def test_a_mistake_ends_in_one_line(capsys):
    assert main(["archs", "lama"]) == 2
    assert (
        capsys.readouterr().err
        == f"hf-dms: error: There is no architecture 'lama'. Supported: {', '.join(sorted(ARCHS))}.\n"
    )


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["prun"])
    assert "invalid choice" in capsys.readouterr().err
