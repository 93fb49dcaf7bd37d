"""What holds for the whole repository: layout of the scripts, shared text, pages and commands."""

import ast
import re
import runpy
import shlex
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("ddpm_*.py"))
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/*.md"))]
README = PAGES[0].read_text()


@pytest.fixture(params=SCRIPTS, ids=lambda path: path.name)
def script(request):
    return request.param


def nodes(path, kind):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kind)]


def test_script_and_its_functions_are_short(script):
    lines = script.read_text().splitlines()
    assert len(lines) <= 300 and max(map(len, lines)) <= 100
    for function in nodes(script, ast.FunctionDef):
        length = function.end_lineno - function.lineno + 1
        assert length <= (75 if function.name == "main" else 45), function.name


def test_script_says_one_thing_a_line(script):
    for assign in nodes(script, ast.Assign):
        packed = isinstance(assign.targets[0], ast.Tuple) and isinstance(assign.value, ast.Tuple)
        assert not packed, f"line {assign.lineno}: tuple to tuple"
        assert not isinstance(assign.value, ast.Lambda), f"line {assign.lineno}: named lambda"
    assert not nodes(script, ast.NamedExpr), "walrus"
    starts = Counter(node.lineno for node in nodes(script, ast.stmt))
    assert max(starts.values()) == 1, f"two statements on a line: {starts.most_common(1)}"


def test_script_imports_no_other_script_and_no_pyplot(script):
    names = {alias.name for node in nodes(script, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes(script, ast.ImportFrom)}
    assert not any("pyplot" in name for name in names)
    packages = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert packages <= {"torch", "numpy", "matplotlib", "tqdm"}


def test_script_hides_no_mistake_of_its_reader(script):
    """One broad except, where a file can raise nearly anything; no network is built in a try."""
    types = [ast.unparse(node.type or node) for node in nodes(script, ast.ExceptHandler)]
    broad = [kind for kind in types if re.search("Exception|except", kind)]
    main = ast.unparse(definitions(script)["main"])
    assert not broad or (len(broad), script.name) == (1, "ddpm_mnist.py") and "except Exc" in main
    networks = "|".join(node.name for node in nodes(script, ast.ClassDef))
    for node in nodes(script, ast.Try):
        assert not re.search(rf"\b({networks})\(", "".join(map(ast.unparse, node.body)))


def definitions(path):
    """Top-level functions, classes and their methods, by qualified name."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(method, ast.FunctionDef):
                found[f"{node.name}.{method.name}"] = method
    return found


def test_public_definitions_have_docstrings(script):
    assert ast.get_docstring(ast.parse(script.read_text()))
    for name, node in definitions(script).items():
        assert ast.get_docstring(node) or name.endswith((".__init__", ".forward")), name


def test_requirements_are_pinned_to_the_versions_that_were_tested():
    pins = "torch==2.13.0 numpy==2.4.6 matplotlib==3.11.2 tqdm==4.70.1 "
    pins += "pytest==9.2.0 hypothesis==6.170.15"
    assert (ROOT / "requirements.txt").read_text().split() == pins.split()


def test_readme_is_short_and_narrow():
    lines = README.splitlines()
    text = [line for line in lines if not re.search(r"^\||\]\(|https?://", line)]
    assert len(lines) <= 160 and max(map(len, text)) <= 100


def test_the_code_that_readme_shows_is_that_of_the_script_word_for_word():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    parts = next(block for block in blocks if "  ...\n" in block).split("        ...\n")
    assert len(parts) == 2 and all(part in SCRIPTS[0].read_text() for part in parts)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_of_pages_lead_to_files_and_headings(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)", target.read_text(), re.M)
            slugs = [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles]
            assert heading in slugs, link
    assert all(map(str.strip, re.findall(r"!\[(.*?)\]", text))), "no alternative text"


TINY = {
    "ddpm_2d.py": "--steps 3 --T 21 --samples 100 --batch-size 8",
    "ddpm_swissroll_2015.py": "--steps 2 --T 5 --samples 100",
    "ddpm_mnist.py": "--steps 1 --samples 10 --sample-steps 1",
}
PLACES = {"NAME": "moons", "SEED": "3", "cat": "3", "points.csv": "moons"}
PLACES |= dict.fromkeys(["mine.npz", "fashion.npz", "photos.npz"], "data/mnist.npz")
PLACES |= dict.fromkeys(["runs/mine/model.pt", "runs/photos/model.pt"], "weights/ddpm_mnist.pt")
COMMANDS = {
    command.strip()
    for page in PAGES
    for command in re.findall(r"(?:^|`)python ((?:\w+/)?\w+\.py[^`#\n]*)", page.read_text(), re.M)
}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_of_the_pages_runs(command, tmp_path, monkeypatch):
    """Scripts with a tiny budget, benchmarks up to their --help."""
    monkeypatch.chdir(ROOT)
    name, *flags = [PLACES.get(word, word) for word in shlex.split(command)]
    monkeypatch.syspath_prepend((ROOT / name).parent)
    main = runpy.run_path(name)["main"]
    if name in TINY and "--help" not in flags:
        main([*flags, *TINY[name].split(), "--out", str(tmp_path)])
        assert (tmp_path / "samples.npy").exists()
    else:
        with pytest.raises(SystemExit, match="^0$"):
            main([*flags, "--help"])


def test_nothing_names_the_machine_it_was_made_on():
    for path in [*SCRIPTS, *PAGES, *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")]:
        assert not re.search(r"/(work|root|home|tmp)/", path.read_text()), path


def test_pages_name_only_functions_and_tests_that_exist():
    text = "".join(page.read_text() for page in PAGES)
    files = {"2d": "ddpm_2d.py", "roll": "ddpm_swissroll_2015.py", "mnist": "ddpm_mnist.py"}
    for short, name in re.findall(r"`(2d|roll|mnist): ([\w.]+)`", text):
        assert name in definitions(ROOT / files[short]), f"{short}: {name}"
    tests = "".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    missing = [name for name in named if f"def {name}(" not in tests]
    assert len(named) > 30 and not missing, missing
