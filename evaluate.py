"""What a run of MLFS is worth: metrics, the palette; choosing, shipping, using a subnet; HumanEval.

    python evaluate.py runs/toy                      # score, size and latency of every subnet, here
    python evaluate.py runs/toy --plot palette.png --max-latency-ms 0.8        # a picture; a choice
    python evaluate.py runs/toy --export w0.5-d2 DIR           # an ordinary checkpoint of one
    python evaluate.py runs/toy --subnet w0.5-d2 --predict "the plot is clever ."
    python evaluate.py runs/python-santacoder --humaneval HumanEval.jsonl.gz --allow-code-execution
"""
import argparse
import ctypes
import glob
import gzip
import hashlib
import importlib
import inspect
import itertools
import json
import logging
import math
import os
import pickle
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tqdm import tqdm

import data
from model import (Cache, Decoder, ElasticLinear, SubnetConfig, SuperTransformer,
                   checkpoint_files, load_pretrained, read_json, replacing, save_pretrained, short)


# ----------------------------------------------------------------- metrics, as pure functions
# predictions and labels are numpy arrays of equal length; 1 is perfect.

def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float((predictions == labels).mean())


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1; 0 when there is no true positive."""
    hits = ((predictions == 1) & (labels == 1)).sum()
    return float(2 * hits / max((predictions == 1).sum() + (labels == 1).sum(), 1))


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation of two binary vectors; 0 when either is constant."""
    return pearson(predictions, labels)                      # the same thing for 0/1 vectors


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Linear correlation; 0 when either vector is constant."""
    x, y = (v - np.mean(v, dtype=np.float64) for v in (predictions, labels))
    norm = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / norm) if norm > 0 else 0.0


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Correlation of the ranks; ties share their mean rank."""
    def ranks(values: np.ndarray) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return pearson(ranks(predictions), ranks(labels))


METRICS: dict[str, Callable] = {f.__name__: f for f in (accuracy, f1, matthews, pearson, spearman)}


def show(metric: str, value: float) -> str:
    """A loss in nats; all else in points, 0 to 100."""
    return f"{value:.3f}" if metric == "loss" else f"{100 * value:.1f}"


def quality(row: dict, metric: str) -> str:
    return f"{show(metric, row['score'])} ± {show(metric, row['stderr'])}"


def gain(metric: str, old: float, new: float) -> float:
    """How much better `new` is: a loss is better when it is lower."""
    return old - new if metric == "loss" else new - old


