"""What training costs: against transformers + PEFT, where the time goes, a palette, how it grows.

    pip install transformers==5.24.0 peft==0.21.2
    python tests/by_hand/bench_train.py                            # random weights and sentences
    python tests/by_hand/bench_train.py --model MINILM --glue GLUE # a checkpoint, and SST-2/ there
    python tests/by_hand/bench_train.py --short --minutes 7        # without start-up and growth

Contestants take turns, step by step, each in a process of its own. A contest for each number of
threads and each dtype runs on cores of its own; where there are too few, one after the other.
Without MINILM the weights are random and of its shape. Without GLUE the tokens are random, the
lengths SST-2's. Not a test: run it by hand on a quiet machine (20 minutes; --short: 8).
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import evaluate  # noqa: E402
import mlfs  # noqa: E402
from model import (  # noqa: E402
    Bert,
    initialise,
    load_pretrained,
    pad_heads,
    save_pretrained,
)

# ------------------------------------------------------------------- what takes turns: step by step

# Of SST-2's 67,349 training sentences, in BERT's tokens: such a share has at most so many.
SST2_SHARES = (*np.linspace(0, 0.95, 20), 0.98, 0.99, 0.999, 1)
SST2_LENGTHS = (3, 4, 4, 5, 6, 6, 7, 8, 8, 9, 10, 11, 13, 14, 16, 18, 20, 23, 27, 33,
                40, 44, 56, 66)
SST2_BATCHES = 1053                                  # of 64, in an epoch
EPOCHS = 3                                           # the paper's for SST-2


# So few that each epoch has the same ten lengths of batch: once each was met, no kernel is new.
SENTENCES = 640


def sst2(minilm, glue, most=SENTENCES):
    """SST-2's training sentences; without GLUE tokens at random, in lengths like theirs."""
    if glue:
        rows = data.load_table(data.GLUE["sst2"], "train", glue)
        rows = data.Rows(rows.texts[:most], rows.labels[:most])
        return data.encode(data.load_tokenizer(minilm), rows, 128)
    shares = np.random.default_rng(0).random(most)
    lengths = np.interp(shares, SST2_SHARES, SST2_LENGTHS)
    return random_examples(lengths.round().astype(int))


def random_examples(lengths):
    rng = np.random.default_rng(0)
    ids = [rng.integers(1000, 30000, n, dtype=np.int32) for n in lengths]
    segments = [np.zeros(n, dtype=np.int8) for n in lengths]
    return data.Examples(ids, segments, rng.integers(0, 2, len(ids)))


def random_bert(layers, dtype, hidden=384):
    """MiniLM's shape (heads of 32, FFN of 4 x hidden) with so many layers, random weights."""
    config = {"model_type": "bert", "vocab_size": 30522, "hidden_size": hidden, "head_dim": 32,
              "num_attention_heads": hidden // 32, "intermediate_size": 4 * hidden,
              "num_hidden_layers": layers, "max_position_embeddings": 512, "num_labels": 2,
              "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    model = initialise(Bert(config))
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)
    return model


def setting(stage, **options):
    return mlfs.HyperParameters(epochs=tuple(99 * (s == stage) for s in range(3)), gamma=1.0,
                                reorder=False, **options)


def iterations(model, examples, stage=0, shares=3, **options):
    """Those of one stage, by `mlfs` itself; shares: so many widths and so many depths in 𝒜."""
    parts = [1 - i / 12 for i in range(shares)], [1 - i / 8 for i in range(shares)]
    space = mlfs.configuration_space(model.maxnet, *(parts if shares != 3 else ()))
    for _ in range(stage):                           # of stages without epochs there is no pair
        model.add_stage(mlfs.HyperParameters.rank)
    run = mlfs.mlfs(model, examples, space, setting(stage, **options))
    return (at for at in run if isinstance(at, mlfs.Updated))


def ours(minilm, glue, dtype, stage=0, most=SENTENCES):
    model = load_pretrained(minilm, 2, getattr(torch, dtype))
    return iterations(model, sst2(minilm, glue, most), stage)


def theirs(minilm, glue, dtype, form, attention):
    """LoRA with the PEFT library: the same adapters, head, batches, optimiser and clipping."""
    model = their_bert(minilm, form, attention)
    return lora_steps(model, batches(minilm, glue, 0), ENCODER, **FORMS[form][1])


