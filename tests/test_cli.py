"""The command line in its own process."""

import dataclasses
import errno
import json
import os
import subprocess
import sys

import pytest
from helpers import fresh

from hf_dms.archs.registry import ARCHS
from hf_dms.cli import _parser, command, main
from hf_dms.files import refusal_of_the_system


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


@pytest.mark.parametrize(
    ("words", "printed"),
    [(["--help"], "usage: hf-dms"), (["recipes"], "quickstart.yaml"), (["launch-config", "ddp"], "use_cpu")],
)
def test_the_package_runs_as_a_module_and_what_shows_texts_imports_neither(words, printed):
    command = [sys.executable, "-m", "hf_dms", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hf_dms.cli" in imported
    assert not {"torch", "transformers"} & imported


def test_an_architecture_is_told_with_its_dims(capsys):
    assert main(["archs", "llama"]) == 0
    assert "llama: prunes kv, mlp, hidden, layers" in capsys.readouterr().out


def test_a_mistake_ends_in_one_line(capsys):
    assert main(["archs", "lama"]) == 2
    assert (
        capsys.readouterr().err
        == f"hf-dms: error: There is no architecture 'lama'. Supported: {', '.join(sorted(ARCHS))}.\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["r.yaml", "--plan", "out"], "--plan cuts by a finished search and takes no recipe, got r.yaml. Leave it out"),
        (["--plan", "out"], "model.path is required"),
        ([], "prune needs a recipe, got nothing. Name its YAML file first."),
        (["dms.target=0.3"], "prune needs a recipe, got dms.target=0.3. Name its YAML file first."),
        (["--json", "nothere.yaml", "dms.target=0.3"], "There is no recipe 'nothere.yaml'"),
    ],
)
def test_prune_says_whether_it_takes_a_recipe(words, message, capsys):
    assert main(["prune", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/a"), "[Errno 28] No space left on device: 'out/a'"),
        (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0"), "is the disk full?"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 448 vs 336"), "is the disk full?"),
        (RuntimeError("basic_ios::clear: iostream error"), "is the disk full?"),
        (
            RuntimeError("[enforce fail at container.cc:7] . open file failed with strerror: Permission denied\n"),
            "torch could not write a checkpoint: Permission denied",
        ),
        (RuntimeError("[enforce fail at container.cc:7] . open file failed with strerror: Is a directory"), None),
        (RuntimeError("a bug"), None),
        (FileNotFoundError(errno.ENOENT, "No such file"), None),
    ],
)
def test_what_the_system_refuses_is_told_from_a_bug(error, words):
    found = refusal_of_the_system(error)
    assert found is None if words is None else words in found


def test_a_command_leaves_a_description_that_was_registered_in_place_of_a_shipped_one(monkeypatch):
    own = dataclasses.replace(ARCHS["llama"])
    monkeypatch.setitem(ARCHS, "llama", own)
    assert main(["archs", "llama"]) == 0
    assert ARCHS["llama"] is own


def test_ctrl_c_ends_in_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_dms.cli.main", interrupted)
    assert command() == 130
    assert capsys.readouterr().err == "hf-dms: stopped. What was finished before is whole; the same command goes on.\n"


def test_a_reader_that_stops_reading_ends_it_in_one_line():
    reading, writing = os.pipe()
    os.close(reading)
    started = [sys.executable, "-m", "hf_dms", "recipes"]
    done = subprocess.run(started, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "hf-dms: stopped, because nothing reads its output any more.\n")


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["prun"])
    assert "invalid choice" in capsys.readouterr().err


def test_overrides_may_follow_an_option(recipe, capsys):
    for name in ("validate", "prune", "compare"):
        code, _ = recipe("--json", "dms.target=60", command=name)
        assert code == 2
        assert "dms.target must be in (0, 1], got 60" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        recipe("--jsn", "dms.target=0.5")
    assert "unrecognized arguments: --jsn dms.target=0.5" in capsys.readouterr().err


def test_validate_needs_a_recipe_whose_path_may_hold_an_equals_sign(tmp_path, capsys):
    assert main(["validate", "dms.target=0.5"]) == 2
    assert "validate needs a recipe, got dms.target=0.5" in capsys.readouterr().err
    file = tmp_path / "lr=0.1.yaml"
    file.write_text("model: 3")
    assert main(["validate", str(file)]) == 2
    assert "lr=0.1.yaml: model must be a section with keys, got 3" in capsys.readouterr().err


# ---- for programs and log files ----
@pytest.mark.parametrize(
    ("words", "holds"),
    [
        (["archs", "mobilenet_v2"], lambda found: found["mobilenet_v2"]["prunes"][::3] == ["mid{s}", "hidden{s}"]),
        (["archs", "llama"], lambda found: found["llama"]["prunes"] == ["kv", "mlp", "hidden", "layers"]),
        (["recipes"], lambda found: "quickstart.yaml" in found["recipes"]),
        (["fetch"], lambda found: "smollm2-135m" in found),
        (["launch-config", "ddp"], lambda found: "distributed_type" in found),
        (["validate", "no-such.yaml"], lambda found: not found[0]["ok"] and "no-such.yaml" in found[0]["error"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_json_is_all_that_stdout_holds(words, holds, capsys):
    assert main([*words, "--json"]) == (2 if words[0] == "validate" else 0)
    assert holds(json.loads(capsys.readouterr().out))


def test_every_command_takes_json():
    commands = next(action for action in _parser()._actions if action.choices).choices
    assert len(commands) > 10
    assert [name for name, each in commands.items() if "--json" not in each.format_help()] == []


def test_a_prune_prints_its_report_as_json_and_again_when_it_is_finished(recipe, capsys):
    for _ in range(2):
        code, out = recipe("--json")
        assert code == 0
        assert json.loads(capsys.readouterr().out) == json.loads((out / "dms_report.json").read_text())
    assert main(["report", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"]["model_class"] == "LlamaForCausalLM"
    assert {verdict["runtime"] for verdict in found["runtimes"]} >= {"transformers", "vLLM"}


def test_a_log_file_has_no_bars_and_no_colours(recipe, dense, tmp_path):
    prune = ["prune", str(tmp_path / "recipe.yaml"), "train.disable_tqdm=false"]
    evaluate = ["eval", str(dense), "--data", str(tmp_path / "text.jsonl"), "--lengths", "16"]
    code = f"from hf_dms.cli import main; print([main(command) for command in {[prune, evaluate]}])"
    done = fresh.run(["-c", code])
    assert done.stdout.endswith("[0, 0]\n"), done.stderr
    assert "perplexity" in done.stdout
    for text in (done.stdout, done.stderr):
        assert not [mark for mark in ("\r", "\x1b[", "it/s") if mark in text], text
