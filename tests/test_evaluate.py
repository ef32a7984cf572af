"""Metrics against hand-worked sums and frozen values of scikit-learn and scipy; the palette;
reading a run folder back.
"""

import importlib
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import data
import evaluate
import mlfs
from conftest import LOAD_TOY, RUN_OPTIONS, load_small_toy, tiny_bert, tiny_llama
from evaluate import accuracy, f1, matthews, pearson, spearman

P = np.array([1, 1, 0, 1, 0, 0, 1, 0, 1, 1])
Y = np.array([1, 0, 0, 1, 1, 0, 1, 0, 0, 1])  # tp 4, fp 2, fn 1, tn 3
A = np.array([0.1, 2.5, 2.5, 4.0, 3.0])
B = np.array([1.0, 2.0, 3.5, 5.0, 2.0])


def test_metrics_by_hand():
    assert accuracy(P, Y) == 0.7
    assert f1(P, Y) == pytest.approx(2 * 4 / (2 * 4 + 2 + 1))
    assert matthews(P, Y) == pytest.approx((4 * 3 - 2 * 1) / np.sqrt(6 * 5 * 5 * 4))
    assert f1(P * 0, Y) == matthews(P * 0, Y) == pearson(A * 0, B) == 0.0


def test_metrics_agree_with_scikit_learn_and_scipy():
    """Values frozen from sklearn.metrics 1.9 (f1_score, matthews_corrcoef) and scipy.stats 1.17
    (pearsonr, spearmanr; with ties).
    """
    assert f1(P, Y) == pytest.approx(0.7272727272727273)
    assert matthews(P, Y) == pytest.approx(0.408248290463863)
    assert pearson(A, B) == pytest.approx(0.7995843125475413)
    assert spearman(A, B) == pytest.approx(0.7631578947368421)


def test_the_standard_error():
    """√(p(1-p)/n) for accuracy; the bootstrap agrees with the formula for a correlation."""
    assert evaluate.standard_error("accuracy", P, Y) == pytest.approx(np.sqrt(0.7 * 0.3 / 10))
    rng = np.random.default_rng(0)
    x = rng.normal(size=400)
    y = x + rng.normal(size=400)
    r = pearson(x, y)
    assert evaluate.standard_error("pearson", x, y) == pytest.approx(
        (1 - r * r) / np.sqrt(400), rel=0.15
    )  # Fisher's formula


def test_predictions_are_paired_with_their_labels_whatever_the_batches(tiny):
    rng = np.random.default_rng(0)
    ids = [rng.integers(50, size=rng.integers(2, 12)).astype(np.int32) for _ in range(150)]
    examples = data.Examples(ids, [np.zeros(len(x), np.int8) for x in ids], np.arange(150))
    predictions, labels = evaluate.predict(tiny, tiny.maxnet, examples)
    for p, i in zip(predictions, labels):
        assert p == tiny(torch.from_numpy(ids[i].astype(np.int64))[None])[0].argmax()
    assert sorted(labels) == list(range(150))


def test_within_one_standard_error_the_smaller_subnet_is_shipped():
    rows = [
        dict(name=n, parameters=p, size_mb=p, score=s, stderr=0.01)
        for n, p, s in (
            ("large", 9, 0.93),
            ("same", 7, 0.915),
            ("middle", 5, 0.91),
            ("worse", 3, 0.88),
            ("small", 1, 0.89),
        )
    ]
    losses = [row | {"score": 1 - row["score"]} for row in rows]  # a loss: lower is better
    for most, name in ((1, "small"), (4, "small"), (5, "middle"), (8, "middle"), (9, "large")):
        budget = {"parameters": most}
        assert evaluate.choose(rows, budget, "accuracy")[0]["name"] == name
        assert evaluate.choose(losses, budget, "loss")[0]["name"] == name


# ---------------------------------------------------------- the commands, on a tiny toy of its own


@pytest.fixture(autouse=True)
def small_toy(monkeypatch):
    """The data that the fixture `run` was trained and measured on."""
    monkeypatch.setattr(data, "load_toy", load_small_toy)


def test_a_run_leaves_the_promised_files(run):
    """Design: adapters, run.json, log.jsonl, palette.json, palette.md, state; maxnet first, minnet
    last.
    """
    assert {p.name for p in run.iterdir()} == {*evaluate.RUN_FILES, ".lock"}
    palette = json.loads((run / "palette.json").read_text())
    assert [row["name"] for row in palette["subnets"]] == ["w1-d4", "w1-d2", "w0.5-d4", "w0.5-d2"]
    row = palette["subnets"][-1]
    assert {"name", "parameters", "encoder_parameters", "macs", "score", "stderr"} <= row.keys()
    assert list(row["history"]) == ["sliced teacher", "reordered", "stage 1", "stage 2"]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in log} == {0, 1, 2} and all(
        "w1-d4" in line["loss"] for line in log if "loss" in line
    )
    settings = json.loads((run / "run.json").read_text())
    assert (
        settings["hyper_parameters"]["rank"] == 16
        and len(settings["base"]["sha256"]) == 64
        and settings["data"]["dev"] == 20
    )


