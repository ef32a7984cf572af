"""The runs behind .github/results, and its page's tables and pictures, made from their raw files.

    python tests/by_hand/evidence.py split           # weights/held-out: a part of SST-2's TRAIN
    python tests/by_hand/evidence.py custom          # weights/custom: 2/3 of SmolLM2's width
    python tests/by_hand/evidence.py full-teacher    # weights/full-teacher: stage 0 in full
    python tests/by_hand/evidence.py run [NAME ...]  # all, or those whose name holds a NAME
    python tests/by_hand/evidence.py dev NAME ...    # a held-out run's scores on SST-2's dev
    python tests/by_hand/evidence.py gradients       # how strongly each loss pulls
    python tests/by_hand/evidence.py tables          # the page's tables, .github/*.png (matplotlib)

Needs weights/minilm-l6, weights/smollm2-135m, GLUE in weights/glue, and what the first three
commands make. A run that stands in .github/results is not repeated, one that was interrupted goes
on; two may run at once if their NAMEs differ.
"""
import dataclasses
import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import evaluate  # noqa: E402
import mlfs  # noqa: E402
from model import SubnetConfig, load_pretrained, save_pretrained  # noqa: E402

RESULTS = ROOT / ".github" / "results"


# ---------------------------------------------------------------------------------------- the runs

def split(glue: Path, target: Path, sentences: int = 2000) -> None:
    """A copy of SST-2 whose dev.tsv is a part of train.tsv: whole sentences, as dev's are.

    TRAIN's rows are phrases of 6,224 sentences (of 8 words or more); of those, so many are drawn,
    and every phrase that one of them holds is left out of the new train.tsv.
    """
    head, *rows = (glue / "SST-2" / "train.tsv").read_text(encoding="utf-8").splitlines()
    phrases = [row.split("\t")[0].strip() for row in rows]
    longer = sorted({p for p in phrases if len(p.split()) >= 8})
    everything = "\n".join(longer)
    whole = [p for p in longer if everything.count(p) == 1]              # in no other phrase
    held_out = set(random.Random(0).sample(whole, sentences))
    text = "\n".join(sorted(held_out))
    parts = {"train": [row for row, p in zip(rows, phrases) if p not in text],
             "dev": [row for row, p in zip(rows, phrases) if p in held_out]}
    (target / "SST-2").mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        (target / "SST-2" / f"{name}.tsv").write_text("\n".join([head, *part]) + "\n", "utf-8")
        print(f"{target}/SST-2/{name}.tsv: {len(part):,} rows")


def custom(source: Path, target: Path) -> None:
    """Fig. 5's custom model: cut from the reordered base, stored as a checkpoint of its own."""
    model, hp = load_pretrained(source), mlfs.HyperParameters(batch_size=4, max_length=256)
    tokenizer = data.load_tokenizer(source, model.config["vocab_size"])
    files = data.load_code(data.find_inputs("python", source, None)[2])["train"]
    model.reorder(mlfs.importance(model, data.encode(tokenizer, files, hp.max_length), hp))
    space = mlfs.configuration_space(model.maxnet, [2 / 3], [1], head_group=model.head_group)
    save_pretrained(model.extract(space[-1]), target)
    shutil.copy(source / "tokenizer.json", target)


def full_teacher(target: Path) -> int:
    """A teacher of which stage 0 trained all parameters, on a third of TRAIN, as a checkpoint."""
    os.chdir(ROOT)
    options, run = GROUPS["third"][0].replace("1,1,1", "1,0,0"), "runs/evidence/full-teacher"
    return (mlfs.main([*options.split(), *GROUPS["third"][2]["supernet"].split(), "--widths", "1",
                       "--depths", "1", "--out", run])
            or evaluate.main([run, "--export", "w1-d6", str(target)]))


