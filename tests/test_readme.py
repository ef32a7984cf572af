"""The README is held to the code: every name it maps a part of the paper to exists, and its
commands are those that CI runs.
"""

import ast
import dataclasses
import re
import shutil
from pathlib import Path

import pytest

import data
import evaluate
import evidence
import mlfs

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`((?:tests/)?\w+\.py)::([\w.]+)`", README)))


def defined(path: Path) -> set[str]:
    """Functions and classes of a file, methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names.add(getattr(node, "name", ""))
        names |= {
            target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)
        }
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{child.name}"
                for child in node.body
                if isinstance(child, ast.FunctionDef)
            }
    return names


@pytest.mark.parametrize("file, name", NAMES)
def test_every_name_in_the_map_from_the_paper_exists(file, name):
    assert name in defined(ROOT / file)


def test_the_map_covers_the_paper():
    """Equations 1-11, Algorithm 1, both propositions, App. A, every figure and table."""
    table = README[README.index("## From the paper") : README.index("## Where the paper")]
    covered = set()
    for first, last in re.findall(r"Eqs?\. (\d+)(?:-(\d+))?", table):
        covered |= set(range(int(first), int(last or first) + 1))
    assert covered == set(range(1, 12))
    for part in (
        "Algorithm 1",
        "Prop. 1",
        "Prop. 2",
        "App. A",
        "Figs. 1 and 8",
        "Fig. 2",
        "Fig. 3",
        "Figs. 4-7",
        "Tables 1-2",
    ):
        assert part in table, part


def test_every_line_of_algorithm_1_stands_in_the_margin():
    """Lines 1 to 15 (14, 16 and 17 end loops), in the paper's order but for 9 (once a stage)."""
    source = (ROOT / "mlfs.py").read_text(encoding="utf-8")
    body = source[source.index("def mlfs(") : source.index("def stage_batches")]
    margin = [
        int(n)
        for line in body.splitlines()
        if (mark := re.search(r"#\s(\d+(?:,\d+)*)$", line))
        for n in mark[1].split(",")
    ]
    assert sorted(margin) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15]


def test_ci_runs_the_readmes_two_commands():
    commands = README[README.index("## Start") : README.index("With `.venv` active")]
    ci = (ROOT / ".ci" / "run").read_text()
    for command in (
        ".venv/bin/pip install",
        "-r requirements.txt",
        ".venv/bin/python mlfs.py --task sst2",
        ".venv/bin/python -m pytest",
    ):
        assert command in commands and command in ci


def test_every_option_that_the_readme_names_exists(capsys):
    with pytest.raises(SystemExit):
        mlfs.main(["--help"])
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    known = capsys.readouterr().out
    ours = re.sub(r"torchrun \S+", "", README)
    assert all(option in known for option in re.findall(r"--[a-z][a-z0-9-]+", ours))
    assert all(
        f"--{field.name.replace('_', '-')}" in known
        for field in dataclasses.fields(mlfs.HyperParameters)
    )


def test_the_readmes_python_examples_run(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    shutil.copytree(run, tmp_path / "runs" / "toy")
    monkeypatch.chdir(tmp_path)
    serving, slicing = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(serving, {})
    large, small = capsys.readouterr().out.splitlines()
    rows = evaluate.read_palette(run)["subnets"]
    assert large.startswith(evaluate.choose(rows, {}, "accuracy")[0]["name"])
    assert small.startswith("w0.5-d2") and large.split()[1] in data.MOOD
    scope: dict = {}
    exec(slicing, scope)
    assert scope["logits"].shape == (8, 2)
    assert abs(scope["small"](**scope["x"])[0] - scope["logits"]).max() < 1e-5
    again = scope["load_pretrained"](tmp_path / "runs" / "minnet")
    assert abs(again(**scope["x"])[0] - scope["logits"]).max() < 1e-5


def test_the_tables_of_results_are_those_of_the_raw_files():
    """No figure in them is typed by hand: `tests/by_hand/evidence.py tables` makes them."""
    made = evidence.tables()
    assert set(made) == set(re.findall(r"<!-- evidence: (.*) -->", README))
    for name, table in made.items():
        assert f"<!-- evidence: {name} -->\n\n{table}\n\n<!-- end -->" in README, name