def batches(minilm, glue, stage):
    """(x, y), the very batches that `ours` takes in this stage."""
    found = mlfs.mini_batches(sst2(minilm, glue), setting(stage), stage, 0, "cpu")
    return ((batch.x, batch.y) for _, batch in found)


def their_bert(folder, form, attention):
    from transformers import BertForSequenceClassification  # to compare with, not ours
    return BertForSequenceClassification.from_pretrained(
        folder, num_labels=2, attn_implementation=attention, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, dtype=FORMS[form][0])


ENCODER = {"target_modules": ["query", "key", "value", "intermediate.dense"],
           "modules_to_save": ["pooler", "classifier"], "task_type": "SEQ_CLS"}
# What a user of theirs may ask for: the dtype of W, and what `lora_steps` is told. All train in
# float32 but "all bfloat16". "mixed" is PEFT's own way with weights in bfloat16: A_s and B_s in
# float32, the head in bfloat16, a cast before and after each adapter.
FORMS = {
    "autocast": (torch.float32, {"autocast": True}),
    "bf16 weights": (torch.bfloat16, {"autocast": True}),
    "mixed": (torch.bfloat16, {"autocast": False, "trained": None}),
    "all bfloat16": (torch.bfloat16, {"autocast": False, "trained": torch.bfloat16}),
    "float32": (torch.float32, {"autocast": False}),
}
USUAL = "autocast, sdpa"


def forms(dtype):
    """name -> which of theirs."""
    kinds = [form for form in FORMS if (form == "float32") == (dtype == "float32")]
    return {f"{form}, {attention}": {"form": form, "attention": attention}
            for form in kinds for attention in ("sdpa", "eager")}