SST2 = "--task sst2 --model weights/minilm-l6 --data-dir weights/"
RECIPE = SST2 + "held-out --train-examples 22450 --recipe edge --epochs 1,0,2 --learning-rate 3e-3"
SUPERNET = "--recipe paper --adapters full --gamma 0 --learning-rate 1e-4"
GLUE = "--model weights/minilm-l6 --data-dir weights/glue"
# group: (options of all its runs, seeds, {variant: its own options})
GROUPS = {
    "sst2": (SST2 + "glue", 3, {
        "mlfs": "", "fixed-teacher-3e-3": "--teacher fixed --learning-rate 3e-3",
        # As many forward-backward passes: 3 + 6 K epochs.
        "rate-1e-3": "--recipe edge --learning-rate 1e-3 --dtype float32",
        "rate-2e-3": "--recipe edge --learning-rate 2e-3",
        "rate-3e-3": "--recipe edge --learning-rate 3e-3",
        "supernet": "--adapters full --gamma 0 --learning-rate 1e-4 --epochs 3,0,6"}),
    "mrpc": (f"--task mrpc {GLUE}", 3, {
        "mlfs": "", "edge": "--recipe edge --epochs 4,0,8 --learning-rate 3e-3",
        "rate-1e-3": "--recipe edge --epochs 4,0,8 --learning-rate 1e-3 --dtype float32"}),
    "rte": (f"--task rte {GLUE}", 3, {"mlfs": ""}),
    "cola": (f"--task cola {GLUE}", 3, {
        "mlfs": "", "edge": "--recipe edge --epochs 4,0,8 --learning-rate 2e-3",
        "rate-1e-3": "--recipe edge --epochs 4,0,8 --learning-rate 1e-3 --dtype float32"}),
    "recipe": (RECIPE, 3, {
        "edge": "", "supernet-1-0-2": SUPERNET, "moving-teacher": "--teacher maxnet",
        "rate-1e-3": "--learning-rate 1e-3", "rate-2e-3": "--learning-rate 2e-3",
        "stage-2-rank-32": "", "gamma-1": "--gamma 1",
        "teacher-3-epochs": "--gamma 1 --epochs 3,0,2", "norms": "--gamma 1",
        "gamma-1-rank-32": "--gamma 1 --rank 32"}),
    "recipe-gpu": (RECIPE, 3, {                      # by graphs.py
        "edge": "", "supernet-1-0-2": SUPERNET,
        "supernet-fixed-teacher": SUPERNET + " --kl forward",
        "k-3": "--num-subnets 3", "k-8-1-0-1": "--num-subnets 8 --epochs 1,0,1",
        "alpha-0.5": "--alpha 0.5", "alpha-1": "--alpha 1",
        "rates-of-a-and-b": "--learning-rate 1.5e-3", "unclipped": "--clip 0"}),
    "third": (SST2 + "held-out --train-examples 22450 --epochs 1,1,1", 2, {
        "mlfs": "",
        "alone": "--learning-rate 1e-4", "alone-3e-4": "--learning-rate 3e-4", "alone-low-rank": "",
        "supernet": "--adapters full --gamma 0 --learning-rate 1e-4",
        "supernet-3e-4": "--adapters full --gamma 0 --learning-rate 3e-4",
        "gamma-0": "--gamma 0", "gamma-2": "--gamma 2",
        "rank-2": "--rank 2", "rank-4": "--rank 4", "rank-16": "--rank 16", "rank-32": "--rank 32",
        "no-reorder": "--no-reorder", "forward-kl": "--kl forward",
        "no-fd": "--beta 0", "fd-10": "--beta 1", "fd-sum": "--fd-sum",
        "no-kd": "--alpha 0", "no-kl": "",
        "learn-u": "--learn-u", "learn-u-naively": "--learn-u",
        "stage-2-alone": "--epochs 1,0,2", "k-2": "--num-subnets 2", "k-8": "--num-subnets 8",
        "rate-3e-3": "--learning-rate 3e-3", "tuned": "--rank 16 --learning-rate 3e-3",
        "wider-start": "", "everywhere": "--rank 16 --learning-rate 2e-3",
        "unclipped": "--clip 0", "frozen-head": "",
        "fixed-teacher": "--teacher fixed",
        "fixed-teacher-3e-3": "--teacher fixed --learning-rate 3e-3",
        "longer-warmup-3e-3": "--learning-rate 3e-3 --warmup 0.3",
        "full-teacher": "--model weights/full-teacher --epochs 0,1,1",
        "full-teacher-3e-3": "--model weights/full-teacher --epochs 0,1,1 --learning-rate 3e-3"}),
    "long": (SST2 + "held-out --train-examples 22450 --epochs 3,3,3", 1, {
        "mlfs": "", "rank-32": "--rank 32",
        "supernet": "--adapters full --gamma 0 --learning-rate 1e-4"}),
    "teacher": (SST2 + "held-out --train-examples 22450 --epochs 3,0,0 --widths 1 --depths 1", 1, {
        "mlfs": "", "rate-2e-3": "--learning-rate 2e-3", "rate-4e-3": "--learning-rate 4e-3",
        "unclipped": "--clip 0", "rank-32": "--rank 32",
        "rank-32-rate-5e-4": "--rank 32 --learning-rate 5e-4",
        "rank-32-rate-3e-3": "--rank 32 --learning-rate 3e-3",
        "full-rate-1e-4": "--adapters full --learning-rate 1e-4"}),
    "sst2-teacher": (SST2 + "glue --epochs 3,0,0 --widths 1 --depths 1", 1, {
        "rank-32": "--rank 32",
        "full-rate-1e-4": "--adapters full --learning-rate 1e-4"}),
    "hidden": (SST2 + "held-out --train-examples 22450 --epochs 1,1,1 --widths 1 --depths 1 "
               "--hidden 1,0.75,0.5", 2, {"mlfs": "", "rank-32": "--rank 32"}),
    "python": ("--task python --model weights/smollm2-135m --widths 1,2/3 --depths 1,2/3 "
               "--max-length 256 --batch-size 4 --train-examples 240 --dev-examples 24 "
               "--validate-every 20", 2, {"mlfs": "", "alpha-0": "--alpha 0"}),
    "custom": ("--task python --model weights/custom --adapters full --widths 1 --depths 1 "
               "--no-reorder --epochs 1,0,0 --max-length 256 --batch-size 4 --train-examples 160 "
               "--dev-examples 24 --validate-every 10 --learning-rate 3e-4", 2,
               {"sliced": "", "random": "--init random"}),
}
AGAINST = {"mlfs": "MLFS", "fixed-teacher-3e-3": "MLFS, teacher fixed, rate 3e-3",
           "rank-32": "MLFS, r = 32", "supernet": "full-parameter supernet",
           "alone": "each alone, in full", "alone-low-rank": "each alone, low-rank",
           "edge": "MLFS, `--recipe edge`, rate 3e-3",
           "supernet-1-0-2": "full-parameter supernet, epochs 1,0,2"}
