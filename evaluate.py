"""Measures a run of MLFS: score, size and latency of every subnet. Chooses one, ships it, uses it.

    python evaluate.py runs/toy                          the palette, measured on this machine
    python evaluate.py runs/toy --max-latency-ms 0.8     the best subnet within a budget
    python evaluate.py runs/toy --export w0.5-d2 DIR     an ordinary checkpoint
    python evaluate.py runs/toy --subnet w0.5-d2 --predict "the plot is clever ."
    python evaluate.py runs/python-santacoder --humaneval HumanEval.jsonl.gz --allow-code-execution

What is measured:
  RUN                   a run folder
  --subnets, --subnet NAMES
                        such as w1-d4,w0.5-d2; default: the whole palette
  --device DEVICE       cpu, cuda, ...; default cpu
  --dtype DTYPE         of the weights: float32 (the default), bfloat16 or float16; or int8, as ONNX
                        beside float32 as ONNX; needs onnx, onnxscript and onnxruntime
  --model DIR           the base checkpoint; default: as in the run
  --data-dir DIR        holds the task's folder, such as SST-2/; default: as in the run

Choosing the best subnet within a budget:
  --max-params N        parameters in all, embeddings included
  --max-macs N          multiply-accumulates per token in the layers' linear maps
  --max-size-mb MB      10^6 bytes of weights in --dtype
  --max-latency-ms MS   median of a forward pass on this machine: batch 1, at most 128 tokens

Or one of these:
  --plot FILE           score against parameters and latency; .png, .svg or .pdf; needs matplotlib
  --export SUBNET DIR   a checkpoint: config.json, model.safetensors, the tokenizer, a model card
  --pad-heads           with it: heads of zeros, where the transformers library needs them to load
  --onnx [FORMAT]       with it: model.onnx in float32 (the default) or int8; needs the same three
  --predict [TEXT]      by --subnet NAME: label and probabilities, of a pair with a tab between; a
                        decoder continues it. Without TEXT, or with -: each line of standard input
  --humaneval FILE      pass@k (Chen et al., 2021) on HumanEval.jsonl.gz, of openai/human-eval
  --allow-code-execution
                        with it: run the generated programs, as the verdict needs; they may do harm
  --samples N           with it: so many per problem; default 1
  --batch-size N        with it: so many texts at a time; default 16
  --max-new-tokens N    of a decoder's text; default 256
  --temperature T       divides its logits; default 0: always the likeliest token
  --top-p P             draw among the likeliest tokens that hold this probability; default 1

A run folder holds what mlfs.py leaves, and what is measured here:
  run.json              all settings, the base checkpoint and its sha256, the subnets' shapes
  log.jsonl             losses and validation scores, by stage and step
  palette.json, .md     a row per subnet: sizes, scores and, once measured here, latencies; int8
  adapters.safetensors  A_s, B_s, the head, the permutation: all to keep beside the base model
  state.safetensors     what a stopped training goes on from
  humaneval-*.jsonl     a subnet's judged completions; the same command goes on with them

Exit codes: 0 done; 2 bad input; 3 no subnet fits the budget; 130 stopped.
"""
import builtins
import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import pickle
import platform
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import data
from model import (
    Cache,
    Decoder,
    SubnetConfig,
    checkpoint_files,
    common_heads,
    initialise,
    load_pretrained,
    load_trained_state,
    naming,
    pad_heads,
    read_json,
    replacing,
    save_pretrained,
    short,
)

# ----------------------------------------------------------------- metrics, as pure functions
# predictions and labels are numpy arrays of equal length; 1 is perfect.

def accuracy(predictions, labels):
    return float((predictions == labels).mean())


def f1(predictions, labels):
    """Harmonic mean of class 1's precision and recall, 0 when there is no true positive."""
    hits = (predictions * labels).sum()
    return float(2 * hits / max(predictions.sum() + labels.sum(), 1))


def macro_f1(predictions, labels):
    """The mean of all classes' F1."""
    classes = np.union1d(predictions, labels)
    return float(np.mean([f1(predictions == c, labels == c) for c in classes]))


def matthews(predictions, labels):
    """Matthews correlation of any number of classes (Gorodkin, 2004); 0 when either is constant."""
    classes = np.union1d(predictions, labels)
    return pearson(predictions[:, None] == classes, labels[:, None] == classes)


def pearson(predictions, labels):
    """Linear correlation; 0 when either is constant. Of two matrices, that of all columns."""
    x = predictions - np.mean(predictions, axis=0, dtype=np.float64)
    y = labels - np.mean(labels, axis=0, dtype=np.float64)
    norm = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / norm) if norm > 0 else 0.0


def spearman(predictions, labels):
    """Correlation of the ranks; ties share their mean rank."""
    def ranks(values):                               # doubled: the values below, and those up to it
        order = np.sort(values)
        return np.searchsorted(order, values) + np.searchsorted(order, values, "right")
    return pearson(ranks(predictions), ranks(labels))


OF_CLASSES = {f.__name__: f for f in (accuracy, f1, macro_f1, matthews)}
OF_SCORES = {f.__name__: f for f in (pearson, spearman)}
METRICS = OF_CLASSES | OF_SCORES


def rank_metrics(row, first=None):
    """The task with this metric as its score; ValueError for one that does not suit its labels."""
    fitting = OF_CLASSES if row.labels else OF_SCORES
    if "loss" in row.metrics:
        fitting = ("loss",)
    # By the task, not by what a sample of it holds.
    general = {"f1": "macro_f1"} if len(row.labels) > 2 else {}
    metrics = dict.fromkeys(general.get(name, name)
                            for name in (first or row.metrics[0], *row.metrics))
    for name in metrics:
        if name not in fitting:
            raise ValueError(f"no metric {name!r}; choose from {', '.join(fitting)}")
    return row._replace(labels=tuple(row.labels), metrics=tuple(metrics))


def show(metric, value):
    """A loss in nats; all else in points, 0 to 100."""
    return f"{value:.3f}" if metric == "loss" else f"{100 * value:.1f}"


def quality(row, metric):
    return f"{show(metric, row['score'])} ± {show(metric, row['stderr'])}"


def called(row):
    """A subnet's name; of a file also its number format."""
    return f"{row['name']} in {row['dtype']}" if "dtype" in row else row["name"]


def gain(metric, old, new):
    """How much better `new` is: a loss is better when it is lower."""
    return old - new if metric == "loss" else new - old


def standard_error(metric, predictions, labels):
    """√(p(1-p)/n) for accuracy; for the others the spread over 500 seeded bootstrap samples."""
    n = len(labels)
    if metric == "accuracy":
        return float((predictions == labels).std() / np.sqrt(n))
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(500):
        drawn = rng.integers(n, size=n)
        scores.append(METRICS[metric](predictions[drawn], labels[drawn]))
    return float(np.std(scores))


# --------------------------------------------------------------------- the palette, and its table

@torch.inference_mode()
def outputs(model, phi, examples):
    """Logits (M, C) and labels (M,), shortest example first."""
    parts = []
    for x, y in data.batches(examples, 64, device=model.device):
        parts.append((model(**x, phi=phi, features=())[0], y))
    return map(torch.cat, zip(*parts))


def predict(model, phi, examples):
    """Predicted classes (or scores) and their labels, shortest example first."""
    z, labels = outputs(model, phi, examples)
    predictions = z.argmax(-1) if z.size(-1) > 1 else z[:, 0]
    return predictions.cpu().numpy(), labels.cpu().numpy()


@torch.inference_mode()
def next_token_losses(model, phi, examples):
    """Cross-entropy in nats per next token, mean over each window (M,)."""
    means = []
    for x, y in data.batches(examples, 8, device=model.device):
        windows, _ = model.encode(**x, phi=phi)                                  # (B, T, H)
        for states, targets in zip(windows, y):     # one window's logits at a time
            z = model.logits(states)                                             # (T, V)
            means.append(F.cross_entropy(z, targets, ignore_index=data.IGNORED))
    return torch.stack(means).cpu().numpy()


def evaluate(model, phi, task, splits):
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


SIZES = {"name": str, "heads": int, "hidden_size": int, "intermediate_size": int, "layers": list,
         "parameters": int, "size_mb": float, "encoder_parameters": int, "macs": int}


def count(module):
    """How many parameters."""
    return sum(p.numel() for p in module.parameters())


def describe(model, phi):
    """SIZES of Φ, counted on its stand-alone model: parameters in all and in the encoder's layers.

    "macs" are the multiply-accumulates per token of the layers' linear maps, attention left out;
    "size_mb" is 10^6 bytes on disk, in the model's number format.
    """
    small = model.skeleton(phi)
    parameters = count(small)
    return {"name": phi.name, "heads": phi.num_attention_heads, "hidden_size": phi.hidden_size,
            "intermediate_size": phi.intermediate_size, "layers": list(phi.layers),
            "parameters": parameters, "encoder_parameters": count(small.layers),
            "size_mb": parameters * next(model.parameters()).itemsize / 1e6,
            "macs": sum(p.numel() for p in small.layers.parameters() if p.dim() == 2)}


