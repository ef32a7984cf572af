"""The pages are held to the code: names, links, commands, options, sizes, and every table."""

import ast
import dataclasses
import inspect
import json
import re
import shlex
import sys
import types
from functools import cache
from pathlib import Path

import pytest
import torch

import data
import evaluate
import evidence
import mlfs
from model import ElasticLinear

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    ".github/CHOICES.md",
    ".github/CONTRIBUTING.md",
    ".github/results/README.md",
    "weights/README.md",
)
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
README = TEXT["README.md"]
CODE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)  # language, content


# ------------------------------------------------------------------------------------------- sizes


def test_the_readme_fits_a_reader():
    lines = README.splitlines()
    assert len(lines) <= 240
    assert max(map(len, lines)) <= 100
    assert len(README.split()) <= 2500
    assert len(README[: README.index("```")].split()) <= 90  # before the first command


def test_no_page_stands_before_the_readme():
    """GitHub would show .github/README.md instead of ours."""
    assert not (ROOT / ".github" / "README.md").exists()


# ------------------------------------------------------------------------------------------- names

NAMES = sorted(set(re.findall(r"`([\w/]+\.py::[\w.]+)`", "\n".join(TEXT.values()))))


@cache
def defined(path: Path) -> set[str]:
    """Functions, classes and constants of a file, methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names.add(getattr(node, "name", ""))
        for target in getattr(node, "targets", []):
            names.add(getattr(target, "id", ""))
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{getattr(child, 'name', '')}" for child in node.body}
    return names


@pytest.mark.parametrize("name", NAMES)
def test_every_name_on_the_pages_exists(name):
    file, what = name.split("::")
    assert what in defined(ROOT / file)


def test_the_map_covers_the_paper():
    """Equations 1-11, Algorithm 1's lines, both propositions, App. A, every figure and table."""
    table = README[README.index("## From the paper") : README.index("## Choices")]
    wanted = {"Eq": 11, "lines": 17, "Prop": 2, "Fig": 8, "Table": 2}
    for kind, last in wanted.items():
        covered = set()
        for numbers in re.findall(rf"{kind}s?\.? (\d[\d, -]*)", table):
            for first, to in re.findall(r"(\d+)(?:-(\d+))?", numbers):
                covered |= set(range(int(first), int(to or first) + 1))
        assert covered == set(range(1, last + 1)), kind
    assert "App. A" in table and "Algorithm 1" in table


def test_every_line_of_algorithm_1_stands_in_the_margin():
    """Lines 1 to 15 (14, 16 and 17 end loops)."""
    margin = []
    for line in inspect.getsource(mlfs.mlfs).splitlines():
        if mark := re.search(r"#\s(\d+(?:,\d+)*)$", line):
            margin += map(int, mark[1].split(","))
    assert sorted(margin) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15]


# ------------------------------------------------------------------------------------------- links


