"""A palette that people can use: measured, chosen from, shipped, and used.

Every way to get a subnet gives the same function. Every refusal is one sentence, and leaves
nothing behind.
"""

import argparse
import errno
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import curves
import data
import evaluate
import mlfs
from conftest import (
    FAMILIES,
    LOAD_TOY,
    batch,
    load_small_toy,
    random_phi,
    randomise_adapters,
    tiny_llama,
)
from model import SubnetConfig, SuperTransformer, common_heads, load_pretrained, pad_heads

PAIR = data.TASKS["mrpc"]


@pytest.fixture(autouse=True)
def small_toy(monkeypatch):
    monkeypatch.setattr(data, "load_toy", load_small_toy)


@pytest.fixture
def copy(run, tmp_path):
    """The run folder, to be changed."""
    return shutil.copytree(run, tmp_path / "toy")


def command(*words) -> int:
    """What the shell would see."""
    return evaluate.exit_on_bad_input(lambda: evaluate.main(list(map(str, words))))


def trained(family: str, seed: int = 0) -> SuperTransformer:
    """A tiny random model with adapters of all three stages."""
    model = FAMILIES[family]()
    for _ in range(3):
        model.add_stage(2, seed)
    return randomise_adapters(model, seed)


def tokenizer_files(folder) -> None:
    tokenizer = data.load_tokenizer(data.DOWNLOADS / "toy")
    tokenizer.add_special_tokens(["</s>"])  # a decoder's end of text
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "merges.txt").write_text("a word list")


def inputs(model: SuperTransformer) -> dict[str, torch.Tensor]:
    x = batch()
    return x if "token_type_embeddings.weight" in model.state_dict() else {"ids": x["ids"]}


def stored(folder) -> list[dict]:
    return evaluate.read_palette(folder)["subnets"]


def rewrite(folder, change) -> None:
    """Changes palette.json."""
    content = json.loads((folder / "palette.json").read_text())
    change(content)
    (folder / "palette.json").write_text(json.dumps(content))


def row(name: str, parameters: int, score: float, stderr: float = 0.01, **more) -> dict:
    sizes = {"parameters": parameters, "size_mb": 4e-6 * parameters}
    return {"name": name, "score": score, "stderr": stderr} | sizes | more


# ------------------------------------------------------------------------------------- measuring


def test_measuring_writes_what_every_subnet_is_gives_and_costs(copy, capsys):
    """Scores are those of the training run; its history stays; palette.md has the table printed."""
    before = stored(copy)
    assert command(copy) == 0
    printed = capsys.readouterr().out
    after, measured = stored(copy), evaluate.read_palette(copy)["measured"]
    for old, new in zip(before, after, strict=True):
        assert new["score"] == old["score"] and new["history"] == old["history"]
        low, high = new["latency_ms_range"]
        assert 0 < low <= new["latency_ms"] <= high
        assert new["size_mb"] == pytest.approx(4e-6 * new["parameters"])
    assert measured["dtype"] == "float32" and measured["length"] == 64  # the toy has 64 positions
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) == 6 and "\n".join(table) in (copy / "palette.md").read_text()
    half = next(line for line in table if line.startswith("| w0.5-d2")).split("|")
    assert [cell.strip() for cell in half[2:6]] == ["2", "128", "64", "2"]
    assert "(25%)" in half[7] and "(25%)" in half[8]  # a quarter of the encoder and of its MACs


def test_a_part_of_the_palette_is_measured_beside_the_maxnet_and_not_written(copy, capsys):
    before = (copy / "palette.json").read_bytes()
    assert command(copy, "--subnets", "w0.5-d2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("| w")] == ["w1-d4", "w0.5-d2"]
    assert (copy / "palette.json").read_bytes() == before


def test_latency_visits_every_subnet_in_every_round_and_warms_up(tiny, monkeypatch):
    """A clock that the forward pass moves: 7 ms a layer in the first pass of a visit (warm-up),
    then 2 ms; in the second round all takes twice as long.
    """
    clock, visits = [0.0], []

    def forward(self, ids, mask=None, phi=None, features=None):
        assert ids.shape == (3, 5) and features == ()
        depth = len(self.maxnet.layers)
        if not visits or visits[-1][0] != depth:
            visits.append((depth, []))
        passes = visits[-1][1]
        passes.append("alone")
        milliseconds = depth * (7 if len(passes) <= 1 else 2)
        clock[0] += 1e-3 * milliseconds * (1 if len(visits) <= 2 else 2)

    monkeypatch.setattr(SuperTransformer, "forward", forward)
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: clock[0])
    space = [tiny.maxnet, SubnetConfig(16, 2, 12, (1, 3))]
    rows = evaluate.latency(tiny.extract, space, batch_size=3, length=5, rounds=2, runs=3)
    assert [depth for depth, _ in visits] == [4, 2, 4, 2]
    assert all(passes == ["alone"] * 4 for _, passes in visits)
    for depth, timed in zip((4, 2), rows):
        assert timed["latency_ms"] == pytest.approx(1.5 * 2 * depth)  # half the runs at each speed
        assert timed["latency_ms_range"] == pytest.approx([2 * depth, 4 * depth])


# -------------------------------------------------------------------------------------- choosing

