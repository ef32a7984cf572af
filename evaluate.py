"""What a run of MLFS is worth: metrics, the palette (a row per subnet), and the reading back of a run folder.

    python evaluate.py runs/sst2-minilm-l6           # the palette, again, from the stored adapters
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Callable, Iterable

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

import data
from model import ElasticLinear, SubnetConfig, SuperTransformer, load_pretrained, read_json, replacing


# ------------------------------------------------------------------------------------------- metrics, as pure functions
# predictions and labels are numpy arrays of equal length; every metric is a fraction, 1 is perfect.

def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float((predictions == labels).mean())


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1; 0 when there is no true positive."""
    hits = ((predictions == 1) & (labels == 1)).sum()
    return float(2 * hits / max((predictions == 1).sum() + (labels == 1).sum(), 1))


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation of two binary vectors; 0 when either is constant."""
    return pearson(predictions, labels)                              # the phi coefficient is Pearson's of 0/1 vectors


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Linear correlation; 0 when either vector is constant."""
    x, y = predictions - np.mean(predictions, dtype=np.float64), labels - np.mean(labels, dtype=np.float64)
    norm = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / norm) if norm > 0 else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """1-based ranks; ties share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    return pearson(ranks(predictions), ranks(labels))


METRICS: dict[str, Callable] = {f.__name__: f for f in (accuracy, f1, matthews, pearson, spearman)}


def standard_error(metric: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """√(p(1-p)/n) for accuracy; the standard deviation over 500 seeded bootstrap samples for the others."""
    n = len(labels)
    if metric == "accuracy":
        p = accuracy(predictions, labels)
        return float(np.sqrt(p * (1 - p) / n))
    rng = np.random.default_rng(0)
    samples = (rng.integers(n, size=n) for _ in range(500))
    return float(np.std([METRICS[metric](predictions[i], labels[i]) for i in samples]))


# ------------------------------------------------------------------------------------------------------- the palette

@torch.no_grad()
def predict(model: SuperTransformer, phi: SubnetConfig, examples: data.Examples,
            batch_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Predicted classes (or scores) and their labels, shortest example first."""
    device = next(model.parameters()).device
    outputs, labels = [], []
    for x, y in data.batches(examples, batch_size, device=device):
        z, _ = model(**x, phi=phi)                                   # (B, C)
        outputs.append(z.argmax(-1) if z.size(-1) > 1 else z[:, 0])
        labels.append(y)
    return torch.cat(outputs).cpu().numpy(), torch.cat(labels).cpu().numpy()


def evaluate(model: SuperTransformer, phi: SubnetConfig, task: data.Task, splits: dict[str, data.Examples]) -> dict[str, float]:
    """{"score", "stderr", every metric of the task}, on dev; MNLI adds "accuracy_mismatched"."""
    predictions, labels = predict(model, phi, splits["dev"])
    values = {metric: METRICS[metric](predictions, labels) for metric in task.metrics}
    if "dev_mismatched" in splits:
        values["accuracy_mismatched"] = accuracy(*predict(model, phi, splits["dev_mismatched"]))
    main = task.metrics[0]
    return {"score": values[main], "stderr": standard_error(main, predictions, labels)} | values


def describe(model: SuperTransformer, phi: SubnetConfig) -> dict:
    """Φ's sizes, counted on the stand-alone model of Φ: parameters in all and in the encoder layers, and the encoder's
    multiply-accumulates per token (matrix products of the linear layers; attention scores left out)."""
    small = model.skeleton(phi)
    count = lambda module: sum(p.numel() for p in module.parameters())
    macs = sum(m.weight.numel() for m in small.layers.modules() if isinstance(m, ElasticLinear))
    return {"name": phi.name, "heads": phi.num_attention_heads, "intermediate_size": phi.intermediate_size,
            "hidden_size": phi.hidden_size, "layers": list(phi.layers), "parameters": count(small),
            "encoder_parameters": count(small.layers), "macs": macs}