def subnet(row):
    """Φ of a row."""
    return SubnetConfig(row["hidden_size"], row["heads"], row["intermediate_size"],
                        tuple(row["layers"]), row["name"])


def palette(model, space, task, splits):
    """A row per subnet, maxnet first: sizes, score, standard error (Figs. 1 and 8)."""
    return [describe(model, phi) | evaluate(model, phi, task, splits) for phi in space]


@torch.inference_mode()
def latency(extract, space, batch_size=1, length=128, rounds=5, runs=4):
    """A row per subnet: how long a forward pass takes, in milliseconds.

    "latency_ms" is the median of the stand-alone model, extract(Φ), "latency_ms_range" its 10% and
    90% quantiles. Every round visits every subnet and warms it up, so that a drift of the machine
    hits all alike.
    """
    times = [[] for _ in space]
    for _ in range(rounds):
        for phi, own in zip(space, times):
            small = extract(phi)                                     # one copy at a time
            ids = torch.ones(batch_size, length, dtype=torch.long, device=small.device)
            for run in range(1 + runs):
                start = time.perf_counter()
                small(ids, features=())
                if ids.device.type != "cpu":         # which has only been told what to do
                    torch.accelerator.synchronize(ids.device)
                if run > 0:                          # the first warms up
                    own.append(1e3 * (time.perf_counter() - start))
    quantiles = [np.quantile(own, (0.1, 0.5, 0.9)).tolist() for own in times]
    return [{"latency_ms": median, "latency_ms_range": [low, high]}
            for low, median, high in quantiles]


def choose(rows, budget, metric):
    """The rows within the budget, best first; budget maps a key of a row to its largest value.

    The one-standard-error rule: of those within a standard error of the best, the smallest on disk
    wins.
    ValueError if a row lacks what the budget limits.
    """
    def worth(row):                                                  # what is not a number is worst
        return -math.inf if math.isnan(row["score"]) else gain(metric, 0, row["score"])

    for row in rows:
        for key in budget.keys() - row.keys():
            raise ValueError(f"{called(row)} has no {key}: measure it first")
    left = [row for row in rows if all(row[key] <= most for key, most in budget.items())]
    chosen = []
    while left:
        top = max(left, key=worth)
        tied = [row for row in left if row is top or worth(top) - worth(row) <= top["stderr"]]
        chosen.append(min(tied, key=lambda row: (row["size_mb"], -worth(row))))
        left.remove(chosen[-1])
    return chosen


def millions(count):
    return f"{count / 1e6:.2f}M"


COLUMNS = {                                          # of a row, with their headings
    "name": "subnet", "dtype": "weights", "heads": "heads", "intermediate_size": "FFN",
    "hidden_size": "hidden", "layers": "layers", "parameters": "parameters",
    "encoder_parameters": "encoder", "macs": "MACs per token", "size_mb": "on disk",
    "score": "score", "stderr": "± s.e.",
    "latency_ms": "median ms [10%, 90%]", "one_thread_ms": "by one thread",
}
COSTS = {                                            # of these, what a subnet saves; its format
    "parameters": millions, "encoder_parameters": millions, "macs": millions,
    "size_mb": "{:.1f} MB".format, "latency_ms": "{:.2f}".format,
    "one_thread_ms": "{:.2f}".format,
}


def table(rows, keys, metric):
    """Markdown, a line per row; of the keys those that the first row has.

    After COSTS and scores stands their share of the first row's, unless that means nothing: of a
    loss, of a score that is 0 or less. A latency's 10% and 90% quantiles stand in brackets.
    """
    def cell(row, key):
        if key not in row:                           # the latency of a padded subnet
            return ""
        value = len(row[key]) if key == "layers" else row[key]
        text = show(metric, value) if isinstance(value, float) else str(value)
        if key in COSTS:
            text = COSTS[key](value)
        if key + "_range" in row:
            quantiles = [f"{value:.2f}" for value in row[key + "_range"]]
            text += f" [{', '.join(quantiles)}]"
        shared = key in COSTS or key == "score" and metric != "loss"
        if shared and rows[0][key] > 0:
            text += f" ({value / rows[0][key]:.0%})"
        return text

    keys = [key for key in keys if key in rows[0]]
    lines = [[COLUMNS.get(key, key) for key in keys]]
    lines += [[cell(row, key) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, cells, widths)) + " |" for cells in lines)


def final_table(rows, metric, last=0):
    """The palette with a column for each of the `last` moments that were measured (0: for all),
    oldest first, the standard error of the last, and the task's other metrics then."""
    moments = list(rows[0].get("history", ["score"]))[-last:]        # [-0:] is all
    others = [key for key in (*METRICS, "accuracy_mismatched") if key != metric]
    keys = ["name", "parameters", "encoder_parameters", *moments, "stderr", *others]
    return table([row | row.get("history", {}) for row in rows], keys, metric)


def title(run, metric):
    """What a palette shows. Of classes the share of the most frequent one, which is what a model
    scores that has learned nothing."""
    unit = "in nats per token, lower is better" if metric == "loss" else "in points"
    examples = f"{run['data']['dev']:,} examples"
    if "largest_class" in run["data"]:
        examples += f", {show('accuracy', run['data']['largest_class'])}% of them of one class"
    return f"{run['task']}, {metric} on dev ({examples}), {unit}"


# ------------------------------------------------------------------------------------- pictures

def require_package(option, *packages):
    """ValueError unless the optional packages of an option are installed."""
    try:
        for package in packages:
            __import__(package)
    except ImportError:
        raise ValueError(f"{option} needs more packages: pip install "
                         f"{' '.join(packages)}") from None


@contextmanager
def picture(path, panels):
    """Yields matplotlib's figure and axes, written to `path` once the block ends well."""
    from matplotlib.figure import Figure  # an optional extra

    figure = Figure(figsize=(5.5 * panels, 4.2), layout="constrained")
    yield figure, figure.subplots(1, panels, squeeze=False)[0]
    with replacing(path) as beside:
        figure.savefig(beside, format=path.suffix[1:], dpi=120)


def plot_palette(path, rows, metric, heading, maxnet):
    """Score against size on disk and against latency, with standard errors; the teacher's score,
    and its slices before stages 1 and 2."""
    points = 1 if metric == "loss" else 100
    formats = dict.fromkeys(row.get("dtype", "MLFS") for row in rows)
    with picture(path, 2) as (figure, axes):
        figure.suptitle(heading)
        axes[0].set_ylabel(metric)
        for axis, key, label in zip(axes, ("size_mb", "latency_ms"), ("size, MB", "latency, ms")):
            axis.set_xlabel(label)
            for name in reversed(formats):           # the first one's sizes are left in `costs`
                own = [row for row in rows if row.get("dtype", "MLFS") == name]
                costs = [row[key] for row in own]
                scores = [points * row["score"] for row in own]
                errors = [points * row["stderr"] for row in own]
                axis.errorbar(costs, scores, errors, fmt="o", label=name)
                for row, cost, score in zip(own, costs, scores):
                    axis.text(cost, score, row["name"], fontsize=7)
            for moment, mark in (("sliced teacher", "x"), ("reordered", "+")):
                if moment in maxnet:
                    old = [points * row["history"][moment] for row in own]
                    axis.plot(costs, old, mark, color="gray", label=f"{moment}, not trained yet")
            if "sliced teacher" in maxnet:           # its history: at that moment it is the teacher
                axis.axhline(points * maxnet["sliced teacher"], linestyle=":", label="teacher")
            axis.grid()
        axes[0].legend(fontsize=7)


# ------------------------------------------------------------------------------------- shipping

@contextmanager
def new_folder(folder):
    """Yields a folder to fill; it becomes `folder` (absent or empty) once the block ends well.

    An empty one stays and is filled: it may be a mount point, or have rights of its own.
    """
    folder = Path(folder).resolve()
    place = folder if is_empty(folder) else folder.parent
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        beside = Path(scratch) / folder.name
        beside.mkdir()
        yield beside
        if place != folder:
            os.replace(beside, folder)
            return
        with ExitStack() as undo:
            for path in beside.iterdir():
                os.replace(path, folder / path.name)
                undo.callback((folder / path.name).unlink)
            undo.pop_all()                           # all went well: keep them


def is_empty(folder):
    """Whether a folder holds nothing, or only what systems put on a new volume: hidden, mostly."""
    return folder.is_dir() and all(path.name[0] == "." or path.name == "lost+found"
                                   for path in folder.iterdir())