def standard_error(metric: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """√(p(1-p)/n) for accuracy; for the others the spread over 500 seeded bootstrap samples."""
    n = len(labels)
    if metric == "accuracy":
        p = accuracy(predictions, labels)
        return float(np.sqrt(p * (1 - p) / n))
    rng = np.random.default_rng(0)
    samples = (rng.integers(n, size=n) for _ in range(500))
    return float(np.std([METRICS[metric](predictions[i], labels[i]) for i in samples]))


# --------------------------------------------------------------------------------- the palette

@torch.inference_mode()
def predict(model: SuperTransformer, phi: SubnetConfig, examples: data.Examples,
            batch_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Predicted classes (or scores) and their labels, shortest example first."""
    device, outputs, labels = next(model.parameters()).device, [], []
    for x, y in data.batches(examples, batch_size, device=device):
        z, _ = model(**x, phi=phi, features=())                                  # (B, C)
        outputs.append(z.argmax(-1) if z.size(-1) > 1 else z[:, 0])
        labels.append(y)
    return torch.cat(outputs).cpu().numpy(), torch.cat(labels).cpu().numpy()


@torch.inference_mode()
def next_token_losses(model: SuperTransformer, phi: SubnetConfig, examples: data.Examples,
                      batch_size: int = 8) -> np.ndarray:
    """Cross-entropy in nats per next token, mean over each window (M,)."""
    device, means = next(model.parameters()).device, []
    for x, y in data.batches(examples, batch_size, device=device):
        s, _ = model.encode(**x, phi=phi)                                        # (B, T, H)
        for states, targets in zip(s, y):                    # one window's logits (T, V) at a time
            means.append(F.cross_entropy(model.logits(states), targets, ignore_index=data.IGNORED))
    return torch.stack(means).cpu().numpy()


def evaluate(model: SuperTransformer, phi: SubnetConfig, task: data.Task,
             splits: dict[str, data.Examples]) -> dict[str, float]:
    """"score" (the task's first metric), "stderr" and every metric, on dev.

    MNLI adds "accuracy_mismatched". Code: the loss, its mean and standard error over windows.
    """
    if "loss" in task.metrics:
        losses = next_token_losses(model, phi, splits["dev"])
        error = losses.std(ddof=1) / np.sqrt(len(losses)) if len(losses) > 1 else 0.0
        return {"score": float(losses.mean()), "stderr": float(error)}
    predictions, labels = predict(model, phi, splits["dev"])
    values = {metric: METRICS[metric](predictions, labels) for metric in task.metrics}
    if "dev_mismatched" in splits:
        values["accuracy_mismatched"] = accuracy(*predict(model, phi, splits["dev_mismatched"]))
    first = task.metrics[0]
    return {"score": values[first], "stderr": standard_error(first, predictions, labels)} | values


def describe(model: SuperTransformer, phi: SubnetConfig) -> dict:
    """Φ's sizes, counted on its stand-alone model: parameters in all and in the encoder's layers.

    "macs" are the multiply-accumulates per token of the layers' linear maps, attention left out;
    "size_mb" is 10^6 bytes on disk, in the model's number format.
    """
    small, dtype = model.skeleton(phi), next(model.parameters()).dtype
    linears = [m for m in small.layers.modules() if isinstance(m, ElasticLinear)]
    parameters = sum(p.numel() for p in small.parameters())
    return {"name": phi.name, "heads": phi.num_attention_heads, "hidden_size": phi.hidden_size,
            "intermediate_size": phi.intermediate_size, "layers": list(phi.layers),
            "parameters": parameters, "size_mb": parameters * dtype.itemsize / 1e6,
            "encoder_parameters": sum(p.numel() for p in small.layers.parameters()),
            "macs": sum(linear.weight.numel() for linear in linears)}


SIZE_KEYS = {"name": str, "heads": int, "hidden_size": int, "intermediate_size": int,
             "layers": list, "parameters": int, "size_mb": float, "encoder_parameters": int,
             "macs": int}                            # what `describe` returns, to check what is read


def subnet(row: dict) -> SubnetConfig:
    """Φ of a row."""
    return SubnetConfig(row["hidden_size"], row["heads"], row["intermediate_size"],
                        tuple(row["layers"]), row["name"])


def palette(model: SuperTransformer, space: list[SubnetConfig], task: data.Task,
            splits: dict[str, data.Examples]) -> list[dict]:
    """A row per subnet, maxnet first: sizes, score, standard error (Figs. 1 and 8)."""
    return [describe(model, phi) | evaluate(model, phi, task, splits) for phi in space]


@torch.inference_mode()
def latency(model: SuperTransformer, space: list[SubnetConfig], batch_size: int = 1,
            length: int = 128, rounds: int = 5, runs: int = 4) -> list[dict]:
    """A row per subnet: how long a forward pass takes, in milliseconds; adapters merged before.

    "latency_ms" is the median of the stand-alone model (`extract`), "latency_ms_range" its 10% and
    90% quantiles, "slice_ms" the same for the slice in place. Every round visits every subnet,
    warms it up, and times both in turn, so that a drift of the machine hits all alike.
    """
    device = next(model.parameters()).device
    ids = torch.ones(batch_size, length, dtype=torch.long, device=device)
    times: dict[tuple, list[float]] = {}
    for _ in range(rounds):
        for phi in space:
            small = model.extract(phi)                               # one copy at a time
            for run in range(-1, runs):
                for key, form in (("latency_ms", lambda: small(ids, features=())),
                                  ("slice_ms", lambda: model(ids, None, phi, features=()))):
                    wait(device)
                    start = time.perf_counter()
                    form()
                    wait(device)
                    if run >= 0:
                        elapsed = 1e3 * (time.perf_counter() - start)
                        times.setdefault((phi, key), []).append(elapsed)
    rows: list[dict] = [{} for _ in space]
    for row, phi in zip(rows, space):
        for key in ("latency_ms", "slice_ms"):
            low, row[key], high = np.quantile(times[phi, key], (0.1, 0.5, 0.9)).tolist()
            row[key + "_range"] = [low, high]
    return rows


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def choose(rows: list[dict], budget: dict[str, float], metric: str) -> list[dict]:
    """The rows within the budget, best first; budget maps a key of a row to its largest value.

    The one-standard-error rule: of those within a standard error of the best, the smallest wins.
    """
    def worth(row: dict) -> float:                                   # what is not a number is worst
        return -math.inf if math.isnan(row["score"]) else gain(metric, 0, row["score"])

    left = [row for row in rows if all(row[key] <= most for key, most in budget.items())]
    chosen = []
    while left:
        top = max(left, key=worth)
        tied = [row for row in left if row is top or worth(top) - worth(row) <= top["stderr"]]
        chosen.append(min(tied, key=lambda row: (row["parameters"], -worth(row))))
        left.remove(chosen[-1])
    return chosen


def worth_shipping(rows: list[dict], metric: str) -> list[tuple[int, dict]]:
    """(n, the row to take) where the choice changes as the budget of parameters grows to n."""
    front: list[tuple[int, dict]] = []
    for most in sorted({row["parameters"] for row in rows}):
        best = choose(rows, {"parameters": most}, metric)[0]
        if not front or front[-1][1] is not best:
            front.append((most, best))
    return front


def millions(count: int) -> str:
    return f"{count / 1e6:.2f}M"


FORMATS: dict[str, Callable] = {                     # of a row's values; all others: as a score
    "layers": lambda layers: str(len(layers)),
    "parameters": millions,
    "encoder_parameters": millions,
    "macs": millions,
    "size_mb": "{:.1f} MB".format,
    "latency_ms": "{:.2f}".format,
    "slice_ms": "{:.2f}".format,
}
SHARED = {*FORMATS, "score"} - {"layers"}            # shown as a share of the first row's, too


def table(rows: list[dict], columns: dict[str, str], metric: str) -> str:
    """Markdown, a line per row; columns maps a key of the first row to its heading.

    A latency's 10% and 90% quantiles stand in brackets. The share of the first row's value is left
    out where it means nothing: of a loss, of a score that is 0 or less.
    """
    def cell(row: dict, key: str) -> str:
        if key not in row:                           # a padded subnet's latency
            return ""
        value = row[key]
        text = show(metric, value) if isinstance(value, float) else str(value)
        if key in FORMATS:
            text = FORMATS[key](value)
        if key + "_range" in row:
            text += " [{:.2f}, {:.2f}]".format(*row[key + "_range"])
        comparable = key in SHARED and (key, metric) != ("score", "loss")
        if comparable and rows[0][key] > 0:
            text += f" ({value / rows[0][key]:.0%})"
        return text

    keys = [key for key in columns if key in rows[0]]
    lines = [[columns[key] for key in keys]]
    lines += [[cell(row, key) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, cells, widths)) + " |" for cells in lines)


SIZE_COLUMNS = {"name": "subnet", "parameters": "parameters", "encoder_parameters": "encoder"}
MEASURED_COLUMNS = {
    "name": "subnet", "heads": "heads", "intermediate_size": "FFN", "hidden_size": "hidden",
    "layers": "layers", "parameters": "parameters", "encoder_parameters": "encoder",
    "macs": "MACs per token", "size_mb": "on disk", "score": "score", "stderr": "± s.e.",
    "latency_ms": "latency, ms", "slice_ms": "in place, ms",
}


def final_table(rows: list[dict], metric: str, last: int = 0) -> str:
    """The palette with a column for each of the `last` moments that were measured (0: for all),
    oldest first, the standard error of the last, and the task's other metrics then."""
    moments = list(rows[0].get("history", ["score"]))
    if last:
        moments = moments[-last:]
    others = [key for key in (*METRICS, "accuracy_mismatched") if key in rows[0] and key != metric]
    columns = SIZE_COLUMNS | {moment: moment for moment in moments} | {"stderr": "± s.e."}
    columns |= {key: key for key in others}
    return table([row | row.get("history", {}) for row in rows], columns, metric)


def title(task: str, metric: str, examples: int) -> str:
    unit = "in nats per token, lower is better" if metric == "loss" else "in points"
    return f"{task}, {metric} on dev ({examples:,} examples), {unit}"


# ------------------------------------------------------------------------------------- pictures

def require_package(option: str, packages: str, *modules: str) -> None:
    """ValueError unless the optional packages of an option are installed."""
    try:
        for module in modules:
            importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{option} needs what is not among the requirements: pip install "
                         f"{packages}") from None


@contextmanager
def picture(path: Path, panels: int):
    """Yields matplotlib's figure and axes, written to `path` once the block ends well."""
    from matplotlib.figure import Figure             # an optional extra
    figure = Figure(figsize=(5.5 * panels, 4.2), layout="constrained")
    yield figure, figure.subplots(1, panels, squeeze=False)[0]
    with replacing(path) as beside:
        figure.savefig(beside, format=path.suffix[1:], dpi=120)


def plot_palette(path: Path, rows: list[dict], metric: str, heading: str,
                 teacher: float | None) -> None:
    """Score against parameters and against latency, with standard errors; the teacher's score, and
    its slices before stages 1 and 2."""
    points = 1 if metric == "loss" else 100
    scores = [points * row["score"] for row in rows]
    errors = [points * row["stderr"] for row in rows]
    history = rows[0].get("history", {})
    with picture(path, 2) as (figure, axes):
        figure.suptitle(heading)
        for axis, (key, unit, label) in zip(axes, (("parameters", 1e6, "parameters, millions"),
                                                   ("latency_ms", 1, "latency, ms"))):
            costs = [row[key] / unit for row in rows]
            for moment, mark in (("sliced teacher", "x"), ("reordered", "+")):
                if moment in history:
                    old = [points * row["history"][moment] for row in rows]
                    axis.plot(costs, old, mark, color="gray", label=f"{moment}, not trained yet")
            axis.errorbar(costs, scores, errors, fmt="o", capsize=2, label="MLFS")
            for row, cost, score in zip(rows, costs, scores):
                axis.annotate(row["name"], (cost, score), fontsize=7, xytext=(4, -9),
                              textcoords="offset points")
            if teacher is not None:
                axis.axhline(points * teacher, color="black", linestyle=":", label="teacher")
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("loss, nats per token" if metric == "loss" else f"{metric}, points")
        axes[0].legend(fontsize=7)


def read_log(path: Path) -> list[dict]:
    """The lines of log.jsonl; ValueError if they hold no losses, or what no run wrote."""
    entries = read_lines(path, {"stage": int, "step": int})
    drawn = [entry[kind] for entry in entries for kind in ("loss", "validation") if kind in entry]
    if not drawn:
        raise ValueError(f"{path} has no losses yet")
    values = [value for part in drawn if isinstance(part, dict) for value in part.values()]
    dicts = all(isinstance(part, dict) for part in drawn)
    if not dicts or not all(isinstance(value, (int, float)) for value in values):
        raise ValueError(f"{path} is not one of ours, or was edited")
    return entries


def running_mean(points: list[tuple], window: int) -> list[np.ndarray]:
    """x and y of points (x, y), each averaged over a window, or over a third of all if that is
    less."""
    window = min(window, math.ceil(len(points) / 3))
    return [np.convolve(values, np.full(window, 1 / window), "valid") for values in zip(*points)]


def plot_curves(path: Path, entries: list[dict]) -> None:
    """Losses per subnet, averaged over 10 logged steps, and validation scores, over the iterations
    of all stages (Figs. 2, 5 and 7)."""
    labels = {"loss": "training loss", "validation": "validation score"}
    kinds = [kind for kind in labels if any(kind in entry for entry in entries)]
    names = list(dict.fromkeys(name for entry in entries for kind in kinds
                               for name in entry.get(kind, {})))
    starts = [0]
    for stage in range(2):
        steps = [entry["step"] for entry in entries if entry["stage"] == stage]
        starts.append(starts[-1] + max(steps, default=0))
    with picture(path, len(kinds)) as (_, axes):
        for axis, kind in zip(axes, kinds):
            for (i, name), stage in itertools.product(enumerate(names), range(3)):
                points = [(starts[stage] + entry["step"], entry[kind][name]) for entry in entries
                          if entry["stage"] == stage and name in entry.get(kind, {})]
                if points:
                    x, y = running_mean(points, 10 if kind == "loss" else 1)
                    axis.plot(x, y, marker="." if len(x) == 1 else "", color=f"C{i % 10}")
            for start in starts[1:]:
                axis.axvline(start, color="gray", linewidth=0.5)
            axis.set_xlabel("iterations of the three stages")
            axis.set_ylabel(labels[kind])
        for i, name in enumerate(names):
            axes[0].plot([], [], color=f"C{i % 10}", label=name)
        axes[0].legend(fontsize=7)


# ------------------------------------------------------------------------------------- shipping

@contextmanager
def new_folder(folder: Path):
    """Yields a folder to fill; it becomes `folder` (absent or empty) once the block ends well."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        beside = Path(scratch) / folder.name
        beside.mkdir()
        yield beside
        os.replace(beside, folder)


def export(small: SuperTransformer, folder: Path, base: Path, labels: tuple[str, ...],
           card: str, onnx: bool = False) -> None:
    """An ordinary checkpoint of a merged subnet: config.json, model.safetensors, the base's
    tokenizer, a model card and, if wanted, model.onnx.

    A tokenizer of vocab.txt alone is stored as tokenizer.json as well, as we read it.
    """
    with new_folder(folder) as beside:
        save_pretrained(small, beside, labels)
        for name in data.TOKENIZER_FILES:
            if (base / name).exists():
                shutil.copyfile(base / name, beside / name)
        if not (base / "tokenizer.json").exists():
            data.load_tokenizer(base).save(str(beside / "tokenizer.json"))
        (beside / "README.md").write_text(card, encoding="utf-8")
        if onnx:
            export_onnx(small, beside / "model.onnx")


def common_form(small: SuperTransformer, pad: bool) -> tuple[SuperTransformer, str]:
    """The model with heads of zeros added if `pad`, and what other libraries can make of it."""
    config = small.config
    own = config["num_attention_heads"]
    hidden = config["hidden_size"]
    shape = f"{own} heads of {config['head_dim']} at hidden size {hidden}"
    heads = small.common_heads()
    if pad and heads == own:
        raise ValueError(f"--pad-heads: nothing to pad, other libraries can express {shape}")
    if pad and heads is None:
        raise ValueError(f"--pad-heads: no number of heads from {own} on fits hidden size {hidden}")
    if heads == own:
        return small, "The transformers library can load it."
    why = f"The transformers library's {type(small).__name__} cannot express {shape}"
    if heads is None:
        return small, f"{why}, padded or not; load_pretrained of model.py reads it."
    padded = small.pad_heads(heads)
    old = describe(small, small.maxnet)
    new = describe(padded, padded.maxnet)
    cost = f"{heads} heads, the new ones zeros: " + ", ".join(
        f"{millions(new[key])} instead of {millions(old[key])} {what}"
        for key, what in (("parameters", "parameters"), ("macs", "MACs per token")))
    if pad:
        return padded, f"The transformers library can load it, padded to {cost}."
    return small, f"{why}; load_pretrained of model.py reads it; --pad-heads makes it {cost}."


class Logits(torch.nn.Module):
    """The model with the input names that other libraries use; its only output is z."""

    def __init__(self, model: SuperTransformer):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        segments = {} if token_type_ids is None else {"segments": token_type_ids}
        return self.model(input_ids, attention_mask, features=(), **segments)[0]


def onnx_inputs(model: SuperTransformer, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random inputs (batch, length); the last of several rows is padded by half."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config["vocab_size"], (batch, length), generator=draw)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[-1, max(1, length // 2):] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if not isinstance(model, Decoder):
        kinds = model.config["type_vocab_size"]
        inputs["token_type_ids"] = torch.randint(kinds, ids.shape, generator=draw)
    return inputs


def export_onnx(small: SuperTransformer, path: Path) -> None:
    """Writes float32 ONNX with dynamic batch and length.

    ValueError if onnxruntime's logits differ by more than 1e-3 from ours.
    """
    import onnxruntime                               # an optional extra, as is onnxscript, in torch

    small = small.float().cpu()
    model = Logits(small)
    room = small.config["max_position_embeddings"]
    example = onnx_inputs(small, 2, min(8, room))
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=room)}
    large = sum(p.nbytes for p in model.parameters()) > 2 ** 30      # one file ends at 2 GiB
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                              # torch's, on its own workings
        torch.onnx.export(model, tuple(example.values()), path, input_names=list(example),
                          output_names=["logits"], dynamic_shapes=dict.fromkeys(example, axes),
                          dynamo=True, verbose=False, external_data=large)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch, length in itertools.product((1, 3), (min(7, room), min(128, room))):
        x = onnx_inputs(small, batch, length)
        z, = session.run(None, {name: part.numpy() for name, part in x.items()})
        away = (torch.from_numpy(z) - model(**x).detach()).abs()
        if isinstance(small, Decoder):                               # what follows padding is void
            away = away[x["attention_mask"].bool()]
        most = float(away.max())
        if not most <= 1e-3:                                         # not a number fails, too
            raise ValueError(f"{path.name}: its logits differ by {most:.1e} from PyTorch's; "
                             f"nothing was written")


def model_card(run: dict, rows: list[dict], metric: str, form: str, dtype: str, where: str) -> str:
    """README.md of an exported subnet; rows: the maxnet's and its own."""
    row, hp, base = rows[-1], run["hyper_parameters"], Path(run["base"]["folder"]).name
    note = f"**{run['note']}**\n\n" if run["note"] else ""
    return f"""---
base_model: {base}
tags: [mlfs]
---
# {row['name']}: a slice of {base} for {run['task']}

{note}Cut by MLFS (Multistage Low-rank Fine-tuning of Super-transformers, Kundu et al., NAACL 2024)
from {base} (sha256 of its files: {run['base']['sha256']}), rank {hp['rank']}, seed {hp['seed']}.
Layers kept, from 0: {', '.join(map(str, row['layers']))}. Weights in {dtype}. {form}

{title(run['task'], metric, run['data']['dev'])}:

{table(rows, MEASURED_COLUMNS, metric)}

{where}
"""


# ---------------------------------------------------------------------------------- using a model

@torch.inference_mode()
def answer(model: SuperTransformer, phi: SubnetConfig, tokenizer: Tokenizer, task: data.Task,
           text: str, max_length: int) -> str:
    """The label of a sentence and each class's probability, or a score; a pair has a tab between.

    ValueError unless there are as many sentences as the task takes.
    """
    sentences = tuple(part.strip() for part in text.split("\t"))
    wanted = len(task.sentences) or 1
    if len(sentences) != wanted:
        raise ValueError(f"{text[:80]!r} has {len(sentences)} parts separated by tabs; the task "
                         f"takes {wanted}")
    rows = data.Rows([sentences], np.zeros(1, dtype=np.int64))
    examples = data.encode(tokenizer, rows, max_length)
    device = next(model.parameters()).device
    (x, _), = data.batches(examples, 1, device=device)
    z = model(**x, phi=phi, features=())[0][0]                               # (C,)
    if not task.labels:
        return f"{z.item():.3f}"
    shares = z.softmax(-1).tolist()
    classes = [f"{label} {share:.3f}" for label, share in zip(task.labels, shares, strict=True)]
    return "\t".join([task.labels[int(z.argmax())], *classes])


# ------------------------------------------------------------------------------- generating text

@torch.inference_mode()
def generate(model: SuperTransformer, tokenizer: Tokenizer, prompts: list[str],
             max_new_tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0,
             stop: tuple[str, ...] = (), seeds: list[int] | None = None,
             phi: SubnetConfig | None = None) -> list[str]:
    """A continuation of each prompt, up to the end of text or the first of the `stop` strings.

    Temperature 0 takes the likeliest token; otherwise one is drawn among the likeliest that hold
    top_p of the probability. Each row draws with a seed of its own: neighbours in the batch do not
    change it, unless the longest meets the model's last position. ValueError if a prompt leaves no
    room for a token.
    """
    device = next(model.parameters()).device
    end = data.end_of_text(tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    encoded = [tokenizer.encode(prompt).ids or [end] for prompt in prompts]
    longest = max(map(len, encoded))
    room = model.config["max_position_embeddings"]
    if longest >= room:
        raise ValueError(f"a prompt of {longest} tokens leaves no room in the model's {room} "
                         f"positions")
    total = min(longest + max_new_tokens, room)
    ids, mask = left_padded(encoded, total, end)
    ids, mask = ids.to(device), mask.to(device)
    cache = Cache(total)
    draws = [torch.Generator().manual_seed(seed) for seed in seeds or range(len(prompts))]
    new: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for length in range(longest, total):
        seen = None if mask.all() else mask[:, :length]              # no mask is faster
        states, _ = model.encode(ids, seen, phi or model.maxnet, cache)
        ids = next_tokens(model.logits(states[:, -1]), temperature, top_p, draws)    # (B, 1)
        for row, token in enumerate(ids[:, 0].tolist()):
            if row in running:
                new[row].append(token)
                if token == end or has_stopped(tokenizer, new[row], stop):
                    running.discard(row)
        if not running:
            break
    return [continuation(tokenizer, before, after, stop)
            for before, after in zip(encoded, new, strict=True)]


def left_padded(encoded: list[list[int]], total: int, padding: int) -> tuple[torch.Tensor, ...]:
    """Ids (B, T) that all end at the longest prompt's last token, and a mask (B, total)."""
    longest = max(map(len, encoded))
    ids = torch.full((len(encoded), longest), padding)
    mask = torch.ones(len(encoded), total, dtype=torch.long)
    for row, tokens in enumerate(encoded):
        padded = longest - len(tokens)
        ids[row, padded:] = torch.tensor(tokens)
        mask[row, :padded] = 0
    return ids, mask


def has_stopped(tokenizer: Tokenizer, new: list[int], stop: tuple[str, ...]) -> bool:
    """Whether a stop string has just been completed."""
    if not stop:
        return False
    tail = tokenizer.decode(new[-max(map(len, stop)):])              # a token is a letter at least
    return any(word in tail for word in stop)


def continuation(tokenizer: Tokenizer, before: list[int], after: list[int],
                 stop: tuple[str, ...]) -> str:
    """The text of the tokens after a prompt, cut before the first stop string."""
    prompt = tokenizer.decode(before)
    text = tokenizer.decode(before + after)[len(prompt):]    # alone it may lose its first space
    end = len(text)
    for word in stop:
        found = text.find(word)
        if found >= 0:
            end = min(end, found)
    return text[:end]


def next_tokens(z: torch.Tensor, temperature: float, top_p: float,
                draws: list[torch.Generator]) -> torch.Tensor:
    """A token (B, 1) for each row of the logits z (B, V): the likeliest, or a drawn one."""
    if temperature == 0:
        return z.argmax(-1, keepdim=True)
    return sample(z / temperature, top_p, draws)


def sample(z: torch.Tensor, top_p: float, draws: list[torch.Generator]) -> torch.Tensor:
    """A token (B, 1) per row of logits z (B, V), among the likeliest whose probability is top_p."""
    p, order = z.softmax(-1).cpu().sort(descending=True)
    before = p.cumsum(-1) - p                        # 0 for the likeliest, which always stays
    p = p.masked_fill(before >= top_p, 0.0)
    places = [torch.multinomial(row, 1, generator=draw) for row, draw in zip(p, draws, strict=True)]
    return order.gather(-1, torch.stack(places)).to(z.device)


# ------------------------------------------------------------------------------------- HumanEval

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@")           # the function has ended
TASK_KEYS = dict.fromkeys(("task_id", "prompt", "entry_point", "test"), str)


def estimate_pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the chance that one of k samples passes, when c of n did.

    Unbiased (Chen et al., 2021, the paper's HumanEval). ValueError unless 1 ≤ k ≤ n and 0 ≤ c ≤ n.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@{k} is not defined for {c} of {n} samples")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def read_lines(path: Path, keys: dict[str, type]) -> list[dict]:
    """A row for each line of *.jsonl or *.jsonl.gz; ValueError names file, line and missing key."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    unpack = gzip.open if path.suffix == ".gz" else open
    rows: list[dict] = []
    try:
        with unpack(path, "rt", encoding="utf-8-sig") as file:       # a byte-order mark is no text
            for line in file:
                row = json.loads(line)
                check_keys(row, keys)
                rows.append(row)
    except (EOFError, zlib.error, gzip.BadGzipFile, ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {len(rows) + 1}: {error}") from None
    return rows


def judged_before(path: Path, made: dict) -> list[dict]:
    """The completions in a file; ValueError if they were made with other settings than these."""
    if not path.exists():
        return []
    text = path.read_bytes()
    with replacing(path) as beside:                  # without a last line that a crash cut short
        beside.write_bytes(text[:text.rfind(b"\n") + 1])
    rows = read_lines(path, {"task_id": str, "sample": int, "passed": bool, "made": dict})
    for row in rows:
        for key, value in made.items():
            if row["made"].get(key) != value:
                raise ValueError(f"{path} holds completions made with another {key}; move it away "
                                 f"first")
    return rows


def humaneval(model: SuperTransformer, tokenizer: Tokenizer, problems: list[dict], path: Path,
              origin: dict, samples: int = 1, batch_size: int = 16, **settings) -> dict[str, float]:
    """pass@k of `model` for k in 1, 10, 100 up to `samples`, and pass@1's standard error.

    Each judged completion is a line of `path`, with the settings of `generate` and the model's
    origin; those that are there already are not made again, and ValueError is raised if they are of
    another origin or other settings. RUNS GENERATED CODE: see `check_correctness`.
    """
    made = origin | settings
    rows = judged_before(path, made)
    done = {(row["task_id"], row["sample"]) for row in rows}
    todo = [(sample, i) for sample in range(samples) for i, problem in enumerate(problems)
            if (problem["task_id"], sample) not in done]
    todo.sort(key=lambda pair: len(problems[pair[1]]["prompt"]))             # less padding
    with open(path, "a", encoding="utf-8") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in tqdm(range(0, len(todo), batch_size), unit=" batches", disable=None):
            batch = todo[start:start + batch_size]
            asked = [problems[i] for _, i in batch]
            prompts = [problem["prompt"].rstrip() for problem in asked]      # "\n    " is one token
            seeds = [sample * len(problems) + i for sample, i in batch]
            texts = generate(model, tokenizer, prompts, stop=STOP, seeds=seeds, **settings)
            verdicts = pool.map(check_correctness, asked, texts)
            for (sample, i), text, verdict in zip(batch, texts, verdicts, strict=True):
                row = {"task_id": problems[i]["task_id"], "sample": sample, "completion": text}
                rows.append(row | {"made": made} | verdict)
                file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
    return pass_at_k(rows, [problem["task_id"] for problem in problems], samples)


def pass_at_k(rows: list[dict], tasks: list[str], samples: int) -> dict[str, float]:
    """Mean over the problems, from rows of {"task_id", "sample", "passed"}."""
    passed = dict.fromkeys(tasks, 0)
    for row in rows:
        if row["sample"] < samples and row["task_id"] in passed:
            passed[row["task_id"]] += row["passed"]
    found = {}
    for k in (1, 10, 100):
        if k <= samples:
            chances = [estimate_pass_at_k(samples, count, k) for count in passed.values()]
            found[f"pass@{k}"] = float(np.mean(chances))
    ones = [count / samples for count in passed.values()]            # pass@1 of each problem
    return found | {"stderr": float(np.std(ones) / np.sqrt(len(tasks)))}


# ------------------------------------------------------------------------------------ the judge
#
# A child interpreter runs the functions below, not this file: it must not import torch, nor hold
# anything of ours. It forks. The *worker* runs the completion; the *judge* runs the asserts, on
# values that it has the worker compute. So no secret is needed: the pipe for the verdict is open in
# the judge alone, and nothing but plain data gets into the judge.

LIMITS = {                                           # of every process that a completion starts
    "AS": 2 ** 30,                                   # bytes of memory
    "FSIZE": 2 ** 24,                                # bytes of a file
    "NPROC": 8,
    "NOFILE": 64,
    "CORE": 0,
}
LINUX = {                                            # numbers of the system's own header files
    "PR_SET_PDEATHSIG": 1,
    "PR_SET_DUMPABLE": 4,
    "PR_SET_CHILD_SUBREAPER": 36,
    "PR_SET_NO_NEW_PRIVS": 38,
    "CLONE_NEWIPC": 0x08000000,
    "CLONE_NEWUSER": 0x10000000,
    "CLONE_NEWPID": 0x20000000,
    "CLONE_NEWNET": 0x40000000,
    "LANDLOCK_CREATE_RULESET": 444,
    "LANDLOCK_ADD_RULE": 445,
    "LANDLOCK_RESTRICT_SELF": 446,
    "LANDLOCK_WRITE_V1": 0x1FF2,                     # all rights to change files, none to read
    "LANDLOCK_WRITE_V2": 0x3FF2,                     # and to move them between folders
    "LANDLOCK_WRITE_V3": 0x7FF2,                     # and to truncate them
}


class PlainUnpickler(pickle.Unpickler):
    """Loads numbers, strings and containers of them; anything else is an error."""
    find_class = None


def plain(value):
    """Containers of derived kinds, such as Counter, as the kind they are derived from."""
    if isinstance(value, dict):
        return dict(plain(list(value.items())))
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return kind(map(plain, value))
    return value


def serve_calls(calls, replies):
    """The worker: runs the completed program, then calls its function as often as it is asked."""
    try:
        program, name = pickle.load(calls)
        namespace = {}
        value = None
        exec(program, namespace)
        while True:
            pickle.dump((True, plain(value)), replies)
            args, kwargs = pickle.load(calls)
            value = namespace[name](*args, **kwargs)
    except BaseException as error:
        pickle.dump((False, type(error).__name__), replies)


def run_asserts(calls, replies):
    """The judge: runs the asserts on a function that is called in the worker."""
    def ask(message):
        pickle.dump(message, calls)
        returned, value = PlainUnpickler(replies).load()
        if not returned:
            raise type(value, (Exception,), {})
        return value

    try:
        problem, completion = json.load(sys.stdin)
        prompt = problem["prompt"]
        name = problem["entry_point"]
        ask((prompt + completion + "\n", name))
        namespace = {}
        exec(prompt + "\n    pass\n", namespace)  # asserts may use another function of the prompt
        namespace[name] = lambda *args, **kwargs: ask((args, kwargs))
        exec(problem["test"] + f"\ncheck({name})", namespace)
        return "passed"
    except BaseException as error:
        return f"failed: {type(error).__name__}"  # EOFError if the worker ended by itself


def kill_all(worker):
    """Kills the worker and all its descendants: an orphan becomes a child of this process."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.kill(worker, signal.SIGKILL)
    with suppress(OSError):
        os.killpg(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    mine = b"\nPPid:\t%d\n" % os.getpid()
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG):
            for path in glob.glob("/proc/[0-9]*/status"):
                with suppress(OSError), open(path, "rb") as file:
                    if mine in file.read():
                        os.kill(int(path.split("/")[2]), signal.SIGKILL)
            time.sleep(0.001)


def give_up_rights(libc, user):
    """The worker gives up, for good, what a program does not need."""
    os.setsid()
    if user:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    if sys.platform != "linux":
        return
    libc.prctl(LINUX["PR_SET_PDEATHSIG"], signal.SIGKILL, 0, 0, 0)  # die with the judge
    libc.prctl(LINUX["PR_SET_NO_NEW_PRIVS"], 1, 0, 0, 0)  # no sudo
    # Landlock: write to no file outside of this folder and, from version 6 on, use no TCP and
    # signal no other process. Where the kernel does not have it, these calls do nothing.
    version = libc.syscall(LINUX["LANDLOCK_CREATE_RULESET"], None, 0, 1)
    write = LINUX[f"LANDLOCK_WRITE_V{min(max(version, 1), 3)}"]
    rights = struct.pack("QQQ", write, 3, 3)
    size = 24 if version >= 6 else 8
    rules = libc.syscall(LINUX["LANDLOCK_CREATE_RULESET"], rights, size, 0)
    folder = struct.pack("Qi", write, os.open(".", os.O_RDONLY))
    libc.syscall(LINUX["LANDLOCK_ADD_RULE"], rules, 1, folder, 0)
    libc.syscall(LINUX["LANDLOCK_RESTRICT_SELF"], rules, 0)


def open_library():
    """Python's library may lie below /root. A descriptor keeps it in reach of another user."""
    library = os.path.dirname(os.__file__)
    opened = f"/proc/self/fd/{os.open(library, os.O_RDONLY)}"
    packages = [module.__path__ for module in sys.modules.values() if hasattr(module, "__path__")]
    for paths in [sys.path, *packages]:
        paths[:] = [path.replace(library, opened) for path in paths]


def isolate(libc, user):
    """What judge and worker share: no network, orphans come to the judge, no view into it."""
    if sys.platform != "linux":
        return
    libc.prctl(LINUX["PR_SET_CHILD_SUBREAPER"], 1, 0, 0, 0)
    libc.prctl(LINUX["PR_SET_DUMPABLE"], 0, 0, 0, 0)  # not to be traced, nor read through /proc
    spaces = LINUX["CLONE_NEWPID"] | LINUX["CLONE_NEWNET"] | LINUX["CLONE_NEWIPC"]
    if not user:
        spaces |= LINUX["CLONE_NEWUSER"]  # root needs it not; others may have it, or not
    libc.unshare(spaces)


def child(timeout, limits, user):
    """The child interpreter's program: one verdict on standard output."""
    import resource  # Windows has none

    libc = ctypes.CDLL(None)
    if user:
        open_library()
    isolate(libc, user)
    verdict = os.dup(1)
    os.dup2(2, 1)  # standard error is /dev/null
    calls = os.pipe()
    replies = os.pipe()
    worker = os.fork()
    for name, limit in limits.items():
        with suppress(OSError, ValueError):  # macOS does not limit memory
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
    if worker == 0:
        os.dup2(2, 0)
        for pipe in (verdict, calls[1], replies[0]):
            os.close(pipe)
        give_up_rights(libc, user)
        serve_calls(open(calls[0], "rb"), open(replies[1], "wb", buffering=0))
        os._exit(0)
    os.close(calls[0])
    os.close(replies[1])

    def finish(result):
        kill_all(worker)
        os.write(verdict, result.encode(errors="replace"))
        os._exit(0)

    signal.signal(signal.SIGALRM, lambda *_: finish("timed out"))
    signal.setitimer(signal.ITIMER_REAL, timeout)
    finish(run_asserts(open(calls[1], "wb", buffering=0), open(replies[0], "rb")))


RUNNER = "\n\n".join((                               # the child's whole source
    "import ctypes, glob, json, os, pickle, signal, struct, sys, time",
    "from contextlib import suppress",
    f"LINUX = {LINUX}",
    *map(inspect.getsource, (PlainUnpickler, plain, serve_calls, run_asserts, kill_all,
                             give_up_rights, open_library, isolate, child)),
    "child(*json.loads(sys.argv[1]))",
))


def check_correctness(problem: dict, completion: str, timeout: float = 10.0) -> dict:
    """Whether the completion passes the problem's asserts, and in a word what happened.

    It runs in an empty folder, under limits, and all that it started is killed in the end. Under
    root it has a user of its own. Where Linux permits, it has no network and writes nowhere else.
    Its exits, output and tricks prove nothing: the asserts run in another process. The completion
    can only send that what its function returns: numbers, strings and containers of them.
    (Arguments that it changes in place are not seen there.)

    But this is no virtual machine. A program can read what its user can, and fill the disk. Without
    root, namespaces and Landlock it can harm all that its user owns.
    """
    folder = tempfile.mkdtemp()
    user = 0
    if os.getuid() == 0:  # one of the numbers that systemd keeps for users of the moment
        user = 61184 + os.stat(folder).st_ino % 4336
        os.chown(folder, user, user)
    settings = json.dumps([timeout, LIMITS | {"CPU": int(timeout) + 2}, user])
    try:
        output = subprocess.run(
            [sys.executable, "-I", "-S", "-c", RUNNER, settings],
            input=json.dumps([problem, completion]).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "PATH": "/usr/bin:/bin"},
            start_new_session=True,
            timeout=timeout + 10,
        ).stdout
        result = " ".join(output.decode(errors="replace").split())[:80] or "failed"
    except subprocess.TimeoutExpired:
        result = "timed out"
    finally:  # whatever the program did to the permissions or the depth of the folder
        clean = ["sh", "-c", 'chmod -R u+rwX "$0"; rm -rf "$0"', folder]
        subprocess.run(clean, stderr=subprocess.DEVNULL)
    return {"passed": result == "passed", "result": result}


# ------------------------------------------------------------------------------ the run folder

RUN_FILES = ("run.json", "log.jsonl", "palette.json", "palette.md", "adapters.safetensors",
             "state.safetensors")
LOCKS: list = []                                     # open files; the system frees them at the end


def write_json(path: Path, content: dict) -> None:
    with replacing(path) as beside:
        text = json.dumps(content, indent=1, ensure_ascii=False)
        beside.write_text(text + "\n", encoding="utf-8")


def take_folder(folder: Path, settings: dict, resume: bool, overwrite: bool) -> dict:
    """Claim a run folder, or go on with one; returns run.json. Only files of ours are ever deleted.

    Raises FileExistsError unless one of the two was asked for, ValueError if resumed otherwise.
    """
    if resume and overwrite:
        raise ValueError("--resume and --overwrite contradict each other; give one of them")
    if resume:
        old = read_json(folder / "run.json")
        for key in ("task", "base", "data", "hyper_parameters", "device", "dtype"):
            new = json.loads(json.dumps(settings[key]))              # tuples become lists
            if old.get(key) != new:
                fields = new if isinstance(new, dict) and isinstance(old.get(key), dict) else {}
                odd = [f for f in fields if old[key].get(f) != fields[f]]
                raise ValueError(f"{folder} was started with another {key} "
                                 f"({', '.join(odd[:5]) or short(new)}); --resume needs the "
                                 f"command it was started with")
        lock(folder)
        return old
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} exists already; go on with --resume, replace it with "
                              f"--overwrite, or choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    for path in [folder / name for name in RUN_FILES] + [*folder.glob("humaneval-*.jsonl")]:
        path.unlink(missing_ok=True)
    write_json(folder / "run.json", settings)
    return settings


def lock(folder: Path) -> None:
    """Until this process ends no other can train into the folder; FileExistsError if one does."""
    try:
        import fcntl                                                 # absent on Windows
    except ImportError:
        return
    LOCKS.append(open(folder / ".lock", "w"))
    try:
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise FileExistsError(f"another run is writing to {folder}; wait for its end, or choose "
                              f"another --out") from None


def base_digest(folder: str | Path) -> str:
    """sha256 of a base checkpoint: config.json, the weights, the tokenizer's files."""
    folder = Path(folder)
    data.tokenizer_file(folder)                                      # there must be one
    tokenizer = [path for name in data.TOKENIZER_FILES if (path := folder / name).exists()]
    return data.sha256([folder / "config.json", *checkpoint_files(folder), *tokenizer])


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 of names, shapes, types and bits."""
    sha = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        sha.update(f"{name} {list(t.shape)} {t.dtype}".encode())
        sha.update(t.flatten().view(torch.uint8).cpu().numpy())
    return sha.hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """What `save_tensors` wrote; FileNotFoundError or ValueError if it cannot be read."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; the run has not got that far, or this is not "
                                f"a run folder")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            origin = json.loads(file.metadata()["mlfs"])
        if not isinstance(origin, dict) or origin.get("sha256") != digest(tensors):
            raise ValueError("its sha256 is not the one stored in it")
        return tensors, origin
    except (SafetensorError, OSError, TypeError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or cut short: {str(error)[:200]}") from None


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], origin: dict) -> None:
    tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
    origin = origin | {"sha256": digest(tensors)}
    with replacing(path) as beside:                  # one metadata entry: several come in any order
        save_file(tensors, beside, {"mlfs": json.dumps(origin)})


