"""README and docs/: what they say of the code is true, commands and Python are valid, and the site builds."""

import ast
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import arch_table
import docs_hooks
import options_page
import pytest
import yaml
from arch_table import heads

from hf_dms.archs.bert import BERT
from hf_dms.archs.llama import LLAMA
from hf_dms.cli import _parser

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}


# ---- tables ----
@pytest.mark.parametrize(
    ("page", "tool", "renewed"),
    [
        ("architectures.md", "tools/arch_table.py", arch_table.renewed),
        ("options.md", "tools/options_page.py", options_page.renewed),
    ],
)
def test_a_page_made_from_the_code_is_up_to_date(page, tool, renewed):
    assert renewed(TEXTS[page]) == TEXTS[page], f"out of date. Run python {tool} docs/{page}"


def test_a_table_that_is_out_of_date_is_replaced_and_the_text_around_it_stays():
    page = TEXTS["architectures.md"]
    assert page.count(arch_table.END) == 1
    assert arch_table.renewed(page.replace("causal LM", "other heads").replace("`deit` |", "`other` |")) == page
    page = TEXTS["options.md"]
    assert options_page.renewed(page.replace("Fraction of the dense", "Share of the")) == page


def test_heads_are_those_whose_parameters_have_lines():
    assert heads(BERT) == ["base", "masked LM", "question answering", "sequence classification", "token classification"]
    assert heads(replace(BERT, heads={})) == ["base"]
    without_pooler = {name: axes for name, axes in BERT.params.items() if not name.startswith("pooler")}
    assert heads(replace(BERT, params=without_pooler)) == ["masked LM", "question answering", "token classification"]
    without_output = {name: axes for name, axes in LLAMA.params.items() if name != "lm_head.weight"}
    assert "causal LM" in heads(LLAMA)
    assert "causal LM" not in heads(replace(LLAMA, params=without_output))


# ---- code and commands ----
def commands(text):
    """The lines of code that run `hf-dms`, continued lines joined."""
    text = text.replace("\\\n", " ")
    fenced = "\n".join(re.findall(r"```(?:bash|text)?\n(.*?)```", text, re.DOTALL))
    lines = [*fenced.splitlines(), *re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)]
    return [line.strip() for line in lines if line.strip().startswith("hf-dms ")]


@pytest.mark.parametrize("line", [line for text in TEXTS.values() for line in commands(text)])
def test_the_command_line_takes_every_command_of_the_pages(line):
    words = shlex.split(re.sub(r"\[[^]]*\]", "", line).replace(" ...", ""), comments=True)[1:]
    _, rest = _parser().parse_known_args([word for word in words if word != "COMMAND"])
    assert rest == [] or "--tasks" in words


def test_commands_are_found_and_a_wrong_one_is_refused():
    assert len(commands(TEXTS["recipes.md"])) > 10
    with pytest.raises(SystemExit):
        _parser().parse_known_args(["prune", "--no-such"] and ["prun", "RECIPE"])


@pytest.mark.parametrize("page", TEXTS)
def test_blocks_of_python_and_yaml_are_python_and_yaml(page):
    for language, code in re.findall(r"```(python|yaml)\n(.*?)```", TEXTS[page], re.DOTALL):
        if language == "python":
            compile(code, page, "exec")
        else:
            assert isinstance(yaml.safe_load(code), dict)


# ---- error messages ----
def messages():
    """Every message that the package raises, with `…` for what is filled in."""

    def text(node):
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
        if isinstance(node, ast.BinOp):
            return text(node.left) + text(node.right)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            return text(node.func.value)  # "...".rstrip()
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"

    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "hf_dms").rglob("*.py")]
    raised = [node.exc for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    return [text(call.args[0]) for call in raised if isinstance(call, ast.Call) and call.args]


def test_every_error_of_the_troubleshooting_page_is_raised_somewhere():
    quoted = re.findall(r"^> (.+(?:\n> .+)*)$", TEXTS["troubleshooting.md"], re.MULTILINE)
    known = messages()
    assert len(quoted) > 20
    unknown = [quote for quote in quoted if not any(quote.replace("\n> ", " ") in message for message in known)]
    assert unknown == [], "reworded? Then reword docs/troubleshooting.md too"


# ---- the site ----
@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_builds_without_a_warning_and_has_every_page(site):
    assert (site / "index.html").is_file()
    assert all((site / page.stem / "index.html").is_file() for page in DOCS.glob("*.md") if page.stem != "index")


def test_the_site_loads_nothing_from_another_host(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?([^\"\s>]+)", page.read_text(encoding="utf-8"))
        loaded += re.findall(r"<link[^>]+href=\"?([^\"\s>]+)[^>]*rel=\"?stylesheet", page.read_text(encoding="utf-8"))
        assert [address for address in loaded if "//" in address and not address.startswith("data:")] == []


def test_equations_are_mathml_and_links_to_source_lead_to_it(site):
    page = (site / "method" / "index.html").read_text(encoding="utf-8")
    assert page.count("<math") > 20
    assert "$" not in re.sub(r"<(script|code|math).*?</\1>", "", page, flags=re.DOTALL)
    assert "../source/hf_dms/topk.py.txt" in page
    assert (site / "source/hf_dms/topk.py.txt").read_text() == (ROOT / "hf_dms/topk.py").read_text()


def test_pages_from_outside_docs_are_pages_of_the_site_with_their_links_and_pictures(site):
    for name in ("benchmarks", "results", "changelog"):
        assert "<h1" in (site / name / "index.html").read_text(encoding="utf-8")
    results = (site / "results" / "index.html").read_text(encoding="utf-8")
    pictures = re.findall(r"<img[^>]+src=\"?([^\"\s>]+compare/[^\"\s>]+)", results)
    assert pictures
    assert all((site / "results" / picture).resolve().is_file() for picture in pictures)
    assert "../benchmarks/#" in (site / "recipes" / "index.html").read_text(encoding="utf-8")
    assert ".md.txt" not in "".join(page.read_text(encoding="utf-8") for page in site.rglob("*.html"))


def test_names_of_functions_in_equations_have_thin_space_beside_variables_alone():
    thin = docs_hooks.THIN
    assert f"<mi>N</mi>{thin}<mi>log</mi>{thin}<mi>N</mi>" in docs_hooks._mathml(r"N \log N", "inline")
    assert "&#x0003D;</mo><mi>max</mi><mo" in docs_hooks._mathml(r"k = \max(1, N)", "inline")


def test_the_reading_path_is_as_long_as_it_says():
    text = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
    files = re.findall(r"^\d+\. \[.+?\]\(\.\./(\S+?)\)", text, re.M)
    lines = sum(len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in files)
    said = int(re.search(r"in about ([\d,]+) lines", text)[1].replace(",", ""))
    assert len(files) == 10
    assert abs(said - lines) <= 50, lines