def export(small, folder, base, labels, card, onnx=None):
    """An ordinary checkpoint of a merged subnet: config.json, model.safetensors, the base's
    tokenizer, a model card and, if wanted, model.onnx in "float32" or "int8".
    """
    with new_folder(folder) as beside:
        save_pretrained(small, beside, labels)
        for name in (*data.TOKENIZER_FILES, *data.GENERATION_FILES):
            if Path(base, name).exists():
                shutil.copyfile(Path(base, name), beside / name)
        export_tokenizer(small, beside, data.load_tokenizer(base))
        write_text(beside / "README.md", card)
        if onnx:
            export_onnx(small, beside / "model.onnx", onnx)


INPUTS = ("input_ids", "attention_mask", "token_type_ids")           # as other libraries call them


def export_tokenizer(small, folder, tokenizer):
    """tokenizer.json as we use it, and settings by which other libraries' pipelines do the same."""
    settings = tokenizer.settings | {"model_max_length": small.max_tokens}
    pad = 0                                          # as in `data.pad`
    if isinstance(small, Decoder):
        pad = data.end_of_text(tokenizer)[0]
    else:
        data.frame(tokenizer, settings)
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast",   # takes tokenizer.json whole
                     "model_input_names": INPUTS[:1 + min(2, small.config["type_vocab_size"])]}
    settings.setdefault("pad_token", tokenizer.id_to_token(pad))     # batches need one
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", settings)


def common_form(small, pad):
    """The model with heads of zeros added if `pad`, and what other libraries can make of it."""
    config = small.config
    own = config["num_attention_heads"]
    heads = common_heads(small)
    shape = f"{own} heads of {config['head_dim']} at hidden size {config['hidden_size']}"
    if pad and heads in (own, None):
        raise ValueError(f"--pad-heads: nothing to pad, or no number of heads helps {shape}")
    if heads == own:
        return small, "The transformers library can load it."
    if heads is None:
        return small, f"No library but this one can express {shape}, padded or not."
    padded = pad_heads(small, heads)
    cost = (f"{heads} heads, some of zeros: {millions(count(padded))} instead of "
            f"{millions(count(small))} parameters")
    if pad:
        return padded, f"The transformers library can load it, padded to {cost}."
    return small, (f"The transformers library cannot express {shape}; load_pretrained reads it. "
                   f"--pad-heads makes it {cost}.")


class Logits(torch.nn.Module):
    """The model with z as its only output."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask, segments=None):
        more = {} if segments is None else {"segments": segments}
        return self.model(ids, mask, features=(), **more)[0]


def onnx_inputs(model, batch, length):
    """Inputs (batch, length); the last row is padded by half."""
    ids = torch.arange(batch * length).view(batch, length) % model.config["vocab_size"]
    mask = torch.ones_like(ids)
    mask[-1, 1 + length // 2:] = 0
    if isinstance(model, Decoder):
        return ids, mask
    return ids, mask, ids % model.config["type_vocab_size"]


def export_onnx(small, path, dtype="float32"):
    """Writes ONNX with dynamic batch and length; dtype "int8": see `quantise`.

    ValueError if onnxruntime's logits, in float32, differ by more than 1e-3 from ours.
    """
    model = Logits(small.float())
    room = small.max_tokens
    example = onnx_inputs(small, 2, min(8, room))
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=room)}
    torch.onnx.export(model, example, path, input_names=INPUTS[:len(example)],
                      output_names=["logits"], dynamic_shapes=[axes] * len(example),
                      dynamo=True, verbose=False,
                      external_data=False)           # but for more than a file can hold, 2 GiB
    x = onnx_inputs(small, 3, min(128, room))        # of another shape than it was traced with
    z, _ = OnnxFile(path, small)(*x)
    away = (z - model(*x).detach()).abs().max()
    if not away <= 1e-3:                                             # not a number fails, too
        raise ValueError(f"{path.name}: its logits differ by {away:.1e} from PyTorch's")
    if dtype == "int8":
        quantise(path, path)
        Path(f"{path}.data").unlink(missing_ok=True)                 # of float32, over 2 GiB


def quantise(path, target):
    """A float32 file in int8: matrices with a scale per output, an embedding with one scale.

    Between its products all stays float32: each rounds what it reads, by the range met just then.
    """
    from onnxruntime.quantization import quantize_dynamic

    # Weights take 7 of the 8 bits. On processors without int8 products (VNNI) onnxruntime adds them
    # up in 16 bits, and 8 overflow: SmolLM2's loss rose from 2.7 to 16.7 nats, by 7 bits to 3.3.
    quantize_dynamic(path, target, per_channel=True, reduce_range=True)


class OnnxFile:
    """One subnet's ONNX file, run by onnxruntime; it answers where the model itself is asked."""
    device = torch.device("cpu")

    def __init__(self, path, model, threads=0):
        import onnxruntime  # an optional extra, as is onnxscript, in torch

        self.maxnet = model.maxnet
        self.max_tokens = model.max_tokens
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads       # 0: as many as the machine has cores
        self.session = onnxruntime.InferenceSession(path, options,
                                                    providers=["CPUExecutionProvider"])

    def __call__(self, ids, mask=None, segments=None, phi=None, features=()):
        """z, and no hidden states."""
        mask = torch.ones_like(ids) if mask is None else mask
        segments = torch.zeros_like(ids) if segments is None else segments
        wanted = zip(self.session.get_inputs(), (ids, mask, segments))       # a decoder wants two
        x = {part.name: values.long().numpy() for part, values in wanted}
        return torch.from_numpy(self.session.run(None, x)[0]), {}

    def encode(self, ids, mask, phi, cache=None, features=()):
        """Logits, where a model has last states. A file has no cache: it reads all tokens again."""
        if cache is not None:
            ids = cache.parts["ids"] = torch.cat((cache.parts.get("ids", ids[:, :0]), ids), 1)
        return self(ids, mask)

    def logits(self, last):
        return last


def model_card(run, rows, metric, form, dtype, where):
    """README.md of an exported subnet; rows: the maxnet's and its own."""
    row = rows[-1]
    hp = run["hyper_parameters"]
    base = Path(run["base"]["folder"]).name
    note = f"**{run['note']}**\n\n" if run["note"] else ""
    return f"""---
base_model: {json.dumps(base, ensure_ascii=False)}
tags: [mlfs]
---
# {row['name']}: a slice of {base} for {run['task']}

{note}Cut by MLFS (Kundu et al., NAACL 2024) from {base} (sha256 of its files:
{run['base']['sha256']}), rank {hp['rank']}, seed {hp['seed']}.
Layers kept, from 0: {row['layers']}. Weights in {dtype}. {form}

{title(run, metric)}:

{table(rows, COLUMNS, metric)}

{where}
"""


# --------------------------------------------------------- using a model, and generating text

def answer(model, tokenizer, task, text, max_length):
    """The label of a sentence and each class's probability, or a score; a pair has a tab between.

    ValueError unless there are as many sentences as the task takes.
    """
    sentences = tuple(part.strip() for part in text.split("\t"))
    wanted = len(task.sentences) or 1
    if len(sentences) != wanted:
        raise ValueError(f"{short(text)} has {len(sentences)} parts separated by tabs; the task "
                         f"takes {wanted}")
    rows = data.Rows([sentences], np.zeros(1, int))
    (z,), _ = outputs(model, model.maxnet, data.encode(tokenizer, rows, max_length))    # (C,)
    if not task.labels:
        return f"{z.item():.3f}"
    shares = z.softmax(-1).tolist()
    classes = [f"{label} {share:.3f}" for label, share in zip(task.labels, shares)]
    return "\t".join([task.labels[int(z.argmax())], *classes])


def generate(model, tokenizer, prompts, max_new_tokens=256, temperature=0.0, top_p=1.0, stop=(),
             seeds=None, phi=None):
    """A continuation of each prompt, up to the end of text or the first of the `stop` strings.

    Temperature 0 takes the likeliest token; otherwise one is drawn among the likeliest that hold
    top_p of the probability. Each row draws with a seed of its own: neighbours in the batch do not
    change it, unless the longest meets the model's last position. ValueError if a prompt leaves no
    room for a token.
    """
    ends = data.end_of_text(tokenizer)
    longest_stop = max(map(len, stop), default=1)
    draws = [torch.Generator().manual_seed(seed) for seed in seeds or range(len(prompts))]

    def next_tokens(z):                                              # (B, V) -> (B, 1)
        if temperature == 0:
            return z.argmax(-1, keepdim=True)
        return sample(z / temperature, top_p, draws)

    def has_ended(new):
        tail = tokenizer.decode(new[-longest_stop:])                 # a letter a token at least
        return new[-1] in ends or any(word in tail for word in stop)

    encoded = [tokenizer.encode(prompt).ids or ends[:1] for prompt in prompts]
    for ids in encoded:
        data.check_ids(tokenizer, ids)
    new = extend(model, phi or model.maxnet, encoded, max_new_tokens, next_tokens, has_ended)
    return [continuation(tokenizer, before, after, stop)
            for before, after in zip(encoded, new)]