def save_adapters(folder: Path, model: SuperTransformer, settings: dict) -> None:
    """{A_s, B_s}, the head and the permutation: with the base model, all there is to keep."""
    origin = {"task": settings["task"], "note": settings["note"],
              "base": settings["base"]["sha256"]}
    save_tensors(folder / "adapters.safetensors", model.trained_state(), origin)


def save_state(folder: Path, model: SuperTransformer, optimizer: torch.optim.Optimizer,
               U: dict[int, torch.Tensor], stage: int, step: int) -> None:
    """All that `mlfs` needs to go on: what was trained, U, AdamW's moments, stage and step."""
    tensors = {f"model.{name}": t for name, t in model.trained_state().items()}
    tensors |= {f"U.{l}": u for l, u in U.items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": t for name, t in moments.items()}
    save_tensors(folder / "state.safetensors", tensors, {"stage": stage, "step": step})


def load_state(folder: Path, model: SuperTransformer) -> dict | None:
    """The inverse of `save_state`: fills the model, returns `mlfs`'s `resume` (None: no state)."""
    path = folder / "state.safetensors"
    if not path.exists():
        return None
    tensors, position = read_tensors(path)
    learned: dict[str, torch.Tensor] = {}
    U: dict[int, torch.Tensor] = {}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    with naming(f"{path} is not one of ours; train anew with --overwrite"):
        check_keys(position, {"stage": int, "step": int})
        for name, t in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "model":
                learned[rest] = t
            elif kind == "U":
                U[int(rest)] = t
            else:
                number, moment = name.removeprefix("optimizer.").split(".")
                moments.setdefault(int(number), {})[moment] = t
    with naming(path):
        model.load_trained_state(learned)
    model.num_stages = position["stage"] + 1         # without adapters, nothing else tells
    return position | {"optimizer": moments, "U": U}


@contextmanager
def naming(where: str | Path):
    """Puts before the words of a ValueError where what was read stands."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_keys(row: object, keys: dict[str, type]) -> None:
    """ValueError unless that is a JSON object with these keys, each with a value of its type."""
    for key, kind in keys.items():
        if not isinstance(row, dict) or not isinstance(row.get(key), kind):
            raise ValueError(f"there is no {key!r}, or it is of the wrong type")


def keep_log(path: Path, resume: dict | None) -> None:
    """Drop the lines that will be written again: of a stage's start (step 0), or later ones."""
    def kept(line: str) -> bool:
        try:
            entry = json.loads(line)
            at = entry["stage"], entry["step"]
            return at < position or at == position and position[1] > 0
        except (ValueError, KeyError, TypeError, RecursionError):    # a line cut off by a crash
            return False

    if path.exists():
        position = (resume["stage"], resume["step"]) if resume else (0, 0)
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        with replacing(path) as beside:
            beside.write_text("".join(filter(kept, text.splitlines(keepends=True))),
                              encoding="utf-8")


def write_palette(folder: Path, settings: dict, task: data.Task, rows: list[dict],
                  measured: dict) -> None:
    """palette.json and palette.md, each replaced as a whole; measured: of which adapters, how."""
    name, note, metric = settings["task"], settings["note"], task.metrics[0]
    content = {"task": name, "metric": metric, "note": note, "measured": measured, "subnets": rows}
    text = f"{title(name, metric, settings['data']['dev'])}\n\n{final_table(rows, metric)}\n"
    if "length" in measured:
        text += f"\n{table(rows, MEASURED_COLUMNS, metric)}\n\n{conditions(measured)}\n"
    write_json(folder / "palette.json", content)
    with replacing(folder / "palette.md") as path:
        path.write_text((f"**{note}**\n\n" if note else "") + text, encoding="utf-8")


def read_palette(folder: Path) -> dict:
    """palette.json: "metric", "measured", "subnets"; nothing in them if there is no such file.

    ValueError if it lacks what `write_palette` writes. (Old ones have a "sha256" as well.)
    """
    path = folder / "palette.json"
    if not path.exists():
        return {"metric": "", "measured": {}, "subnets": []}
    content = read_json(path)
    with naming(f"{path} was damaged or edited; delete it, and evaluate.py measures anew"):
        check_keys(content, {"metric": str, "measured": dict, "subnets": list})
        for row in content["subnets"]:
            check_keys(row, SIZE_KEYS | {"score": float, "stderr": float})
            for score in row.get("history", {}).values():
                check_keys({"history": score}, {"history": float})
    return content


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):                                     # not Linux
        return platform.processor() or platform.machine()