ROWS = [
    row("large", 100, 0.93, latency_ms=10.0, macs=80),
    row("middle", 60, 0.925, latency_ms=7.0, macs=50),  # within a standard error of large
    row("slow", 40, 0.90, latency_ms=9.0, macs=45),
    row("small", 20, 0.85, latency_ms=2.0, macs=10),
]


@pytest.mark.parametrize(
    "budget, names",
    [
        ({}, ["middle", "large", "slow", "small"]),
        ({"parameters": 50}, ["slow", "small"]),
        ({"parameters": 50, "latency_ms": 8}, ["small"]),
        ({"macs": 50}, ["middle", "slow", "small"]),
        ({"macs": 5}, []),
    ],
)
def test_the_best_within_the_budget_and_the_smaller_of_two_within_a_standard_error(budget, names):
    assert [row["name"] for row in evaluate.choose(ROWS, budget, "accuracy")] == names
    losses = [row | {"score": 1 - row["score"]} for row in ROWS]
    assert [row["name"] for row in evaluate.choose(losses, budget, "loss")] == names


def test_a_budget_of_what_was_not_measured_is_refused():
    """A palette that training wrote has no latencies; no row of it can be within one."""
    rows = [row("timed", 2, 0.9, latency_ms=1.0), row("large", 1, 0.9)]
    with pytest.raises(ValueError, match="large has no latency_ms: measure it first"):
        evaluate.choose(rows, {"parameters": 5, "latency_ms": 3}, "accuracy")
    assert evaluate.choose(rows, {"parameters": 1}, "accuracy") == rows[1:]


ARM = "processor\t: 0\nBogoMIPS\t: 108.00\nCPU implementer\t: 0x41\nCPU part\t: {}\n"
OLD_ARM = "model name\t: ARMv7 Processor rev 3 (v7l)\n"


@pytest.mark.parametrize(
    "one, other",
    [
        ((ARM.format("0xd08"), "pi"), (ARM.format("0xd0b"), "pi")),  # two parts
        ((ARM.format("0xd08"), "kitchen"), (ARM.format("0xd08"), "garage")),
        ((ARM + "Model\t: Pi 4\n", "pi"), (ARM + "Model\t: Rock 5\n", "pi")),
        ((OLD_ARM, "kitchen"), (OLD_ARM, "garage")),
        ((None, "mine.local"), (None, "yours.local")),  # Apple has no such file
    ],
)
def test_the_latency_of_another_machine_answers_nothing(
    one, other, copy, capsys, monkeypatch
):
    """Where the processor's name is the same for all of ARM's or Apple's, part and host count."""
    calls = []
    timed = {"latency_ms": 5.0, "latency_ms_range": [4.0, 6.0]}
    monkeypatch.setattr(
        evaluate, "latency", lambda model, space, *_: calls.append(1) or [timed for _ in space]
    )
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: {"score": 0.5, "stderr": 0.1})
    read = Path.read_text

    def board(cpuinfo, host):
        def read_text(path, *args, **options):
            if str(path) != "/proc/cpuinfo":
                return read(path, *args, **options)
            if cpuinfo is None:
                raise FileNotFoundError(path)
            return cpuinfo

        monkeypatch.setattr(Path, "read_text", read_text)
        monkeypatch.setattr(evaluate.platform, "node", lambda: host)
        assert command(copy, "--max-latency-ms", 6) == 0

    board(*one)
    board(*one)
    assert len(calls) == 1
    board(*other)
    assert len(calls) == 2


def test_a_score_that_is_no_number_is_the_worst():
    rows = [row("nan", 1, math.nan, math.nan), row("high", 2, 9.0), row("low", 3, 5.0)]
    assert [r["name"] for r in evaluate.choose(rows, {}, "loss")] == ["low", "high", "nan"]
    assert evaluate.choose(rows[:1], {}, "loss")[0]["name"] == "nan"


def test_a_budget_is_answered_from_the_stored_palette(copy, capsys, monkeypatch):
    """Scores and sizes are there from the training run: nothing is measured, no data is read."""
    monkeypatch.delattr(data, "load_task")
    assert command(copy, "--max-params", "150000", "--max-size-mb", 0.6) == 0
    rows = stored(copy)
    within = [row for row in rows if row["parameters"] <= 0.15e6]
    best, second = evaluate.choose(within, {}, "accuracy")[:2]
    out = capsys.readouterr().out
    head, first, after, where = out.splitlines()
    assert head == "Within 150,000 parameters, 0.6 MB, best first:"
    assert first.startswith(f"{best['name']} ({evaluate.quality(best, 'accuracy')}): ")
    assert f": {best['parameters']:,} parameters, {best['macs']:,} MACs per token, " in first
    assert after.startswith(f"{second['name']} (") and "Measured with dtype" in where


@pytest.mark.parametrize("what", ["adapters", "dtype"])
def test_scores_of_other_weights_are_measured_again(copy, what, capsys):
    """After an interrupted stage palette.json may be ahead of the adapters: never trust it then."""
    rewrite(copy, lambda content: content["measured"].update({what: "another"}))
    rewrite(copy, lambda content: content["subnets"][-1].update(score=0.999))
    assert command(copy, "--max-params", 1e5 + stored(copy)[-1]["parameters"]) == 0
    assert "99.9" not in capsys.readouterr().out


def test_other_data_than_the_runs_are_refused(copy, monkeypatch, capsys):
    monkeypatch.setattr(data, "load_toy", lambda: LOAD_TOY(train=30, dev=10))
    before = (copy / "palette.json").read_bytes()
    assert command(copy) == 2
    assert "these 10 dev examples are not those of" in capsys.readouterr().err
    assert (copy / "palette.json").read_bytes() == before