@torch.inference_mode()
def extend(model, phi, encoded, most, next_tokens, has_ended):
    """The tokens, at most so many, that come after each row; ValueError if there is no room."""
    longest = max(map(len, encoded))
    padding = [longest - len(tokens) for tokens in encoded]          # on the left
    room = model.max_tokens
    if longest >= room:
        raise ValueError(f"a prompt of {longest} tokens leaves no room in the model's {room} "
                         f"positions")
    total = min(longest + most, room)
    device = model.device
    ids = torch.tensor([[0] * n + tokens for n, tokens in zip(padding, encoded)],
                       device=device)                                # (B, T)
    mask = torch.arange(total, device=device) >= torch.tensor(padding, device=device)[:, None]
    cache = Cache(total)
    new = [[] for _ in encoded]
    running = range(len(encoded))
    for length in range(longest, total):
        seen = mask[:, :length] if any(padding) else None            # without a mask it is faster
        states, _ = model.encode(ids, seen, phi, cache)
        ids = next_tokens(model.logits(states[:, -1]))
        for row in running:
            new[row].append(int(ids[row]))
        running = [row for row in running if not has_ended(new[row])]
        if not running:
            break
    return new


def continuation(tokenizer, before, after, stop):
    """The text of the tokens after a prompt, cut before the first stop string."""
    prompt = tokenizer.decode(before)
    text = tokenizer.decode(before + after)[len(prompt):]    # alone it may lose its first space
    ends = [text.index(word) for word in stop if word in text]
    return text[:min(ends, default=len(text))]


def sample(z, top_p, draws):
    """A token (B, 1) per row of logits z (B, V), among the likeliest whose probability is top_p."""
    p, order = z.softmax(-1).cpu().sort(descending=True)
    before = p.cumsum(-1) - p                        # 0 for the likeliest, which always stays
    p[before >= top_p] = 0.0
    places = [torch.multinomial(row, 1, generator=draw) for row, draw in zip(p, draws)]
    return order.gather(-1, torch.stack(places)).to(z.device)


# ------------------------------------------------------------------------------------- HumanEval

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@")           # the function has ended
PROBLEM = dict.fromkeys(("task_id", "prompt", "entry_point", "test"), str)


def estimate_pass_at_k(n, c, k):
    """1 - C(n-c, k) / C(n, k): the chance that one of k samples passes, when c of n did.

    Unbiased (Chen et al., 2021, the paper's HumanEval).
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def judged_before(path, made):
    """The completions in a file; ValueError if they were made with other settings than these."""
    if not path.exists():
        return []
    # A crash may have cut the last line short.
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    rows = read_lines(path, {"task_id": str, "sample": int, "passed": bool, "made": dict})
    for key, value in made.items():
        if any(row["made"].get(key) != value for row in rows):
            raise ValueError(f"{path} holds completions made with another {key}; move it away")
    return rows


def usable_cores():
    """How many processors this process may use: its affinity, cut by its container's quota."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    with suppress(OSError, ValueError):              # no control groups; "max", which is no quota
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, math.ceil(quota / period))
    return cores


def pick_threads(model):
    """One thread for thin matrices: two would wait for each other for longer than they work."""
    cores = min(torch.get_num_threads(), usable_cores())
    torch.set_num_threads(cores if model.config["hidden_size"] >= 256 else 1)


def check_sandbox(problems):
    """ValueError unless here, after all imports, a right program passes and a wrong one fails."""
    text = "\n".join(problem["prompt"] + "\n" + problem["test"] for problem in problems)
    statement = r"^(?!from __)(?:from [\w.]+ )?import [\w.]+(?:, *\w+)*(?: as \w+)? *(?=#|$)"
    imports = re.findall(statement, text, re.M)
    prompt = "\n".join(sorted(set(imports))) + "\ndef f(): return "
    problem = {"prompt": prompt, "entry_point": "f", "test": "def check(f): assert f()"}
    for value, wanted in (("1", "passed"), ("0", "failed: AssertionError")):
        result = check_correctness(problem, value)["result"]
        if result != wanted:
            raise ValueError(f"programs cannot be judged here: {prompt + value!r} should be "
                             f"{wanted!r}, not {result!r}")


