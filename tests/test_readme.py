"""What the README says is true: its examples run, its commands, files and figures exist."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ("toy_experiment",)

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT))
regenerate_main = importlib.import_module("regenerate").main
experiments_of = importlib.import_module("paper_figures.__main__").experiments_of


def test_quick_start_runs_as_it_stands():
    command = [sys.executable, "-m", "doctest", "README.md"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == done.stderr == ""


def test_every_make_command_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE))
    assert {"figures", "figure", "test", "verify", "report", "bench"} <= named <= targets


def test_every_figure_is_in_the_table():
    rows = re.findall(r"^\| (\w+) \| .* \| (\[.*\)) \| `make figure NAME=(\w+)` \|", README, re.MULTILINE)
    figures = importlib.import_module("paper_figures").FIGURES
    assert sorted(name for name, _, _ in rows) == sorted(figures)
    for name, scripts, argument in rows:
        module = importlib.import_module(f"paper_figures.{name}")
        assert re.findall(r"\]\((.*?)\)", scripts) == [f"experiments/{used}.py" for used in experiments_of(module)]
        assert argument == name


def test_every_link_to_a_file_leads_somewhere():
    links = re.findall(r"\]\(((?!https?:)[^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.slow
def test_the_example_of_a_new_experiment_runs_and_its_verdicts_are_as_expected(toy, capsys):
    for package in ("experiments", "paper_figures"):
        code = next(
            block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if f"# {package}/" in block
        )
        toy.write(f"toy{package.removeprefix('paper_')}/mean_error.py", code)
    toy.write("toyexperiments/__init__.py", "ORDER = ('mean_error',)\n")
    toy.write("toyfigures/__init__.py", "FIGURES = ('mean_error',)\n")
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context():
        status = regenerate_main(
            ("--preset", "smoke"), figures="toyfigures", experiments="toyexperiments", output=toy.folder / "pictures"
        )
    said = capsys.readouterr().out
    assert status == 0, said
    assert "2 verdicts, 2 as expected" in said
    assert sorted(path.name for path in (toy.folder / "pictures").iterdir()) == ["mean_error.pdf", "mean_error.png"]


def test_files_name_no_place_on_one_machine_and_pins_name_no_address():
    for name in ("README.md", "Makefile", ".ci/run", "pyproject.toml", "CHANGELOG.md", "CITATION.cff"):
        assert not re.search(r"/(home|root|Users|work|tmp)/", (ROOT / name).read_text(encoding="utf-8")), name
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"#.*|[\w.-]+==[\w.]+( ; .+)?", line) or "//" in line] == []


@pytest.fixture
def makefile(tmp_path):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    # A MAKEFLAGS of the `make test` around this test would reach the inner one.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "THEORYKIT"))}

    def run(*words):
        return subprocess.run(["make", *words], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False)

    run.folder = tmp_path
    return run


def test_make_alone_lists_every_target(makefile):
    listed = re.findall(r"^  make ([a-z-]+)", makefile().stdout, re.MULTILINE)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert sorted(listed) == sorted(phony)


def test_make_without_a_suitable_python_says_what_to_install(makefile):
    for name in ("pyproject.toml", "constraints.txt"):
        (makefile.folder / name).touch()
    done = makefile("lint", "PYTHON=python-of-nowhere")
    assert done.returncode == 2
    assert "No Python 3.11 to 3.13" in done.stderr and "python-of-nowhere" in done.stderr
    assert "PYTHON=/path/to/python3.12" in done.stderr
    assert not (makefile.folder / ".venv").exists()


def test_make_clean_keeps_results_and_removes_what_killed_runs_left(makefile):
    for name in ("results/.partial-a", "results/.new-a", "results/a", "paper_figures/output", "paper_figures/b"):
        (makefile.folder / name).mkdir(parents=True)
    assert makefile("clean").returncode == 0
    left = sorted(str(path.relative_to(makefile.folder)) for path in makefile.folder.glob("*/*"))
    assert left == ["paper_figures/b", "results/a"]
