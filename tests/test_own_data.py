"""Files of one's own: readers, classes, what is held out, metrics, and a run that is moved."""

import gzip
import json
import shutil

import numpy as np
import pytest

import data
import evaluate
import mlfs

TEXT = "text,kind\n"
TOY = data.DOWNLOADS / "toy"


def own(folder, name, text, columns="text", label="kind", **options):
    """The Task of a train file, and its splits."""
    path = folder / name
    pack = gzip.compress if name.endswith(".gz") else bytes
    path.write_bytes(pack(text.encode()))
    options = {"dev": None, "regression": False} | options
    _, place, task = data.own_task(path, text=columns, label=label, **options)
    return task, data.load_task(task, place)


# The same three mails: a comma, a quote and a line's end in a cell, where the form can hold them.
MAILS = [('buy, "now"', "spam"), ("see you", "ham"), ("", "ham")]
FORMS = {
    "mail.csv": 'text,id,kind\n"buy, ""now""",1,spam\nsee you,2,ham\n,3,ham\n',
    "mail.tsv": 'text\tid\tkind\nbuy, "now"\t1\tspam\nsee you\t2\tham\n\t3\tham\n',
    "mail.jsonl": "".join(json.dumps({"id": 1, "text": t, "kind": k}) + "\n" for t, k in MAILS),
}


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("name", FORMS)
def test_a_csv_a_tsv_and_json_lines_hold_the_same(tmp_path, name, packed):
    """Windows lines and a byte-order mark change nothing; blank lines are no rows."""
    for text in (FORMS[name], "\ufeff" + FORMS[name].replace("\n", "\r\n") + "\r\n"):
        task, splits = own(tmp_path, name + packed, text)
        rows = {t[0]: int(y) for part in splits.values() for t, y in zip(part.texts, part.labels)}
        assert rows == {'buy, "now"': 1, "see you": 0, "": 0}
        assert task.labels == ("ham", "spam")


def test_a_cell_of_a_csv_may_hold_a_lines_end_and_a_long_text(tmp_path):
    long = "word " * 40_000
    _, splits = own(tmp_path, "a.csv", f'text,kind\n"one\ntwo",x\n{long},y\n')
    texts = [text for part in splits.values() for (text,) in part.texts]
    assert sorted(texts) == ["one\ntwo", long.strip()]