def conditions(measured: dict) -> str:
    """Where and how a palette was measured."""
    what = "Scores as the training run measured them"
    if "length" in measured:
        what = "Median latency of a forward pass [10%, 90%], stand-alone and in place"
    return f"{what}: " + ", ".join(f"{key} {value}" for key, value in measured.items()
                                   if key != "adapters") + "."


def peak_memory(device: str) -> int:
    """Bytes: the process's largest resident size; on a GPU, the largest allocation there."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource                                              # absent on Windows
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


RUN_KEYS = {"task": str, "note": str, "num_labels": int, "base": dict, "data": dict,
            "hyper_parameters": dict, "space": list}


def read_run(folder: Path) -> tuple[dict, list[SubnetConfig]]:
    """(run.json, 𝒜); ValueError if it lacks what a run writes."""
    path = folder / "run.json"
    run = read_json(path)
    with naming(f"{path} is not one of ours, or was edited"):
        check_keys(run, RUN_KEYS)
        check_keys(run["base"], {"folder": str, "sha256": str})
        check_keys(run["data"], {"folder": str, "dev": int})
        check_keys(run["hyper_parameters"], {"init": str, "seed": int, "rank": int,
                                             "max_length": int, "dev_examples": int})
        check_keys(data.TASKS, {run["task"]: data.Task})
        for row in run["space"]:
            check_keys(row, SIZE_KEYS)
    return run, [subnet(row) for row in run["space"]]


def load_run(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32,
             base: Path | None = None) -> tuple[dict, SuperTransformer, list[SubnetConfig]]:
    """(run.json, the model with its adapters, 𝒜), from the folder and its base checkpoint.

    base: where that is now, if not where the run found it. Raises FileNotFoundError or ValueError
    naming what is missing, damaged, or of another base.
    """
    run, space = read_run(folder)
    base = base or Path(run["base"]["folder"])
    if not os.path.isdir(base):
        raise FileNotFoundError(f"{folder / 'run.json'}: its base checkpoint {short(str(base))} is "
                                f"not there; name its folder with --model")
    path = folder / "adapters.safetensors"
    state, origin = read_tensors(path)
    if not base_digest(base) == run["base"]["sha256"] == origin.get("base"):
        raise ValueError(f"{base} is not the checkpoint that {folder} was trained on: sha256 "
                         f"differs")
    model = load_pretrained(base, run["num_labels"], dtype)
    if run["hyper_parameters"]["init"] == "random":
        model.initialise(run["hyper_parameters"]["seed"])
    with naming(path):
        model.load_trained_state(state)
    with naming(folder / "run.json"):
        for phi in space:
            model.subnet_config(phi)                 # is a part of the maxnet
    run["base"]["folder"] = str(base)
    run["adapters"] = origin["sha256"]
    return run, model.to(device), space


# ---------------------------------------------------------------------------- the command line

def check_device(name: str) -> str:
    """The name, if this machine has that device; else ValueError."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here: "
                         f"{str(error).splitlines()[0]}") from None
    return name


