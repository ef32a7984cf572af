"""How fast a subnet is: extracted against the maxnet, in place against extracted, ours against the
transformers library's BERT, and what it costs to switch Φ from one request to the next.

    pip install transformers==5.23.0 && python tests/by_hand/bench_latency.py [float32|bfloat16]

Random weights of BERT-base's shape. In every comparison the contestants take turns, and ratios are
those of the medians. Not a test: run it by hand on a quiet machine (5 minutes on two cores).
"""
import sys
import time
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import evaluate  # noqa: E402
from mlfs import configuration_space  # noqa: E402
from model import Bert, initialise  # noqa: E402

CONFIG = {"model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "num_attention_heads": 12,
          "head_dim": 64, "intermediate_size": 3072, "num_hidden_layers": 12,
          "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
          "hidden_act": "gelu", "num_labels": 2}


def medians(contestants: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Milliseconds of each, taking turns, after one turn to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(some[1:])) for name, some in times.items()}


def in_place(model) -> Callable:
    """In place of model.extract: `evaluate.latency` then times slices that are not cut out."""
    def use(phi):
        slice = partial(model, phi=phi)
        slice.device = model.device
        return slice
    return use


@torch.inference_mode()
def main(dtype: torch.dtype) -> None:
    from transformers import BertConfig, BertForSequenceClassification  # to compare with, not ours
    ours = initialise(Bert(CONFIG)).to(dtype)
    theirs = BertForSequenceClassification(BertConfig()).eval().to(dtype)
    space = configuration_space(ours.maxnet)
    print(f"{evaluate.device_name('cpu')}, {torch.get_num_threads()} threads, {dtype}, torch "
          f"{torch.__version__}\n\nBatch 1, 128 tokens:")

    shown = [space[0], space[6], space[-1]]
    rows = evaluate.latency(ours.extract, shown, runs=8)
    slices = evaluate.latency(in_place(ours), shown, runs=8)
    for phi, row, own in zip(shown, rows, slices):
        ms = row["latency_ms"]
        print(f"  {phi.name:8} extracted {ms:6.1f} ms ({ms / rows[0]['latency_ms']:.2f} of the "
              f"maxnet's), in place {own['latency_ms']:6.1f} ms ({own['latency_ms'] / ms:.2f} of "
              f"extracted)")

    print("\nMaxnet against the transformers library, milliseconds (above 1: ours is faster):")
    for batch in (1, 32):
        for length in (16, 128, 512):
            ids = torch.randint(1000, 30000, (batch, length))
            mask = torch.ones_like(ids)
            padded = mask.clone()
            padded[-1, length // 2:] = 0
            pair = {"ours": lambda: ours(ids, features=()),
                    "theirs": lambda: theirs(ids, attention_mask=mask)}
            if batch > 1 and length < 512:
                pair |= {"ours, padded": lambda: ours(ids, padded, features=()),
                         "theirs, padded": lambda: theirs(ids, attention_mask=padded)}
            ms = medians(pair, max(3, min(40, 20000 // (batch * length))))
            ours_ms = [name for name in ms if "ours" in name]
            ratios = [ms[name.replace("ours", "theirs")] / ms[name] for name in ours_ms]
            print(f"  batch {batch:2}, length {length:3}: "
                  + ", ".join(f"{name} {value:.1f}" for name, value in ms.items())
                  + "; ratio " + " and ".join(f"{ratio:.2f}" for ratio in ratios), flush=True)

    ids = torch.randint(1000, 30000, (1, 16))
    small, smaller = space[4], space[8]

    def ask(phi) -> object:
        return ours(ids, None, phi, features=())

    ms = medians({"stay": lambda: [ask(small), ask(small), ask(smaller), ask(smaller)],
                  "switch": lambda: [ask(small), ask(smaller), ask(small), ask(smaller)]}, 60)
    print(f"\nFour requests of 16 tokens, two by {small.name} and two by {smaller.name}: "
          f"{ms['stay']:.2f} ms with one switch, {ms['switch']:.2f} ms with three: "
          f"{1e3 * (ms['switch'] - ms['stay']) / 2:+.0f} µs a switch")


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "float32"
    if name not in ("float32", "bfloat16"):
        sys.exit(__doc__)
    main(getattr(torch, name))