def palette(model: SuperTransformer, space: list[SubnetConfig], task: data.Task,
            splits: dict[str, data.Examples]) -> list[dict]:
    """A row per subnet, maxnet first, minnet last: sizes, score and its standard error (the paper's Figs. 1 and 8)."""
    return [describe(model, phi) | evaluate(model, phi, task, splits) for phi in space]


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """Rows as a Markdown table; columns maps a key to its heading. Scores are printed in points (0-100)."""
    def cell(row, key):
        value = row.get(key, "")
        if key in ("parameters", "encoder_parameters", "macs"):
            return f"{value / 1e6:.2f}M ({value / rows[0][key]:.0%})"
        return f"{100 * value:.1f}" if isinstance(value, float) else str(value)
    lines = [list(columns.values())] + [[cell(row, key) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = ["| " + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))) + " |"
            for line in lines]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([text[0], rule, *text[1:]])


def final_table(rows: list[dict]) -> str:
    """The palette with one column for each moment that was measured, oldest first."""
    flat = [row | row.get("history", {}) for row in rows]
    columns = {"name": "subnet", "parameters": "parameters", "encoder_parameters": "encoder"}
    columns |= {moment: moment for moment in rows[0].get("history", {})} or {"score": "score"}
    return table(flat, columns | {"stderr": "± s.e."})


def write_palette(folder: Path, task_name: str, task: data.Task, rows: list[dict], note: str) -> None:
    """palette.json and palette.md in the run folder, each replaced as a whole."""
    content = {"task": task_name, "metric": task.metrics[0], "note": note, "subnets": rows}
    with replacing(folder / "palette.json") as path:
        path.write_text(json.dumps(content, indent=1) + "\n")
    with replacing(folder / "palette.md") as path:
        path.write_text((f"**{note}**\n\n" if note else "") + f"{task_name}, {task.metrics[0]} on dev, in points\n\n{final_table(rows)}\n")


def smallest_as_good(rows: list[dict]) -> dict:
    """The subnet with the fewest parameters whose score is within one standard error of the best."""
    best = max(rows, key=lambda row: row["score"])
    return min((row for row in rows if row["score"] >= best["score"] - best["stderr"]), key=lambda row: row["parameters"])


# ------------------------------------------------------------------------------------------------------- a run folder

def read_trained(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of one of our safetensors files. FileNotFoundError or ValueError if it cannot be read."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; the run has not got that far, or is not a run folder")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None


def subnet_from_json(row: dict) -> SubnetConfig:
    return SubnetConfig(row["hidden_size"], row["heads"], row["intermediate_size"], tuple(row["layers"]), name=row["name"])


def load_run(folder: Path, device: str = "cpu") -> tuple[dict, SuperTransformer, list[SubnetConfig]]:
    """(run.json, the model with its adapters in float32, 𝒜) of a finished run: all that is needed is in the folder and the
    base checkpoint it names."""
    run = read_json(folder / "run.json")
    try:
        base, digest, labels, space = run["base"]["folder"], run["base"]["sha256"], run["num_labels"], run["space"]
        space = [subnet_from_json(row) for row in space]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'run.json'} is not one of ours or was edited: {error} is missing or wrong") from None
    if data.sha256(Path(base) / "model.safetensors") != digest:
        raise ValueError(f"{base} is not the checkpoint that {folder} was trained on (its sha256 differs)")
    model = load_pretrained(base, labels, torch.float32)
    state, _ = read_trained(folder / "adapters.safetensors")
    model.load_trained_state(state)
    return run, model.to(device), space


def exit_on_bad_input(main: Callable[[], int]) -> int:
    """Runs a command: whatever the user can put right is told in one sentence, exit code 2; a bug keeps its traceback.

    The convention throughout: ValueError and OSError carry that sentence.
    """
    try:
        return main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The palette of a finished run, measured again.")
    parser.add_argument("run", type=Path, help="a run folder, such as runs/toy")
    parser.add_argument("--data-dir", type=Path, help="folder that holds SST-2/ etc. (default: where the run found it)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    args = parser.parse_args(argv)
    run, model, space = load_run(args.run, args.device)
    task = data.TASKS[run["task"]]
    tokenizer = data.load_tokenizer(run["base"]["folder"], model.config["vocab_size"])
    splits = {name: data.encode(tokenizer, rows, run["hyper_parameters"]["max_length"])
              for name, rows in data.load_task(run["task"], args.data_dir or run["data"]["folder"]).items() if name != "train"}
    rows = palette(model, space, task, splits)
    if run["note"]:
        print(run["note"])
    print(f"{run['task']}, {task.metrics[0]} on dev ({len(splits['dev'].labels)} examples), float32, in points\n")
    print(final_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_bad_input(main))