def humaneval(model, tokenizer, problems, path, origin, samples=1, batch_size=16, too_long=(),
              **settings):
    """pass@k of `model` for k in 1, 10, 100 up to `samples`, and pass@1's standard error.

    Each judged completion is a line of `path`, with the settings of `generate` and the model's
    origin; those that are there already are not made again, and ValueError is raised if they are of
    another origin or other settings. The tasks that are `too_long` count as failed.
    RUNS GENERATED CODE: see `check_correctness`.
    """
    tasks = [problem["task_id"] for problem in problems]
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"two problems have the task_id {max(tasks, key=tasks.count)!r}")
    made = origin | settings
    rows = judged_before(path, made)
    done = {(row["task_id"], row["sample"]) for row in rows}
    todo = [(seed, problem) for seed, problem in enumerate(problems * samples)
            if (problem["task_id"], seed // len(tasks)) not in done
            and problem["task_id"] not in too_long]
    todo.sort(key=lambda pair: len(pair[1]["prompt"]))               # less padding
    if todo:
        check_sandbox(problems)
    with open(path, "a") as file, ThreadPoolExecutor(usable_cores()) as pool:
        for start in tqdm(range(0, len(todo), batch_size), unit=" batches", disable=None):
            seeds, asked = zip(*todo[start:start + batch_size])
            prompts = [problem["prompt"].rstrip() for problem in asked]      # "\n    " is one token
            texts = generate(model, tokenizer, prompts, stop=STOP, seeds=seeds, **settings)
            verdicts = pool.map(check_correctness, asked, texts)
            for seed, problem, text, verdict in zip(seeds, asked, texts, verdicts):
                rows.append({"task_id": problem["task_id"], "sample": seed // len(tasks),
                             "completion": text, "made": made} | verdict)
                file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
    return pass_at_k(rows, tasks, samples)


def pass_at_k(rows, tasks, samples):
    """Mean over the problems, from rows of {"task_id", "sample", "passed"}."""
    passed = Counter(row["task_id"] for row in rows if row["passed"] and row["sample"] < samples)

    def chances(k):
        return [estimate_pass_at_k(samples, passed[task], k) for task in tasks]

    found = {f"pass@{k}": float(np.mean(chances(k))) for k in (1, 10, 100) if k <= samples}
    return found | {"stderr": float(np.std(chances(1)) / np.sqrt(len(tasks)))}


# ------------------------------------------------------------------------------------ the judge
#
# A child interpreter runs this section, not this file: it must not import torch, nor hold
# anything of ours. It forks. The *worker* runs the completion; the *judge* runs the asserts, on
# values that it has the worker compute. So no secret is needed: the pipe for the verdict is open in
# the judge alone, and nothing but plain data gets into the judge.

# Of every process that a completion starts: bytes of memory and of a file, and counts.
LIMITS = {"AS": 2 ** 30, "FSIZE": 2 ** 24, "NPROC": 8, "NOFILE": 64, "CORE": 0}
libc = ctypes.CDLL(None)
kept = {}                                            # in the worker: what the judge uses


def ask(function, *args, **kwargs):
    """The judge has the worker call a function. Its exception is raised here."""
    pickle.dump((function, args, kwargs), ask.worker)
    ask.worker.flush()
    returned, value = PlainUnpickler(ask.worker).load()
    if returned:
        return value
    # Of the program's making it would end a map() of the asserts.
    if value == "StopIteration" and function is not next:
        value = "RuntimeError"
    kind = type(value, (getattr(builtins, value, Exception),), {})
    raise kind.__new__(kind)


class Remote:
    """In the judge: an object of the program. It stays in the worker, and is used there."""
    __call__ = ask

    def __init__(self, number):
        self._number = number

    def __reduce__(self):
        return kept_object, (self._number,)

    def __getattr__(self, name):
        # Such as __array_interface__, an address that numpy would read.
        if name.startswith("__"):
            raise AttributeError
        return ask(getattr, self, name)

    def __eq__(self, other):
        # A program's own __eq__ can say that it equals all.
        if repr(self) != repr(other):
            raise pickle.PicklingError
        return True


for use in (bool, iter, len, next, repr, str):
    setattr(Remote, f"__{use.__name__}__", lambda self, use=use: ask(use, self))


def kept_object(number):
    return kept[number]


class PlainUnpickler(pickle.Unpickler):
    """Loads numbers, strings and containers of them; anything else is a Remote."""
    def find_class(self, module, name):
        # Not the class itself, which what is loaded could change.
        return lambda number: Remote(number)


def plain(value):
    """Containers of derived kinds, such as Counter, as the kind they are derived from."""
    if type(value).__module__ == "numpy":
        value = value.tolist()
    for kind in (dict, list, tuple, set, frozenset):
        if isinstance(value, kind):
            return kind(map(plain, value.items() if kind is dict else value))
    if type(value) in (bool, int, float, str, bytes, type(None)):
        return value
    kept[id(value)] = value
    return Remote(id(value))


def define(user, program, name):
    """The program's function, class or method of that name."""
    give_up_rights(user)
    namespace = {}
    exec(program, namespace)
    return eval(name, namespace)


def serve_calls(judge):
    """The worker: does with the program what it is asked, as often as it is asked."""
    while True:
        function, args, kwargs = pickle.load(judge)
        try:
            reply = (True, plain(function(*args, **kwargs)))
        except BaseException as error:
            reply = (False, type(error).__name__)
        pickle.dump(reply, judge)
        judge.flush()


def run_asserts(user):
    """The judge: runs the asserts on a function that is called in the worker."""
    namespace = {}
    try:
        problem, completion = json.load(sys.stdin)
        name = problem["entry_point"]
        entry = ask(define, user, problem["prompt"] + completion + "\n", name)
        # Asserts may use another function of the prompt. A prompt ends anywhere.
        lines = problem["prompt"].split("\n")
        while lines:
            with suppress(Exception):
                exec("\n".join(lines), namespace)
                break
            lines.pop()
        namespace[name] = entry
        exec(problem["test"], namespace)
        namespace["check"](entry)
        return "passed"
    except BaseException as error:
        return f"failed: {type(error).__name__}"  # EOFError if the worker ended by itself


def kill_all(worker):
    """Kills the worker and all its descendants: an orphan becomes a child of this process."""
    signal.alarm(0)
    os.kill(worker, signal.SIGKILL)
    with suppress(OSError):
        os.killpg(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    mine = b"\nPPid:\t%d\n" % os.getpid()
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG):
            for name in filter(str.isdigit, os.listdir("/proc")):
                with suppress(OSError), open(f"/proc/{name}/status", "rb") as file:
                    if mine in file.read():
                        os.kill(int(name), signal.SIGKILL)
            time.sleep(0.001)


def give_up_rights(user):
    """The worker gives up, for good, what a program does not need."""
    os.setsid()
    if user:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    if sys.platform != "linux":
        return
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the judge
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: no sudo
    # Landlock: write to no file outside of this folder and, from version 6 on, use no TCP and
    # signal no other process. Where the kernel does not have it, these calls do nothing.
    # 444 creates its rules, 445 adds to them, 446 restricts this process to them.
    version = libc.syscall(444, None, 0, 1)
    # Change files; from version 2 on also move, from 3 on also truncate them.
    write = (0x1FF2, 0x3FF2, 0x7FF2)[min(version, 3) - 1]
    rights = struct.pack("QQQ", write, 3, 3)
    rules = libc.syscall(444, rights, 24 if version >= 6 else 8, 0)
    folder = struct.pack("Qi", write, os.open(".", os.O_RDONLY))
    libc.syscall(445, rules, 1, folder, 0)
    libc.syscall(446, rules, 0)


def open_library(installed):
    """Python's library may lie below /root. A descriptor keeps it in reach of another user."""
    for library in (os.path.dirname(os.__file__), installed):
        opened = f"/proc/self/fd/{os.open(library, os.O_RDONLY)}"
        for module in sys.modules.values():
            paths = getattr(module, "__path__", sys.path)
            paths[:] = [path.replace(library, opened) for path in paths]


def isolate(user):
    """Judge and worker get no network; the judge gets all orphans, and nobody sees into it."""
    if sys.platform != "linux":
        return
    libc.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    libc.prctl(4, 0)  # PR_SET_DUMPABLE: not to be traced, nor read through /proc
    spaces = 0x20000000 | 0x40000000 | 0x08000000  # CLONE_NEWPID, NEWNET, NEWIPC
    if not user:
        spaces |= 0x10000000  # CLONE_NEWUSER, by which others than root may, on some systems
    libc.unshare(spaces)


def child(timeout, user, installed):
    """The child interpreter's program: one verdict on standard output."""
    sys.path.append(installed)
    if user:
        open_library(installed)
    isolate(user)
    verdict = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    here, there = socket.socketpair()
    worker = os.fork()
    seconds = math.ceil(timeout)
    for name, limit in (LIMITS | {"CPU": seconds}).items():
        with suppress(OSError, ValueError):  # macOS does not limit memory
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
    if worker == 0:
        os.dup2(nowhere, 0)
        os.close(verdict)
        here.close()
        serve_calls(there.makefile("rwb"))
    there.close()
    ask.worker = here.makefile("rwb")

    def finish(result):
        kill_all(worker)
        used = sum(os.times()[2:4])  # by the worker and its children
        if result != "passed" and used > seconds - 0.1:
            result = "timed out"
        os.write(verdict, " ".join(result.split())[:80].encode(errors="replace"))
        os._exit(0)

    signal.signal(signal.SIGALRM, lambda *_: finish("timed out"))
    # By the clock it has ten times as long: it may have to wait for a processor.
    signal.setitimer(signal.ITIMER_REAL, 10 * timeout)
    finish(run_asserts(user))


# The child's source: this section up to here.
SOURCE = Path(__file__).read_text(encoding="utf-8")
RUNNER = """import builtins, ctypes, json, math, os, pickle, resource, signal, socket
import struct, sys, time
from contextlib import suppress
""" + SOURCE[SOURCE.index("LIMITS = {"):SOURCE.index("SOURCE = ")]


def check_correctness(problem, completion, timeout=10.0):
    """Whether the completion passes the problem's asserts, and in a word what happened.

    It runs in an empty folder, under limits, and all that it started is killed in the end. Under
    root it has a user of its own. Where Linux permits, it has no network and writes nowhere else.
    It computes for `timeout` seconds at most, and takes ten times as long by the clock.
    Its exits, output and tricks prove nothing: the asserts run in another process. Only numbers,
    strings and containers get there. Another object is used from there, and equals what has its
    `repr`; or the result is "failed: PicklingError". (Changes of arguments are not seen.)

    But this is no virtual machine. A program can read what its user can, and fill the disk. Without
    root, namespaces and Landlock it can harm all that its user owns.
    """
    folder = tempfile.mkdtemp()
    user = 0
    try:
        if os.getuid() == 0:  # one of the numbers that systemd keeps for users of the moment
            user = 61184 + os.stat(folder).st_ino % 4336
            try:
                os.chown(folder, user, user)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                user = 0                             # a container's root has no such user
        arguments = (timeout, user, os.path.dirname(np.__path__[0]))
        output = subprocess.run(
            [sys.executable, "-I", "-S", "-c", f"{RUNNER}child{arguments}"],
            input=json.dumps([problem, completion]),
            encoding="utf-8",
            errors="replace",
            stdout=subprocess.PIPE,
            # Which tells why the interpreter cannot start.
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            timeout=10 * timeout + 10,
        ).stdout
        result = (output.splitlines() or ["failed"])[-1]
    except subprocess.TimeoutExpired:
        result = "timed out"
    finally:  # whatever the program did to the permissions or the depth of the folder
        clean = ["sh", "-c", 'chmod -R u+rwX "$0"; rm -rf "$0"', folder]
        subprocess.run(clean, stderr=subprocess.DEVNULL)
    return {"passed": result == "passed", "result": result}


# ------------------------------------------------------------------------------ the run folder

RUN_FILES = ("run.json", "log.jsonl", "palette.json", "palette.md", "adapters.safetensors",
             "state.safetensors")
PLACE = {"stage": int, "step": int}                  # in the log, and of a state
LOCKS: list = []                                     # open files; the system frees them at the end


def check_form(value, form, name="object"):
    """The value; ValueError unless JSON has a form: a type, [the form of each entry],
    {key: its form}, or {str: the form of each value}."""
    kind = form if isinstance(form, type) else type(form)
    right = isinstance(value, (int, float) if kind is float else kind)
    huge = isinstance(value, int) and abs(value) >= 2 ** 63
    if huge or not right:
        raise ValueError(f"there is no {name!r}, or it is of the wrong type")
    if isinstance(form, dict):
        parts = dict.fromkeys(value, form[str]) if str in form else form
        for key, part in parts.items():
            check_form(value.get(key), part, key)
    elif isinstance(form, list):
        for entry in value:
            check_form(entry, form[0], f"entry of {name}")
    return value


def read_lines(path, form):
    """A row for each line of *.jsonl or *.jsonl.gz; ValueError names file, line and missing key."""
    return data.read_file(Path(path), data.json_lines, partial(check_form, form=form))


def write_text(path, text):
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path, content):
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def take_folder(folder, settings, resume, overwrite):
    """Claims a run folder, or goes on with one; returns run.json. Deletes only files of ours.

    FileExistsError if it is in use and neither was asked for; ValueError if it is resumed with
    other settings than it was started with.
    """
    if resume:
        old = read_run(folder)
        before = lasting(old)
        now = lasting(json.loads(json.dumps(settings)))              # tuples become lists
        if differing := [name for name, value in now.items() if before.get(name) != value]:
            raise ValueError(f"{folder} was started with another {', '.join(differing[:5])}; "
                             f"--resume needs the settings in run.json")
        lock(folder)
        return old | {key: settings[key] for key in ("row", "base", "data")}    # where they are now
    if folder.exists() and not is_empty(folder) and not overwrite:
        raise FileExistsError(f"{folder} exists already; go on with --resume, replace it with "
                              f"--overwrite, or choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    for pattern in (*RUN_FILES, "humaneval-*.jsonl"):
        for path in folder.glob(pattern):
            path.unlink()
    write_json(folder / "run.json", settings)
    return settings


def lasting(run):
    """What --resume may not change. Of base and data contents decide, not paths."""
    # Of the dtype what `auto` became counts: on another processor it may become another.
    found = run["hyper_parameters"] | {key: run.get(key) for key in ("device", "dtype")}
    found |= {key: run[key]["sha256"] for key in ("base", "data")}
    return found | {key: run["row"][key] for key in ("labels", "metrics")}


def lock(folder):
    """Until this process ends no other can train into the folder; FileExistsError if one does."""
    LOCKS.append(open(folder / ".lock", "w"))
    try:
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise FileExistsError(f"another run is writing to {folder}; wait for it, or "
                                  f"choose another --out") from None
        print(f"warning: {folder} cannot be locked: {error}", file=sys.stderr)


def base_digest(folder):
    """sha256 of a base checkpoint: config.json, the weights, the tokenizer's files."""
    tokenizer = [folder / name for name in data.TOKENIZER_FILES if (folder / name).exists()]
    return data.sha256([folder / "config.json", *checkpoint_files(folder), *tokenizer])


def digest(tensors):
    """sha256 of names, shapes, types and bits."""
    sha = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        sha.update(f"{name} {list(t.shape)} {t.dtype}".encode())
        sha.update(t.flatten().view(torch.uint8).cpu().numpy())
    return sha.hexdigest()


def read_tensors(path):
    """What `save_tensors` wrote; FileNotFoundError or ValueError if it cannot be read."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; the run has not got that far, or this is not "
                                f"a run folder")
    data.refuse_pointer(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            origin = json.loads(file.metadata()["mlfs"])
        # safetensors does not notice a flipped bit
        if origin["sha256"] != digest(tensors):
            raise ValueError("its sha256 is not the one stored in it")
        return tensors, origin
    except (SafetensorError, OSError, TypeError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or cut short: {str(error)[:200]}") from None


def save_tensors(path, tensors, origin):
    tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
    origin = origin | {"sha256": digest(tensors)}
    with replacing(path) as beside:                  # one metadata entry: several come in any order
        save_file(tensors, beside, {"mlfs": json.dumps(origin)})


def save_adapters(folder, model, settings):
    """{A_s, B_s}, the head and the permutation: with the base model, all there is to keep."""
    origin = {"task": settings["task"], "note": settings["note"],
              "base": settings["base"]["sha256"]}
    save_tensors(folder / "adapters.safetensors", model.trained_state(), origin)


def save_state(folder, model, state):
    """All that `mlfs` needs to go on: what was trained, and its State."""
    tensors = {f"model.{name}": t for name, t in model.trained_state().items()}
    tensors |= {f"U.{layer}": u for layer, u in state.U.items()}
    for i, moments in state.moments.items():
        tensors |= {f"optimizer.{i}.{name}": t for name, t in moments.items()}
    place = {key: getattr(state, key) for key in PLACE}
    save_tensors(folder / "state.safetensors", tensors, place)


def load_state(folder, model):
    """The inverse of `save_state`: fills the model, returns a State's fields ({}: no state).

    Why they are enough for the same bits is said at `mlfs.py::State`.
    """
    path = folder / "state.safetensors"
    if not path.exists():
        return {}
    tensors, position = read_tensors(path)
    learned = {}
    U = {}
    moments = {}
    with naming(f"{path} is not one of ours; train anew with --overwrite"):
        check_form(position, PLACE)
        for name, t in tensors.items():
            kind, rest = name.split(".", 1)
            if kind == "model":
                learned[rest] = t
            elif kind == "U":
                U[int(rest)] = t
            else:
                number, moment = rest.split(".")     # of the optimizer
                moments.setdefault(int(number), {})[moment] = t
        load_trained_state(model, learned)
    model.num_stages = position["stage"] + 1         # without adapters, nothing else tells
    return {key: position[key] for key in PLACE} | {"moments": moments, "U": U}


def cut_log(path, state):
    """Drops the lines that will be written again: of a stage's start (step 0), or later ones."""
    path.touch()
    last = (state.stage, state.step or -1)
    kept = []
    for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines(keepends=True):
        with suppress(ValueError, RecursionError):   # a line that a crash cut off
            entry = check_form(json.loads(line), PLACE)
            if (entry["stage"], entry["step"]) <= last:
                kept.append(line)
    write_text(path, "".join(kept))


def write_palette(folder, settings, task, palette):
    """palette.json and palette.md, each replaced as a whole.

    palette: "subnets", the rows; "measured", of which adapters and how; "files", both of ONNX.
    """
    note = settings["note"]
    metric = task.metrics[0]
    content = {"task": settings["task"], "metric": metric, "note": note, "files": NONE} | palette
    text = f"**{note}**\n\n" if note else ""
    text += f"{title(settings, metric)}\n\n{final_table(palette['subnets'], metric)}\n"
    for part in (content, content["files"]):
        if "length" in part["measured"]:
            text += f"\n{table(part['subnets'], COLUMNS, metric)}\n\n"
            text += f"{conditions(part['measured'])}\n"
    write_json(Path(folder, "palette.json"), content)
    write_text(Path(folder, "palette.md"), text)


OPTIONAL = {"history": {str: float}, "dtype": str,                   # what a row may have as well
            "latency_ms": float, "latency_ms_range": [float],
            "one_thread_ms": float, "one_thread_ms_range": [float]}
NONE = {"measured": {}, "subnets": []}


def read_palette(folder):
    """palette.json: "measured" and "subnets", and the same of ONNX files; empty if there is none.

    ValueError if it lacks what `write_palette` writes. Earlier versions wrote a "sha256" as well.
    """
    path = Path(folder, "palette.json")
    content = {"files": {**NONE}} | (read_json(path) if path.exists() else NONE)
    with naming(f"{path} was damaged or edited; delete it, and evaluate.py measures anew"):
        form = {"measured": dict, "subnets": [SIZES | {"score": float, "stderr": float}]}
        check_form(content, form | {"files": form})
        for row in content["subnets"] + content["files"]["subnets"]:
            check_form(row, {key: kind for key, kind in OPTIONAL.items() if key in row})
    return content


def device_name(device):
    """What tells this device from others: a latency measured on one says nothing of another."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    told = ""
    with suppress(OSError):                          # not Linux
        told = Path("/proc/cpuinfo").read_text()
    if name := re.search(r"model name\s*: (?!ARM)(\S.*)", told):
        return name[1]
    # ARM's and Apple's have one name for all: their parts, the board and the host tell two apart.
    parts = sorted(set(re.findall(r"(?:part|Hardware|Model)\s*: (.*)", told)))
    return " ".join([device, platform.machine(), *parts, platform.node()])


def conditions(measured):
    """Where and how a palette was measured."""
    how = [f"{key} {value}" for key, value in measured.items() if key != "adapters"]
    return f"Measured with {', '.join(how)}."


def peak_memory(device):
    """Bytes: the process's largest resident size; on a GPU, the largest allocation there."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


ROW = {name: str if kind is str else [str] for name, kind in data.Task.__annotations__.items()}
RUN = {                                              # what is read of run.json
    "task": str, "row": ROW, "note": str, "space": [SIZES],
    "base": {"folder": str, "from_run": str, "sha256": str},
    "data": {"folder": str, "from_run": str, "dev": int, "sha256": {str: str}},
    "hyper_parameters": {"init": str, "seed": int, "rank": int, "max_length": int,
                         "dev_examples": int},
}


def read_run(folder):
    """run.json; ValueError if it lacks what a run writes."""
    path = Path(folder, "run.json")
    run = read_json(path)
    with naming(f"{path} is not one of ours, or was edited"):
        check_form(run, RUN)
        rank_metrics(task_of(run))
    return run


def task_of(run):
    """The task as it was when the run began: the order of its classes is what the model knows."""
    return data.Task(*[run["row"][name] for name in ROW])


def located(path, run_folder):
    """Where a run's base or data lie: the path, and the same as seen from the run folder."""
    path = path.resolve()
    return {"folder": str(path), "from_run": os.path.relpath(path, run_folder.resolve())}


def find_again(place, run_folder):
    """Where that is now: as far from the run folder, if both were moved, or where it was."""
    moved = Path(run_folder, place["from_run"])
    return moved if os.path.exists(moved) else Path(place["folder"])


def load_run(folder, device="cpu", dtype=torch.float32, base=None):
    """(run.json, the model with its adapters, 𝒜), from the folder and its base checkpoint.

    base: where that is now, if not where the run found it. Raises FileNotFoundError or ValueError
    naming what is missing, damaged, or of another base.
    """
    folder = Path(folder)
    run = read_run(folder)
    space = [subnet(row) for row in run["space"]]
    base = Path(base or find_again(run["base"], folder))
    if not os.path.isfile(base / "config.json"):
        raise FileNotFoundError(f"{folder / 'run.json'}: its base checkpoint {base} is not there; "
                                f"name it with --model")
    state, origin = read_tensors(folder / "adapters.safetensors")
    if not base_digest(base) == run["base"]["sha256"] == origin.get("base"):
        raise ValueError(f"{base} is not the checkpoint that {folder} was trained on: sha256 "
                         f"differs")
    model = load_pretrained(base, max(1, len(run["row"]["labels"])), dtype)
    if run["hyper_parameters"]["init"] == "random":
        initialise(model, run["hyper_parameters"]["seed"])
    with naming(folder):
        load_trained_state(model, state)
        for phi in space:
            model.subnet_config(phi)                 # ValueError unless it is part of the maxnet
    run["base"]["folder"] = str(base)
    run["adapters"] = origin["sha256"]
    return run, model.to(device), space


# ---------------------------------------------------------------------------- the command line

def check_device(name):
    """The name, if this machine has that device; otherwise ValueError."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: "
                         f"{str(error).splitlines()[0]}") from None
    return name


def exit_on_bad_input(main):
    """Runs a command. What the user can put right is told in one sentence, exit code 2.

    By convention ValueError and OSError carry that sentence; a bug keeps its traceback.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")             # None if the shell closed it
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError):      # a notebook's
            stream.reconfigure(errors="replace")     # a terminal without Greek shows "?" for it
    try:
        return main()
    except BrokenPipeError:                          # who reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; go on with --resume, or HumanEval with the same command", file=sys.stderr)
        return 130


