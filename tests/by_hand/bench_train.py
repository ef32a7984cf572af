"""What training costs: against transformers + PEFT, the share of matrix products, how it all grows.

    pip install transformers==5.23.0 peft==0.21.2
    python tests/by_hand/bench_train.py MINILM GLUE [bfloat16|float32]

MINILM: folder of a BERT checkpoint; GLUE: the folder that holds SST-2/. Contestants take turns,
step by step, each in a process of its own. Not a test: run it by hand on a quiet machine (7 to 15
minutes a dtype).
"""
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import evaluate  # noqa: E402
import mlfs  # noqa: E402
from model import Bert, SuperTransformer, initialise, load_pretrained  # noqa: E402

# ------------------------------------------------------------------- what takes turns: step by step

def sst2(minilm: str, glue: str) -> data.Examples:
    """12,800 training sentences."""
    rows = data.load_table(data.GLUE["sst2"], "train", glue)
    rows = data.Rows(rows.texts[:12800], rows.labels[:12800])
    return data.encode(data.load_tokenizer(minilm), rows, 128)


def random_examples(rows: int, tokens: int) -> data.Examples:
    rng = np.random.default_rng(0)
    ids = [np.array(r, dtype=np.int32) for r in rng.integers(1000, 30000, (rows, tokens))]
    return data.Examples(ids, [np.zeros(tokens, dtype=np.int8)] * rows, rng.integers(0, 2, rows))


def random_bert(layers: int, dtype: torch.dtype, hidden: int = 384) -> Bert:
    """MiniLM's shape (heads of 32, FFN of 4 x hidden) with so many layers, random weights."""
    config = {"model_type": "bert", "vocab_size": 30522, "hidden_size": hidden, "head_dim": 32,
              "num_attention_heads": hidden // 32, "intermediate_size": 4 * hidden,
              "num_hidden_layers": layers, "max_position_embeddings": 512, "num_labels": 2,
              "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    model = initialise(Bert(config))
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)
    return model


def iterations(model: SuperTransformer, examples: data.Examples, stage: int = 0, shares: int = 3,
               **options) -> Iterator[mlfs.Updated]:
    """Those of one stage, by `mlfs` itself; shares: so many widths and so many depths in 𝒜."""
    hp = mlfs.HyperParameters(epochs=tuple(99 * (s == stage) for s in range(3)), gamma=1.0,
                              reorder=False, **options)
    parts = [1 - i / 12 for i in range(shares)], [1 - i / 8 for i in range(shares)]
    space = mlfs.configuration_space(model.maxnet, *(parts if shares != 3 else ()))
    return (at for at in mlfs.mlfs(model, examples, space, hp) if isinstance(at, mlfs.Updated))


def ours(minilm: str, glue: str, dtype: str, stage: int = 0) -> Iterator:
    model = load_pretrained(minilm, 2, getattr(torch, dtype))
    return iterations(model, sst2(minilm, glue), stage)