def test_a_run_folder_is_never_overwritten_unasked(run, capsys):
    command = ["--out", str(run), *RUN_OPTIONS]
    before = (run / "adapters.safetensors").read_bytes()
    assert exit_code(command, capsys) == (
        2,
        "exists already; go on with --resume, replace it with --overwrite",
    )
    assert exit_code([*command, "--resume", "--rank", "4"], capsys) == (
        2,
        "was started with another rank;",
    )
    assert mlfs.main([*command, "--resume"]) == 0  # finished: prints the palette again
    assert (run / "adapters.safetensors").read_bytes() == before
    (run / "mine.txt").write_text("keep me")
    assert mlfs.main([*command, "--overwrite"]) == 0
    assert (run / "mine.txt").read_text() == "keep me"  # only files of ours are replaced
    assert (
        run / "adapters.safetensors"
    ).read_bytes() == before  # same command, same seed: the same bits
    (run / "mine.txt").unlink()


def exit_code(command: list[str], capsys) -> tuple[int, str]:
    """The exit code, and the one line on standard error (without its start)."""
    code = evaluate.exit_on_bad_input(lambda: mlfs.main(command))
    error = capsys.readouterr().err.strip().splitlines()
    message = next(line for line in error if line.startswith("error: "))
    return code, next((words for words in EXPECTED if words in message), message)


EXPECTED = (
    "exists already; go on with --resume, replace it with --overwrite",
    "was started with another rank;",
)