# int8 is made of float32.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
          "int8": torch.float32}
FILES = ("float32", "int8")                          # the number formats of ONNX files
BUDGETS = {"max_params": ("parameters", "parameters"), "max_macs": ("macs", "MACs per token"),
           "max_size_mb": ("size_mb", "MB"), "max_latency_ms": ("latency_ms", "ms")}


class Parser(ArgumentParser):
    """One whose errors are a sentence, and whose help has lines of at most 100 characters."""

    def __init__(self, documentation):
        super().__init__(usage="python %(prog)s [options]", description=documentation,
                         formatter_class=partial(RawDescriptionHelpFormatter, width=100))
        # A shell replaces ~ in `--out ~/x`, but not in `--out=~/x`.
        self.register("type", Path, lambda text: Path(os.path.expanduser(text)))

    def error(self, message):
        raise ValueError(f"{message}; see --help")


def parse_arguments(argv):
    """The options; ValueError for those that contradict each other, before anything is read."""
    parser = Parser(__doc__)
    parser.format_help = lambda: __doc__             # written by hand: what goes with what
    add = parser.add_argument
    add("run", type=Path, metavar="RUN")
    add("--subnets", "--subnet")
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=DTYPES)
    add("--model", type=Path)
    add("--data-dir", type=Path)
    for budget in BUDGETS:
        add("--" + budget.replace("_", "-"), type=float)
    one_of = parser.add_mutually_exclusive_group().add_argument
    one_of("--plot", type=Path)
    one_of("--export", nargs=2, type=os.path.expanduser)
    one_of("--predict", nargs="?", const="-")
    one_of("--humaneval", type=Path)
    add("--onnx", nargs="?", const="float32", choices=FILES)
    for switch in ("--pad-heads", "--allow-code-execution"):
        add(switch, action="store_true")
    numbers = {"--samples": 1, "--batch-size": 16, "--max-new-tokens": 256,
               "--temperature": 0.0, "--top-p": 1.0}
    for option, default in numbers.items():
        add(option, type=type(default), default=default)
    args = parser.parse_args(argv)
    args.sampling = {key: getattr(args, key)
                     for key in ("max_new_tokens", "temperature", "top_p")}
    args.budget = {key: getattr(args, option) for option, (key, _) in BUDGETS.items()
                   if getattr(args, option) is not None}
    check_options(args)
    if args.plot or args.export:
        check_targets(args)
    return args