VARIANTS = {
    "edge": "`--recipe edge`, rate 3e-3",
    "supernet-1-0-2": "full-parameter supernet, the same epochs",
    "k-3": "K = 3", "moving-teacher": "`--teacher maxnet`",
    "k-8-1-0-1": "K = 8, epochs 1,0,1", "alpha-0.5": "α = 0.5", "alpha-1": "α = 1",
    "rates-of-a-and-b": "rate 1.5e-3, of B_s four times as much",
    "stage-2-rank-32": "r = 32 in stage 2, 16 in stage 0",
    "supernet-fixed-teacher": "full-parameter supernet, the same epochs, with a fixed teacher and "
                              "KL[teacher, student], too",
    "gamma-1": "γ = 1",
    "teacher-3-epochs": "γ = 1, stage 0 of three epochs at a rate of 1e-3",
    "norms": "γ = 1, layer norms and biases trained as well, at a tenth of the rate",
    "gamma-1-rank-32": "γ = 1, r = 32", "rate-1e-3": "learning rate 1e-3",
    "mlfs": "the defaults (App. A: γ = 1, r = 8, learning rate 1e-3)",
    "gamma-0": "γ = 0", "gamma-2": "γ = 2",
    "rank-2": "r = 2", "rank-4": "r = 4", "rank-16": "r = 16", "rank-32": "r = 32",
    "rate-2e-3": "learning rate 2e-3", "rate-3e-3": "learning rate 3e-3",
    "tuned": "r = 16, learning rate 3e-3",
    "everywhere": "r = 16, rate 2e-3, adapters on both output projections, too",
    "wider-start": "A starts three times as large",
    "no-reorder": "heads and neurons in the checkpoint's order",
    "forward-kl": "KL[teacher, student]",
    "no-fd": "no ℓ_FD (β = 0)", "fd-10": "ten times ℓ_FD (β = 1)",
    "fd-sum": "ℓ_FD summed over d_low, as printed", "no-kd": "no distillation at all (α = 0)",
    "no-kl": "no ℓ_KD: 0.1 ℓ_task and 0.9 ℓ_FD are left",
    "learn-u": "U learned, rows kept orthonormal", "learn-u-naively": "U learned freely",
    "stage-2-alone": "no stage 1, stage 2 twice as long", "k-2": "K = 2", "k-8": "K = 8",
    "unclipped": "no clipping", "frozen-head": "the head trained in stage 0 alone",
    "fixed-teacher": "`--teacher fixed`",
    "fixed-teacher-3e-3": "`--teacher fixed`, learning rate 3e-3",
    "longer-warmup-3e-3": "learning rate 3e-3, reached after 30% of a stage's steps, not 6%",
    "full-teacher": "stage 0 (elsewhere) trains all parameters, at a rate of 1e-4",
    "full-teacher-3e-3": "so, and stages 1 and 2 at 3e-3",
}
CURVES = [f"third/{variant}-seed0" for variant in ("gamma-0", "mlfs", "gamma-2")]           # Fig. 2
LOGGED = (*CURVES, "third/k-", "third/rate-", "long/", "rte/", "python/", "custom/",   # log.jsonl
          "sst2/rate-3e-3-seed0", "sst2/rate-1e-3")


def commands() -> dict[str, list[str]]:
    """Every run's name and command line."""
    return {f"{group}/{variant}-seed{seed}":
            [*options.split(), *own.split(), "--seed", str(seed),
             "--out", f"runs/evidence/{group}/{variant}-seed{seed}"]
            for group, (options, seeds, variants) in GROUPS.items()
            for variant, own in variants.items() for seed in range(seeds)}


