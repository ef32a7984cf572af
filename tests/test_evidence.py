"""The script behind .github/results: what it holds out, what it counts, what it writes."""

import json
import random
import shutil

import data
import evaluate
import evidence
from conftest import RUN_OPTIONS, load_small_toy

# What palette.json says of a subnet's sizes; the tables show the parameters.
SIZES = {"heads": 1, "hidden_size": 1, "intermediate_size": 1, "layers": [0], "macs": 1}
SIZES |= {"parameters": 2_000_000, "encoder_parameters": 1_000_000, "size_mb": 8.0}


def keep(folder, **files) -> None:
    """A run's raw files, by their names without .json."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        evaluate.write_json(folder / f"{name}.json", content)


def test_no_phrase_of_a_held_out_sentence_is_trained_on(tmp_path, capsys):
    """SST-2's rows are phrases of each other: a split by rows would leak the labels."""
    rng, rows = random.Random(0), []
    words = [f"w{i}" for i in range(400)]
    for i in range(40):
        sentence = rng.sample(words, 12)
        rows += [f"{' '.join(sentence[:n])} \t{i % 2}" for n in (12, 9, 3)]
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    evidence.split(tmp_path, tmp_path / "held-out", 10)
    parts = {}
    for name in ("train", "dev"):
        head, *lines = (tmp_path / "held-out" / "SST-2" / f"{name}.tsv").read_text().splitlines()
        assert head == "sentence\tlabel" and set(lines) <= set(rows)
        parts[name] = [line.split("\t")[0].strip() for line in lines]
    assert len(parts["dev"]) == 10 and all(len(text.split()) == 12 for text in parts["dev"])
    assert len(parts["train"]) == 90
    assert not any(phrase in text for phrase in parts["train"] for text in parts["dev"])


def test_the_baseline_has_the_same_teacher_and_as_many_passes(run, tmp_path, monkeypatch):
    """Every subnet alone: together they get the passes of stages 1 and 2, and train all of W."""
    monkeypatch.setattr(data, "load_toy", load_small_toy)
    folder = tmp_path / "alone"
    evidence.alone(["--out", str(folder), *RUN_OPTIONS], full=True)
    settings = json.loads((folder / "run.json").read_text())
    rows, mlfs_rows = (evaluate.read_palette(f)["subnets"] for f in (folder, run))
    assert [row["name"] for row in rows] == [row["name"] for row in mlfs_rows]
    assert rows[0]["score"] == mlfs_rows[0]["history"]["reordered"]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    last = {entry["stage"]: entry for entry in log if "loss" in entry}
    passes = sum(last[stage]["step"] * len(last[stage]["loss"]) for stage in (1, 2))
    assert settings["steps"] == passes // (len(rows) - 1)
    teacher = 4 * 3 * 16 * (64 + 64) + 4 * 16 * (64 + 256) + 64 * 65 + 2 * 65  # A_0, B_0, the head
    assert settings["trained"] == teacher + sum(row["parameters"] for row in rows[1:])
    assert settings["stored"] == 4 * settings["trained"]


def test_results_keep_the_palette_and_no_folder_of_the_machine(run, tmp_path, monkeypatch):
    """What is kept is the run's own palette; run.json says where nothing lies."""
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results")
    shutil.copytree(run, tmp_path / "runs" / "evidence" / "third" / "mlfs-seed0")
    evidence.keep("third/mlfs-seed0")
    kept = evidence.load("third")["mlfs"]
    assert len(kept) == 1 and list(kept[0][1].values()) == evaluate.read_palette(run)["subnets"]
    tensors, _ = evaluate.read_tensors(run / "adapters.safetensors")
    assert kept[0][0]["trained"] == sum(
        t.numel() for name, t in tensors.items() if not name.startswith("order.")
    )
    assert [kept[0][0][part]["folder"] for part in ("base", "data")] == ["toy", "glue"]


def test_tables_show_means_standard_errors_and_gains_seed_by_seed(tmp_path, monkeypatch):
    """Two seeds, 80 and 82: 81.0 ± 1.0; one point above each: 1.0 ± 0.0; seed 1 alone: 1.0;
    two minutes and one: the faster seed's."""
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    names = [f"w{w}-d{d}" for w in (1, 0.75, 0.5) for d in (6, 4, 3)]
    for variant, more in (("mlfs", 0), ("gamma-0", 0.01), ("supernet", 0.01)):
        for seed, score in [(0, 0.80)] * (variant != "supernet") + [(1, 0.82)]:
            folder = tmp_path / "third" / f"{variant}-seed{seed}"
            folder.mkdir(parents=True)
            rows = [SIZES | {"name": n, "score": score + more, "stderr": 0.1} for n in names]
            content = {"task": "sst2", "metric": "accuracy", "measured": {}, "subnets": rows}
            evaluate.write_json(folder / "palette.json", content)
            run = {
                "task": "sst2",
                "data": {"dev": 2000, "folder": "held-out"},
                "seconds": [60.0 * (2 - seed)],
            }
            run |= {"trained": 0, "stored": 0, "peak_memory": 0}
            evaluate.write_json(folder / "run.json", run | {"hyper_parameters": {"seed": seed}})
    table = evidence.variants("third")
    assert "2,000 held-out TRAIN sentences" in table and "2 seeds" in table
    ours, theirs = table.splitlines()[-2:]
    assert ours == f"| {evidence.VARIANTS['mlfs']} | 2 |" + " 81.0 ± 1.0 |" * 5 + "  | 1 |"
    assert theirs == "| γ = 0 | 2 |" + " 82.0 ± 1.0 |" * 5 + " 1.0 ± 0.0 | 1 |"
    means, gains = evidence.against("third").splitlines()[-8:-6]
    assert means == "| mean of the 8 below the maxnet |  | 81.0 ± 1.0 | 83.0 |"
    assert gains == "| gain over the first column |  |  | 1.0 |"