def anchors(text: str) -> set[str]:
    """The places in a page that a link may name, spelled as GitHub does."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", CODE.sub("", TEXT[page]))
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.resolve().is_relative_to(ROOT) and target.is_file(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_page_is_linked_from_the_readme():
    assert all(f"]({page})" in README for page in PAGES[1:])


# ---------------------------------------------------------------------------------------- commands


def commands(text: str) -> list[list[str]]:
    """Every command of a page's code blocks, and every `python ...` within a line, as its words."""
    lines = []
    for language, block in CODE.findall(text):
        if not language:
            lines += block.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(python [^`\n]+)`", CODE.sub("", text))
    found = []
    for line in lines:
        if loop := re.fullmatch(r"for (\w+) in (.*); do (.*); done\s*(?:#.*)?", line):
            variable, values, body = loop.groups()
            parts = [body.replace(f"${variable}", value) for value in values.split()]
        else:
            parts = line.split("&&")
        found += [shlex.split(part, comments=True) for part in parts]
    return [words for words in found if words]


def check(words: list[str]) -> None:
    """Parses a command of ours without running it; knows the few others that the pages use."""
    program = Path(words[0]).name
    if program == "torchrun":
        program, words = "python", words[1:]
        assert words[0].startswith("--nproc-per-node=")
    if program in ("python", "python3"):
        script, options = words[1], words[2:]
        if script == "-m":
            assert options[0] in ("venv", "pytest")
        elif script == "mlfs.py":
            args, given = mlfs.parse_arguments(options)
            mlfs.HyperParameters(**given)  # its values are possible ones
            assert args.train or args.task in data.TASKS
        elif script == "evaluate.py":
            evaluate.parse_arguments(options)
        else:
            assert (ROOT / script).is_file()
            if script.endswith("evidence.py"):
                check_evidence(*options)
    elif program == "pip":
        assert words[1] == "install"
        assert words[2] != "-r" or (ROOT / words[3]).is_file()
    else:
        assert words == ["ruff", "check"]


def check_evidence(what: str, *names: str) -> None:
    assert what in re.findall(r"evidence\.py ([\w-]+)", evidence.__doc__)
    assert all(any(name in run for run in evidence.commands()) for name in names)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page, tmp_path, monkeypatch):
    for module in ("matplotlib", "matplotlib.figure", "onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))  # optional extras
    monkeypatch.chdir(tmp_path)
    found = commands(TEXT[page])
    assert found or page == ".github/CHOICES.md"
    for words in found:
        try:
            check(words)
        except SystemExit as error:  # argparse: 0 after --help
            assert error.code == 0, words


def test_ci_runs_the_readmes_commands():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    block = CODE.search(README)[2]
    first, tests, main_job = block.splitlines()
    for command in first.split(" && "):
        assert command.replace("pip install", "pip install -q") in ci
    for line in (tests, main_job):
        assert line.split("#")[0].strip() in ci


def test_ci_has_every_package_that_a_test_may_lack():
    """Of one version each, for a new one has new opinions."""
    lines = (ROOT / ".github" / "extras.txt").read_text(encoding="utf-8").splitlines()
    pinned = {re.fullmatch(r"(\w+)==[\d.]+", line)[1] for line in lines}
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    assert set(re.findall(r'(?:importorskip|find_spec)\("(\w+)"\)', tests)) <= pinned
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert ci.index("pytest -q\n") < ci.index("-r .github/extras.txt") < ci.rindex("pytest -q")


def entries(help_text: str) -> dict[str, str]:
    """Each option of a --help with what is said of it."""
    found = {}
    for entry in re.split(r"\n  (?=-)", help_text)[1:]:
        options, _, text = re.sub(r"\s*\n\s+", "  ", entry).partition("  ")
        found |= dict.fromkeys(re.findall(r"--[a-z][a-z0-9-]*", options), text.strip())
    return found


def documented(main, capsys) -> dict[str, str]:
    """The options of a command."""
    with pytest.raises(SystemExit):
        main(["--help"])
    return entries(capsys.readouterr().out)


@pytest.mark.parametrize("page", PAGES)
def test_every_option_on_the_pages_exists(page, capsys):
    known = documented(mlfs.main, capsys) | documented(evaluate.main, capsys)
    ours = re.sub(r"torchrun \S+", "", TEXT[page])
    for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", ours):
        assert option in known, option


def test_every_hyper_parameter_is_documented_in_help(capsys):
    known = documented(mlfs.main, capsys)
    for field in dataclasses.fields(mlfs.HyperParameters):
        option = f"--{field.name.replace('_', '-')}"
        assert len(known.get(option, "").split()) >= 4, option


# ---------------------------------------------------------------------------------------- examples


def test_the_readmes_table_is_read(tmp_path):
    """The columns of its command, in a CSV with a comma and a quote in a text."""
    path = tmp_path / "mail.csv"
    path.write_text('body,kind\n"Buy now, ""cheap""",spam\nSee you at noon,ham\n')
    _, folder, task = data.own_task(path, None, "body", "kind", False)
    assert task.labels == ("ham", "spam") and len(data.load_task(task, folder)["dev"].texts) == 1


def test_the_readmes_slices_in_numbers():
    """W and b are read off the page; the layer computes what stands beside them."""
    (block,) = re.findall(r"```text\n(.*?)```", README, re.S)
    matrix = re.findall(r"^(?:W =|   ) ((?:\d )+)", block, re.M)
    linear = ElasticLinear(3, 2)
    linear.weight.data = torch.tensor([[float(n) for n in row.split()] for row in matrix])
    linear.bias.data = torch.tensor([10.0, 20.0])
    assert "b = 10" in block and re.search(r"^    4 5 6 +20", block, re.M)
    shown = re.findall(r"x = \((.*?)\) +gives \((.*?)\)", block)
    assert len(shown) == 3
    for inputs, outputs in shown:
        x = torch.tensor([float(n) for n in inputs.split(",")])
        y = [float(n) for n in outputs.split(",")]
        assert linear(x, len(y)).tolist() == y


def test_the_readmes_python_example_runs(tmp_path, monkeypatch):
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(import torch.*?)```", README, re.S)
    scope: dict = {}
    exec(example, scope)
    assert scope["logits"].shape == (1, 2)
    assert [phi.name for phi in (scope["space"][0], scope["space"][-1])] == ["w1-d4", "w0.5-d2"]
    small = scope["load_pretrained"](tmp_path / "runs" / "minnet")
    for model in (scope["small"], small):
        assert abs(model(scope["ids"])[0] - scope["logits"]).max() < 1e-5


# ------------------------------------------------------------------------------------------ tables


def tables(text: str) -> list[dict[tuple[str, str], str]]:
    """Each table of a page as {(first cell of the row, heading of the column): cell}."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n?)+", text, re.M):
        lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        head, _, *rows = [[cell.strip() for cell in line] for line in lines]
        table = {}
        for row in rows:
            for column, cell in zip(head, row, strict=True):
                table[row[0], column] = cell
        found.append(table)
    return found


def with_column(text: str, *names: str) -> list[dict[tuple[str, str], str]]:
    return [t for t in tables(text) if set(names) <= {column for _, column in t}]


@pytest.fixture(scope="session")
def made() -> dict[str, str]:
    return evidence.tables()


def test_the_toys_table_is_the_one_that_the_code_prints():
    """Of a default run of the toy, whose palette is kept: rows and columns may be left out."""
    folder = ROOT / ".github" / "results" / "toy"
    settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert settings["command"] == ["mlfs.py"] and settings["task"] == "toy"
    rows = evaluate.read_palette(folder)["subnets"]
    (printed,) = tables(evaluate.final_table(rows, "accuracy"))
    (shown,) = with_column(README, "sliced teacher", "parameters")
    assert len(shown) >= 5 * 7
    assert shown.items() <= printed.items()


def test_the_tables_of_results_are_those_of_the_raw_files(made):
    """No figure in them is typed by hand: `tests/by_hand/evidence.py tables` makes them."""
    page = TEXT[".github/results/README.md"]
    assert set(made) == set(re.findall(r"<!-- evidence: (.*) -->", page))
    for name, table in made.items():
        assert f"<!-- evidence: {name} -->\n\n{table}\n\n<!-- end -->" in page, name


def test_the_readmes_evidence_is_that_of_the_results(made):
    (sst2,) = tables(made["sst2"])
    (shown,) = with_column(README, "sliced teacher", "encoder")
    assert len(shown) == 4 * 6
    assert shown.items() <= sst2.items()
    (against,) = tables(made["against"])
    (shown,) = with_column(README, "stored for the task")
    assert len(shown) == 4 * 5
    dev = {method: shown.pop((method, what)) for method, what in [*shown] if "dev" in what}
    for (method, what), cell in shown.items():  # columns there are rows here
        assert cell == (against[what, method] if what else method)
    means = {what: cell for (row, what), cell in sst2.items() if row == "mean below the maxnet"}
    mlfs, edge, alone, supernet = dev.values()
    assert (mlfs, alone) == (means["stage 2"], "not run")
    edges = {cell for what, cell in means.items() if "edge --learning-rate 1e-3" in what}
    assert edges == {edge.split(" (")[0]}
    assert {supernet} == {cell for what, cell in means.items() if "--adapters full" in what}


def test_the_readmes_other_figures_are_those_of_the_results(made):
    """Every mean with its error; the claims' figures; what nine models take on disk."""
    figure = re.compile(r"\d+\.\d ± \d+\.\d")
    assert set(figure.findall(README)) <= set(figure.findall("\n".join(made.values())))
    (claims,) = with_column(README, "seen here")
    seen = {claim: text for (claim, column), text in claims.items() if column == "seen here"}
    (third,) = tables(made["third"])
    variants = [evidence.VARIANTS[name] for name in ("gamma-0", "mlfs", "gamma-2")]
    minnets = [third[variant, "w0.5-d3"].split(" ")[0] for variant in variants]
    assert ", ".join(minnets) in seen["gradient scaling helps the minnet (Fig. 2)"]
    gains = [third[f"r = {rank}", "gain"].split(" ")[0] for rank in (16, 32)]
    assert " and ".join(gains) in seen["rank 8 is best (Fig. 3)"]
    (custom,) = tables(made["custom"])
    ends = [custom[start, "step 40"].split(" ")[0] for start in ("sliced", "random")]
    assert " nats against ".join(ends) in seen["a slice is a better start (Fig. 5)"]
    (run, rows), *_ = evidence.load("sst2")["mlfs"]
    nine = 4 * sum(row["parameters"] for row in rows.values()) / 1e6
    one = (4 * rows["w1-d6"]["parameters"] + run["stored"]) / 1e6
    assert f"{one:.0f} MB instead of {nine:.0f} MB" in README
