"""What holds for every script: layout, metadata, shared text, README."""

import ast
import functools
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("ddpm_*.py"))
REQUIREMENTS = (ROOT / "requirements.txt").read_text()
README = (ROOT / "README.md").read_text()
TESTING = {"pytest", "hypothesis"}
LINES = {"ddpm_2d.py": 372, "ddpm_mnist.py": 474}  # over 300; they may shrink, never grow


def pins():
    return dict(line.split("==") for line in REQUIREMENTS.split())


def version(text):
    return tuple(int(part) for part in text.split("."))


@pytest.fixture(params=SCRIPTS, ids=lambda path: path.name)
def script(request):
    return request.param


def test_script_is_one_short_file(script):
    lines = script.read_text().splitlines()
    assert len(lines) <= LINES.get(script.name, 300)
    assert max(map(len, lines)) <= 100
    for node in ast.walk(ast.parse(script.read_text())):  # one statement a line
        body = getattr(node, "body", [])
        starts = [child.lineno for child in body] if isinstance(body, list) else []
        assert len(set(starts)) == len(starts)


def test_script_imports_no_other_script(script):
    tree = ast.parse(script.read_text())
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not names & {other.stem for other in SCRIPTS}


def test_public_definitions_have_docstrings(script):
    tree = ast.parse(script.read_text())
    assert ast.get_docstring(tree)
    for node in tree.body:
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
        if public:
            assert ast.get_docstring(node), node.name
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(method, ast.FunctionDef) and method.name not in (
                    "__init__",
                    "forward",
                ):
                    assert ast.get_docstring(method), method.name


def test_inline_metadata_agrees_with_requirements(script):
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", script.read_text())[1]
    named = dict(re.findall(r'"([a-z]+)>=([\d.]+)"', block))
    assert 'requires-python = ">=3.11"' in block
    assert named.keys() == pins().keys() - TESTING
    for name, lowest in named.items():
        assert version(pins()[name]) >= version(lowest), name


@functools.cache
def definitions(path):
    """Source of the top-level functions and of the methods, by qualified name."""
    source, found = path.read_text(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = ast.get_source_segment(source, node)
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    text = ast.get_source_segment(source, method)
                    found[f"{node.name}.{method.name}"] = text
    return found


# what differs on purpose: each script's own data, network, metrics and pictures
OWN = {"main", "draw", "train", "evaluate", "Diffusion.predict_x0", "Diffusion.decoder_nll"}


def test_definitions_of_the_same_name_have_the_same_text():
    for i, first in enumerate(SCRIPTS):
        for second in SCRIPTS[i + 1 :]:
            a, b = definitions(first), definitions(second)
            for name in a.keys() & b.keys() - OWN:
                assert a[name] == b[name], f"{name} differs in {first.name} and {second.name}"


def test_readme_shows_every_script_and_only_files_that_exist():
    for path in SCRIPTS:
        row = next(line for line in README.splitlines() if line.startswith(f"| [`{path.name}`]"))
        assert f"| {len(path.read_text().splitlines())} |" in row  # the number of lines
    for link in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
    for picture in re.findall(r"!\[(.*?)\]", README):
        assert picture.strip(), "a picture without alternative text"


TINY = {
    "ddpm_2d.py": "--steps 5 --T 21 --n 100 --batch-size 8",
    "ddpm_swissroll_2015.py": "--steps 2 --T 5 --beta1 1e-3",
    "ddpm_mnist.py": "--steps 1 --data data/mnist5k --n 10 --sample-steps 1 --test-images 0",
}
LOADED = "--data data/mnist5k --n 10 --sample-steps 2 --test-images 0"
PLACES = {"NAME": "moons", "SEED": "3"}
COMMANDS = re.findall(r"(?:^|`)python ((?:\w+/)?\w+\.py[^`#\n]*)", README, re.M)


@pytest.mark.parametrize("command", sorted({command.strip() for command in COMMANDS}))
def test_every_command_in_readme_runs(command, tmp_path, monkeypatch):
    """Scripts with a tiny budget, benchmarks up to their --help, the mutants with none chosen."""
    monkeypatch.chdir(ROOT)
    name, *flags = [PLACES.get(word, word) for word in shlex.split(command)]
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [name, *flags, "none of these"])
    spec.loader.exec_module(module)
    if name in TINY:
        tiny = shlex.split(LOADED if "--load" in flags else TINY[name])
        metrics = module.main([*flags, *tiny, "--out", str(tmp_path)])
        assert metrics["script"] == Path(name).stem
    elif name.startswith("benchmarks/"):
        with pytest.raises(SystemExit) as exit:
            module.main([*flags, "--help"])
        assert exit.value.code == 0
    else:
        assert module.main() == 0


def test_nothing_names_the_machine_it_was_made_on():
    for path in [*SCRIPTS, ROOT / "README.md", *ROOT.glob("tests/*.py")]:
        if path.name != Path(__file__).name:
            assert not re.search(r"/(work|root|home|tmp)/", path.read_text()), path


def test_derivations_name_only_functions_and_tests_that_exist():
    text = (ROOT / "docs" / "derivations.md").read_text()
    files = {"2d": "ddpm_2d.py", "roll": "ddpm_swissroll_2015.py", "mnist": "ddpm_mnist.py"}
    for short, name in re.findall(r"`(2d|roll|mnist): ([\w.]+)`", text):
        source = (ROOT / files[short]).read_text()
        classes = re.findall(r"^class (\w+)", source, re.M)
        assert name in {*definitions(ROOT / files[short]), *classes}, name
    tests = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) > 30
    for name in named:
        assert f"def {name}(" in tests, name
