"""SantaCoder's true size on this machine: peak memory and time of loading, a forward pass, a step.

    python tests/by_hand/bench_santacoder.py FOLDER   # writes 2.2 GB of random weights there

The weights are random, as those of the checkpoint cannot be had everywhere: what is measured is
memory and time, not text. Each measurement is a process of its own. Not a test: run it by hand.
"""
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
import mlfs  # noqa: E402
from model import load_pretrained  # noqa: E402

H, D, L, V, P, I = 2048, 128, 24, 49280, 2048, 8192
CONFIG = {"model_type": "gpt_bigcode", "n_embd": H, "n_head": 16, "n_layer": L, "n_inner": I,
          "vocab_size": V, "n_positions": P, "multi_query": True, "layer_norm_epsilon": 1e-5,
          "activation_function": "gelu_pytorch_tanh", "tie_word_embeddings": True}


def write(folder: Path, conv1d: bool) -> None:
    """The gpt_bigcode layout, or the custom gpt2 layout with its transposed (in, out) matrices."""
    shapes = {"wte.weight": (V, H), "wpe.weight": (P, H), "ln_f.weight": (H,), "ln_f.bias": (H,)}
    attention = {"q_attn": (H, H), "kv_attn": (2 * D, H)} if conv1d else {"c_attn": (H + 2 * D, H)}
    for l in range(L):
        linears = {f"attn.{name}": shape for name, shape in attention.items()}
        linears |= {"attn.c_proj": (H, H), "mlp.c_fc": (I, H), "mlp.c_proj": (H, I)}
        for name, (out, in_) in linears.items():
            shapes[f"h.{l}.{name}.weight"] = (in_, out) if conv1d else (out, in_)
            shapes[f"h.{l}.{name}.bias"] = (out,)
        shapes |= {f"h.{l}.{n}.{k}": (H,) for n in ("ln_1", "ln_2") for k in ("weight", "bias")}
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"transformer.{name}": (torch.randn(shape) * 0.02).bfloat16()
               for name, shape in shapes.items()}, folder / "model.safetensors", {"format": "pt"})
    kind = {"model_type": "gpt2", "attention_head_type": "multiquery"} if conv1d else {}
    (folder / "config.json").write_text(json.dumps(CONFIG | kind))


def measure(what: str, folder: Path) -> None:
    start = time.perf_counter()
    model = load_pretrained(folder)
    if what == "read":                               # every byte, as a model that runs does
        sum(p.sum() for p in model.parameters())
    elif what == "forward":
        with torch.no_grad():
            model(torch.arange(256)[None])
    elif what == "step":
        model.gradient_checkpointing = True
        for _ in range(2):                           # of stages without epochs there is no pair
            model.add_stage(mlfs.HyperParameters.rank)
        hp = mlfs.HyperParameters(epochs=(0, 0, 1), batch_size=1, max_length=256, reorder=False,
                                  checkpointing=True)
        window = data.Examples([np.arange(256)], None, None)
        for at in mlfs.mlfs(model, window, mlfs.SUBNETS["santacoder"], hp):
            if isinstance(at, mlfs.Updated):
                print(json.dumps(at.losses))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    print(f"{what}: {time.perf_counter() - start:.1f} s, peak {peak:.2f} GiB", flush=True)


def main(folder: Path) -> None:
    for layout in ("gpt_bigcode", "gpt2"):
        place = folder / layout
        if not (place / "config.json").exists():
            subprocess.run([sys.executable, __file__, "write", layout, place], check=True)
        size = os.path.getsize(place / "model.safetensors") / 2 ** 30
        print(f"{layout}: file {size:.2f} GiB; {torch.get_num_threads()} threads; the limit for "
              f"loading is 1.15 x file + 0.5 = {1.15 * size + 0.5:.2f} GiB", flush=True)
        for what in ("nothing", "read", "forward", "step"):
            subprocess.run([sys.executable, __file__, what, layout, place], check=True)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 4) or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    elif sys.argv[1] == "write":
        write(Path(sys.argv[3]), conv1d=sys.argv[2] == "gpt2")
    else:
        measure(sys.argv[1], Path(sys.argv[3]))