def check_options(args):
    """ValueError for numbers that cannot be, and for options that contradict each other."""
    for name in ("samples", "batch_size", "max_new_tokens", "top_p", *BUDGETS):
        value = getattr(args, name)
        if value is not None and not value > 0:      # not a number is not above 0, either
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if args.top_p > 1 or not (args.temperature == 0 or args.temperature >= 1e-3):
        raise ValueError("--top-p must be at most 1, --temperature 0 or at least 0.001")
    if args.humaneval and not args.allow_code_execution:
        raise ValueError("--humaneval runs programs that a model wrote, which may do harm; nothing "
                         "was run: add --allow-code-execution to allow that")
    if args.samples > 1 and args.temperature == 0:
        raise ValueError("--samples above 1 need a --temperature: greedy text is always the same")
    if (args.pad_heads or args.onnx) and not args.export:
        raise ValueError("--pad-heads and --onnx go with --export SUBNET DIR")
    if args.dtype == "int8" and (args.export or args.device != "cpu"):
        raise ValueError("--dtype int8 is measured on a cpu; --export SUBNET DIR --onnx int8 "
                         "exports it")
    if args.onnx or args.dtype == "int8":
        require_package("ONNX", "onnx", "onnxscript", "onnxruntime")
        # They and torch warn of their own workings.
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    if args.budget and any((args.predict is not None, args.humaneval, args.export)):
        raise ValueError("--max-..., --export, --predict, --humaneval: do one at a time")


def check_targets(args):
    """FileExistsError, or ValueError, if what is asked for cannot be written."""
    path = args.plot or Path(args.export[1])
    if path.exists() and not is_empty(path):
        raise FileExistsError(f"{path} exists already; choose another name, or delete it")
    if args.plot:
        if path.suffix not in (".png", ".svg", ".pdf") or not path.parent.is_dir():
            raise ValueError(f"--plot {path}: name a .png, .svg or .pdf file in a folder that "
                             f"exists")
        require_package("--plot", "matplotlib")


class Opened:
    """A run folder, as the options open it; ValueError if it lacks the subnets that they name."""

    def __init__(self, args):
        self.settings, model, self.space = load_run(args.run, check_device(args.device),
                                                    DTYPES[args.dtype], args.model)
        names = [phi.name for phi in self.space]
        asked = args.export[0] if args.export else args.subnets
        self.names = names if asked is None else asked.split(",")
        for name in self.names:
            if name not in names:
                raise ValueError(f"there is no subnet {name!r}, only {', '.join(names)}")
        if args.predict is not None and len(self.names) > 1:
            raise ValueError("--predict needs one --subnet NAME")
        # What the command is about.
        self.subnets = [phi for phi in self.space if phi.name in self.names]
        # What is shipped is measured: adapters merged.
        self.model = model.extract(model.maxnet)
        self.task = task_of(self.settings)
        pick_threads(model)
        self.tokenizer = data.load_tokenizer(self.settings["base"]["folder"],
                                             model.config["vocab_size"])
        if self.settings["note"]:
            print(self.settings["note"], file=sys.stderr)


def main(argv=None):
    args = parse_arguments(argv)
    problems = args.humaneval and read_lines(args.humaneval, PROBLEM)
    if problems == []:
        raise ValueError(f"{args.humaneval} has no problems")
    run = Opened(args)
    if problems:
        print_humaneval(args, run, problems)
    elif args.predict is not None:
        print_predictions(args, run)
    else:
        return print_palette(args, run)
    return 0