def lora_steps(model, batches, places, autocast, device="cpu", trained=torch.float32):
    """The loss of each step of PEFT; what it trains is in `trained`, None: as PEFT has it."""
    from peft import LoraConfig, get_peft_model  # to compare with, not ours
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, **places)).train()
    learned = [p for p in model.parameters() if p.requires_grad]
    for p in learned:
        p.data = p.data.to(trained or p.dtype)
    optimizer = torch.optim.AdamW(learned, lr=1e-3, weight_decay=0.0, fused=True)
    for x, y in batches:
        mask = torch.ones_like(x["ids"]) if x["mask"] is None else x["mask"]
        segments = {"token_type_ids": x["segments"]} if "segments" in x else {}
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            z = model(input_ids=x["ids"], attention_mask=mask, **segments).logits
            loss = torch.nn.functional.cross_entropy(z.float().flatten(0, -2), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def their_palette(minilm, glue, dtype, form, attention):
    """One step for each subnet of 𝒜 in turn, all on one batch, then the next batch."""
    model = load_pretrained(minilm, 2, torch.float32)
    runs = []
    for phi in mlfs.configuration_space(model.maxnet):
        with tempfile.TemporaryDirectory() as folder:
            # No BERT of theirs has fewer heads than hidden_size / head_dim: heads of zeros stand
            # in, and are cut off once it is loaded. So both multiply the same matrices.
            small = model.extract(phi)
            save_pretrained(pad_heads(small, model.config["num_attention_heads"]), folder)
            small = their_bert(folder, form, attention)
        for layer in small.bert.encoder.layer:
            cut_heads(layer.attention, phi.num_attention_heads * model.config["head_dim"])
        runs.append(lora_steps(small, batches(minilm, glue, 2), ENCODER, **FORMS[form][1]))
    while True:
        yield from map(next, runs)


def cut_heads(attention, size):
    """All but the leading `size` rows of query, key and value go, and the columns that read them.
    """
    for name in ("query", "key", "value"):
        linear = getattr(attention.self, name)
        linear.weight.data = linear.weight[:size].clone()
        linear.bias.data = linear.bias[:size].clone()
        linear.out_features = size
    reader = attention.output.dense
    reader.weight.data = reader.weight[:, :size].clone()
    reader.in_features = size


def grown(stage, dtype, num_subnets=4, layers=6, rows=64, tokens=16, shares=3):
    """An iteration on random tokens, one size of which is varied."""
    model = random_bert(layers, getattr(torch, dtype))
    return iterations(model, random_examples([tokens] * rows * 8), stage, shares, batch_size=rows,
                      num_subnets=num_subnets)


def large_product(dtype, size=2048):
    """GMACs a second of one large product: the machine's rate."""
    a, b = torch.randn(2, size, size).to(getattr(torch, dtype))
    times = [timed(lambda: a @ b) for _ in range(12)]
    return size ** 3 / 1e6 / np.median(times)


class Contestant:
    """One of the functions above in a process of its own, which takes a step when it is told to."""

    def __init__(self, name, cores, root=ROOT, **options):
        env = os.environ | {"OMP_NUM_THREADS": str(len(cores)), "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", Path(root, "tests/by_hand/bench_train.py"), "--child",
             name, json.dumps(cores), json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=env)
        self.ms = []

    def ask(self, word):
        """step: milliseconds; products: those of the next 10 steps, bare: milliseconds and GMACs a
        step; profile: milliseconds a step by kind; rate: GMACs a second; peak: GiB so far."""
        print(word, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{self.process.args}: {self.process.stderr.read()[-2000:]}")
        return json.loads(answer)

    def step(self):
        self.ms.append(self.ask("step"))

    def end(self):
        peak = self.ask("peak")
        self.process.communicate()
        return peak


def serve(name, cores, options):
    """The child's side of `Contestant`."""
    answers, sys.stdout = sys.stdout, sys.stderr
    steps = globals()[name](**options)
    for word in sys.stdin:
        for thread in os.listdir("/proc/self/task"):     # only now: all cores help to start
            os.sched_setaffinity(int(thread), cores)
        if word == "peak\n":
            answer = evaluate.peak_memory("cpu") / 2 ** 30
        elif word == "products\n":
            with (products := Products()):
                for _ in range(10):                                  # an epoch of SENTENCES
                    next(steps)
            answer = products.milliseconds() / 10, products.macs / 10e9
        elif word == "profile\n":
            answer = profile(steps)
        elif word == "rate\n":
            answer = large_product(options["dtype"])
        else:
            answer = timed(lambda: next(steps))
        print(json.dumps(answer), file=answers, flush=True)


def timed(run):
    """Milliseconds."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


class Products(TorchDispatchMode):
    """Notes every matrix product that runs inside of it, to multiply the same operands bare."""
    NAMES = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "mkldnn::_linear_pointwise")

    def __init__(self):
        super().__init__()
        self.calls = {}                              # shapes -> function, operands, how often

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in self.NAMES:
            key = (function, *((t.shape, t.stride()) if torch.is_tensor(t) else 0 for t in args))
            self.calls.setdefault(key, [function, [
                t.detach() if torch.is_tensor(t) else t for t in args], 0])[2] += 1
        return function(*args, **(kwargs or {}))

    @property
    def macs(self):
        """Multiplications, each with its addition."""
        total = 0
        for function, args, count in self.calls.values():
            a, b = [t for t in args if torch.is_tensor(t) and t.dim() > 1][-2:]
            linear = "linear" in function._schema.name               # its b is (out, in)
            total += count * a.numel() * b.size(0 if linear else -1)
        return total

    def milliseconds(self):
        with torch.no_grad():
            return sum(count * sorted(timed(lambda: function(*args)) for _ in range(5))[2]
                       for function, args, count in self.calls.values())


# A kind of work -> how the names of its kernels begin, or those that `mlfs` gives.
KINDS = {
    "products": ("mm", "addmm", "linear"),
    "attention": ("bmm", "baddbmm", "_softmax", "_scaled_dot_product"),
    "activation": ("gelu",),
    "norms": ("native_layer_norm",),
    "optimiser, clipping": ("_fused_adamw", "_foreach", "linalg_vector_norm"),
    "copies, casts": ("copy_", "cat", "clone", "_to_copy"),
    "sums, masks": ("add", "mul", "sum", "fill_", "embedding", "index"),
}


def profile(steps, count=10):
    """Milliseconds a step by kind of work, by torch's profiler; those of no kernel are the rest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        total = timed(lambda: [next(steps) for _ in range(count)])
    ms = dict.fromkeys(KINDS, 0.0)
    kernels = 0
    for event in found.key_averages():
        name = event.key.removeprefix("aten::")
        for kind, starts in KINDS.items():
            if event.key.startswith("aten::") and name.startswith(starts):
                ms[kind] += event.self_cpu_time_total / 1e3 / count
                kernels += event.count / count
                break
    rest = "Python and the rest"
    return ms | {rest: total / count - sum(ms.values()), "kernels": kernels}


# ------------------------------------------------------------------------------------ the contests

def take_turns(contestants, warm, steps, seconds=3600):
    """At most so many seconds; `ms` then holds the steps after the warm ones."""
    end = time.monotonic() + seconds
    for done in range(warm + steps):
        for contestant in contestants.values():
            contestant.step()
        if time.monotonic() > end and done > 8:
            warm = min(warm, (done + 1) // 2)
            break
    for contestant in contestants.values():
        contestant.ms = contestant.ms[warm:]


def against_peft(where, cores, seconds, before):
    """(Table, the name of the fastest of theirs)."""
    runs = {"ours": Contestant("ours", cores, **where)}
    if before:
        runs["ours, before"] = Contestant("ours", cores, before, **where)
    for name, form in forms(where["dtype"]).items():
        runs[name] = Contestant("theirs", cores, **where, **form)
    take_turns(runs, 20, 100, seconds)
    mine = runs["ours"].ms
    fastest = min(forms(where["dtype"]), key=lambda name: sum(runs[name].ms))
    lines = [f"A step of stage 0, batch 64 of SST-2 by length: the mean and median of {len(mine)}",
             f"{'':22}    mean  median  peak GiB   ours is faster by (means)  (medians)"]
    for name, run in runs.items():
        note = {USUAL: "  the usual one", fastest: "  the fastest"}.get(name, "")
        lines.append(f"{name:22} {np.mean(run.ms):7.1f} {np.median(run.ms):7.1f} {run.end():9.2f}"
                     f" {sum(run.ms) / sum(mine):26.2f} {np.median(run.ms) / np.median(mine):10.2f}"
                     f"{note}")
    return lines, fastest


def time_goes(where, cores, seconds):
    """Table: shares of a step of stage 0, and what its products would take at best."""
    run = Contestant("ours", cores, **where)
    take_turns({"": run}, 20, 0, seconds / 2)
    run.ms.clear()
    # The first pass meets lengths anew, and the profiler.
    parts = [run.ask("profile") for _ in range(3)][1:]
    bare, rates = [], []
    for _ in range(3):
        take_turns({"": run}, 0, 10)
        bare.append(run.ask("products"))
        rates.append(run.ask("rate"))
    run.end()
    ms = np.mean(run.ms)
    alone, gmacs = np.mean(bare, axis=0)
    best = 1e3 * gmacs / np.median(rates)
    part = {kind: np.mean([p[kind] for p in parts]) for kind in parts[0]}
    kernels = part.pop("kernels")
    lines = [f"Where a step of stage 0 goes ({ms:.1f} ms; {sum(part.values()):.1f} in the profiler,"
             f" which counts {kernels:.0f} kernels)"]
    for kind, of_it in part.items():
        lines.append(f"{kind:22} {of_it:7.1f} ms {of_it / sum(part.values()):7.1%}")
    return [*lines,
            f"Its {gmacs:.1f} GMACs take {best:.1f} ms at the rate of one large product "
            f"({np.median(rates):.0f} GMACs/s): {best / ms:.2f} of a step.",
            f"The same products alone, on operands that lie ready: {alone:.1f} ms, "
            f"{alone / ms:.2f} of a step."]


def palette(where, cores, fastest, seconds):
    """Table: an iteration of stage 2, and a palette of nine, ours and with the PEFT library."""
    end = time.monotonic() + seconds
    mine = {stage: Contestant("ours", cores, **where, stage=stage) for stage in range(3)}
    usual = USUAL if where["dtype"] == "bfloat16" else "float32, sdpa"
    every = forms(where["dtype"])
    others = {name: Contestant("their_palette", cores, **where, **every[name])
              for name in dict.fromkeys((usual, fastest))}
    space = mlfs.configuration_space(random_bert(6, torch.float32).maxnet)
    warm, rounds = 20, 60
    for done in range(warm + rounds):
        for run in mine.values():
            run.step()
        for run in others.values():
            for _ in space:
                run.step()
        if time.monotonic() > end and done > 8:
            warm = min(warm, (done + 1) // 2)
            break
    ms = {stage: np.mean(run.ms[warm:]) for stage, run in mine.items()}
    drawn = [mlfs.sample_sub_transformers(space, 2, 4, (0, 2, step + 1))
             for step in range(len(mine[2].ms))]
    hours = EPOCHS * SST2_BATCHES / 3.6e6
    one_palette = hours * sum(ms.values())
    lines = [f"A palette of nine, {EPOCHS} epochs a stage or a fine-tuning, {SST2_BATCHES} batches "
             f"of 64 each (means of {len(mine[2].ms) - warm} steps)",
             f"{'':22} 4 subnets, ms   9 subnets, ms   palette, hours   ours is faster by (4) (9)",
             f"{'MLFS':22} {ms[2]:13.0f} {sum(ms.values()):15.0f} {one_palette:16.2f}"
             f"   stages 0, 1, 2: {ms[0]:.0f} + {ms[1]:.0f} + {ms[2]:.0f} ms"]
    for name, run in others.items():
        nine = np.reshape(run.ms, (-1, len(space)))
        four = [sum(step[space.index(phi)] for phi in phis)
                for step, phis in zip(nine[warm:], drawn[warm:])]
        all_nine = nine[warm:].sum(1).mean()
        lines.append(f"{name:22} {np.mean(four):13.0f} {all_nine:15.0f} {hours * all_nine:16.2f}"
                     f" {np.mean(four) / ms[2]:24.2f} {all_nine / sum(ms.values()):4.2f}")
    for run in (*mine.values(), *others.values()):
        run.end()
    return lines


def contest(where, cores, minutes, before):
    """All of it with one dtype, on these cores."""
    title = f"{where['dtype']}, {len(cores)} thread{'s' * (len(cores) > 1)}"

    def show(lines):
        print("\n".join(["", f"[{title}] {lines[0]}", *lines[1:]]), flush=True)

    seconds = 60 * minutes
    lines, fastest = against_peft(where, cores, 0.5 * seconds, before)
    show(lines)
    show(time_goes(where, cores, 0.1 * seconds))
    show(palette(where, cores, fastest, 0.35 * seconds))


def run_contests(where, threads, dtypes, minutes, before):
    wanted = [(dtype, n) for dtype in dtypes for n in threads]
    free = physical_cores()
    needed = sum(n for _, n in wanted)
    together = needed <= len(free)
    # Apart from one another, in case two CPUs of one core are not told from two cores.
    free = free[::max(1, len(free) // needed)]
    with ThreadPoolExecutor(len(wanted) if together else 1) as pool:
        started = []
        for dtype, n in wanted:
            cores = free[:n]
            started.append(pool.submit(contest, where | {"dtype": dtype}, cores, minutes,
                                       before))
            if together:
                free = free[n:]
        for future in started:
            future.result()


def physical_cores():
    """One CPU's number for each core that this process may use: two of one core are slower."""
    found = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        found.setdefault(path.read_text() if path.exists() else cpu, cpu)
    return list(found.values())


def growth(dtype):
    """Time against multiplications, and memory, as one size at a time is varied."""
    sizes = {
        "K": [dict(stage=2, num_subnets=k) for k in (1, 2, 4, 8)],
        "layers": [dict(stage=0, layers=n, shares=1) for n in (1, 3, 6, 12, 24)],
        "tokens": [dict(stage=0, tokens=t, rows=8) for t in (32, 64, 128, 256, 512)],
        "stage": [dict(stage=s) for s in (0, 1, 2)],
        "subnets in 𝒜": [dict(stage=2, shares=s, layers=8) for s in (1, 2, 4, 6)],
    }
    for what, settings in sizes.items():
        print(f"\n[{dtype}] Varying {what}:")
        runs = {str(options): Contestant("grown", physical_cores()[:2], dtype=dtype, **options)
                for options in settings}
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


def start_up(minilm, glue, dtype):
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a BERT checkpoint")
    parser.add_argument("--glue", help="the folder that holds SST-2/")
    parser.add_argument("--before", help="an older checkout with this file, to compare ours with")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--short", action="store_true", help="without start-up and growth")
    parser.add_argument("--minutes", type=float, default=20, help="roughly, for a contest")
    args = parser.parse_args()
    import peft
    import transformers
    print(f"{evaluate.device_name('cpu')}, {len(physical_cores())} cores; torch "
          f"{torch.__version__}, transformers {transformers.__version__}, PEFT {peft.__version__}; "
          f"weights {'of ' + Path(args.model).name if args.model else 'random'}, sentences "
          f"{'SST-2' if args.glue else 'random'}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        minilm = args.model
        if not minilm:
            minilm = str(Path(folder) / "random")
            save_pretrained(random_bert(6, torch.float32), minilm)
        where = {"minilm": minilm, "glue": args.glue}
        run_contests(where, args.threads, args.dtypes, args.minutes, args.before)
        if not args.short:
            for dtype in args.dtypes:
                if args.model and args.glue:
                    start_up(**where, dtype=dtype)
                growth(dtype)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        serve(sys.argv[2], *map(json.loads, sys.argv[3:]))
    else:
        main()