def alone(argv: list[str], full: bool) -> None:
    """What one would do without MLFS: cut each subnet from the reordered teacher, fine-tune it by
    itself, all of it (full) or adapters and head, with the task's loss and KD from the teacher.

    Together they get as many forward-backward passes as stages 1 and 2 of MLFS; the teacher's
    forward passes come on top. The teacher is that of MLFS, --learning-rate the students'.
    """
    run, _ = mlfs.prepare(*mlfs.parse_arguments(argv))
    hp, device = run.hp, run.settings["device"]
    per_epoch = math.ceil(len(run.splits["train"].ids) / hp.batch_size)
    passes = sum(hp.epochs[stage] * per_epoch
                 * len(mlfs.sample_sub_transformers(run.space, stage, hp.num_subnets, (0,)))
                 for stage in (1, 2))
    steps = passes // (len(run.space) - 1)
    rate = mlfs.HyperParameters(**mlfs.TASK_SETTINGS.get(run.settings["task"], {})).learning_rate
    stage_0 = dataclasses.replace(hp, epochs=(hp.epochs[0], 0, 0), learning_rate=rate)
    start = time.monotonic()
    for _ in mlfs.mlfs(run.model, run.splits["train"], run.space, stage_0):
        pass
    seconds, rows, teacher = time.monotonic() - start, [], run.model.extract(run.space[0])
    head = sum(p.numel() for name in teacher.trained_whole
               for p in getattr(teacher, name).parameters())
    trained = run.model.num_trainable(run.space[0]) + head
    if full:
        teacher, run.settings["dtype"] = teacher.float(), "float32"
    own = dataclasses.replace(hp, epochs=(0, -(-steps // per_epoch), 0))
    for phi, row in zip(run.space, run.settings["space"]):
        student = teacher.extract(phi)
        if phi != run.space[0]:
            student.add_stage(None if full else hp.rank, hp.seed)
            optimizer = mlfs.make_optimizer(student, {}, {})
            parameters = optimizer.param_groups[0]["params"]
            trained += sum(p.numel() for p in parameters)
            batches = mlfs.mini_batches(run.splits["train"], own, 1, 0, device)
            start = time.monotonic()
            for step, (x, y, *_) in itertools.islice(batches, steps):
                with torch.no_grad():
                    z_1 = teacher.logits(teacher.encode(**x, phi=run.space[0])[0])
                z = student.logits(student.encode(**x, phi=student.maxnet)[0])
                kd = mlfs.kd_loss(z, z_1, hp.temperature, hp.kl)
                ((1 - hp.alpha) * mlfs.task_loss(z, y) + hp.alpha * kd).mean().backward()
                torch.nn.utils.clip_grad_norm_(parameters, hp.clip or math.inf)
                optimizer.param_groups[0]["lr"] = mlfs.learning_rate(hp, step, steps)
                optimizer.step()
                optimizer.zero_grad()
            seconds += time.monotonic() - start
        rows.append(row | evaluate.evaluate(student, student.maxnet, run.task, run.splits))
        print(phi.name, rows[-1]["score"], flush=True)
    run.settings |= {"steps": steps, "trained": trained, "stored": 4 * trained,
                     "seconds": [seconds], "peak_memory": evaluate.peak_memory(device)}
    evaluate.write_palette(run.folder, run.settings, run.task, {"measured": {}, "subnets": rows})
    evaluate.write_json(run.folder / "run.json", run.settings)


def keep(name: str, command: list[str] | None = None) -> None:
    """Copies what a run measured to .github/results, without the folders' places on the machine."""
    folder, target = ROOT / "runs" / "evidence" / name, RESULTS / name
    run = json.loads((folder / "run.json").read_text("utf-8"))
    for part in ("base", "data"):
        run[part]["folder"] = Path(run[part]["folder"]).name
    if "/alone" in name or name.split("/")[1].rpartition("-")[0] in PATCHES:
        run["command"] = ["tests/by_hand/evidence.py", "run", name]
    run["command"] = command or run["command"]
    if (folder / "adapters.safetensors").exists():
        tensors, _ = evaluate.read_tensors(folder / "adapters.safetensors")
        run["trained"] = sum(t.numel() for t in tensors.values() if t.is_floating_point())
        run["stored"] = (folder / "adapters.safetensors").stat().st_size
    target.mkdir(parents=True, exist_ok=True)
    (target / "run.json").write_text(json.dumps(run, indent=1) + "\n", "utf-8")
    shutil.copy(folder / "palette.json", target / "palette.json")
    if name.startswith(LOGGED):
        shutil.copy(folder / "log.jsonl", target / "log.jsonl")


def on_dev(name: str) -> None:
    """A run that was measured on held-out sentences, scored on SST-2's dev: to its dev.json.

    It has trained on a part of TRAIN alone.
    """
    run, model, space = evaluate.load_run(ROOT / "runs" / "evidence" / name)
    task = data.TASKS[run["task"]]
    rows = data.load_task(task, ROOT / "weights" / "glue")["dev"]
    tokenizer = data.load_tokenizer(run["base"]["folder"])
    dev = data.encode(tokenizer, rows, run["hyper_parameters"]["max_length"])
    scores = {row["name"]: row["score"]
              for row in evaluate.palette(model, space, task, {"dev": dev})}
    (RESULTS / name / "dev.json").write_text(json.dumps(scores, indent=1) + "\n", "utf-8")


def gradients(name: str = "third/mlfs-seed0", batches: int = 20) -> None:
    """Norms of each loss's gradient on the new B_2 where that run's stage 2 starts (on A_2 it is 0,
    for B_2 is), for every subnet, mean over so many TRAIN batches: which loss steers?

    To .github/results/gradients.json. The head is that of the run's end.
    """
    run, model, space = evaluate.load_run(ROOT / "runs" / "evidence" / name, dtype=torch.bfloat16)
    hp = mlfs.HyperParameters(**{key: tuple(value) if isinstance(value, list) else value
                                 for key, value in run["hyper_parameters"].items()})
    for linear in model.adapted_linears():
        linear.A, linear.B = linear.A[:2], linear.B[:2]
    model.num_stages = 2
    model.add_stage(hp.rank, hp.seed)
    trained = [linear.B[2] for linear in model.adapted_linears()]
    rows = data.load_task(data.TASKS[run["task"]], Path(run["data"]["folder"]))["train"]
    examples = data.encode(data.load_tokenizer(run["base"]["folder"]), rows, hp.max_length)
    drawn = np.random.default_rng(0).permutation(len(examples.ids))[:batches * hp.batch_size]
    U = mlfs.feature_projections(space[-1].layers, hp.d_low, space[0].hidden_size, hp.seed)
    norms: dict = {phi.name: {} for phi in space[1:]}
    for x, y in data.batches(data.take(examples, drawn), hp.batch_size, seed=0):
        batch = mlfs.whole_batch(x, y)
        with torch.no_grad():
            s_1, h_1 = model.encode(**x, phi=space[0], features=U)
            z_1 = model.logits(s_1)
        for phi in space[1:]:
            s, h = model.encode(**x, phi=phi, features=U)
            z = model.logits(s)
            losses = {"task": mlfs.task_loss(z, y).mean(), "kd": mlfs.kd_loss(z, z_1).mean(),
                      "fd": batch.token_mean(mlfs.fd_loss(h, h_1, U, hp.beta))}
            for loss, value in losses.items():
                g = torch.autograd.grad(value, trained, retain_graph=True, allow_unused=True)
                norm = sum(float(t.square().sum()) for t in g if t is not None) ** 0.5
                norms[phi.name].setdefault(loss, []).append(norm)
    means = {phi: {loss: statistics.fmean(values) for loss, values in of.items()}
             for phi, of in norms.items()}
    (RESULTS / "gradients.json").write_text(json.dumps(means, indent=1) + "\n", "utf-8")


PATCHES = {                                    # what no option of mlfs.py does, by variant
    "learn-u-naively": "mlfs.orthonormalise = lambda U: None",
    "no-kl": "mlfs.kd_loss = lambda z_j, *more: 0 * z_j.sum(-1)",
    "wider-start": """
add_stage = model.ElasticLinear.add_stage
def wider(self, rank, generator):
    add_stage(self, rank, generator)
    self.A[-1].data *= 3
model.ElasticLinear.add_stage = wider
""",
    "everywhere": """
model.Bert.adapted = (*model.Bert.adapted, "attention_output", "output")
""",
    "teacher-3-epochs": """
begin = mlfs.begin_stage
def slower(model, examples, space, hp, state, stage):
    object.__setattr__(hp, "learning_rate", 3e-3 if stage else 1e-3)
    return begin(model, examples, space, hp, state, stage)
mlfs.begin_stage = slower
""",
    "stage-2-rank-32": """
begin = mlfs.begin_stage
def more(model, examples, space, hp, state, stage):
    object.__setattr__(hp, "rank", 32 if stage else 16)
    return begin(model, examples, space, hp, state, stage)
mlfs.begin_stage = more
""",
    "supernet-fixed-teacher": """
import copy                                          # (its stage 2 cannot be resumed)
begin, make = mlfs.begin_stage, mlfs.make_optimizer
def fixed(model, examples, space, hp, state, stage):
    teacher = copy.deepcopy(model).requires_grad_(False) if stage == 2 else None
    return begin(model, examples, space, hp, state, stage)[0], teacher
def without_head(model, U, moments):
    for name in model.trained_whole if model.num_stages == 3 else ():
        getattr(model, name).requires_grad_(False)
    return make(model, U, moments)
mlfs.begin_stage, mlfs.make_optimizer = fixed, without_head
""",
    "rates-of-a-and-b": """
make = mlfs.make_optimizer
def two_rates(model, U, moments):
    optimizer = make(model, U, {})                   # (AdamW's moments start anew on resuming)
    of_B = {id(p) for linear in model.adapted_linears() for p in linear.B}
    group = optimizer.param_groups[0]
    faster = [p for p in group["params"] if id(p) in of_B]
    group["params"] = [p for p in group["params"] if id(p) not in of_B]
    optimizer.add_param_group({"params": faster})
    def follow(optimizer, *_):
        optimizer.param_groups[1]["lr"] = 4 * optimizer.param_groups[0]["lr"]
    optimizer.register_step_pre_hook(follow)
    return optimizer
mlfs.make_optimizer = two_rates
""",
    "norms": """
import copy
begin, make = mlfs.begin_stage, mlfs.make_optimizer
def small(model):
    return [p for name, p in model.layers.named_parameters() if p.dim() == 1]
def with_norms(model, U, moments):
    optimizer = make(model, U, moments)
    for p in small(model) if model.num_stages == 3 else ():
        p.requires_grad_()
    if model.num_stages == 3:
        optimizer.add_param_group({"params": small(model)})
        def follow(optimizer, *_):
            optimizer.param_groups[1]["lr"] = optimizer.param_groups[0]["lr"] / 10
        optimizer.register_step_pre_hook(follow)
    return optimizer
def own_norms(model, examples, space, hp, state, stage):
    optimizer, teacher = begin(model, examples, space, hp, state, stage)
    if teacher and stage == 2:                       # which shares them otherwise
        for part in teacher.layers.modules():
            for name, p in part._parameters.items():
                if p is not None and p.dim() == 1:
                    part._parameters[name] = copy.deepcopy(p).requires_grad_(False)
    return optimizer, teacher
mlfs.make_optimizer, mlfs.begin_stage = with_norms, own_norms
""",
    "frozen-head": """
make = mlfs.make_optimizer
def without_head(model, U, moments):
    if model.num_stages > 1:
        for name in model.trained_whole:
            getattr(model, name).requires_grad_(False)
    return make(model, U, moments)
mlfs.make_optimizer = without_head
""",
}


def run(wanted: list[str]) -> int:
    """The runs that are not there yet, in their order."""
    os.chdir(ROOT)
    if not any(part in name for part in wanted or [""] for name in commands()):
        raise ValueError(f"no run's name holds {' or '.join(wanted)}; there are "
                         f"{', '.join(commands())}")
    for name, argv in commands().items():
        if (RESULTS / name).exists() or not any(part in name for part in wanted or [""]):
            continue
        print(f"\n{name}: python mlfs.py {' '.join(argv)}", flush=True)
        patch = PATCHES.get(name.split("/")[1].rpartition("-")[0])
        program = ["mlfs.py", *argv]
        if "/alone" in name:
            program = ["tests/by_hand/evidence.py", "alone", name]
        if patch is not None:
            program = ["-c", f"import sys, mlfs, model\n{patch}\nsys.exit(mlfs.main())", *argv]
        goes_on = Path("runs/evidence", name).exists() and "/alone" not in name
        done = subprocess.run([sys.executable, *program, *["--resume"] * goes_on])
        if done.returncode:
            return done.returncode
        keep(name)
    return 0


# -------------------------------------------------------------------------------------- the tables

Seeds = list[tuple[dict, dict[str, dict]]]                   # a seed: run.json, rows by subnet


def load(group: str) -> dict[str, Seeds]:
    """What .github/results has of a group, by variant."""
    runs: dict[str, Seeds] = {}
    for variant in GROUPS[group][2]:
        for folder in sorted((RESULTS / group).glob(f"{variant}-seed*")):
            rows = evaluate.read_palette(folder)["subnets"]
            run = json.loads((folder / "run.json").read_text("utf-8"))
            runs.setdefault(variant, []).append((run, {row["name"]: row for row in rows}))
    return runs


def caption(group: str, runs: Seeds) -> str:
    """What was measured on what, how often, by which command."""
    run = runs[0][0]
    metric, rows = data.TASKS[run["task"]].metrics[0], run["data"]["dev"]
    where = "held-out TRAIN sentences" if run["data"]["folder"] == "held-out" else "dev examples"
    return (f"{run['task']}, {metric} on {rows:,} {where}, last checkpoint, {len(runs)} seed"
            + ("s, mean ± standard error over seeds" if len(runs) > 1 else "")
            + f": `python mlfs.py {GROUPS[group][0]}`")


def mean(values: list[float], metric: str = "accuracy") -> str:
    """Mean ± standard error over seeds."""
    text = evaluate.show(metric, statistics.fmean(values))
    if len(values) > 1:
        error = statistics.stdev(values) / math.sqrt(len(values))
        text += f" ± {evaluate.show(metric, error)}"
    return text


def markdown(header: list[str], rows: list[list[str]]) -> str:
    rule = [":---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def stages(group: str) -> str:
    """Figs. 1 and 8: every subnet's score at the four moments; what other options end with."""
    groups = load(group)
    runs = groups.pop("mlfs")
    metric, first = data.TASKS[runs[0][0]["task"]].metrics[0], runs[0][1]
    moments = list(next(iter(first.values()))["history"])
    body = [[name, f"{row['parameters'] / 1e6:.2f}M", f"{row['encoder_parameters'] / 1e6:.2f}M",
             *(mean([rows[name]["history"][moment] for _, rows in runs], metric)
               for moment in moments),
             *(mean([rows[name]["score"] for _, rows in seeds], metric)
               for seeds in groups.values()),
             evaluate.show(metric, statistics.fmean(rows[name]["stderr"] for _, rows in runs))]
            for name, row in first.items()]
    if len(first) > 1:
        means = [palette_means(seeds, 1) for seeds in (runs, *groups.values())]
        blank = [""] * (1 + len(moments))            # up to the first column of stage 2
        body.append(["mean below the maxnet", *blank,
                     *(mean(list(of.values()), metric) for of in means), ""])
        if groups:
            body.append(["difference on equal seeds", *blank, "",
                         *(gain(of, means[0], metric) for of in means[1:]), ""])
    others = (f"stage 2, `{GROUPS[group][2][variant]}`"
              + (f" (seeds: {len(seeds)})" if len(seeds) != len(runs) else "")
              for variant, seeds in groups.items())
    return (caption(group, runs) + "\n\n" + markdown(
        ["subnet", "parameters", "encoder", *moments, *others, "± s.e. of one run"], body))


def minutes(run: dict) -> float:
    return sum(run["seconds"]) / 60


def fastest(seeds: Seeds) -> dict:
    """The seed that shared its machine the least: others can only be slower."""
    return min((run for run, _ in seeds), key=minutes)


def palette_means(seeds: Seeds, first: int = 0) -> dict[int, float]:
    """A palette's mean score, from that row on, by seed."""
    return {run["hyper_parameters"]["seed"]:
            statistics.fmean([row["score"] for row in rows.values()][first:])
            for run, rows in seeds}


def gain(means: dict[int, float], base: dict[int, float], metric: str = "accuracy") -> str:
    """What of them is more than base's, seed by seed where both have one."""
    return mean([means[seed] - base[seed] for seed in means if seed in base], metric)


def variants(group: str) -> str:
    """A row a variant: the palette's corners, the mean over it, its gain over the first row's."""
    runs, corners = load(group), ["w1-d6", "w1-d3", "w0.5-d6", "w0.5-d3"]
    base, body = {}, []
    for variant in filter(runs.get, VARIANTS):
        scores = palette_means(runs[variant])
        base = base or scores
        body.append([VARIANTS[variant], str(len(scores)),
                     *(mean([rows[name]["score"] for _, rows in runs[variant]])
                       for name in corners),
                     mean(list(scores.values())), gain(scores, base) if body else "",
                     f"{minutes(fastest(runs[variant])):.0f}"])
    return (caption(group, next(iter(runs.values()))) + "\n\n"
            + markdown(["", "seeds", *corners, "mean of all 9", "gain", "minutes"], body))


def teachers(group: str) -> str:
    """Stage 0 alone, three epochs."""
    runs = load(group)
    return (caption(group, next(iter(runs.values()))) + "\n\n" + markdown(
        ["options", "score ± s.e."],
        [[f"`{own}`" if own else "App. A's",
          evaluate.quality(runs[variant][0][1]["w1-d6"], "accuracy")]
         for variant, own in GROUPS[group][2].items() if variant in runs]))


def against(group: str = "third") -> str:
    """Scores of every subnet side by side, then what they cost."""
    runs = load(group)
    if group == "third":                             # on the same sentences, with epochs 1,0,2
        others = load("recipe")
        runs |= {name: others[name] for name in ("edge", "supernet-1-0-2") if name in others}
    there = {variant: text for variant, text in AGAINST.items() if variant in runs}
    body = [[name, f"{row['parameters'] / 1e6:.2f}M",
             *(mean([rows[name]["score"] for _, rows in runs[variant]]) for variant in there)]
            for name, row in runs[next(iter(there))][0][1].items()]
    means = [palette_means(runs[variant], 1) for variant in there]
    teachers = {variant: [row.get("history", {"sliced teacher": row["score"]})["sliced teacher"]
                          for _, rows in runs[variant] for row in [next(iter(rows.values()))]]
                for variant in there}
    body.append(["mean of the 8 below the maxnet", "",
                 *(mean(list(scores.values())) for scores in means)])
    body.append(["gain over the first column", "",
                 "", *(gain(scores, means[0]) for scores in means[1:])])
    body.append(["their teacher, after stage 0", "", *map(mean, teachers.values())])
    body.append(["seeds", "", *(str(len(runs[variant])) for variant in there)])
    for what, value in {"numbers trained": lambda run: f"{run['trained'] / 1e6:.2f}M",
                        "stored for the task": lambda run: f"{run['stored'] / 1e6:.1f} MB",
                        "minutes": lambda run: f"{minutes(run):.0f}",
                        "peak memory": lambda run: f"{run['peak_memory'] / 2**30:.1f} GiB"}.items():
        body.append([what, "", *(value(fastest(runs[variant])) for variant in there)])
    return (caption(group, runs[next(iter(there))]) + "\n\n"
            + markdown(["subnet", "parameters", *there.values()], body))


def dev_table(variants: tuple[str, ...] = ("edge", "supernet-1-0-2")) -> str:
    """The recipe and the supernet on SST-2's dev (`on_dev`), mean ± standard error over seeds."""
    columns, means = [], []                          # of each variant; by seed
    for variant in variants:
        files = sorted((RESULTS / "recipe").glob(f"{variant}-seed*/dev.json"))
        scores = {path.parent.name: json.loads(path.read_text("utf-8")) for path in files}
        seeds = {name.removeprefix(f"{variant}-seed"): of for name, of in scores.items()}
        columns.append(seeds)
        means.append({seed: statistics.fmean(list(of.values())[1:]) for seed, of in seeds.items()})
    names = next(iter(columns[0].values()))
    body = [[name, *(mean([of[name] for of in seeds.values()]) for seeds in columns)]
            for name in names]
    body.append(["mean of the 8 below the maxnet", *(mean(list(of.values())) for of in means)])
    body.append(["gain over the first column", "", *(gain(of, means[0]) for of in means[1:])])
    body.append(["seeds", *(str(len(seeds)) for seeds in columns)])
    return markdown(["subnet", *(AGAINST[variant] for variant in variants)], body)


def curves(group: str) -> str:
    """Fig. 5: validation loss by step of stage 0, which is ordinary fine-tuning."""
    runs, body, steps = load(group), [], []
    for variant, seeds in runs.items():
        logs = [(RESULTS / group / f"{variant}-seed{run['hyper_parameters']['seed']}/log.jsonl")
                .read_text("utf-8").splitlines() for run, _ in seeds]
        losses = [{entry["step"]: next(iter(entry["validation"].values()))
                   for entry in map(json.loads, log)
                   if "validation" in entry and entry["stage"] == 0} for log in logs]
        steps = list(losses[0])
        body.append([variant, *(mean([loss[step] for loss in losses], "loss") for step in steps)])
    return (caption(group, next(iter(runs.values()))) + "\n\n"
            + markdown(["start", *(f"step {step}" for step in steps)], body))


def gradient_table() -> str:
    """Norms of the losses' gradients where stage 2 starts; ℓ_FD also as the paper prints it."""
    means = json.loads((RESULTS / "gradients.json").read_text("utf-8"))
    d_low = mlfs.HyperParameters.d_low
    return markdown(["subnet", "ℓ_task", "ℓ_KD", "ℓ_FD, β = 0.1", "ℓ_FD, summed over d_low"],
                    [[name, f"{row['task']:.3f}", f"{row['kd']:.3f}", f"{row['fd']:.4f}",
                      f"{d_low * row['fd']:.3f}"] for name, row in means.items()])


def estimates() -> str:
    """Hours for the paper's models, from the multiplications of the layers' linear maps: forward,
    and as many backward (frozen matrices need no gradient), at the speed of two cores and a GPU.

    Tokens a row of MNLI, QQP and QNLI are guesses, the other tasks' are counted, padding included.
    A GPU needs some time to start an iteration's kernels, however small: 40 ms, a guess. What
    attention itself and a decoder's output matrix multiply is left out (15% of SantaCoder).
    """
    cores, gpu = 175e9, 30e12        # multiply-adds/s: bench_train.py's; 60 TFLOP/s, a guess
    bert = mlfs.configuration_space(SubnetConfig(768, 12, 3072, tuple(range(12)), "w1-d12"))
    glue = {"sst2": (67349, 14), "cola": (8551, 12), "mrpc": (3668, 54), "rte": (2490, 68),
            "qnli": (104743, 50), "qqp": (363846, 30), "mnli": (392702, 40)}
    jobs = [(f"BERT-base, {task}", bert, 64, 12, 2, rows, tokens,
             mlfs.HyperParameters(**mlfs.TASK_SETTINGS.get(task, {})), 2)
            for task, (rows, tokens) in glue.items()]
    for name, keys, ffn, epochs in ("SantaCoder", 1, 2, (1, 1, 1)), ("CodeLlama", 32, 3, (1, 0, 1)):
        hp = mlfs.HyperParameters(**mlfs.TASK_SETTINGS["python"] | {"epochs": epochs})
        jobs.append((f"{name}, 100,000 windows of 512", mlfs.SUBNETS[name.lower()], 128, keys, ffn,
                     100_000, 512, hp, 3))                           # 3: --checkpointing
    body = []
    for what, space, head_dim, keys, ffn, rows, tokens, hp, passes in jobs:
        def macs(phi: SubnetConfig) -> float:
            heads = phi.num_attention_heads
            attention = 2 * head_dim * (heads + min(keys, heads))
            return len(phi.layers) * phi.hidden_size * (attention + ffn * phi.intermediate_size)

        total = 0.0
        for stage in range(3):
            draws = [mlfs.sample_sub_transformers(space, stage, 4, (0, i)) for i in range(200)]
            each = statistics.fmean(sum(map(macs, subnets)) for subnets in draws)
            total += hp.epochs[stage] * rows * tokens * passes * each
        on_gpu = max(total / gpu, 0.04 * sum(hp.epochs) * rows / hp.batch_size)
        body.append([what, ",".join(map(str, hp.epochs)), f"{total / 1e15:,.1f}",
                     f"{total / cores / 3600:,.1f}", f"{on_gpu / 3600:,.2f}"])
    return markdown(["", "epochs", "10^15 MACs", "hours, two cores", "hours, GPU"], body)


def tables() -> dict[str, str]:
    """What stands between <!-- evidence: NAME --> and <!-- end --> in .github/results/README.md."""
    kinds = {"third": variants, "recipe": variants, "recipe-gpu": variants, "teacher": teachers,
             "sst2-teacher": teachers, "long": against, "custom": curves}
    made = {group: kinds.get(group, stages)(group) for group in GROUPS if load(group)}
    return made | {"against": against(), "dev": dev_table(), "gradients": gradient_table(),
                   "estimates": estimates()}


def average(runs: list, score: Callable[[dict], float]) -> tuple[list[float], list[float]]:
    """Sizes in millions and mean scores in points, of every subnet."""
    names = runs[0][1]
    return ([row["parameters"] / 1e6 for row in names.values()],
            [100 * statistics.fmean(score(rows[name]) for _, rows in runs) for name in names])


def pictures() -> None:
    """.github/results.png: score against parameters, at each moment, and of the baselines."""
    with evaluate.picture(ROOT / ".github" / "results.png", 2) as (_, axes):
        main, third = load("sst2")["mlfs"], load("third")
        marks = {"sliced teacher": "x", "reordered": "+", "stage 1": "^", "stage 2": "o"}
        for moment, mark in marks.items():
            axes[0].plot(*average(main, lambda row: row["history"][moment]), mark, label=moment)
        axes[0].set_title(f"SST-2 dev, seeds: {len(main)}", fontsize=9)
        for mark, (variant, text) in zip("oDPs^v", AGAINST.items()):
            if variant in third:
                axes[1].plot(*average(third[variant], lambda row: row["score"]), mark, label=text)
        axes[1].set_title("SST-2, a third of TRAIN, held-out sentences", fontsize=9)
        teacher = average(main, lambda row: row["history"]["sliced teacher"])[1][0]
        axes[0].axhline(teacher, color="black", linestyle=":", label="teacher")
        for axis in axes:
            axis.set_xlabel("parameters, millions")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
        axes[0].set_ylabel("accuracy, points")


def gamma_picture(window: int = 5) -> None:
    """.github/gamma.png, Fig. 2: training losses of three subnets in stage 2, running means."""
    with evaluate.picture(ROOT / ".github" / "gamma.png", 3) as (_, axes):
        for axis, name in zip(axes, ("w1-d6", "w0.75-d4", "w0.5-d3")):
            for curve in filter(lambda curve: (RESULTS / curve).exists(), CURVES):
                lines = (RESULTS / curve / "log.jsonl").read_text("utf-8").splitlines()
                logged = [entry for entry in map(json.loads, lines) if entry["stage"] == 2]
                points = [(entry["step"], entry["loss"][name]) for entry in logged
                          if name in entry.get("loss", ())]                  # where it was drawn
                steps, losses = np.array(points).T
                means = np.convolve(losses, np.ones(window) / window, "valid")
                run = json.loads((RESULTS / curve / "run.json").read_text("utf-8"))
                gamma = run["hyper_parameters"]["gamma"]
                axis.plot(steps[window - 1:], means, label=f"γ = {gamma:g}")
            axis.set_title(name, fontsize=9)
            axis.set_xlabel("step of stage 2")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
        axes[0].set_ylabel("loss, nats")


def rewrite() -> None:
    """Puts the tables into the page of results and draws the pictures."""
    page = RESULTS / "README.md"
    text = page.read_text("utf-8")
    for name, table in tables().items():
        text = re.sub(rf"(<!-- evidence: {name} -->\n).*?(<!-- end -->)",
                      lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text, flags=re.S)
    page.write_text(text, "utf-8")
    pictures()
    gamma_picture()


def main() -> int:
    what, *names = sys.argv[1:] or [""]
    if what == "split":
        split(ROOT / "weights" / "glue", ROOT / "weights" / "held-out")
    elif what == "custom":
        custom(ROOT / "weights" / "smollm2-135m", ROOT / "weights" / "custom")
    elif what == "full-teacher":
        return full_teacher(ROOT / "weights" / "full-teacher")
    elif what == "run":
        return run(names)
    elif what == "alone" and names and names[0] in commands():       # what `run` calls
        alone([*commands()[names[0]], "--overwrite"], "low-rank" not in names[0])
    elif what == "dev":
        for name in names:
            on_dev(name)
    elif what == "gradients":
        gradients()
    elif what == "tables":
        evaluate.require_package("tables", "matplotlib")
        rewrite()
    else:
        print(__doc__)
    return 0


if __name__ == "__main__":
    sys.exit(evaluate.exit_on_bad_input(main))