def print_palette(args, run):
    """What is asked for, from palette.json if it has that, otherwise measured and printed first."""
    metric = run.task.metrics[0]
    heading = title(run.settings, metric)
    stored = read_palette(args.run)
    part = stored["files"] if args.dtype == "int8" else stored
    if not answers(args, run, part, args.dtype):
        part |= measure(args, run, stored)
        print(heading, table(part["subnets"], COLUMNS, metric), conditions(part["measured"]),
              sep="\n\n", flush=True)
        try:
            if run.subnets == run.space:             # a part replaces no whole palette
                write_palette(args.run, run.settings, run.task, stored)
        except OSError as error:                     # the answer is given all the same
            print(f"warning: the palette could not be stored: {error}", file=sys.stderr)
    rows = part["subnets"]
    where = conditions(part["measured"])
    files = stored["files"]
    if part is stored and answers(args, run, files, "int8"):
        rows = rows + [row for row in files["subnets"] if row["dtype"] == "int8"]
        where += f"\n{conditions(files['measured'])}"
    shown = [row for row in rows if row["name"] in run.names]
    if args.plot:
        plot_palette(args.plot, shown, metric, heading, rows[0].get("history", {}))
    if args.export:
        ship(args, run, [rows[0], *shown], where)
    return print_choice(shown, args.budget, metric, where) if args.budget else 0


def conditions_now(args, run, dtype):
    """How a palette would be measured now: what decides whether a stored one answers."""
    threads = usable_cores() if dtype == "int8" else torch.get_num_threads()
    return {"adapters": run.settings["adapters"], "dtype": dtype,
            "device": device_name(args.device), "threads": threads, "batch_size": 1,
            "length": min(128, run.model.max_tokens), "torch": torch.__version__}


def answers(args, run, stored, dtype):
    """Whether the rows of palette.json are what is asked for."""
    if args.data_dir or not (args.plot or args.export or args.budget):
        return False
    wanted = conditions_now(args, run, dtype)
    if not (args.plot or args.max_latency_ms):
        # Scores depend on both. An export's card says in which dtype they were measured.
        keys = ["adapters"] if args.export else ["adapters", "dtype"]
        wanted = {key: wanted[key] for key in keys}
    return stored["subnets"] and wanted.items() <= stored["measured"].items()


def measure(args, run, stored):
    """A row per subnet, the maxnet's first, as shares need it; and how they were measured now.

    The scores of earlier moments are those of the stored palette.
    """
    hp = run.settings["hyper_parameters"]
    place = args.data_dir or find_again(run.settings["data"], args.run)
    splits = {}
    for name, texts in data.load_task(run.task, place, train=False).items():
        if data.fingerprint(texts) != run.settings["data"]["sha256"].get(name):
            raise ValueError(f"{place}: these {len(texts.texts):,} {name} examples are not those "
                             f"of {args.run}")
        examples = data.encode(run.tokenizer, texts, hp["max_length"])
        splits[name] = data.draw(examples, hp["dev_examples"])
    space = [phi for phi in run.space if phi == run.space[0] or phi in run.subnets]
    now = conditions_now(args, run, args.dtype)
    if args.dtype == "int8":
        rows = file_rows(run, space, splits, now)
    else:
        timed = latency(run.model.extract, space, now["batch_size"], now["length"])
        scored = palette(run.model, space, run.task, splits)
        rows = [row | times for row, times in zip(scored, timed)]
    past = {row["name"]: row for row in stored["subnets"]}
    return {"measured": now,
            "subnets": [past.get(row["name"], {}) | row for row in rows]}


def file_rows(run, space, splits, now):
    """A row per subnet and number format, of ONNX files in onnxruntime."""
    import onnxruntime

    now["onnxruntime"] = onnxruntime.__version__
    rows = {}                                        # by path
    with tempfile.TemporaryDirectory() as folder:
        for phi in space:
            files = {dtype: Path(folder, f"{phi.name}-{dtype}.onnx") for dtype in FILES}
            export_onnx(run.model.extract(phi), files["float32"])
            quantise(*files.values())
            for dtype, path in files.items():
                sizes = describe(run.model, phi)
                sizes |= {"dtype": dtype, "size_mb": path.stat().st_size / 1e6}
                rows[path] = sizes | evaluate(OnnxFile(path, run.model), phi, run.task, splits)
        for threads, what in ((now["threads"], "latency"), (1, "one_thread")):
            opened = partial(OnnxFile, model=run.model, threads=threads)
            timed = latency(opened, rows, now["batch_size"], now["length"])
            for row, times in zip(rows.values(), timed):
                row |= {key.replace("latency", what): value for key, value in times.items()}
    return list(rows.values())


def ship(args, run, rows, where):
    """--export, and what the transformers library can make of it.

    rows: the maxnet's, its own and, if it was measured, that of its int8 file.
    """
    # Their sizes on disk in --dtype, which may not be the one that they were measured in.
    maxnet, row = (row | describe(run.model, subnet(row)) for row in rows[:2])
    small, form = common_form(run.model.extract(run.subnets[0]), args.pad_heads)
    if args.pad_heads:                               # what was measured had no heads of zeros
        row = {key: value for key, value in row.items() if not key.endswith("_ms")}
        row |= describe(small, small.maxnet) | {"name": row["name"], "layers": row["layers"]}
    metric = run.task.metrics[0]
    if args.onnx:
        form += f" model.onnx is in {args.onnx}."
    if args.onnx == "int8":
        form += "".join(f" Its {metric}: {quality(file, metric)}." for file in rows[2:])
    card = model_card(run.settings, [maxnet, row], metric, form, args.dtype, where)
    small = small.to(DTYPES[args.dtype]).cpu()
    name, folder = args.export
    export(small, folder, run.settings["base"]["folder"], run.task.labels, card, args.onnx)
    print(f"Wrote {name} to {folder}: {row['size_mb']:.1f} MB in {args.dtype}. {form}")


def stand_alone(args, model, phi):
    """Φ's own model, cut out; in int8 its ONNX file."""
    small = model.extract(phi)
    if args.dtype == "int8":
        with tempfile.TemporaryDirectory() as folder:                # the file is read at once
            path = Path(folder, "model.onnx")
            export_onnx(small, path, "int8")
            small = OnnxFile(path, small)
    return small


def print_predictions(args, run):
    """--predict: a line for TEXT or for each line of standard input, as soon as it is there."""
    small = stand_alone(args, run.model, run.subnets[0])
    lines = [os.fsencode(args.predict)]
    if args.predict == "-":
        lines = (line.rstrip(b"\r\n") for line in getattr(sys.stdin, "buffer", ()))
    for number, line in enumerate(lines, 1):
        with naming(f"--predict, line {number}"):
            text = line.decode()
            if isinstance(run.model, Decoder):
                text += generate(small, run.tokenizer, [text], **args.sampling)[0]
            else:
                text = answer(small, run.tokenizer, run.task, text,
                              run.settings["hyper_parameters"]["max_length"])
        print(text, flush=True)


def print_choice(rows, budget, metric, where):
    """The best and the next best within the budget; exit code 3 if there is none."""
    def costs(row):
        return ", ".join(f"{round(row[key], 2):,.10g} {unit}" for key, unit in BUDGETS.values()
                         if key in row)

    chosen = choose(rows, budget, metric)
    if not chosen:
        least = min(rows, key=lambda row: row["size_mb"])
        print(f"error: no subnet fits within {costs(budget)}; the smallest, {called(least)}, has "
              f"{costs(least)}", file=sys.stderr)
        return 3
    print(f"Within {costs(budget)}, best first:")
    for row in chosen[:2]:
        print(f"{called(row)} ({quality(row, metric)}): {costs(row)}")
    print(where)
    return 0


def print_humaneval(args, run, problems):
    """A line per subnet; its completions go to humaneval-SUBNET.jsonl in the run folder."""
    if not isinstance(run.model, Decoder):
        raise ValueError(f"{args.run} is an encoder; --humaneval needs one that generates text")
    origin = {"adapters": data.sha256([args.run / "adapters.safetensors"]),
              "problems": data.sha256([args.humaneval]), "dtype": args.dtype}
    too_long = [problem["task_id"] for problem in problems
                if len(run.tokenizer.encode(problem["prompt"]).ids) >= run.model.max_tokens]
    for phi in run.subnets:
        path = args.run / f"humaneval-{phi.name}.jsonl"
        found = humaneval(stand_alone(args, run.model, phi), run.tokenizer, problems, path, origin,
                          args.samples, args.batch_size, too_long, **args.sampling)
        unjudged = path.read_text().count('"failed: PicklingError"')
        points = ", ".join(f"{name} {100 * value:.1f}" for name, value in found.items())
        print(f"{phi.name}: {points}; {len(problems)} problems, {args.samples} samples each; "
              f"not judged: {unjudged} values of other kinds, {len(too_long)} long prompts",
              flush=True)


if __name__ == "__main__":
    sys.exit(exit_on_bad_input(main))