def test_an_answer_is_given_even_where_it_cannot_be_stored(copy, monkeypatch, capsys):
    def fail(*_):
        raise OSError("Read-only file system")

    monkeypatch.setattr(evaluate, "write_palette", fail)
    assert command(copy, "--max-latency-ms", 1e6) == 0
    out, err = capsys.readouterr()
    assert "best first:" in out
    assert err.startswith("warning: the palette could not be stored: Read-only")


def test_a_latency_budget_is_measured_here_once(copy, capsys, monkeypatch):
    """Latency measured elsewhere, or of other weights, says nothing; measured here, it is kept."""
    calls = []
    timed = {"latency_ms": 5.0, "latency_ms_range": [4.0, 6.0]}
    monkeypatch.setattr(
        evaluate, "latency", lambda model, space, *_: calls.append(1) or [timed for _ in space]
    )
    assert command(copy, "--max-latency-ms", 5) == command(copy, "--max-latency-ms", 6) == 0
    assert len(calls) == 1
    for number, key in enumerate(("device", "threads", "torch", "adapters", "dtype"), 2):
        rewrite(copy, lambda content: content["measured"].update({key: "another"}))
        assert command(copy, "--max-latency-ms", 4) == 3 and len(calls) == number
    assert command(copy, "--max-latency-ms", 4, "--data-dir", copy) == 3 and len(calls) == 7
    assert "no subnet fits within 4 ms" in capsys.readouterr().err


def test_when_none_fits_the_smallest_is_named_with_what_it_has_and_exit_code_3(copy, capsys):
    assert command(copy, "--max-params", 5e4, "--max-macs", 1e9) == 3
    rows = stored(copy)
    least = rows[-1]
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "no subnet fits within 50,000 parameters, 1,000,000,000 MACs per token;" in message
    assert f"w0.5-d2, has {least['parameters']:,} parameters, {least['macs']:,} MACs" in message