def test_devs_table_leaves_the_maxnet_out_of_the_mean_and_compares_equal_seeds(
    tmp_path, monkeypatch
):
    """Recipe: 80 and 82 with seeds 0 and 1; the supernet has seed 0 alone, one point above."""
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    for variant, seed, score in ("edge", 0, 0.80), ("edge", 1, 0.82), ("supernet-1-0-2", 0, 0.81):
        keep(tmp_path / "recipe" / f"{variant}-seed{seed}",
             dev={"w1-d6": 0.5, "w1-d4": score, "w1-d3": score})
    *_, maxnet, _, _, means, gains, seeds = evidence.dev_table().splitlines()
    assert maxnet == "| w1-d6 | 50.0 ± 0.0 | 50.0 |"
    assert means == "| mean of the 8 below the maxnet | 81.0 ± 1.0 | 81.0 |"
    assert gains == "| gain over the first column |  | 1.0 |"
    assert seeds == "| seeds | 2 | 1 |"


def test_a_tasks_table_ends_with_the_means_below_the_maxnet_and_compares_equal_seeds(
    tmp_path, monkeypatch
):
    """The recipe has seed 1 alone, two points above MLFS there, three above its mean."""
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    for variant, seed, score in ("mlfs", 0, 0.70), ("mlfs", 1, 0.72), ("edge", 1, 0.74):
        rows = [SIZES | {"name": name, "stderr": 0.1, "score": x, "history": {"stage 2": x}}
                for name, x in (("w1-d6", 0.9), ("w1-d4", score), ("w1-d3", score))]
        run = {"task": "mrpc", "data": {"dev": 9, "folder": "glue"}}
        keep(tmp_path / "mrpc" / f"{variant}-seed{seed}",
             palette={"metric": "accuracy", "measured": {}, "subnets": rows},
             run=run | {"hyper_parameters": {"seed": seed}})
    means, difference = evidence.stages("mrpc").splitlines()[-2:]
    assert means == "| mean below the maxnet |  |  | 71.0 ± 1.0 | 74.0 |  |"
    assert difference == "| difference on equal seeds |  |  |  | 2.0 |  |"


def test_a_decoders_tables_show_nats_with_and_without_distillation_and_over_the_steps(
    tmp_path, monkeypatch
):
    """Fig. 7's column beside stage 2's, and Fig. 5's losses at each validated step."""
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)

    def result(name, seed, score, losses):
        folder = tmp_path / f"{name}-seed{seed}"
        folder.mkdir(parents=True)
        row = SIZES | {"name": "w1-d2", "stderr": 0.1}
        history = {"sliced teacher": 9.0, "stage 2": score}
        rows = [row | {"score": score, "history": history}]
        content = {"metric": "loss", "measured": {}, "subnets": rows}
        evaluate.write_json(folder / "palette.json", content)
        run = {"task": "python", "data": {"dev": 24, "folder": "lib"}}
        evaluate.write_json(folder / "run.json", run | {"hyper_parameters": {"seed": seed}})
        log = [{"stage": 0, "step": i, "validation": {"w1-d2": x}} for i, x in enumerate(losses)]
        log.append({"stage": 1, "step": 0, "validation": {"w1-d2": 9.0}})
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))

    for seed in (0, 1):
        result("python/mlfs", seed, 2.5 + seed / 10, [])
        result("python/alpha-0", seed, 2.0 + seed / 10, [])
        result("custom/sliced", seed, 0.0, [3.0 + seed / 10, 2.0])
    row = "| w1-d2 | 2.00M | 1.00M | 9.000 ± 0.000 | 2.550 ± 0.050 | 2.050 ± 0.050 | 0.100 |"
    assert evidence.stages("python").splitlines()[-1] == row
    shutil.rmtree(tmp_path / "python" / "alpha-0-seed0")
    shutil.rmtree(tmp_path / "python" / "alpha-0-seed1")
    assert evidence.stages("python").splitlines()[-1] == row.replace(" 2.050 ± 0.050 |", "")
    head, _, row = evidence.curves("custom").splitlines()[-3:]
    assert head == "| start | step 0 | step 1 |"
    assert row == "| sliced | 3.050 ± 0.050 | 2.000 ± 0.000 |"