@pytest.mark.parametrize(
    "command, words",
    [
        (["--task", "sst3"], "unknown task 'sst3'"),
        (["--rank", "0"], "rank must be in [1, 1024], not 0"),
        (["--widths", f"1{400 * '0'}/1"], "argument --widths: invalid"),
        (["--recipe", "edge", "--adapters", "full"], "teacher must be maxnet with --adapters full"),
        (["--alpha", "2"], "alpha must be in [0, 1]"),
        (["--gamma", "1000"], "gamma must be in [0, 10]"),
        (["--rank", "100000000000"], "rank must be in [1, 1024], not 100000000000"),
        (["--widths", "1,.3"], "0.3 of 4 heads is 1.2, not a whole number"),
        (["--widths", "1e999999999"], "inf of 4 heads is inf, not a whole number"),
        (["--data-dir", "."], "--data-dir .: name its --task"),
        (["--resume", "--overwrite"], "--overwrite: not allowed with argument --resume"),
        (["--model", "nowhere"], "nowhere"),
        (["--task", "sst2", "--model", "nowhere"], "--model: there is no nowhere/config.json"),
        (
            ["--task", "rte", "--model", str(data.DOWNLOADS / "toy"), "--data-dir", "nowhere"],
            "there is no nowhere/RTE/train.tsv",
        ),
        (["--max-length", "4000"], "exceeds the model's 64 positions"),
        (["--resume", "--out", "nowhere"], "there is no nowhere/run.json"),
        (["--device", "abacus"], "--device abacus cannot be used here"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(command, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, message = exit_code(command, capsys)
    assert code == 2 and words in message
    assert not list(tmp_path.iterdir())  # and nothing was written


def test_without_network_sst2_becomes_the_toy_behind_a_banner(tmp_path, monkeypatch, capsys):
    """Design §7: on disk, else download, else the toy; whatever was named explicitly never falls
    back.
    """

    def fails(*args):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(data, "DOWNLOADS", tmp_path)
    monkeypatch.setattr(data, "download_model", fails)
    monkeypatch.setattr(data, "download_glue", fails)
    task, model, _, note = data.find_inputs("sst2", None, None)
    assert (task, model) == ("toy", tmp_path / "toy") and note.startswith(
        "TOY RUN, not BERT-BASE ON SST2"
    )
    assert "TOY RUN, not BERT-BASE ON SST2: " in capsys.readouterr().out
    with pytest.raises(
        FileNotFoundError,
        match="bert-base-uncased is not in .* and could not be downloaded .no route to host",
    ):
        data.find_inputs("sst2", None, tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match="sst2 is not in .* could not be downloaded"
    ):
        data.find_inputs("sst2", tmp_path / "mine", None)
    fetched = []
    monkeypatch.setattr(data, "download_model", lambda name, folder: fetched.append(folder.name))
    monkeypatch.setattr(data, "download_glue", lambda task, folder: fetched.append(task))
    assert data.find_inputs("sst2", None, None) == (
        "sst2",
        tmp_path / "bert-base-uncased",
        tmp_path / "glue",
        "",
    )
    assert fetched == ["bert-base-uncased", "sst2"]


def test_a_toy_run_marks_every_file(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load_toy", lambda: LOAD_TOY(train=64, dev=20))
    monkeypatch.setattr(
        data,
        "find_inputs",
        lambda *_: ("toy", data.DOWNLOADS / "toy", Path("."), "TOY RUN, not BERT-BASE ON SST2"),
    )
    assert (
        mlfs.main(
            [
                "--task",
                "sst2",
                "--out",
                str(tmp_path),
                "--epochs",
                "1,0,0",
                "--widths",
                "1",
                "--depths",
                "1,.5",
            ]
        )
        == 0
    )
    for name in set(evaluate.RUN_FILES) - {"state.safetensors"}:
        assert b"TOY RUN" in (tmp_path / name).read_bytes(), name


def test_a_task_of_your_own_is_one_more_row_of_the_table(tmp_path, monkeypatch, capsys):
    """Three classes in files that GLUE has not: learned, answered by name, never downloaded."""
    row = data.Task("moods", "", data.DEV, ("text",), "mood", ("bad", "fair", "good"), data.ACC)
    monkeypatch.setitem(data.GLUE, "moods", row)
    monkeypatch.setitem(data.TASKS, "moods", row)
    code, message = exit_code(["--task", "moods", "--model", str(data.DOWNLOADS / "toy")], capsys)
    assert code == 2 and "/glue/moods/train.tsv; name the folder that holds moods/" in message
    assert not (data.DOWNLOADS / "glue" / "moods").exists()
    command = ["--task", "moods", "--model", str(data.DOWNLOADS / "toy"), "--epochs", "12,0,0"]
    command += ["--data-dir", str(tmp_path), "--widths", "1", "--depths", "1", "--out"]
    code, message = exit_code([*command, str(tmp_path / "run")], capsys)
    assert code == 2 and "moods/train.tsv; name the folder that holds moods/" in message
    words = {"bad": "awful", "fair": "nice", "good": "superb"}
    (tmp_path / "moods").mkdir()
    for name, nouns in (("train", data.NOUNS[:12]), ("dev", data.NOUNS[12:13])):
        lines = [
            f"{mood}\tthe {noun} is {word} ." for noun in nouns for mood, word in words.items()
        ]
        (tmp_path / "moods" / f"{name}.tsv").write_text("\n".join(["mood\ttext", *lines]))
    command += [str(tmp_path / "run"), "--batch-size", "6", "--learning-rate", "5e-3"]
    assert mlfs.main(command) == 0
    capsys.readouterr()
    for mood, word in words.items():
        text = f"the hero is {word} ."
        assert evaluate.main([str(tmp_path / "run"), "--subnet", "w1-d4", "--predict", text]) == 0
        assert capsys.readouterr().out.split("\t")[0] == mood


@pytest.mark.parametrize(
    "spoil, words",
    [
        (
            lambda folder: (folder / "adapters.safetensors").unlink(),
            "there is no .*adapters.safetensors",
        ),
        (
            lambda folder: (folder / "adapters.safetensors").write_bytes(b"short"),
            "damaged or cut short",
        ),
        (
            lambda folder: (folder / "run.json").write_text("{}"),
            "is not one of ours, or was edited",
        ),
        (
            lambda folder: (folder / "run.json").write_text(
                (folder / "run.json").read_text().replace('"sha256": "', '"sha256": "0')
            ),
            "sha256 differs",
        ),
    ],
)
def test_a_spoiled_run_folder_is_refused_by_name(run, tmp_path, spoil, words):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    spoil(folder)
    with pytest.raises((ValueError, OSError), match=words):
        evaluate.load_run(folder)


def test_a_pair_task_with_two_dev_sets_and_a_regression_run_from_end_to_end(tmp_path):
    """MNLI scores both dev sets; STS-B trains on the squared error, scores correlations."""
    reviews = [text for (text,) in LOAD_TOY(train=24, dev=2)["train"].texts]
    header = "index\tsentence1\tsentence2\t"
    for folder, label, values, dev in (
        ("MNLI", "gold_label", ("neutral", "entailment", "contradiction"), data.MNLI_DEV),
        ("STS-B", "score", ("0.0", "2.5", "5.0"), data.DEV),
    ):
        lines = [
            f"{i}\t{a}\t{b}\t{values[i % 3]}\n"
            for i, (a, b) in enumerate(zip(reviews, reviews[1:]))
        ]
        (tmp_path / folder).mkdir()
        for name in ("train.tsv", *dev):
            some = lines if name == "train.tsv" else lines[:9]
            (tmp_path / folder / name).write_text(header + label + "\n" + "".join(some))
    small = [
        "--model",
        str(data.DOWNLOADS / "toy"),
        "--data-dir",
        str(tmp_path),
        "--epochs",
        "1,1,1",
        "--widths",
        "1,0.5",
        "--depths",
        "1",
        "--max-length",
        "24",
    ]
    for task, metrics in (
        ("mnli", {"accuracy", "accuracy_mismatched"}),
        ("stsb", {"pearson", "spearman"}),
    ):
        assert (
            mlfs.main(["--task", task, *small, "--out", str(tmp_path / task), "--batch-size", "32"])
            == 0
        )
        rows = json.loads((tmp_path / task / "palette.json").read_text())["subnets"]
        assert all(metrics <= row.keys() and 0 < row["stderr"] < 1 for row in rows)
        assert evaluate.main([str(tmp_path / task)]) == 0
    assert rows[0]["score"] == rows[0]["pearson"]


def test_a_maxnet_that_falls_is_warned_of(tmp_path, monkeypatch, capsys):
    """The stage's starting score is kept in run.json, so a collapse is measured from there."""
    command = [
        "--out",
        str(tmp_path / "run"),
        "--epochs",
        "0,1,0",
        "--widths",
        "1,.5",
        "--depths",
        "1",
    ]
    scores = iter((0.9, 0.9, 0.6, 0.6))  # stage 0 begins; stage 1 begins, ends; ...
    monkeypatch.setattr(mlfs.Run, "held_out_score", lambda self: next(scores, 0.6))
    assert mlfs.main(command) == 0
    assert "the maxnet's accuracy went from 90.0 to 60.0" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["start_scores"][1] == 0.9


# ------------------------------------------------------------------- the tokenizer of an export


def read(path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "settings, words",
    [
        (None, "[PAD] [UNK] [CLS] [SEP] [MASK]"),
        ({}, "[PAD] [UNK] [CLS] [SEP] [MASK]"),
        ({"do_lower_case": False, "model_max_length": 512}, "[PAD] [UNK] [CLS] [SEP] [MASK]"),
        ({"truncation_side": "left"}, "[PAD] [UNK] [CLS] [SEP] [MASK]"),
    ],
)
def test_an_exports_tokenizer_is_the_one_that_was_trained_with(tmp_path, settings, words):
    """Its tokenizer.json alone gives the ids, and so do its pipelines, by transformers' class."""
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    (base / "vocab.txt").write_text("\n".join([*words.split(), "is", "it", "no", "No", "Extra"]))
    if settings is None:  # a tokenizer.json alone: of whole words, and without a frame
        words = (base / "vocab.txt").read_text().split()
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(base / "tokenizer.json"))
    else:
        (base / "tokenizer_config.json").write_text(json.dumps(settings))
        (base / "added_tokens.json").write_text('{"no it": 10}')
    evaluate.export(tiny_bert(), out, base, (), "card")
    rows = data.Rows([("No it is", "no it"), ("Extra is it no no it",)], np.zeros(2, np.int64))
    ids, segments, _ = data.encode(data.load_tokenizer(base), rows, 6)
    again = data.encode(data.load_tokenizer(out), rows, 6).ids
    assert all((a == b).all() for a, b in zip(ids, again, strict=True))
    alone = Tokenizer.from_file(str(out / "tokenizer.json"))
    alone.enable_truncation(6, direction=(settings or {}).get("truncation_side", "right"))
    assert [alone.encode(*texts).ids for texts in rows.texts] == [row.tolist() for row in ids]
    assert read(out / "tokenizer_config.json")["model_max_length"] == 32  # the positions
    if not find_spec("transformers"):
        return
    theirs = importlib.import_module("transformers").AutoTokenizer.from_pretrained(out)
    assert theirs.model_max_length == 32 and theirs.pad_token == "[PAD]"
    found = [theirs(*texts, truncation=True, max_length=6) for texts in rows.texts]
    assert [x["input_ids"] for x in found] == [row.tolist() for row in ids]
    assert [x["token_type_ids"] for x in found] == [row.tolist() for row in segments]


def test_a_decoders_export_has_a_pad_token_its_chat_and_its_generation_settings(tmp_path):
    """Without a pad token no batch can be made of texts; without the template no chat."""
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<|eot_id|>": 2}, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(base / "tokenizer.json"))
    (base / "config.json").write_text('{"eos_token_id": [2, 1]}')
    (base / "tokenizer_config.json").write_text('{"padding_side": "left", "eos_token": "</s>"}')
    kept = {"chat_template.jinja": "{{ messages }}", "generation_config.json": '{"top_p": 0.9}'}
    for name, text in kept.items():
        (base / name).write_text(text)
    evaluate.export(tiny_llama(), out, base, (), "card")
    want = {"padding_side": "left", "eos_token": "</s>", "pad_token": "<|eot_id|>"}
    assert read(out / "tokenizer_config.json") == want | {"model_max_length": 32}
    assert {name: (out / name).read_text() for name in kept} == kept