@pytest.mark.parametrize(
    "words, order",
    [
        (["ham", "spam", "eggs"], ("eggs", "ham", "spam")),
        (["10", "9", "2"], ("2", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["0.5", "-3", "0.25"], ("-3", "0.25", "0.5")),
        (["yes", "no", "-1", "-", ""], ("no", "yes")),
    ],
)
def test_classes_are_the_labels_of_train_in_order_numbers_as_numbers(tmp_path, words, order):
    text = TEXT + "".join(f"text {i},{word}\n" for i, word in enumerate(words))
    task, splits = own(tmp_path, "a.csv", text)
    assert task.labels == order
    named = {t[0]: order[y] for p in splits.values() for t, y in zip(p.texts, p.labels)}
    assert named == {f"text {i}": w for i, w in enumerate(words) if w in order}


def test_rows_without_a_label_are_counted_and_a_score_may_be_minus_one(tmp_path):
    text = TEXT + "a,1\nb,-\nc,-1\nd,\ne,0\n"
    _, splits = own(tmp_path, "a.csv", text)
    assert splits["train"].skipped == {"without a label": 3}
    _, splits = own(tmp_path, "a.csv", text, regression=True)
    scores = {t[0]: float(y) for p in splits.values() for t, y in zip(p.texts, p.labels)}
    assert scores == {"a": 1.0, "c": -1.0, "e": 0.0}


def test_a_label_may_be_a_json_number_or_truth_value(tmp_path):
    lines = [{"text": "a", "kind": True}, {"text": "b", "kind": False}, {"text": "c", "kind": None}]
    lines.append({"text": "d", "kind": float("nan")})  # as pandas writes an empty cell
    task, splits = own(tmp_path, "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert task.labels == ("false", "true") and splits["train"].skipped == {"without a label": 2}


def test_snlis_dash_is_no_label_in_a_row_of_the_table_either(tmp_path, monkeypatch):
    row = data.Task("SNLI", "", data.DEV, data.PAIR, "gold_label", ("no", "yes"), data.ACC)
    (tmp_path / "SNLI").mkdir()
    text = "sentence1\tsentence2\tgold_label\na\tb\t-\nc\td\tyes\n"
    (tmp_path / "SNLI" / "dev.tsv").write_text(text)
    rows = data.load_table(row, "dev", tmp_path)
    assert rows.texts == [("c", "d")] and rows.skipped == {"without a label": 1}


def test_mrpc_with_the_columns_of_the_datasets_library(tmp_path):
    (tmp_path / "MRPC").mkdir()
    text = "sentence1\tsentence2\tlabel\tidx\na\tb\t1\t0\n"
    (tmp_path / "MRPC" / "dev.tsv").write_text(text)
    assert data.load_table(data.GLUE["mrpc"], "dev", tmp_path).texts == [("a", "b")]


GOOD = TEXT + "a,x\nb,y\n"


@pytest.mark.parametrize(
    "name, train, dev, columns, words",
    [
        ("a.csv", GOOD, GOOD, "txt", r"a.csv, line 1: there is no column 'txt'; the header has"),
        ("a.csv", GOOD, TEXT + "a,x\nb,z\n", "text", r"dev.csv, line 3: unknown label 'z'; .*x, y"),
        ("a.csv", GOOD, TEXT + "a,0\n", "text", r"dev.csv, line 2: unknown label '0'"),
        ("a.csv", GOOD + "c,d,x\n", GOOD, "text", r"a.csv, line 4: 3 columns, not 2 as in the"),
        ("a.tsv", "text\tkind\nname:\tbuy now\tx\n", GOOD, "text", r"line 2: 3 columns, not 2"),
        ("a.csv", TEXT + 'a,x\n"b,y\n', GOOD, "text", r"a.csv, line 3: unexpected end of data"),
        ("a.csv", "text,kind,text\n", GOOD, "text", r"a.csv, line 1: the header has a name twice"),
        ("a.csv", "", GOOD, "text", r"a.csv: column 'kind' has 0 classes; at least 2"),
        ("a.csv", GOOD, TEXT, "text", r"dev.csv has no examples with a label"),
        ("a.csv", TEXT + "a,x\nb,x\n", GOOD, "text", r"column 'kind' has 1 classes; at least 2"),
        ("a.csv", GOOD, GOOD, "text,kind,text", r"--text text,kind,text: name one column, or two"),
        ("a.parquet", "PAR1", GOOD, "text", r"a.parquet: convert it to .csv, .tsv or .jsonl"),
        ("a.jsonl", '{"text": "a", "kind": "x"}\n{"text": "a"}\n', GOOD, "text",
         r"a.jsonl, line 2: there is no column 'kind'"),
        ("a.jsonl", '["a", "x"]\n', GOOD, "text", r"a.jsonl, line 1: this is no JSON object"),
        ("a.jsonl", '{"text": ["a"], "kind": "x"}\n{"text": "a", "kind": "y"}\n', GOOD, "text",
         r"a.jsonl, line 1: column 'text' holds neither text nor a number"),
        ("a.jsonl", '{"text": "\\ud800", "kind": "x"}\n{"text": "a", "kind": "y"}\n', GOOD, "text",
         r"a.jsonl, line 1: 'utf-8' codec can't encode"),
        ("a.csv.gz", None, GOOD, "text", r"a.csv.gz, line 0: Not a gzipped file"),
    ],
)  # fmt: skip
def test_a_bad_file_is_told_with_file_and_line(tmp_path, name, train, dev, columns, words, capsys):
    """By the command line, exit code 2, and no run folder is left."""
    if train is not None:
        (tmp_path / name).write_text(train)
    else:
        (tmp_path / name).write_bytes(b"text")
    (tmp_path / "dev.csv").write_text(dev)
    command = ["--train", str(tmp_path / name), "--dev", str(tmp_path / "dev.csv"), "--text"]
    command += [columns, "--label", "kind", "--model", str(TOY), "--out", str(tmp_path / "run")]
    with pytest.raises(ValueError, match=words):
        mlfs.main(command)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["toy", "python"])
def test_a_table_with_a_tasks_name_starts_from_bert_base_as_others_do(name, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("it is asked for")

    monkeypatch.setattr(data, "download_model", refuse)
    (tmp_path / f"{name}.csv").write_text(GOOD)
    command = ["--train", str(tmp_path / f"{name}.csv"), "--text", "text", "--label", "kind"]
    with pytest.raises(FileNotFoundError, match="bert-base-uncased is not in .* .it is asked for."):
        mlfs.main([*command, "--out", str(tmp_path / "run")])


@pytest.mark.parametrize(
    "options, words",
    [
        ("--train a.csv --text t", "--train FILE, --text COLUMN and --label COLUMN go together"),
        ("--train a.csv --text t --label l --task rte", "go together, in place of --task"),
        ("--train a.csv --text t --label l", "No such file or directory: .*a.csv"),
        ("--label l", "--label COLUMN go together, in"),
        ("--regression", "--label COLUMN go together, in"),
        ("--metric bleu", "no metric 'bleu'; choose from accuracy, f1"),
        ("--metric pearson", "no metric 'pearson'; choose from"),
        ("--task stsb --data-dir . --model {toy} --metric f1", "choose from pearson, spearman"),
    ],
)
def test_options_that_do_not_go_together(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=words):
        mlfs.main(options.format(toy=TOY).split())
    assert not any(tmp_path.iterdir())


def test_a_tenth_is_held_out_the_same_one_each_time_with_all_copies_of_a_text(tmp_path):
    lines = [f"text {i % 200},{'xy'[i % 2]}\n" for i in range(300)]  # 100 texts occur twice
    _, splits = own(tmp_path, "a.csv", TEXT + "".join(lines))
    train, dev = (set(splits[name].texts) for name in ("train", "dev"))
    assert not train & dev and len(dev) == 20 and len(train) == 180
    assert sum(len(part.texts) for part in splits.values()) == 300
    _, again = own(tmp_path, "a.csv", TEXT + "".join(lines))
    assert again["dev"].texts == splits["dev"].texts


def test_no_file_of_code_is_on_both_sides_of_the_split(tmp_path):
    for i in range(40):
        (tmp_path / f"m{i}.py").write_text(f"x = {i % 20}\n")
    rows = data.load_code(tmp_path)
    assert not set(rows["train"].texts) & set(rows["dev"].texts)
    assert len(rows["dev"].texts) == 2  # 1 in 20 of the 20 that differ, and its copy


def test_code_as_codeparrot_packs_it(tmp_path):
    lines = "".join(json.dumps({"content": f"x = {i}\n"}) + "\n" for i in range(4))
    (tmp_path / "file-1.json.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "package.json").write_text("{}")
    assert sum(len(rows.texts) for rows in data.load_code(tmp_path).values()) == 4


# ----------------------------------------------------------------------------------------- metrics

P = np.array([0, 0, 1, 1, 2, 2, 2, 0, 1, 2])
Y = np.array([0, 1, 1, 1, 2, 0, 2, 0, 2, 2])


def test_f1_and_matthews_of_three_classes():
    """By the confusion matrix: each class's F1, and Gorodkin's formula."""
    counts = np.zeros((3, 3))
    for p, y in zip(P, Y):
        counts[y, p] += 1
    t, p, c, s = counts.sum(1), counts.sum(0), counts.trace(), counts.sum()
    macro = np.mean([2 * counts[k, k] / (t[k] + p[k]) for k in range(3)])
    assert evaluate.macro_f1(P, Y) == pytest.approx(macro)
    r = (c * s - t @ p) / np.sqrt((s * s - p @ p) * (s * s - t @ t))
    assert evaluate.matthews(P, Y) == pytest.approx(r)
    row = data.Task("", "", (), ("text",), "kind", ("a", "b", "c"), ("accuracy",))
    assert evaluate.rank_metrics(row, "f1").metrics == ("macro_f1", "accuracy")
    order = np.array([2, 0, 1])  # which class has which number means nothing
    assert evaluate.matthews(order[P], order[Y]) == pytest.approx(r)
    assert evaluate.macro_f1(order[P], order[Y]) == pytest.approx(macro)


def test_macro_f1_sees_what_accuracy_does_not():
    """3 of 100 are spam and none is found: 97 points, and the title says why."""
    labels = np.array([1] * 3 + [0] * 97)
    assert evaluate.accuracy(labels * 0, labels) == 0.97
    assert evaluate.macro_f1(labels * 0, labels) == pytest.approx((2 * 97 / 197 + 0) / 2)
    run = {"task": "mail", "data": {"dev": 100, "largest_class": 0.97}}
    assert "100 examples, 97.0% of them of one class" in evaluate.title(run, "accuracy")


# ---------------------------------------------------------------------------------- from end to end

EPOCHS = ["--epochs", "1,0,0", "--widths", "1", "--depths", "1,.5", "--batch-size", "8"]


def mails(folder):
    folder.mkdir()
    pairs = [(adjective, "pro" if strength > 0 else "con")
             for adjective, strength in data.ADJECTIVES.items()]  # fmt: skip
    lines = [f"the plot is {word} .,{kind}\n" for word, kind in pairs]
    (folder / "reviews.csv").write_text(TEXT + "".join(lines))
    shutil.copytree(TOY, folder / "toy")
    return ["--train", str(folder / "reviews.csv"), "--text", "text", "--label", "kind",
            "--model", str(folder / "toy"), *EPOCHS]  # fmt: skip


def test_a_run_on_a_file_can_be_moved_with_its_base_and_data(tmp_path, capsys, monkeypatch):
    """Contents decide, not paths, for --resume and for measuring. An edit that keeps the number of
    rows is noticed.
    """
    monkeypatch.setattr(evaluate, "latency", lambda model, space, *_: [{} for _ in space])
    command = mails(tmp_path / "a")
    mlfs.main([*command, "--out", str(tmp_path / "a" / "run")])
    assert "classes: con, pro" in capsys.readouterr().out
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a" / "reviews.csv").write_text(TEXT + "another,con\n")  # a copy has its own data
    assert evaluate.main([str(tmp_path / "b" / "run")]) == 0
    assert "of them of one class" in capsys.readouterr().out
    moved = [word.replace(f"{tmp_path}/a/", f"{tmp_path}/b/") for word in command]
    moved += ["--out", str(tmp_path / "b" / "run"), "--resume"]
    assert mlfs.main(moved) == 0
    run = json.loads((tmp_path / "b" / "run" / "run.json").read_text())
    assert run["row"]["labels"] == ["con", "pro"]
    assert run["data"]["folder"] == str(tmp_path / "b")  # where they are from now on
    table = tmp_path / "b" / "reviews.csv"
    table.write_text(table.read_text().replace("superb", "good"))
    with pytest.raises(ValueError, match="was started with another data;"):
        mlfs.main(moved)
    with pytest.raises(ValueError, match="dev examples are not those of"):
        evaluate.main([str(tmp_path / "b" / "run")])


def test_the_order_of_the_classes_is_the_runs_whatever_the_table_says_later(
    tmp_path, monkeypatch, capsys
):
    """Labels of a row that is built from a set have another order in another process: such a run
    answers by its own, and is not trained on by another.
    """
    command = mails(tmp_path / "a")[6:]
    (tmp_path / "reviews").mkdir()
    text = (tmp_path / "a" / "reviews.csv").read_text().replace(",", "\t")
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "reviews" / name).write_text(text)
    command += ["--task", "reviews", "--data-dir", str(tmp_path), "--out", str(tmp_path / "run")]
    row = data.Task("reviews", "", data.DEV, ("text",), "kind", ("pro", "con"), data.ACC)
    monkeypatch.setitem(data.TASKS, "reviews", row)
    assert mlfs.main(command) == 0
    monkeypatch.setitem(data.TASKS, "reviews", row._replace(labels=("con", "pro")))
    with pytest.raises(ValueError, match="was started with another .*labels"):
        mlfs.main([*command, "--resume"])
    capsys.readouterr()
    options = ["--subnet", "w1-d4", "--predict", "the plot is superb ."]
    assert evaluate.main([str(tmp_path / "run"), *options]) == 0
    assert capsys.readouterr().out.split("\t")[1].startswith("pro ")
