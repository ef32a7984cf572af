"""What a run of MLFS is worth: metrics, the palette (a row per subnet), and the run folder.

    python evaluate.py runs/sst2-minilm-l6           # the palette, again, from the stored adapters
"""
import argparse
import json
import math
import sys
from pathlib import Path
from typing import Callable, Iterable

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import data
from model import (ElasticLinear, SubnetConfig, SuperTransformer, load_pretrained, read_json,
                   replacing)


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

@torch.no_grad()
def predict(model: SuperTransformer, phi: SubnetConfig, examples: data.Examples,
            batch_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Predicted classes (or scores) and their labels, shortest example first."""
    device, outputs, labels = next(model.parameters()).device, [], []
    for x, y in data.batches(examples, batch_size, device=device):
        z, _ = model(**x, phi=phi)                                               # (B, C)
        outputs.append(z.argmax(-1) if z.size(-1) > 1 else z[:, 0])
        labels.append(y)
    return torch.cat(outputs).cpu().numpy(), torch.cat(labels).cpu().numpy()


def evaluate(model: SuperTransformer, phi: SubnetConfig, task: data.Task,
             splits: dict[str, data.Examples]) -> dict[str, float]:
    """"score" (the task's first metric), "stderr" and every metric, on dev.

    MNLI adds "accuracy_mismatched".
    """
    predictions, labels = predict(model, phi, splits["dev"])
    values = {metric: METRICS[metric](predictions, labels) for metric in task.metrics}
    if "dev_mismatched" in splits:
        values["accuracy_mismatched"] = accuracy(*predict(model, phi, splits["dev_mismatched"]))
    first = task.metrics[0]
    return {"score": values[first], "stderr": standard_error(first, predictions, labels)} | values


def describe(model: SuperTransformer, phi: SubnetConfig) -> dict:
    """Φ's sizes, counted on its stand-alone model: parameters in all and in the encoder's layers.

    "macs" are the multiply-accumulates per token of the layers' linear maps, attention left out.
    """
    small = model.skeleton(phi)
    linears = [m for m in small.layers.modules() if isinstance(m, ElasticLinear)]
    return {"name": phi.name, "heads": phi.num_attention_heads, "hidden_size": phi.hidden_size,
            "intermediate_size": phi.intermediate_size, "layers": list(phi.layers),
            "parameters": sum(p.numel() for p in small.parameters()),
            "encoder_parameters": sum(p.numel() for p in small.layers.parameters()),
            "macs": sum(linear.weight.numel() for linear in linears)}


def palette(model: SuperTransformer, space: list[SubnetConfig], task: data.Task,
            splits: dict[str, data.Examples]) -> list[dict]:
    """A row per subnet, maxnet first: sizes, score, standard error (Figs. 1 and 8)."""
    return [describe(model, phi) | evaluate(model, phi, task, splits) for phi in space]


def worth_shipping(rows: list[dict]) -> list[dict]:
    """The subnet to take for any budget, smallest first.

    A larger one is listed only if it beats all smaller ones listed by more than its standard error.
    """
    front: list[dict] = []
    for row in sorted(rows, key=lambda row: (row["parameters"], -row["score"])):
        if not front or row["score"] > front[-1]["score"] + row["stderr"]:
            front.append(row)
    return front


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """Markdown; columns maps a key to its heading. Fractions are printed in points (0-100)."""
    def cell(row: dict, key: str) -> str:
        value = row.get(key, "")
        if key.endswith("parameters"):
            return f"{value / 1e6:.2f}M ({value / rows[0][key]:.0%})"
        return f"{100 * value:.1f}" if isinstance(value, float) else str(value)

    lines = [list(columns.values())] + [[cell(row, key) for key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = [":" + "-" * (widths[0] - 1)] + ["-" * (w - 1) + ":" for w in widths[1:]]
    lines.insert(1, rule)
    return "\n".join("| " + " | ".join([line[0].ljust(widths[0])] + [
        text.rjust(width) for text, width in zip(line[1:], widths[1:])]) + " |" for line in lines)


COLUMNS = {"name": "subnet", "parameters": "parameters", "encoder_parameters": "encoder"}


def final_table(rows: list[dict]) -> str:
    """The palette with a column for each moment that was measured, oldest first, the standard error
    of the last, and the task's other metrics then."""
    moments = {moment: moment for moment in rows[0].get("history", {})} or {"score": "score"}
    flat = [row | row.get("history", {}) for row in rows]
    metrics = [key for key in rows[0] if key in (*METRICS, "accuracy_mismatched")]
    return table(flat, COLUMNS | moments | {"stderr": "± s.e."} | {key: key for key in metrics[1:]})


def stage_table(rows: list[dict]) -> str:
    """The palette before and after the stage that has just ended."""
    moments = {moment: moment for moment in list(rows[0]["history"])[-2:]}
    return table([row | row["history"] for row in rows], COLUMNS | moments | {"stderr": "± s.e."})


# ------------------------------------------------------------------------------ the run folder

RUN_FILES = ("run.json", "log.jsonl", "palette.json", "palette.md", "adapters.safetensors",
             "state.safetensors")


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
                fields = new if isinstance(new, dict) else {}
                odd = [f for f in fields if (old.get(key) or {}).get(f) != fields[f]]
                raise ValueError(f"{folder} was started with another {key} "
                                 f"({', '.join(odd) or new}); --resume needs the command it was "
                                 f"started with")
        return old
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} exists already; go on with --resume, replace it with "
                              f"--overwrite, or choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "run.json", settings)
    return settings


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """What `save_tensors` wrote; FileNotFoundError or ValueError if it cannot be read."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; the run has not got that far, or this is not "
                                f"a run folder")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            return tensors, json.loads(file.metadata()["mlfs"])
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], origin: dict) -> None:
    tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
    with replacing(path) as beside:                  # one metadata entry: several come in any order
        save_file(tensors, beside, {"mlfs": json.dumps(origin)})


def save_adapters(folder: Path, model: SuperTransformer, settings: dict) -> None:
    """{A_s, B_s}, the head and the permutation: with the base model, all there is to keep."""
    origin = {key: settings[key] for key in ("task", "note")} | {"base": settings["base"]["sha256"]}
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
    if not (folder / "state.safetensors").exists():
        return None
    tensors, position = read_tensors(folder / "state.safetensors")
    model.load_trained_state({name.removeprefix("model."): t for name, t in tensors.items()
                              if name.startswith("model.")})
    resume = position | {"optimizer": {}, "U": {}}
    for name, t in tensors.items():
        kind, number, *moment = name.split(".")
        if kind == "U":
            resume["U"][int(number)] = t
        elif kind == "optimizer":
            resume["optimizer"].setdefault(int(number), {})[moment[0]] = t
    return resume


def keep_log(path: Path, resume: dict | None) -> None:
    """Drop the lines logged after the checkpoint: they will be written again."""
    def place(line: str) -> tuple[float, float]:
        try:
            entry = json.loads(line)
            return entry["stage"], entry["step"]
        except (ValueError, KeyError, TypeError):                    # a line cut off by a crash
            return math.inf, math.inf

    if path.exists():
        position = (resume["stage"], resume["step"]) if resume else (0, 0)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        with replacing(path) as beside:
            beside.write_text("".join(line for line in lines if place(line) <= position),
                              encoding="utf-8")


def write_palette(folder: Path, settings: dict, task: data.Task, rows: list[dict]) -> None:
    """palette.json and palette.md, each replaced as a whole."""
    name, note, metric = settings["task"], settings["note"], task.metrics[0]
    content = {"task": name, "metric": metric, "note": note, "subnets": rows}
    write_json(folder / "palette.json", content)
    text = f"{name}, {metric} on dev, in points\n\n{final_table(rows)}\n"
    with replacing(folder / "palette.md") as path:
        path.write_text((f"**{note}**\n\n" if note else "") + text, encoding="utf-8")


def peak_memory(device: str) -> int:
    """Bytes: the process's largest resident size; on a GPU, the largest allocation there."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    try:
        import resource                                              # absent on Windows
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def load_run(folder: Path,
             device: str = "cpu") -> tuple[dict, SuperTransformer, list[SubnetConfig]]:
    """(run.json, the model with its adapters, 𝒜), from the folder and its base, in float32.

    Raises FileNotFoundError or ValueError naming what is missing, damaged, or of another base.
    """
    run = read_json(folder / "run.json")
    try:
        base, digest, labels = run["base"]["folder"], run["base"]["sha256"], run["num_labels"]
        run["data"]["folder"], run["hyper_parameters"]["max_length"], run["note"]        # all there?
        data.TASKS[run["task"]]
        space = [SubnetConfig(row["hidden_size"], row["heads"], row["intermediate_size"],
                              tuple(row["layers"]), row["name"]) for row in run["space"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'run.json'} is not one of ours, or was edited: {error} is "
                         f"missing or wrong") from None
    state, origin = read_tensors(folder / "adapters.safetensors")
    if not data.sha256(Path(base) / "model.safetensors") == digest == origin.get("base"):
        raise ValueError(f"{base} is not the checkpoint that {folder} was trained on: sha256 "
                         f"differs")
    model = load_pretrained(base, labels, torch.float32)
    model.load_trained_state(state)
    return run, model.to(device), space


# ---------------------------------------------------------------------------- the command line

def check_device(name: str) -> str:
    """The name, if this machine has that device; else ValueError."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return name


def exit_on_bad_input(main: Callable[[], int]) -> int:
    """Runs a command. What the user can put right is told in one sentence, exit code 2.

    By convention ValueError and OSError carry that sentence; a bug keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):          # a terminal without Greek shows "?" for it
        stream.reconfigure(errors="replace")
    try:
        return main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; `python mlfs.py` with the same options and --resume goes on from the "
              "last checkpoint", file=sys.stderr)
        return 130


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The palette of a finished run, measured again.")
    parser.add_argument("run", type=Path, help="a run folder, such as runs/toy")
    parser.add_argument("--data-dir", type=Path, help="holds SST-2/ etc.; default: as in the run")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...; default cpu")
    args = parser.parse_args(argv)
    run, model, space = load_run(args.run, check_device(args.device))
    task, max_length = data.TASKS[run["task"]], run["hyper_parameters"]["max_length"]
    tokenizer = data.load_tokenizer(run["base"]["folder"], model.config["vocab_size"])
    splits = data.load_task(run["task"], args.data_dir or run["data"]["folder"], train=False)
    splits = {name: data.encode(tokenizer, rows, max_length) for name, rows in splits.items()}
    rows = palette(model, space, task, splits)
    if run["note"]:
        print(run["note"])
    print(f"{run['task']}, {task.metrics[0]} on dev ({len(splits['dev'].labels):,} examples), "
          f"float32, in points\n\n{final_table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_on_bad_input(main))