def exit_on_bad_input(main: Callable[[], int]) -> int:
    """Runs a command. What the user can put right is told in one sentence, exit code 2.

    By convention ValueError and OSError carry that sentence; a bug keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):          # a terminal without Greek shows "?" for it
        stream.reconfigure(errors="replace")
    try:
        return main()
    except BrokenPipeError:                          # who reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; training goes on with --resume, HumanEval with the same command",
              file=sys.stderr)
        return 130


BUDGETS = {"max_params": ("parameters", "parameters"), "max_macs": ("macs", "MACs per token"),
           "max_latency_ms": ("latency_ms", "ms"), "max_size_mb": ("size_mb", "MB")}


def parse_arguments(argv: Iterable[str] | None) -> argparse.Namespace:
    """The options; ValueError for those that contradict each other, before anything is read."""
    parser = argparse.ArgumentParser(
        description="A finished run: measure its palette, choose a subnet, ship it, use it.")
    parser.add_argument("run", type=Path, help="a run folder, such as runs/toy; or, with --plot, "
                                               "its log.jsonl")
    parser.add_argument("--model", type=Path, help="the base checkpoint; default: as in the run")
    parser.add_argument("--data-dir", type=Path, help="holds SST-2/ etc.; default: as in the run")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...; default cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"),
                        help="of the weights, measured or exported; default float32")
    parser.add_argument("--subnets", "--subnet", metavar="NAMES",
                        help="names, separated by commas; default: the whole palette")
    parser.add_argument("--plot", type=Path, metavar="FILE",
                        help="draw score against parameters and latency (or, of log.jsonl, the "
                             "training curves); needs matplotlib")
    group = parser.add_argument_group("choosing: the best subnet within a budget; exit code 3 if "
                                      "none fits")
    group.add_argument("--max-params", type=float, metavar="N", help="parameters in all")
    group.add_argument("--max-macs", type=float, metavar="N",
                       help="multiply-accumulates per token in the layers' linear maps")
    group.add_argument("--max-latency-ms", type=float, metavar="MS",
                       help="median latency of the stand-alone model on this machine, batch 1")
    group.add_argument("--max-size-mb", type=float, metavar="MB",
                       help="10^6 bytes of weights, stored in --dtype")
    group = parser.add_argument_group("shipping")
    group.add_argument("--export", nargs=2, metavar=("SUBNET", "DIR"),
                       help="write an ordinary checkpoint: config.json, model.safetensors, the "
                            "tokenizer, a model card")
    group.add_argument("--pad-heads", action="store_true", help="add heads of zeros where the "
                       "transformers library could not load the checkpoint else")
    group.add_argument("--onnx", action="store_true", help="write model.onnx as well, in float32; "
                       "needs onnx, onnxscript and onnxruntime")
    group = parser.add_argument_group("using a model")
    group.add_argument("--predict", nargs="?", const="-", metavar="TEXT",
                       help="label and probabilities by --subnet NAME; a decoder completes the "
                            "text. Without TEXT, or with -: of each line of standard input. Pairs "
                            "are separated by a tab; what exceeds the run's max_length is cut")
    group.add_argument("--max-new-tokens", type=int, default=256, help="default 256")
    group.add_argument("--temperature", type=float, default=0.0, help="default 0: greedy")
    group.add_argument("--top-p", type=float, default=1.0, help="default 1")
    group = parser.add_argument_group("HumanEval")
    group.add_argument("--humaneval", type=Path, metavar="FILE", help="HumanEval.jsonl.gz")
    group.add_argument("--allow-code-execution", action="store_true",
                       help="run the generated programs, as the verdict needs")
    group.add_argument("--samples", type=int, default=1, help="per problem; default 1")
    group.add_argument("--batch-size", type=int, default=16, help="default 16")
    args = parser.parse_args(argv)
    if args.humaneval and not args.allow_code_execution:
        raise ValueError("--humaneval runs programs that a model wrote, which may do harm; nothing "
                         "was run: add --allow-code-execution if this machine may be exposed to "
                         "them")
    for key in ("samples", "batch_size", "max_new_tokens"):
        if getattr(args, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} must be at least 1")
    if not ((args.temperature == 0 or args.temperature >= 1e-3) and 0 < args.top_p <= 1):
        raise ValueError("--temperature must be 0 or at least 0.001, --top-p above 0 and at most 1")
    if args.samples > 1 and args.temperature == 0:
        raise ValueError("--samples above 1 need a --temperature: greedy text is always the same")
    args.budget = {}
    for option, (key, _) in BUDGETS.items():
        if (most := getattr(args, option)) is not None:
            if not most > 0:
                raise ValueError(f"--{option.replace('_', '-')} must be above 0, not {most:g}")
            args.budget[key] = most
    if (args.pad_heads or args.onnx) and not args.export:
        raise ValueError("--pad-heads and --onnx go with --export SUBNET DIR")
    args.curves = args.run.suffix == ".jsonl"
    if args.curves and not args.plot:
        raise ValueError(f"{args.run}: what to do with it? --plot FILE draws its curves")
    jobs = (args.predict is not None, args.humaneval, args.export, args.plot or args.budget,
            args.curves and (args.budget or args.subnets is not None))
    if sum(map(bool, jobs)) > 1:
        raise ValueError("--predict, --humaneval, --export, choosing, and drawing the curves of a "
                         "log are different things; do one at a time")
    try:
        (args.predict or "").encode()
    except UnicodeEncodeError:
        raise ValueError("--predict: TEXT is not valid UTF-8") from None
    folder = Path(args.export[1]) if args.export else None
    empty = folder and folder.is_dir() and not any(folder.iterdir())
    for path in filter(None, (args.plot, folder)):
        if path.exists() and not empty:
            raise FileExistsError(f"{path} exists already; choose another name, or delete it")
    if args.plot:
        if args.plot.suffix not in (".png", ".svg", ".pdf") or not args.plot.parent.is_dir():
            raise ValueError(f"--plot {args.plot}: name a .png, .svg or .pdf file in a folder that "
                             f"exists")
        require_package("--plot", "matplotlib", "matplotlib.figure")
    if args.onnx:
        require_package("--onnx", "onnx onnxscript onnxruntime", "onnxscript", "onnxruntime")
    return args


def main(argv: Iterable[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.curves:
        plot_curves(args.plot, read_log(args.run))
        return 0
    problems = read_lines(args.humaneval, TASK_KEYS) if args.humaneval else []
    if args.humaneval and not problems:
        raise ValueError(f"{args.humaneval} has no problems")
    dtype = getattr(torch, args.dtype)
    run, model, space = load_run(args.run, check_device(args.device), dtype, args.model)
    names = [phi.name for phi in space]
    wanted = names if args.subnets is None else args.subnets.split(",")
    for name in (*wanted, *(args.export or ())[:1]):
        if name not in names:
            raise ValueError(f"there is no subnet {name!r}; this palette has {', '.join(names)}")
    if args.predict is not None and len(wanted) > 1:
        raise ValueError(f"--predict needs one --subnet NAME out of {', '.join(names)}")
    tokenizer = data.load_tokenizer(run["base"]["folder"], model.config["vocab_size"])
    model = model.extract(model.maxnet)              # adapters merged: what is shipped is measured
    chosen = [phi for phi in space if phi.name in wanted]
    if run["note"]:
        print(run["note"], file=sys.stderr if args.predict is not None else sys.stdout)
    if args.humaneval:
        print_humaneval(args, run, model, chosen, tokenizer, problems)
        return 0
    if args.predict is not None:
        print_predictions(args, run, model, chosen[0], tokenizer)
        return 0
    rows, where = measure(args, run, model, space, wanted, tokenizer)
    shown = [row for row in rows if row["name"] in wanted]
    metric = data.TASKS[run["task"]].metrics[0]
    if args.plot:
        plot_palette(args.plot, shown, metric,
                     f"{run['task']}, {Path(run['base']['folder']).name}",
                     rows[0].get("history", {}).get("sliced teacher"))
    if args.export:
        row = next(row for row in rows if row["name"] == args.export[0])
        phi = next(phi for phi in space if phi.name == args.export[0])
        ship(args, run, model.extract(phi), [rows[0], row], where)
    return print_choice(shown, args.budget, metric, where) if args.budget else 0


def measure(args: argparse.Namespace, run: dict, model: SuperTransformer,
            space: list[SubnetConfig], wanted: list[str],
            tokenizer: Tokenizer) -> tuple[list[dict], str]:
    """(rows, a sentence on how they were measured): from palette.json if it has what is asked for,
    else measured now, printed and, if it is the whole palette, written."""
    stored, hp = read_palette(args.run), run["hyper_parameters"]
    task, length = data.TASKS[run["task"]], min(128, model.config["max_position_embeddings"])
    metric = task.metrics[0]
    scored = {"adapters": run["adapters"], "dtype": args.dtype}      # what the scores depend on
    now = scored | {"device": device_name(args.device), "threads": torch.get_num_threads(),
                    "batch_size": 1, "length": length, "torch": torch.__version__}
    wish = now if args.plot or args.max_latency_ms else scored
    if (args.plot or args.export or args.budget) and not args.data_dir and (
            wish.items() <= stored["measured"].items()):
        return stored["subnets"], conditions(stored["measured"])
    place = args.data_dir or run["data"]["folder"]
    splits = {name: data.draw(data.encode(tokenizer, part, hp["max_length"]), hp["dev_examples"])
              for name, part in data.load_task(run["task"], place, train=False).items()}
    if (found := len(splits["dev"].ids)) != run["data"]["dev"]:
        raise ValueError(f"{place} has {found:,} dev examples, {args.run} was measured on "
                         f"{run['data']['dev']:,}: that is other data")
    names = {space[0].name, *wanted, *(args.export or ())[:1]}               # shares need Φ_1
    some = [phi for phi in space if phi.name in names]
    history = {row["name"]: {"history": row["history"]} for row in stored["subnets"]
               if "history" in row}
    rows = [row | timed | history.get(row["name"], {}) for row, timed in
            zip(palette(model, some, task, splits), latency(model, some, 1, length))]
    print(f"{title(run['task'], metric, found)}\n\n{table(rows, MEASURED_COLUMNS, metric)}\n\n"
          f"{conditions(now)}", flush=True)
    if len(rows) == len(space):
        try:
            write_palette(args.run, run, task, rows, now)
        except OSError as error:
            print(f"warning: the palette could not be stored: {error}", file=sys.stderr)
    return rows, conditions(now)


def ship(args: argparse.Namespace, run: dict, small: SuperTransformer, rows: list[dict],
         where: str) -> None:
    """--export, and what the transformers library can make of it; rows: the maxnet's, its own."""
    task, folder, row = data.TASKS[run["task"]], Path(args.export[1]), rows[-1]
    small, form = common_form(small, args.pad_heads)
    if args.pad_heads:                               # what was measured had no heads of zeros
        sizes = {"name": row["name"], "layers": row["layers"]}
        row = {key: value for key, value in row.items() if not key.endswith("_ms")}
        row |= describe(small, small.maxnet) | sizes
    card = model_card(run, [rows[0], row], task.metrics[0], form, args.dtype, where)
    small = small.to(getattr(torch, args.dtype)).cpu()
    export(small, folder, Path(run["base"]["folder"]), task.labels, card, args.onnx)
    print(f"Wrote {row['name']} to {folder}: {row['size_mb']:.1f} MB in {args.dtype}. {form}")


