"""What a GPU changes: are results right, do runs resume, how long do steps and passes take.

    pip install transformers peft pytest-xdist onnx onnxscript onnxruntime
    python tests/by_hand/gpu.py FIGURES.json [--parts logits,bert] [--device cpu --tiny]

All parts, one after another, each with a limit on its time; where one fails the next goes on. A
line per result is printed as it comes, and FIGURES.json holds them all. Weights are random, in the
shapes of BERT-base, SantaCoder and CodeLlama. Not a test: run it by hand (5 minutes on an H100).
"""
import argparse
import copy
import gc
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "by_hand")]
import bench_latency  # noqa: E402
import bench_santacoder  # noqa: E402
import bench_train  # noqa: E402
import conftest  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import mlfs  # noqa: E402
import test_processes  # noqa: E402
from model import GPT, Bert, Llama, stored_config  # noqa: E402

# Without this, torch refuses its deterministic algorithms; on an H100 it is what torch does anyway.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
torch.set_num_threads(os.cpu_count() // 2)           # conftest sets 1

# --------------------------------------------------------------------------- shapes and contestants

SHAPES = {
    "BERT-base": (Bert, bench_latency.CONFIG),
    "SantaCoder": (GPT, {
        "vocab_size": bench_santacoder.V, "hidden_size": bench_santacoder.H,
        "head_dim": bench_santacoder.D, "intermediate_size": bench_santacoder.I,
        "num_attention_heads": 16, "num_key_value_heads": 1,
        "num_hidden_layers": bench_santacoder.L, "tie_word_embeddings": True,
        "max_position_embeddings": bench_santacoder.P, "layer_norm_eps": 1e-5,
        "hidden_act": "gelu_pytorch_tanh"}),
    "CodeLlama": (Llama, {
        "vocab_size": 32016, "hidden_size": 4096, "head_dim": 128, "intermediate_size": 11008,
        "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 32,
        "max_position_embeddings": 16384, "layer_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False, "rope_theta": 1e6}),
}
TINY = {"vocab_size": 100, "hidden_size": 32, "head_dim": 8, "intermediate_size": 64,
        "num_attention_heads": 4, "num_hidden_layers": 4}
LORA = {"BERT-base": bench_train.ENCODER,            # SantaCoder's query, key and value are one
        "SantaCoder": {"target_modules": ["c_attn", "c_fc"], "task_type": "CAUSAL_LM"}}


class Setting(NamedTuple):
    """What all parts are told."""
    device: str
    tiny: bool
    rounds: int
    folder: Path                                     # of FIGURES.json

    def shape(self, name):
        """The family and its sizes."""
        family, config = SHAPES[name]
        if self.tiny:
            config = config | TINY
            if config.get("num_key_value_heads", 1) > 1:
                config["num_key_value_heads"] = 4
        return family, config


def random_model(at, name, dtype=torch.bfloat16):
    """A shape with random weights, drawn on the device; what is trained is in float32."""
    family, config = at.shape(name)
    with torch.device("meta"):
        model = family(config)
    generator = torch.Generator(at.device).manual_seed(0)
    weights = {}
    for key, p in model.named_parameters():
        own = torch.float32 if p.requires_grad else dtype
        weights[key] = torch.full(p.shape, float(key.endswith("norm.weight")), dtype=own,
                                  device=at.device)
        if p.dim() == 2:
            weights[key].normal_(std=0.02, generator=generator)
    model.load_state_dict(weights, assign=True)
    return model


def palette_of(at, name, model):
    if name in ("SantaCoder", "CodeLlama") and not at.tiny:
        return mlfs.SUBNETS[name.lower()]
    return mlfs.configuration_space(model.maxnet)


def random_examples(at, name, rows, lengths):
    """Rows of random tokens and, for an encoder, labels; half of its tokens in the second text."""
    rng = np.random.default_rng(0)
    family, config = at.shape(name)
    lengths = rng.choice(lengths, rows)
    if at.tiny:
        lengths = np.maximum(2, lengths // 8)
    ids = [rng.integers(config["vocab_size"], size=n).astype(np.int32) for n in lengths]
    if family is not Bert:
        return data.Examples(ids, None, None)
    segments = [(np.arange(n) > n // 2).astype(np.int8) for n in lengths]
    return data.Examples(ids, segments, rng.integers(2, size=rows))


def our_steps(at, name, examples, batch_size, stage, checkpointing=False, in_order=True):
    """Iterations of one stage, by `mlfs` itself, in bfloat16; in_order: as a run does it."""
    model = random_model(at, name)
    model.gradient_checkpointing = checkpointing
    for _ in range(stage):                           # of stages without epochs there is no pair
        model.add_stage(mlfs.HyperParameters.rank)
    hp = mlfs.HyperParameters(epochs=tuple(99 * (s == stage) for s in range(3)), gamma=1.0,
                              batch_size=batch_size, reorder=False)
    events = mlfs.mlfs(model, examples, palette_of(at, name, model), hp)
    updates = (event for event in events if isinstance(event, mlfs.Updated))
    while True:
        with one_order(in_order):
            event = next(updates)
        yield event


@contextmanager
def one_order(asked):
    """What `mlfs.add_in_one_order` sets for a whole run."""
    torch.use_deterministic_algorithms(asked)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def their_model(at, name, dtype):
    """The transformers library's model of the same shape."""
    import transformers  # to compare with, not ours
    transformers.logging.set_verbosity_error()
    with torch.device("meta"):
        family, config = at.shape(name)
        stored = stored_config(family(config), ())
    dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop",
                "attn_pdrop")
    config = transformers.AutoConfig.for_model(**stored, **dict.fromkeys(dropouts, 0.0))
    of_text = family is not Bert
    kind = (transformers.AutoModelForCausalLM if of_text
            else transformers.AutoModelForSequenceClassification)
    with torch.device(at.device):
        return kind.from_config(config, dtype=dtype, attn_implementation="sdpa")


def their_steps(at, name, examples, batch_size, dtype):
    """Steps of PEFT under autocast to bfloat16, frozen weights in `dtype`."""
    batches = data.batches(examples, batch_size, (0, 0, 0), at.device)
    model = their_model(at, name, dtype)
    return bench_train.lora_steps(model, batches, LORA[name], True, at.device)


def wait(device):
    """Until a GPU has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Contestant:
    """Something that takes steps; GiB at its peak, beside what was there before."""

    def __init__(self, at, make, warm):
        self.device = torch.device(at.device)
        before = self.memory("reset_peak_memory_stats", "memory_allocated")
        self.steps = make()
        self.ms = []
        for _ in range(warm):
            self.step()
        self.peak = (self.memory("max_memory_allocated") - before) / 2 ** 30
        self.ms = []

    def memory(self, *asked):
        """What the last of torch.cuda's functions answers; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0
        gc.collect()
        return [getattr(torch.cuda, name)() for name in asked][-1]

    def step(self):
        self.ms.append(bench_train.timed(
            lambda: (next(self.steps), wait(self.device))))


def relative(ours, reference):
    """‖ours - reference‖ / ‖reference‖"""
    reference = reference.double().cpu()
    return float((ours.double().cpu() - reference).norm() / reference.norm())


# ----------------------------------------------------------------------------- are results right?

@torch.inference_mode()
def logits(at, report):
    """Every slice's logits on the device, against the CPU's in float32."""
    cases = {}
    for name, make in conftest.FAMILIES.items():
        model = make()
        model.add_stage(4)
        model.add_stage(2)
        x = conftest.batch()
        if name != "bert":
            del x["segments"]
        cases[f"tiny {name}"] = (conftest.randomise_adapters(model), x)
    model = random_model(at._replace(device="cpu"), "BERT-base", torch.float32)
    examples = random_examples(at, "BERT-base", 4, (64, 100, 128))
    cases["BERT-base's shape"] = (model, next(data.batches(examples, 4))[0])
    for name, (model, x) in cases.items():
        space = mlfs.configuration_space(model.maxnet, (1, 0.5), (1, 0.5), (1, 0.5),
                                         model.head_group)
        report.add(f"logits, {name}", slices=len(space), **logits_of(at, model, space, x))
    generation(at, report)


def logits_of(at, model, space, x):
    """The largest relative error among slices: of two number formats, in place and cut."""
    real = x["mask"].bool()
    moved = {name: None if part is None else part.to(at.device) for name, part in x.items()}
    on_device = copy.deepcopy(model).to(at.device)
    low = {place: half(copy.deepcopy(model)).to(place) for place in ("cpu", at.device)}
    worst = dict.fromkeys(("float32_in_place", "float32_cut", "bfloat16", "bfloat16_on_cpu"), 0.0)
    for phi in space:
        reference = model(**x, phi=phi)[0]
        found = {
            "float32_in_place": on_device(**moved, phi=phi)[0],
            "float32_cut": on_device.extract(phi)(**moved)[0],
            "bfloat16": low[at.device](**moved, phi=phi)[0],
            "bfloat16_on_cpu": low["cpu"](**x, phi=phi)[0],
        }
        for what, z in found.items():
            if z.dim() == 3:                         # a decoder's: what padding gives is void
                away = relative(z.cpu()[real], reference[real])
            else:
                away = relative(z, reference)
            worst[what] = max(worst[what], away)
    assert worst["float32_in_place"] < 1e-4 and worst["float32_cut"] < 1e-4, worst
    assert worst["bfloat16"] < 2 * worst["bfloat16_on_cpu"] + 1e-3, worst
    return worst


def half(model):
    """Frozen weights in bfloat16, as a run has them."""
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.bfloat16()
    return model


def generation(at, report):
    """Greedy text of every slice, from prompts of unequal length, with a cache."""
    prompts = [[5, 7, 11], [3, 1, 4, 1, 5, 9, 2, 6], [8]]
    for name in ("gpt", "llama"):
        model = conftest.FAMILIES[name]()
        moved = copy.deepcopy(model).to(at.device)
        space = mlfs.configuration_space(model.maxnet, (1, 0.5), (1, 0.5), (1, 0.5),
                                         model.head_group)
        same = 0
        for phi in space:
            texts = [evaluate.extend(m, phi, prompts, 16, lambda z: z.argmax(-1, keepdim=True),
                                     lambda new: False) for m in (model, moved)]
            same += texts[0] == texts[1]
        report.add(f"generation, tiny {name}", slices=len(space), same_text=same)
        assert same == len(space)


def training(at, report):
    """Seven iterations of each stage in float32: losses and adapters, against the CPU's."""
    for name, make in conftest.FAMILIES.items():
        hp = mlfs.HyperParameters(dtype="float32", batch_size=4, rank=2, epochs=(1, 1, 1),
                                  learning_rate=1e-4, seed=3)
        found = []
        for place in ("cpu", at.device):
            model = make().to(place)
            space = mlfs.configuration_space(model.maxnet, (1, 0.5), (1, 0.5), (1, 0.5),
                                             model.head_group)
            events = list(mlfs.mlfs(model, test_processes.examples(name), space, hp))
            losses = [value for event in events if isinstance(event, mlfs.Updated)
                      for value in event.losses.values()]
            found.append((torch.tensor(losses), model.trained_state()))
        (losses, state), (their_losses, their_state) = found
        away = max((t.cpu() - their_state[key].cpu()).abs().max() for key, t in state.items())
        report.add(f"training, tiny {name}", losses_relative=relative(their_losses, losses),
                   adapters_absolute=float(away))
        assert relative(their_losses, losses) < 1e-5 and away < 1e-4


def bits(at, report):
    """Whether two equal runs of all stages learn the same bits, by default and if asked to."""
    cases = {"BERT-base": (64, (32, 64, 128)), "SantaCoder": (4, (400, 512))}
    for name, (batch_size, lengths) in cases.items():
        examples = random_examples(at, name, 2 * batch_size, lengths)
        hp = mlfs.HyperParameters(epochs=(1, 1, 1), batch_size=batch_size)
        for asked in (False, True):
            with one_order(asked):
                digests = [learned(at, name, examples, hp) for _ in range(2)]
            report.add(f"bits, {name}'s shape", in_one_order=asked, same=digests[0] == digests[1])


def learned(at, name, examples, hp):
    model = random_model(at, name)
    for _ in mlfs.mlfs(model, examples, palette_of(at, name, model), hp):
        pass
    return evaluate.digest(model.trained_state())


# ------------------------------------------------------------------------- the two command lines

def start(*words, log, **more):
    """A command of ours; what it prints goes to a file. more: of its environment."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | more
    with open(log, "w") as file:
        return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=file,
                                stderr=subprocess.STDOUT, env=env)


def finish(process, log, code=0):
    """What the command printed; an AssertionError if it did not end with this exit code."""
    found = process.wait()
    text = Path(log).read_text()
    assert found == code, f"exit code {found}: {text[-1500:]}"
    return text


def toy(at, rows="3200"):
    """Options of a short run on the toy."""
    few = ["--train-examples", "1280" if at.tiny else rows] if rows or at.tiny else []
    return ["mlfs.py", "--device", at.device, "--epochs", "1,1,1", *few]


def commands(at, report):
    """The toy: trained, stopped by SIGTERM, resumed to the same bits, measured, exported."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        begun = time.perf_counter()
        runs = {}
        for dtype in ("float32", "bfloat16"):
            for what in ("whole", "stopped"):
                name = f"{dtype}-{what}"
                runs[name] = start(*toy(at), "--dtype", dtype, "--out", folder / name,
                                   log=folder / f"{name}.txt")
        try:
            stop_in(runs["float32-stopped"], folder / "float32-stopped", stage=1)
            stop_in(runs["bfloat16-stopped"], folder / "bfloat16-stopped", stage=2)
            for name, process in runs.items():
                finish(process, folder / f"{name}.txt", 143 if "stopped" in name else 0)
            report.add("four runs at a time", seconds=time.perf_counter() - begun)
            resume(at, report, folder)
            measure(at, report, folder)
        finally:
            for process in runs.values():
                process.kill()


def stop_in(process, folder, stage):
    """SIGTERM once the log has a line of the stage."""
    log = folder / "log.jsonl"
    while process.poll() is None:
        if log.exists() and re.search(rf'"stage": {stage}, "step": [1-9]', log.read_text()):
            process.send_signal(signal.SIGTERM)
            return
        time.sleep(0.01)


def resume(at, report, folder):
    again = {}
    for dtype in ("float32", "bfloat16"):
        name = f"{dtype}-stopped"
        again[dtype] = start(*toy(at), "--dtype", dtype, "--out", folder / name, "--resume",
                             log=folder / f"{name}-again.txt")
    for dtype, process in again.items():
        finish(process, folder / f"{dtype}-stopped-again.txt")
        whole, other = (folder / f"{dtype}-{what}" for what in ("whole", "stopped"))
        same = [(whole / file).read_bytes() == (other / file).read_bytes()
                for file in ("adapters.safetensors", "palette.json")]
        settings = json.loads((whole / "run.json").read_text())
        report.add(f"stopped and resumed, {dtype}", same_adapters=same[0], same_palette=same[1],
                   seconds_by_stage=settings["seconds"],
                   peak_gib=settings["peak_memory"] / 2 ** 30, scores=scores(whole))


def scores(folder):
    rows = evaluate.read_palette(folder)["subnets"]
    return {row["name"]: round(100 * row["score"], 1) for row in rows}


def measure(at, report, folder):
    """evaluate.py on the device and, where it tells something, on the CPU."""
    where = ["--device", at.device]
    text = ["--subnet", "w0.5-d2", "--predict", "the plot is clever ."]
    jobs = {
        "palette": where,
        "palette_bfloat16": [*where, "--dtype", "bfloat16"],
        "palette_cpu": [],
        "predict": [*where, *text],
        "predict_bfloat16": [*where, *text, "--dtype", "bfloat16"],
        "predict_cpu": text,
        "export": [*where, "--export", "w0.5-d2", folder / "exported"],
        "export_onnx": [*where, "--export", "w0.75-d3", folder / "onnx", "--onnx"],
    }
    started = {}
    for name, words in jobs.items():
        run = shutil.copytree(folder / "float32-whole", folder / name)
        started[name] = start("evaluate.py", run, *words, log=folder / f"{name}.txt")
    for name, process in started.items():
        printed = finish(process, folder / f"{name}.txt")
        if name.startswith("palette"):
            report.add(f"evaluate.py, {name}", scores=scores(folder / name))
        else:
            report.add(f"evaluate.py, {name}", printed=printed.strip().splitlines()[-1])


def whole_toy(at, report):
    """All of the toy's training sentences, an epoch a stage."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "toy"
        process = start(*toy(at, rows=None), "--out", run, log=Path(scratch) / "log.txt")
        try:
            finish(process, Path(scratch) / "log.txt")
        finally:
            process.kill()
        settings = json.loads((run / "run.json").read_text())
        report.add("the whole toy, an epoch a stage", seconds_by_stage=settings["seconds"],
                   peak_gib=settings["peak_memory"] / 2 ** 30, scores=scores(run))


# ----------------------------------------------------------------------------------- what it costs

def bert(at, report):
    report.add("one small kernel", microseconds=1e3 * launch(at))
    race(at, report, "BERT-base", 64, (128,), warm=6)
    race(at, report, "BERT-base", 64, (10, 20, 30), warm=8)


def santacoder(at, report):
    race(at, report, "SantaCoder", 8, (512,), warm=4)


def codellama(at, report):
    """An iteration of stage 2 of a 7B model; its memory is what matters."""
    examples = random_examples(at, "CodeLlama", 80, (512,))
    one = Contestant(at, lambda: our_steps(at, "CodeLlama", examples, 8, 2, True), 3)
    for _ in range(4):
        one.step()
    report.add("cost, CodeLlama's shape, 8 x 512, stage 2, checkpointing", ms=np.median(one.ms),
               peak_gib=one.peak, busy_ms=busy(at, lambda: next(one.steps), times=1))


def launch(at):
    """Milliseconds to ask for a kernel that has nothing to do."""
    one = torch.ones(1, device=at.device)

    def ask():
        for _ in range(1000):
            one.add_(1)
        wait(one.device)

    return float(np.median([bench_train.timed(ask) for _ in range(5)])) / 1000


def race(at, report, name, batch_size, lengths, warm):
    """A step of stage 0 against PEFT's, an iteration of stage 2; in turns, medians."""
    examples = random_examples(at, name, batch_size * (warm + at.rounds + 12), lengths)

    def ours(stage, *more):
        return lambda: our_steps(at, name, examples, batch_size, stage, *more)

    def theirs(dtype):
        return lambda: their_steps(at, name, examples, batch_size, dtype)

    entrants = {"stage 0": ours(0), "PEFT, weights bfloat16": theirs(torch.bfloat16),
                "PEFT, weights float32": theirs(torch.float32), "stage 2": ours(2),
                "stage 2, in any order": ours(2, False, False)}
    if name == "SantaCoder":
        entrants["stage 2, checkpointing"] = ours(2, True)
    runs = {who: Contestant(at, make, warm) for who, make in entrants.items()}
    bench_train.take_turns(runs, 0, at.rounds)
    what = f"cost, {name}'s shape, {batch_size} x {'/'.join(map(str, lengths))}"
    for who, run in runs.items():
        low, median, high = np.quantile(run.ms, (0.1, 0.5, 0.9))
        report.add(f"{what}, {who}", ms=median, ms_range=[low, high], peak_gib=run.peak)
    for who, run in runs.items():
        found = {"busy_ms": busy(at, lambda: next(run.steps))}
        if who in ("stage 0", "stage 2"):
            found["gmacs"] = products(run)
        report.add(f"{what}, {who}, the GPU alone", **found)
    runs.clear()
    free()


def busy(at, step, times=3):
    """Milliseconds that the GPU computes for a step: the sum of its kernels; 0 if not told."""
    if at.device == "cpu":
        return 0.0
    kernels = [torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=kernels) as noted:
            for _ in range(times):
                step()
            wait(torch.device(at.device))
        return sum(e.self_device_time_total for e in noted.key_averages()) / 1e3 / times
    except RuntimeError as error:
        print(f"no profile: {error}")
        return 0.0


def products(run, times=4):
    """GMACs a step of the matrix products but attention's own kernel."""
    with (noted := bench_train.Products()):
        for _ in range(times):
            next(run.steps)
    return noted.macs / times / 1e9


def free():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.inference_mode()
def latency(at, report):
    """The palette: each subnet cut out and in place; the maxnet against the transformers library's.
    """
    cases = [("BERT-base", torch.bfloat16, 1, 64), ("BERT-base", torch.float32, 1, 64),
             ("SantaCoder", torch.bfloat16, 1, 8)]
    for name, dtype, *batches in cases:
        model = random_model(at, name, dtype)
        theirs = their_model(at, name, dtype).eval()
        space = palette_of(at, name, model)
        for batch in batches:
            what = f"latency, {name}'s shape, {dtype}, {batch} x 128"
            rows = evaluate.latency(model.extract, space, batch, 128, rounds=4, runs=3)
            slices = evaluate.latency(bench_latency.in_place(model), space, batch, 128, 4, 3)
            report.add(what, cut={phi.name: row["latency_ms"] for phi, row in zip(space, rows)},
                       in_place={phi.name: row["latency_ms"] for phi, row in zip(space, slices)})
            report.add(f"{what}, the whole", **against_theirs(at, model, theirs, batch, 128))
            ids = torch.ones(batch, 128, dtype=torch.long, device=at.device)
            cut = {phi.name: model.extract(phi) for phi in space}
            report.add(f"{what}, the GPU alone", cut={key: busy(
                at, lambda: small(ids, features=())) for key, small in cut.items()})
        del model, theirs, cut
        free()


def against_theirs(at, model, theirs, batch, tokens):
    """Milliseconds of both, in turns."""
    ids = torch.randint(model.config["vocab_size"], (batch, tokens), device=at.device)
    mask = torch.ones_like(ids)
    device = torch.device(at.device)
    return bench_latency.medians({
        "ours": lambda: (model(ids, features=()), wait(device)),
        "transformers": lambda: (theirs(ids, attention_mask=mask), wait(device)),
    }, at.rounds)


# -------------------------------------------------------------------------------- several processes

def one_of_two(rank, folder, words):
    sys.stdout = open(os.devnull, "w")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))
    assert mlfs.main([*words, "--out", f"{folder}/two"]) == 0


def processes(at, report):
    """torchrun where there are too few GPUs; two processes that share one, by gloo."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        words = [*toy(at), "--dtype", "float32", "--batch-size", "32"]
        more = torch.cuda.device_count() + 1
        many = start("-m", "torch.distributed.run", f"--nproc-per-node={more}", *words, "--out",
                     folder / "many", log=folder / "many.txt")
        one = start(*words, "--out", folder / "one", log=folder / "one.txt")
        begun = time.perf_counter()
        two = mp.start_processes(one_of_two, (folder, words[1:]), nprocs=2, join=False,
                                 start_method="spawn")
        try:
            while not two.join():
                pass
            seconds = time.perf_counter() - begun
            finish(one, folder / "one.txt")
            away = {name: float((t - load_file(folder / "two" / "adapters.safetensors")[name])
                                .abs().max())
                    for name, t in load_file(folder / "one" / "adapters.safetensors").items()}
            report.add("two processes, gloo, one device", seconds=seconds,
                       largest_difference=max(away.values()), scores_of_two=scores(folder / "two"),
                       scores_of_one=scores(folder / "one"))
            many.wait()
            errors = re.findall(r"error: .*", (folder / "many.txt").read_text())
            report.add(f"torchrun with {more} processes", code=many.returncode, errors=errors[:3])
        finally:
            for process in (*two.processes, one, many):
                process.kill()


# -------------------------------------------------------------------------------------- the tests

def suite(at, report):
    """The ordinary tests, which hide the GPU from themselves; and so that they use it."""
    runs = {}
    for name, more in {"on the CPU": {}, "with the GPU": {"CUDA_VISIBLE_DEVICES": "0"}}.items():
        log = at.folder / f"tests {name}.txt".replace(" ", "-")
        words = ["-n", "5"] if find_spec("xdist") else []
        words += ["--timeout", "60"] if find_spec("pytest_timeout") else []
        words += ["tests/test_slicing.py" if at.tiny else "tests"]
        runs[name] = log, start("-m", "pytest", "-q", "-rfE", "--tb=short", "--maxfail=40", "-p",
                                "no:cacheprovider", *words, log=log, **more)
    try:
        deadline = time.monotonic() + 100
        for name, (log, process) in runs.items():
            with suppress(subprocess.TimeoutExpired):
                process.wait(deadline - time.monotonic())
            process.send_signal(signal.SIGINT)       # it then tells what it has found so far
            process.wait()
            lines = log.read_text().splitlines()
            failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
            report.add(f"tests, {name}", summary=lines[-1], failed=failed)
    finally:
        for _, process in runs.values():
            process.kill()


# ------------------------------------------------------------------------------------ all parts

PARTS = {"logits": (logits, 60), "training": (training, 60), "bits": (bits, 60),
         "commands": (commands, 115), "bert": (bert, 80), "santacoder": (santacoder, 80),
         "codellama": (codellama, 60), "latency": (latency, 60),
         "processes": (processes, 110), "toy": (whole_toy, 120), "suite": (suite, 120)}


class Report:
    """All figures, in a file that is whole after each."""

    def __init__(self, path, about):
        self.path = path
        self.figures = {"about": about}

    def add(self, name, **values):
        values = {key: rounded(value) for key, value in values.items()}
        self.figures[name] = [*self.figures.get(name, []), values]
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in values.items()),
              flush=True)
        self.path.write_text(json.dumps(self.figures, indent=1, ensure_ascii=False) + "\n")


def rounded(value):
    """Numbers with four digits, as plain JSON."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.4g}")
    return value


@contextmanager
def time_limit(seconds):
    def stop(number, frame):
        raise TimeoutError(f"it took more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def versions():
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main():
    parser = argparse.ArgumentParser(usage="python tests/by_hand/gpu.py FIGURES.json [options]")
    parser.add_argument("figures", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try this script")
    parser.add_argument("--patience", type=int, default=1, help="multiplies each part's limit")
    args = parser.parse_args()
    at = Setting(args.device, args.tiny, args.rounds, args.figures.resolve().parent)
    about = {"device": evaluate.device_name(evaluate.check_device(args.device)),
             "command": sys.argv, "seed": 0} | versions()
    report = Report(args.figures, about)
    print(about, flush=True)
    for name in args.parts.split(","):
        part, seconds = PARTS[name]
        begun = time.perf_counter()
        result = "done"
        try:
            with time_limit(args.patience * seconds):
                part(at, report)
        except Exception as error:
            traceback.print_exc()
            result = f"FAILED: {type(error).__name__}: {str(error)[:1500]}"
        free()
        report.add(f"part {name}", result=result, seconds=time.perf_counter() - begun)


if __name__ == "__main__":
    main()