def theirs(minilm: str, glue: str, dtype: str, attention: str) -> Iterator:
    """LoRA with the PEFT library: the same adapters, head, batches, optimiser and clipping."""
    from peft import LoraConfig, get_peft_model  # to compare with, not ours
    from transformers import BertForSequenceClassification
    model = BertForSequenceClassification.from_pretrained(
        minilm, num_labels=2, attn_implementation=attention, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(
        r=8, lora_alpha=8, target_modules=["query", "key", "value", "intermediate.dense"],
        modules_to_save=["pooler", "classifier"], task_type="SEQ_CLS")).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)
    for x, y in data.batches(sst2(minilm, glue), 64, (0, 0, 0)):
        mask = torch.ones_like(x["ids"]) if x["mask"] is None else x["mask"]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            z = model(input_ids=x["ids"], attention_mask=mask, token_type_ids=x["segments"]).logits
            loss = torch.nn.functional.cross_entropy(z.float(), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def grown(stage: int, dtype: str, num_subnets: int = 4, layers: int = 6, rows: int = 64,
          tokens: int = 16, shares: int = 3) -> Iterator:
    """An iteration on random tokens, one size of which is varied."""
    return iterations(random_bert(layers, getattr(torch, dtype)), random_examples(rows * 8, tokens),
                      stage, shares, batch_size=rows, num_subnets=num_subnets)


class Contestant:
    """One of the functions above in a process of its own, which takes a step when it is told to."""

    def __init__(self, name: str, **options):
        # a user of theirs has oneDNN's own cache of 1,024 entries; see the top of model.py
        env = os.environ | ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"} if name == "theirs" else {})
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--child", name, json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=env)
        self.ms: list[float] = []

    def ask(self, word: str):
        """step: milliseconds; products: those of the next 8 steps, bare: milliseconds and GMACs a
        step; peak: GiB so far."""
        print(word, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def step(self) -> None:
        self.ms.append(self.ask("step"))

    def end(self) -> float:
        peak = self.ask("peak")
        self.process.communicate()
        return peak


def serve(name: str, options: dict) -> None:
    """The child's side of `Contestant`."""
    answers, sys.stdout = sys.stdout, sys.stderr
    steps = globals()[name](**options)
    for word in sys.stdin:
        if word == "peak\n":
            answer = evaluate.peak_memory("cpu") / 2 ** 30
        elif word == "products\n":
            with (products := Products()):
                for _ in range(8):                                   # subnets are drawn
                    next(steps)
            answer = products.milliseconds() / 8, products.macs / 8e9
        else:
            answer = timed(lambda: next(steps))
        print(json.dumps(answer), file=answers, flush=True)


def timed(run: Callable) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


class Products(TorchDispatchMode):
    """Notes every matrix product that runs inside of it, to multiply the same operands bare."""
    NAMES = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "mkldnn::_linear_pointwise")

    def __init__(self):
        super().__init__()
        self.calls: dict[tuple, list] = {}           # shapes -> function, operands, how often

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in self.NAMES:
            key = (function, *((t.shape, t.stride()) if torch.is_tensor(t) else 0 for t in args))
            self.calls.setdefault(key, [function, [
                t.detach() if torch.is_tensor(t) else t for t in args], 0])[2] += 1
        return function(*args, **(kwargs or {}))

    @property
    def macs(self) -> int:
        """Multiplications, each with its addition."""
        total = 0
        for function, args, count in self.calls.values():
            a, b = [t for t in args if torch.is_tensor(t) and t.dim() > 1][-2:]
            linear = "linear" in function._schema.name               # its b is (out, in)
            total += count * a.numel() * b.size(0 if linear else -1)
        return total

    def milliseconds(self) -> float:
        with torch.no_grad():
            return sum(count * sorted(timed(lambda: function(*args)) for _ in range(5))[2]
                       for function, args, count in self.calls.values())


# ------------------------------------------------------------------------------------- the table

def take_turns(contestants: dict[str, Contestant], warm: int, steps: int) -> None:
    for _ in range(warm + steps):
        for contestant in contestants.values():
            contestant.step()
    for contestant in contestants.values():
        contestant.ms = contestant.ms[warm:]


def against_peft(where: dict, warm: int = 100, steps: int = 100) -> None:
    print("\nStage 0, batch 64 of SST-2 by length, against transformers + PEFT (two kernels):")
    names = {"ours": {}, "sdpa": {"attention": "sdpa"}, "eager": {"attention": "eager"}}
    runs = {who: Contestant("theirs" if more else "ours", **where, **more)
            for who, more in names.items()}
    take_turns(runs, warm, steps)
    batches = data.batches(sst2(where["minilm"], where["glue"]), 64, (0, 0, 0))
    tokens = sum(int(x["ids"].numel() if x["mask"] is None else x["mask"].sum())
                 for x, _ in itertools.islice(batches, warm, warm + steps))
    speed = {who: 1e3 * tokens / sum(run.ms) for who, run in runs.items()}
    peak = {who: run.end() for who, run in runs.items()}
    for who, run in runs.items():
        print(f"  {who:5} {speed[who]:5.0f} tokens/s, median step {np.median(run.ms):5.1f} ms, "
              f"peak {peak[who]:.2f} GiB; ours/this: speed {speed['ours'] / speed[who]:.2f} (of "
              f"medians {np.median(run.ms) / np.median(runs['ours'].ms):.2f}), memory "
              f"{peak['ours'] / peak[who]:.2f}", flush=True)


def product_shares(where: dict, warm: int = 40, rounds: int = 4) -> None:
    """Two processes take the same steps, one timed, one noting its products to repeat them bare."""
    print("\nMatrix products of an iteration, batch 64 of SST-2 by length:")
    cost = {}
    for stage in (0, 2):
        runs = {who: Contestant("ours", **where, stage=stage) for who in ("timed", "noting")}
        take_turns(runs, warm, 0)
        bare = []
        for _ in range(rounds):
            take_turns({"timed": runs["timed"]}, 0, 8)
            bare.append(runs["noting"].ask("products"))
        ms, (alone, gmacs) = np.mean(runs["timed"].ms), np.mean(bare, axis=0)
        cost[stage] = ms / gmacs
        print(f"  stage {stage}: {ms:.1f} ms; its products alone {alone:.1f} ms, "
              f"{alone / ms:.2f} of it; {gmacs:.1f} GMACs", flush=True)
        for run in runs.values():
            run.end()
    print(f"  a GMAC of stage 2 (K = 4) takes {cost[2] / cost[0]:.2f} of one of stage 0")


def growth(dtype: str) -> None:
    """Time against multiplications, and memory, as one size at a time is varied."""
    sizes = {
        "K": [dict(stage=2, num_subnets=k) for k in (1, 2, 4, 8)],
        "layers": [dict(stage=0, layers=n, shares=1) for n in (1, 3, 6, 12, 24)],
        "tokens": [dict(stage=0, tokens=t, rows=8) for t in (32, 64, 128, 256, 512)],
        "stage": [dict(stage=s) for s in (0, 1, 2)],
        "subnets in 𝒜": [dict(stage=2, shares=s, layers=8) for s in (1, 2, 4, 6)],
    }
    for what, settings in sizes.items():
        print(f"\nVarying {what}:")
        runs = {str(options): Contestant("grown", dtype=dtype, **options) for options in settings}
        take_turns(runs, 4, 12)
        points = []
        for options, run in runs.items():
            peak, (_, gmacs) = run.ask("peak"), run.ask("products")
            points.append((gmacs, np.median(run.ms)))
            print(f"  {options}: {gmacs:6.1f} GMACs, {points[-1][1]:6.1f} ms, {peak:.2f} GiB",
                  flush=True)
            run.end()
        slope, start = np.polyfit(*zip(*points, strict=True), 1)
        if what in ("K", "layers", "tokens"):
            print(f"  fitted: {start:.1f} ms + {slope:.2f} ms a GMAC; correlation "
                  f"{np.corrcoef(*zip(*points, strict=True))[0, 1]:.4f}")


def start_up(minilm: str, glue: str, dtype: str) -> None:
    """From the command to the end of the first optimiser step, all of SST-2 tokenised."""
    with tempfile.TemporaryDirectory() as folder:
        start, log = time.perf_counter(), Path(folder) / "run" / "log.jsonl"
        command = [sys.executable, ROOT / "mlfs.py", "--task", "sst2", "--model", minilm,
                   "--data-dir", glue, "--dtype", dtype, "--out", log.parent, "--epochs", "1,0,0",
                   "--train-examples", "64"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (log.exists() and '"step": 1,' in log.read_text()):
            time.sleep(0.02)
        print(f"\nStart-up to the first optimiser step: {time.perf_counter() - start:.1f} s")
        process.kill()
        process.wait()


def main(minilm: str, glue: str, dtype: str = "bfloat16") -> None:
    print(f"{evaluate.device_name('cpu')}, {torch.get_num_threads()} threads, {dtype}, torch "
          f"{torch.__version__}")
    where = {"minilm": minilm, "glue": glue, "dtype": dtype}
    start_up(**where)
    against_peft(where)
    product_shares(where)
    growth(dtype)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        serve(sys.argv[2], json.loads(sys.argv[3]))
    elif len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    else:
        main(*sys.argv[1:])
