"""The curves of a training run (Figs. 2, 5 and 7): losses per subnet, and validation scores.

    pip install matplotlib
    python tests/by_hand/curves.py runs/toy/log.jsonl curves.png
"""

import itertools
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import evaluate  # noqa: E402


def read_log(path):
    """Curves of a log.jsonl, and the iterations at which the three stages start.

    A curve is [(iteration, value)], kept by kind ("loss", "validation"), subnet and stage.
    ValueError if there is none, or what no run wrote.
    """
    entries = evaluate.read_lines(path, evaluate.PLACE)
    starts = [0]
    for stage in range(2):
        steps = [entry["step"] for entry in entries if entry["stage"] == stage]
        starts.append(starts[-1] + max(steps, default=0))
    curves = {}
    with evaluate.naming(f"{path} is not one of ours, or was edited"):
        for entry, kind in itertools.product(entries, ("loss", "validation")):
            stage = entry["stage"]
            if stage not in range(3):
                raise ValueError(f"there is no stage {stage}")
            values = entry.get(kind, {})
            evaluate.check_form(values, {str: float}, kind)
            for name, value in values.items():
                stages = curves.setdefault(kind, {}).setdefault(name, ([], [], []))
                stages[stage].append((starts[stage] + entry["step"], value))
    if not curves:
        raise ValueError(f"{path} has no losses yet")
    return curves, starts


def plot_curves(path, curves, starts):
    """Losses per subnet, means over 10 logged steps, and validation scores, over the iterations of
    all stages (Figs. 2, 5 and 7); see `read_log`."""
    evaluate.require_package("curves.py", "matplotlib")
    with evaluate.picture(path, len(curves)) as (_, axes):
        for axis, (kind, subnets) in zip(axes, curves.items()):
            for i, (name, stages) in enumerate(sorted(subnets.items())):
                color = f"C{i % 10}"
                axis.plot([], [], color=color, label=name)
                for points in filter(None, stages):
                    window = min(10 if kind == "loss" else 1, math.ceil(len(points) / 3))
                    weights = np.full(window, 1 / window)
                    steps, values = np.transpose(points)
                    axis.plot(np.convolve(steps, weights, "valid"),
                              np.convolve(values, weights, "valid"),
                              marker="." if len(points) == 1 else "", color=color)
            for start in starts[1:]:
                axis.axvline(start, color="gray", linewidth=0.5)
            axis.set_xlabel("iterations of the three stages")
            axis.set_ylabel("training loss" if kind == "loss" else "validation score")
            axis.legend(fontsize=7)


def main(argv):
    if len(argv) != 2 or Path(argv[1]).exists():
        raise ValueError(f"a log.jsonl and a new picture are wanted, not {argv}:\n{__doc__}")
    log, target = map(Path, argv)
    plot_curves(target, *read_log(log))
    return 0


if __name__ == "__main__":
    sys.exit(evaluate.exit_on_bad_input(lambda: main(sys.argv[1:])))