def print_predictions(args: argparse.Namespace, run: dict, model: SuperTransformer,
                      phi: SubnetConfig, tokenizer: Tokenizer) -> None:
    """--predict: a line for TEXT or for each line of standard input, as soon as it is there."""
    task, decoder = data.TASKS[run["task"]], isinstance(model, Decoder)
    small, max_length = model, run["hyper_parameters"]["max_length"]
    if decoder:
        small = model.extract(phi).pack()
    stdin = args.predict == "-"
    if stdin and sys.stdin is None:
        raise ValueError("--predict: standard input is closed")
    texts = sys.stdin.buffer if stdin else [args.predict.encode()]
    for number, line in enumerate(texts, 1):
        try:
            text = line.decode().rstrip("\r\n") if stdin else args.predict
            if decoder:
                said = text + generate(small, tokenizer, [text], args.max_new_tokens,
                                       args.temperature, args.top_p)[0]
            else:
                said = answer(model, phi, tokenizer, task, text, max_length)
        except ValueError as error:
            where = f"standard input, line {number}: " if stdin else ""
            what = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error
            raise ValueError(f"{where}{what}") from None
        print(said, flush=True)


def print_choice(rows: list[dict], budget: dict[str, float], metric: str, where: str) -> int:
    """The best and the next best within the budget; exit code 3 if there is none."""
    units = dict(BUDGETS.values())
    number = lambda value: f"{value:,.0f}" if value >= 1e4 else f"{value:,.6g}"
    within = ", ".join(f"{number(most)} {units[key]}" for key, most in budget.items())
    chosen = choose(rows, budget, metric)
    if not chosen:
        least = min(rows, key=lambda row: row["parameters"])
        over = ", ".join(f"{number(least[key])} {units[key]} ({least[key] / most - 1:.0%} over)"
                         for key, most in budget.items() if least[key] > most)
        print(f"error: no subnet fits within {within}; the smallest, {least['name']}, has {over}",
              file=sys.stderr)
        return 3
    print(f"Within {within}:")
    for rank, row in zip(("best", "next best"), chosen):
        latency = f", {row['latency_ms']:.2f} ms" if "latency_ms" in row else ""
        print(f"  {rank + ':':10} {row['name']} ({quality(row, metric)}): "
              f"{row['parameters'] / 1e6:.2f}M parameters, {row['macs'] / 1e6:.2f}M MACs per "
              f"token, {row['size_mb']:.1f} MB{latency}")
    print(where)
    return 0


def print_humaneval(args: argparse.Namespace, run: dict, model: SuperTransformer,
                    space: list[SubnetConfig], tokenizer: Tokenizer, problems: list[dict]) -> None:
    """A line per subnet; its completions go to humaneval-SUBNET.jsonl in the run folder."""
    if not isinstance(model, Decoder):
        raise ValueError(f"{args.run} is an encoder; --humaneval needs one that generates text")
    settings = {key: getattr(args, key) for key in ("max_new_tokens", "temperature", "top_p")}
    origin = {"adapters": data.sha256([args.run / "adapters.safetensors"]),
              "problems": data.sha256([args.humaneval]), "dtype": args.dtype}
    for phi in space:
        path = args.run / f"humaneval-{phi.name}.jsonl"
        found = humaneval(model.extract(phi).pack(), tokenizer, problems, path, origin,
                          args.samples, args.batch_size, **settings)
        error = found.pop("stderr")
        print(f"{phi.name}: " + ", ".join(f"{k} {100 * v:.1f}" for k, v in found.items())
              + f" (± {100 * error:.1f}); {len(problems)} problems, {args.samples} samples each, "
              f"{args.dtype}", flush=True)


if __name__ == "__main__":
    sys.exit(exit_on_bad_input(main))