# -------------------------------------------------------------------------------------- shipping


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", FAMILIES)
def test_slice_extract_export_and_reload_are_one_function(family, seed, tmp_path):
    """For random Φ: the same bits in float32, the same logits to 1e-5."""
    model = trained(family, seed)
    phi, x = random_phi(seed, model.head_group), inputs(model)
    small = model.extract(phi)
    tokenizer_files(tmp_path)
    evaluate.export(small, tmp_path / "out", tmp_path, (), "card")
    again = load_pretrained(tmp_path / "out")
    for p, q in zip(small.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    sliced = model(**x, phi=phi)[0]
    assert (again(**x)[0] - sliced).abs().max() < 1e-5
    assert (small(**x)[0] - sliced).abs().max() < 1e-5
    assert (tmp_path / "out" / "merges.txt").read_text() == "a word list"
    assert (tmp_path / "out" / "README.md").read_text() == "card"


def test_an_exported_slice_is_a_checkpoint_with_tokenizer_labels_and_model_card(copy, capsys):
    folder = copy.parent / "out"
    assert command(copy, "--export", "w0.5-d2", folder) == 0
    said = capsys.readouterr().out
    assert "cannot express 2 heads of 16 at hidden size 64" in said and "--pad-heads" in said
    names = {"config.json", "model.safetensors", "vocab.txt", "tokenizer.json", "README.md"}
    names |= {"tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.iterdir())
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    run, model, space = evaluate.load_run(copy)
    tokenizer = data.load_tokenizer(folder)
    (x, _), *_ = data.batches(data.encode(tokenizer, load_small_toy()["dev"], 64), 16)
    small = load_pretrained(folder)
    assert (small(**x)[0] - model(**x, phi=space[-1])[0]).abs().max() < 1e-5
    rows = stored(copy)
    card = (folder / "README.md").read_text()
    assert "| w1-d4 " in card and f"{rows[0]['parameters'] / 1e6:.2f}M (100%)" in card
    assert f"{rows[-1]['parameters'] / 1e6:.2f}M" in card and "Layers kept, from 0: [0, 3]" in card
    assert f"| {100 * rows[-1]['score']:.1f} (" in card and run["base"]["sha256"] in card


@pytest.mark.parametrize("dtype, width", [("bfloat16", 2), ("float16", 2), ("float32", 4)])
def test_the_file_has_the_type_and_size_that_the_card_says(
    copy, dtype, width, capsys, monkeypatch
):
    """No data set is needed: the scores are the run's, and the card says of which format."""
    monkeypatch.delattr(data, "load_task")
    folder = copy.parent / "out"
    assert command(copy, "--export", "w1-d2", folder, "--dtype", dtype) == 0
    rows = stored(copy)
    file = evaluate.safe_open(folder / "model.safetensors", framework="pt")
    dtypes = {file.get_tensor(name).dtype for name in file.keys()}
    assert dtypes == {getattr(torch, dtype)}
    size = (folder / "model.safetensors").stat().st_size
    assert size == pytest.approx(width * rows[1]["parameters"], rel=0.02)
    assert f"{width * rows[1]['parameters'] / 1e6:.1f} MB in {dtype}" in capsys.readouterr().out
    card = (folder / "README.md").read_text()
    assert f"{width * rows[1]['parameters'] / 1e6:.1f} MB (" in card
    assert f"Weights in {dtype}." in card and "Measured with dtype float32." in card


@pytest.mark.parametrize("labels", [(), ("no", "maybe", "yes")])
def test_an_export_says_nothing_of_the_task_that_its_base_was_made_for(labels, tmp_path):
    """A pipeline of the transformers library gives our scores, or the softmax of our logits."""
    model = FAMILIES["bert"](vocab_size=70, num_labels=len(labels) or 1)
    model.config |= {"problem_type": "multi_label_classification", "finetuning_task": "mnli"}
    model.config |= {"id2label": {"0": "cat"}, "label2id": {"cat": 0}, "_name_or_path": "/home/me"}
    model.config |= {"task_specific_params": {"text-classification": {"top_k": 1}}}
    model.config |= {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    evaluate.export(model, tmp_path / "out", data.DOWNLOADS / "toy", labels, "card")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    names = labels or ("LABEL_0",)
    assert config["id2label"] == {str(i): name for i, name in enumerate(names)}
    assert config["label2id"] == {name: i for i, name in enumerate(names)}
    assert config.get("problem_type") == (None if labels else "regression")
    stale = {"finetuning_task", "task_specific_params", "quantization_config", "_name_or_path"}
    assert not stale & config.keys()
    transformers = pytest.importorskip("transformers")
    pipe = transformers.pipeline("text-classification", model=str(tmp_path / "out"), top_k=None)
    ids = torch.tensor([data.load_tokenizer(tmp_path / "out").encode("the plot is good").ids])
    z = model(ids)[0][0]
    expected = z.softmax(-1) if labels else z
    (answers,) = pipe(["the plot is good"])
    said = {entry["label"]: entry["score"] for entry in answers}
    assert said == pytest.approx(dict(zip(names, expected.tolist())), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_zeros_change_the_shape_and_not_the_function(family):
    model, x = trained(family), inputs(trained(family))
    phi = SubnetConfig(12, 2, 10, (0, 2))  # 2 heads of 4 at hidden size 12
    small = model.extract(phi)
    expected = {"bert": 3, "gpt": 3, "llama": 2}  # a Llama's config.json has a head_dim
    assert common_heads(small) == expected[family]
    padded = pad_heads(small, 3)
    assert (padded(**x)[0] - small(**x)[0]).abs().max() < 1e-6
    extra = padded.layers[0].attention_output.weight[:, 2 * 4 :]
    assert extra.numel() and not extra.any()


def test_which_shapes_other_libraries_can_express():
    """BERT: heads x head size is hidden size. Llama: heads divide hidden size, in whole groups."""
    bert = FAMILIES["bert"]()
    found = lambda model, hidden, heads: common_heads(
        model.extract(SubnetConfig(hidden, heads, 8, (0,)))
    )
    assert [found(bert, 16, 4), found(bert, 16, 1), found(bert, 8, 2)] == [4, 4, 2]
    assert found(bert, 10, 2) is None and found(bert, 8, 4) is None
    grouped = tiny_llama(hidden_size=24, num_attention_heads=6)  # three heads a key
    assert [found(grouped, 24, 6), found(grouped, 24, 3), found(grouped, 16, 3)] == [6, 3, 4]
    nine = tiny_llama(hidden_size=16, num_attention_heads=9, num_key_value_heads=3)
    assert found(nine, 16, 6) is None  # 6 and 9 do not divide 16, nor 12 and 15


def test_a_padded_export_says_what_the_zeros_cost(copy, capsys):
    """4 heads of 16 at hidden size 64: config.json, file size, card and logits are those of 4."""
    folder = copy.parent / "out"
    assert command(copy, "--export", "w0.5-d2", folder, "--pad-heads") == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["num_attention_heads"] * config["head_dim"] == config["hidden_size"] == 64
    padded = load_pretrained(folder)
    size = sum(p.numel() for p in padded.parameters())
    said, card = capsys.readouterr().out, (folder / "README.md").read_text()
    assert f"{size / 1e6:.2f}M instead of" in said and f"{4e-6 * size:.1f} MB in float32" in said
    assert f"{size / 1e6:.2f}M (" in card and f"{4e-6 * size:.1f} MB (" in card
    _, model, space = evaluate.load_run(copy)
    ids = torch.randint(60, (3, 9))
    assert (padded(ids)[0] - model(ids, phi=space[-1])[0]).abs().max() < 1e-5


def test_padding_is_refused_where_it_is_not_needed_or_does_not_help(copy, capsys, tmp_path):
    assert command(copy, "--export", "w1-d2", tmp_path / "out", "--pad-heads") == 2
    assert "nothing to pad" in capsys.readouterr().err and not (tmp_path / "out").exists()
    odd = FAMILIES["bert"]().extract(SubnetConfig(10, 2, 8, (0,)))
    with pytest.raises(ValueError, match="no number of heads"):
        evaluate.common_form(odd, pad=True)
    assert "padded or not" in evaluate.common_form(odd, pad=False)[1]


def test_an_export_that_fails_leaves_nothing(copy, monkeypatch, capsys):
    def fail(*_):
        raise OSError("No space left on device")

    folder = copy.parent / "out"
    monkeypatch.setattr(evaluate.shutil, "copyfile", fail)
    assert command(copy, "--export", "w1-d2", folder) == 2
    assert capsys.readouterr().err == "error: No space left on device\n"
    assert [path.name for path in copy.parent.iterdir()] == ["toy"]


@pytest.fixture
def mount(tmp_path, monkeypatch):
    """An empty volume: it cannot be renamed, and nothing can be created beside it."""
    folder = tmp_path / "disk"
    (folder / "lost+found").mkdir(parents=True)
    folder.chmod(0o750)
    replace, make = os.replace, tempfile.mkdtemp

    def refuse_renaming(old, new):
        if new == folder:
            raise OSError(errno.EBUSY, "Device or resource busy", str(new))
        replace(old, new)

    def refuse_outside(suffix=None, prefix=None, dir=None):
        if dir == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(dir))
        return make(suffix, prefix, dir)

    monkeypatch.setattr(os, "replace", refuse_renaming)
    monkeypatch.setattr(tempfile, "mkdtemp", refuse_outside)
    return folder


def test_an_empty_folder_is_filled_and_keeps_its_rights(copy, mount, capsys):
    assert command(copy, "--export", "w1-d2", mount) == 0
    assert load_pretrained(mount).maxnet.layers == (0, 1)
    assert mount.stat().st_mode & 0o777 == 0o750
    names = {"config.json", "model.safetensors", "vocab.txt", "tokenizer.json", "README.md"}
    names |= {"tokenizer_config.json"}
    assert {path.name for path in mount.iterdir()} == names | {"lost+found"}
    assert command(copy, "--export", "w1-d2", mount) == 2
    assert "exists already" in capsys.readouterr().err


def test_an_empty_folder_that_cannot_be_filled_is_left_empty(tiny, mount, tmp_path, monkeypatch):
    tokenizer_files(tmp_path)
    moved = []

    def fail_at_the_third(old, new):
        if new.parent == mount:
            moved.append(new.name)
            if len(moved) == 3:
                raise OSError(errno.EIO, "Input/output error")
        os.rename(old, new)

    monkeypatch.setattr(os, "replace", fail_at_the_third)
    with pytest.raises(OSError, match="Input/output error"):
        evaluate.export(tiny, mount, tmp_path, (), "card")
    assert len(moved) == 3 and [path.name for path in mount.iterdir()] == ["lost+found"]


def test_a_folder_with_something_in_it_is_never_filled(tiny, tmp_path):
    tokenizer_files(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("keep me")
    with pytest.raises(OSError):
        evaluate.export(tiny, tmp_path / "mine", tmp_path, (), "card")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["README.md"]
    assert (tmp_path / "mine" / "README.md").read_text() == "keep me"


@pytest.mark.parametrize("name", ["v1: final", "no", "2024", "a #b", "'\"\\", "- x", "größe 😀"])
def test_the_cards_header_is_yaml_whatever_the_base_is_called(run, name, tmp_path):
    """Read by PyYAML, as the hub's own library does."""
    settings = evaluate.read_run(run)
    settings["base"]["folder"] = str(tmp_path / name)
    card = evaluate.model_card(settings, stored(run), "accuracy", "", "float32", "")
    header = yaml.safe_load(card.split("---\n")[1])
    assert header == {"base_model": name, "tags": ["mlfs"]}


def test_nothing_that_exists_is_overwritten(copy, capsys, monkeypatch):
    """Told before anything is loaded."""
    monkeypatch.delattr(evaluate, "load_run")
    taken = copy.parent / "taken"
    taken.mkdir()
    (taken / "letter.png").write_text("dear")
    assert command(copy, "--export", "w1-d2", taken) == 2
    assert command(copy, "--plot", taken / "letter.png") == 2
    assert capsys.readouterr().err.count("exists already") == 2
    assert (taken / "letter.png").read_text() == "dear"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(6))
def test_the_transformers_library_gives_the_same_logits(family, seed, tmp_path):
    """Whatever it can express, and after padding the rest: within 1e-4 (where it is installed)."""
    transformers = pytest.importorskip("transformers")
    rotary = {"rope_theta": 500.0} if family == "llama" else {}
    model, x = FAMILIES[family](**rotary), batch()
    model.add_stage(2)
    randomise_adapters(model)
    sizes = random_phi(seed, model.head_group)
    heads = (seed % 2 + 1) * 2 if family == "llama" else min(3, sizes.num_attention_heads)
    hidden = 16 if heads * 4 > 12 else 12
    phi = SubnetConfig(hidden, heads, sizes.intermediate_size, sizes.layers)
    small = model.extract(phi)
    form, said = evaluate.common_form(small, pad=common_heads(small) != heads)
    assert "can load it" in said
    tokenizer_files(tmp_path)
    evaluate.export(form, tmp_path / "out", tmp_path, ("no", "maybe", "yes"), "card")
    kind = "SequenceClassification" if family == "bert" else "CausalLM"
    theirs, report = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values())  # nothing missing, nothing left over
    more = {"token_type_ids": x["segments"]} if family == "bert" else {}
    z = theirs.eval()(x["ids"], attention_mask=x["mask"], **more).logits
    real = slice(None) if family == "bert" else x["mask"].bool()
    ours = model(**(x if family == "bert" else {"ids": x["ids"], "mask": x["mask"]}), phi=phi)[0]
    assert (z - ours)[real].abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_gives_the_same_logits_for_any_batch_and_length(family, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = trained(family)
    small = model.extract(SubnetConfig(12, 2, 10, (0, 2)))
    evaluate.export_onnx(small, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for size, length in ((1, 1), (4, 32), (2, 9)):
        ids = torch.randint(50, (size, length))
        mask = torch.ones_like(ids)
        mask[-1, 1:] = 0
        feed = {"input_ids": ids, "attention_mask": mask}
        feed |= {"token_type_ids": ids % 2} if family == "bert" else {}
        z = session.run(None, {name: part.numpy() for name, part in feed.items()})[0]
        more = {"segments": ids % 2} if family == "bert" else {}
        real = slice(None) if family == "bert" else mask.bool()
        assert (torch.from_numpy(z) - small(ids, mask, **more)[0])[real].abs().max() < 1e-3


@pytest.mark.parametrize("wrong", [0.002, math.nan])
def test_an_onnx_file_with_other_logits_is_not_kept(copy, wrong, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")

    class Session(onnxruntime.InferenceSession):
        def run(self, *args):
            return [z + wrong for z in super().run(*args)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    assert command(copy, "--export", "w1-d2", copy.parent / "out", "--onnx") == 2
    assert "its logits differ by" in capsys.readouterr().err
    assert [path.name for path in copy.parent.iterdir()] == ["toy"]


@pytest.mark.parametrize(
    "words, missing, advice",
    [
        (["--plot", "p.png"], "matplotlib", "pip install matplotlib"),
        (["--export", "w1-d2", "out", "--onnx"], "onnxscript", "pip install onnx onnxscript"),
        (["--export", "w1-d2", "out", "--onnx"], "onnxruntime", "pip install onnx onnxscript"),
    ],
)
def test_a_missing_extra_is_one_clear_sentence(words, missing, advice, copy, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.chdir(copy.parent)
    assert command(copy, *words) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and advice in message
    assert [path.name for path in copy.parent.iterdir()] == ["toy"]


def test_the_curves_without_matplotlib_are_one_clear_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "log.jsonl").write_text('{"stage": 0, "step": 1, "loss": {"a": 1}}\n')
    with pytest.raises(ValueError, match="curves.py needs more packages: pip install matplotlib"):
        curves.main([str(tmp_path / "log.jsonl"), str(tmp_path / "c.png")])
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


# -------------------------------------------------------------------------------------- pictures


def test_the_picture_shows_every_subnet_and_the_teacher(copy, tmp_path):
    pytest.importorskip("matplotlib")
    svg = tmp_path / "palette.svg"
    assert command(copy, "--plot", svg) == 0
    text = svg.read_text()
    words = ["w1-d4", "w0.5-d2", "MLFS", "reordered, not trained yet", "teacher", "latency, ms"]
    for word in words:
        assert f"<!-- {word} -->" in text, word
    assert command(copy, "--plot", tmp_path / "p.png", "--subnets", "w1-d2,w0.5-d2") == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_curves_are_the_losses_of_the_log_averaged_within_a_stage(tmp_path):
    """Eleven losses 0..10 of stage 0, then one of stage 1: means of four, and a point."""
    pytest.importorskip("matplotlib")
    lines = [{"stage": 0, "step": 10 * (i + 1), "loss": {"a": i, "b": 1}} for i in range(11)]
    lines += [{"stage": 1, "step": 30, "loss": {"b": 5}}, {"stage": 1, "step": 30, "held_out": 1}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        from matplotlib.axes import Axes

        plot = Axes.plot
        patch.setattr(Axes, "plot", lambda *a, **k: drawn.append((a[1:], k)) or plot(*a, **k))
        assert curves.main([str(tmp_path / "log.jsonl"), str(tmp_path / "c.png")]) == 0
    labels = [(xy, k) for xy, k in drawn if "label" in k]
    lines = [xy for xy, k in drawn if "label" not in k]
    x, y = lines[0]
    assert list(y) == [i + 1.5 for i in range(8)] and list(x) == [25 + 10 * i for i in range(8)]
    x, y = lines[2]
    assert (list(x), list(y)) == ([110 + 30], [5])
    assert [k["label"] for _, k in labels] == ["a", "b"]


# ---------------------------------------------------------------------------------- using a model


def test_a_prediction_is_the_slices_softmax(copy, capsys):
    text = "the plot is not very good ."
    assert command(copy, "--subnet", "w0.5-d4", "--predict", text) == 0
    label, *classes = capsys.readouterr().out.rstrip("\n").split("\t")
    _, model, space = evaluate.load_run(copy)
    ids = torch.tensor([data.load_tokenizer(data.DOWNLOADS / "toy").encode(text).ids])
    p = model(ids, phi=space[2])[0].softmax(-1)[0].tolist()
    assert classes == [f"negative {p[0]:.3f}", f"positive {p[1]:.3f}"]
    assert label == ("positive" if p[1] > p[0] else "negative")


def test_lines_of_standard_input_are_answered_one_by_one(copy, capsys, monkeypatch):
    sent = b"the plot is good .\r\n\nthe cast is dull .\n\xff\n"
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(sent)))
    assert command(copy, "--subnet", "w1-d4", "--predict") == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert err.startswith("error: --predict, line 4: not UTF-8 text")
    command(copy, "--subnet", "w1-d4", "--predict", "the plot is good .")
    assert capsys.readouterr().out == out.splitlines(keepends=True)[0]


def test_a_pair_is_separated_by_a_tab_and_its_parts_are_counted():
    """The second sentence is segment 1; an answer of one output is a score."""
    tokenizer = data.load_tokenizer(data.DOWNLOADS / "toy")
    ids = data.encode(tokenizer, data.Rows([("the plot", "is good")], np.zeros(1)), 64)
    tiny = FAMILIES["bert"](vocab_size=70, num_labels=2)
    ((x, _),) = data.batches(ids, 1)
    assert x["segments"].any()
    p = tiny(**x)[0].softmax(-1)[0].tolist()
    said = evaluate.answer(tiny, tokenizer, PAIR, "the plot\tis good", 64)
    assert said.split("\t")[1:] == [f"different {p[0]:.3f}", f"duplicate {p[1]:.3f}"]
    for text in ("the plot", "a\tb\tc"):
        with pytest.raises(ValueError, match="the task takes 2"):
            evaluate.answer(tiny, tokenizer, PAIR, text, 64)
    score = FAMILIES["bert"](vocab_size=70, num_labels=1)
    said = evaluate.answer(score, tokenizer, data.TASKS["stsb"], "the plot\tis good", 64)
    assert float(said) == pytest.approx(score(**x)[0].item(), abs=5e-4)


def test_one_supernet_serves_a_budget_that_changes_from_request_to_request():
    """Each answer is that of the stand-alone model, whatever was asked for before, and every weight
    that a product is given lies in the supernet's own memory: no slice is kept."""
    model = trained("bert")
    supernet = model.extract(model.maxnet)
    own = {p.untyped_storage().data_ptr() for p in supernet.parameters()}
    read, linear = set(), torch.nn.functional.linear
    with pytest.MonkeyPatch.context() as patch:
        spy = lambda x, W, b: read.add(W.untyped_storage().data_ptr()) or linear(x, W, b)
        patch.setattr(torch.nn.functional, "linear", spy)
        requests = [(random_phi(seed), batch(seed)) for seed in range(20)]
        answers = [supernet(**x, phi=phi)[0] for phi, x in requests]
    assert len(read) > 20 and read <= own
    for (phi, x), z in zip(requests, answers):
        assert (z - model.extract(phi)(**x)[0]).abs().max() < 1e-5


def test_paths_may_be_plain_strings(copy, tiny, tmp_path):
    run, model, space = evaluate.load_run(str(copy), base=str(data.DOWNLOADS / "toy"))
    names = [row["name"] for row in evaluate.read_run(str(copy))["space"]]
    assert len(space) == 4 and names == [phi.name for phi in space]
    content = evaluate.read_palette(str(copy))
    before = (copy / "palette.json").read_bytes()
    evaluate.write_palette(str(copy), run, data.TASKS["toy"], content)
    assert (copy / "palette.json").read_bytes() == before
    tokenizer_files(tmp_path)
    evaluate.export(tiny, str(tmp_path / "out"), str(tmp_path), (), "card")
    assert load_pretrained(str(tmp_path / "out")).maxnet == tiny.maxnet
    (tmp_path / "x.jsonl").write_text('{"a": "b"}')
    assert evaluate.read_lines(str(tmp_path / "x.jsonl"), {"a": str}) == [{"a": "b"}]
    assert data.find_inputs("toy", str(data.DOWNLOADS / "toy"), None)[0] == "toy"


def test_a_tilde_is_the_home_folder_also_after_an_equals_sign(monkeypatch, tmp_path):
    """The shell does not replace it there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    args, _ = mlfs.parse_arguments(["--out=~/x", "--model=~", "--data-dir=~/glue"])
    assert (args.out, args.model) == (tmp_path / "x", tmp_path)
    assert args.data_dir == tmp_path / "glue"
    args = evaluate.parse_arguments(["~/x", "--model=~/b", "--export", "w1", "~/out"])
    assert (args.run, args.model) == (tmp_path / "x", tmp_path / "b")
    assert args.export == ["w1", str(tmp_path / "out")]


# ------------------------------------------------------------------------------- what is refused


def edit(name: str, old: str, new: str):
    def spoil(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return spoil


def flip(folder):
    """One bit in the last tensor."""
    content = bytearray((folder / "adapters.safetensors").read_bytes())
    content[-3] ^= 4
    (folder / "adapters.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (flip, "adapters.safetensors is damaged"),
        (edit("run.json", '"intermediate_size": 128', '"intermediate_size": 1280'), "no part of"),
        (edit("run.json", '"heads": 4', '"heads": "4"'), "was edited: there is no 'heads'"),
        (edit("run.json", '"seed": 0', '"seed": []'), "was edited: there is no 'seed'"),
        (
            edit("run.json", '"accuracy"', '"accurate"'),
            "was edited: no metric 'accurate'; choose from accuracy, f1",
        ),
        (edit("run.json", '"negative"', '"none", "negative"'), "do not fit this base model"),
        (edit("run.json", '"sha256": "', '"sha256": "0'), "is not the checkpoint that"),
        (
            edit("palette.json", '"score": 0.', '"score": "9", "old": 0.'),
            "palette.json was damaged",
        ),
        (edit("palette.json", '"macs": ', '"macs": 9999999999999999999'), "there is no 'macs'"),
        (edit("palette.json", '"stage 2": 0.', '"stage 2": "a", "b": 0.'), "damaged or edited"),
        (edit("palette.json", '"subnets": [\n', '"subnets": [3,\n'), "or edited; delete it"),
        (edit("palette.json", "{", ""), "palette.json is not valid JSON"),
    ],
)
def test_a_spoiled_run_folder_is_refused(copy, spoil, words, capsys):
    spoil(copy)
    assert command(copy, "--max-params", 1e9) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and words in message


NAMES = ["config.json", "vocab.txt", "model.safetensors", "tokenizer_config.json"]


@pytest.mark.parametrize("name", NAMES)
def test_any_change_of_the_base_checkpoint_is_noticed(copy, name, capsys):
    base = shutil.copytree(data.DOWNLOADS / "toy", copy.parent / "base")
    assert command(copy, "--model", base, "--max-params", 1e9) == 0  # moved, but the same
    with open(base / name, "ab") as file:
        file.write(b" ")
    assert command(copy, "--model", base, "--max-params", 1e9) == 2
    assert "is not the checkpoint that" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--export", "w9", "out"], "there is no subnet 'w9', only w1-d4, w1-d2"),
        (["--predict", "x"], "--predict needs one --subnet NAME"),
        (["--predict", "a\tb", "--subnet", "w1-d4"], "2 parts separated by tabs; the task takes 1"),
        (["--max-params", "-3"], "--max-params must be above 0, not -3"),
        (["--max-latency-ms", "nan"], "--max-latency-ms must be above 0, not nan"),
        (["--samples", "0"], "--samples must be above 0, not 0"),
        (["--batch-size", "1.5"], "--batch-size: invalid int value: '1.5'"),
        (["--temperature", "1e-9"], "--temperature 0 or at least 0.001"),
        (["--top-p", "1.1"], "--top-p must be at most 1"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--predict", "x", "--export", "w1-d4", "out"], "--export: not allowed with argument --p"),
        (["--onnx"], "go with --export"),
        (["--predict", "x", "--max-params", "3"], "do one at a time"),
        (["--export", "w1-d4", "out", "--max-params", "3"], "do one at a time"),
        (["--predict", "\udcff", "--subnet", "w1-d4"], "--predict, line 1: not UTF-8 text"),
        (["--subnets", ""], "there is no subnet ''"),
        (["--device", "meta"], "--device meta cannot be used here"),
    ],
)
def test_bad_options_are_one_sentence_and_exit_code_2(run, words, message, capsys):
    assert command(run, *words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


@pytest.mark.parametrize("columns", ["40", "300"])
def test_the_help_has_lines_of_at_most_100_characters_in_any_terminal(columns, monkeypatch, capsys):
    """It names every option, the files of a run folder, and the exit codes."""
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    text = capsys.readouterr().out
    assert 95 < max(map(len, text.splitlines())) <= 100
    for name in evaluate.RUN_FILES:
        assert name.replace("palette.md", "palette.json, .md") in text
    assert "2 bad input; 3 no subnet fits the budget; 130 stopped" in text
    assert text.index("--subnets") < text.index("--max-params") < text.index("--onnx")


@pytest.mark.parametrize("program", [evaluate, mlfs])
def test_the_manual_and_the_parser_know_the_same_options(program, monkeypatch, capsys):
    """The manual is written by hand: no option is missing in it, and none is made up."""
    monkeypatch.setattr(sys, "argv", ["mlfs.py"])  # the usage line has its name
    known, add = {"-h", "--help"}, argparse._ActionsContainer._add_action

    def spy(parser, action):
        known.update(action.option_strings)
        return add(parser, action)

    monkeypatch.setattr(argparse._ActionsContainer, "_add_action", spy)
    with pytest.raises(SystemExit):
        program.parse_arguments(["runs/x", "--help"])
    told = capsys.readouterr().out
    named = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", told)) | {"-h", "--help"}
    assert known <= named <= known | {"--nproc-per-node"}  # torchrun's
    if program is mlfs:
        tasks = re.search("--task TASK (.*)", told)[1]
        assert set(re.findall(r"\w+", tasks)) - {"default"} == set(data.TASKS)


@pytest.mark.parametrize(
    "line, message",
    [
        ({}, "has no losses yet"),
        ({"loss": 5}, "is not one of ours"),
        ({"loss": {"a": None}}, "is not one of ours"),
        ({"stage": 3, "loss": {"a": 1}}, "there is no stage 3"),
    ],
)
def test_a_log_that_cannot_be_drawn(line, message, tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"stage": 0, "step": 0} | line) + "\n")
    with pytest.raises(ValueError, match=message):
        curves.main([str(tmp_path / "log.jsonl"), str(tmp_path / "c.png")])


@pytest.mark.parametrize(
    "name, message",
    [("p.xyz", "name a .png, .svg or .pdf file"), ("nowhere/p.png", "in a folder that exists")],
)
def test_a_picture_that_cannot_be_written(run, name, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(run, "--plot", name) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_shares_are_those_of_the_first_row_where_they_mean_anything():
    rows = [row("a", 4, 0.0), row("b", 1, 0.5)]
    columns = {"name": "subnet", "score": "score", "parameters": "size"}
    second = lambda rows, metric: evaluate.table(rows, columns, metric).splitlines()[-1]
    assert second(rows, "matthews").split("|")[2:-1] == [" 50.0  ", " 0.00M (25%)  "]
    assert second(rows[::-1], "matthews").split("|")[2:-1] == [" 0.0 (0%)    ", " 0.00M (400%) "]
    assert second(rows[::-1], "loss").split("|")[2:-1] == [" 0.000 ", " 0.00M (400%) "]
