"""Multistage Low-rank Fine-tuning of Super-transformers (Kundu et al., NAACL 2024): Algorithm 1 and its command line.

    python mlfs.py                                   # the built-in toy: no download, about two minutes on two cores
    python mlfs.py --task sst2                       # BERT-base on SST-2

Read from the top: hyper-parameters, the configuration space 𝒜, the losses, then `mlfs`, which is Algorithm 1 line by line.
"""
import argparse
import dataclasses
import itertools
import json
import math
import platform
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import data
import evaluate
from model import SubnetConfig, SuperTransformer, load_pretrained, replacing


# ---------------------------------------------------------------------------------------------------- hyper-parameters

def setting(default, help: str, choices: tuple[str, ...] | None = None):
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class HyperParameters:
    """Every knob of the method: default, the paper's symbol, and where it comes from. The command line is made from this."""
    rank: int = setting(8, "r, rank of A_s and B_s (App. A)")
    alpha: float = setting(0.9, "α, distillation factor in [0, 1] (App. A)")
    beta: float = setting(0.1, "β_l, weight of the feature loss, the same for all l (App. A)")
    gamma: float = setting(2.0, "γ, exponent of the gradient scaling (App. A: 1 for SST-2, 2 otherwise)")
    temperature: float = setting(1.0, "t ≥ 1, softens both distributions of the KD loss (Sec. 5; its value is not given)")
    kl: str = setting("reverse", "KL[student, teacher] as printed (reverse), or Hinton's KL[teacher, student] (forward)", ("reverse", "forward"))
    kd_t2: bool = setting(False, "multiply the KD loss by t² (not in the paper)")
    d_low: int = setting(64, "d_low, rows of the projections U (Sec. 5; its value is not given)")
    fd_sum: bool = setting(False, "sum the squared feature distance over d_low as printed, rather than average it")
    learn_u: bool = setting(False, "learn U, with its rows kept orthonormal, rather than draw it once")
    epochs: tuple[int, ...] = setting((8, 8, 8), "epochs E_0,E_1,E_2 of the three stages (App. A: at most 8, SST-2 3)")
    batch_size: int = setting(64, "|ℬ| (App. A: 128 for QQP, MNLI, QNLI, else 64)")
    learning_rate: float = setting(1e-3, "initial learning rate (App. A: 5e-4 for QNLI, MNLI, else 1e-3)")
    warmup: float = setting(0.06, "share of a stage's steps in which the learning rate rises; it then falls to 0 linearly")
    clip: float = setting(1.0, "largest norm of Eq. 6's gradient; 0 does not clip")
    max_length: int = setting(128, "tokens per example (App. A)")
    num_subnets: int = setting(4, "K, subnets per iteration: maxnet, minnet and K-2 drawn at random")
    widths: tuple[float, ...] = setting((1.0, 0.75, 0.5), "shares of the heads and FFN neurons in 𝒜; 1 is always in")
    depths: tuple[float, ...] = setting((1.0, 0.75, 0.5), "shares of the layers in 𝒜; 1 is always in")
    hidden: tuple[float, ...] = setting((1.0,), "shares of the hidden size in 𝒜; 1 is always in")
    reorder: bool = setting(True, "put important heads and neurons first after stage 0")
    seed: int = setting(0, "of the head, A_s, U, the order of the data and the subnets drawn")
    dtype: str = setting("auto", "of the frozen weights; auto is bfloat16 where the hardware has it", ("auto", "float32", "bfloat16"))

    def __post_init__(self):
        checks = {"rank must be at least 1": self.rank >= 1, "alpha must lie in [0, 1]": 0 <= self.alpha <= 1,
                  "beta must be at least 0": self.beta >= 0, "gamma must be at least 0": self.gamma >= 0,
                  "temperature must be at least 1": self.temperature >= 1, "d_low must be at least 1": self.d_low >= 1,
                  "kl must be reverse or forward": self.kl in ("reverse", "forward"),
                  "epochs must be three whole numbers, at least 0": len(self.epochs) == 3 and min(self.epochs) >= 0,
                  "batch_size must be at least 1": self.batch_size >= 1, "learning_rate must be above 0": self.learning_rate > 0,
                  "warmup must lie in [0, 1)": 0 <= self.warmup < 1, "clip must be at least 0": self.clip >= 0,
                  "max_length must be at least 4": self.max_length >= 4, "num_subnets must be at least 1": self.num_subnets >= 1,
                  "seed must be at least 0": self.seed >= 0,
                  "dtype must be auto, float32 or bfloat16": self.dtype in ("auto", "float32", "bfloat16")}
        for rule, holds in checks.items():
            if not holds:                                            # nan fails every comparison
                raise ValueError(f"{rule}, not {getattr(self, rule.split()[0])}")


LARGE = {"batch_size": 128}
TASK_SETTINGS = {                                                    # App. A, where it departs from the defaults above
    "sst2": {"epochs": (3, 3, 3), "gamma": 1.0}, "qqp": LARGE,
    "mnli": LARGE | {"learning_rate": 5e-4}, "qnli": LARGE | {"learning_rate": 5e-4},
    "toy": {"epochs": (4, 2, 6), "gamma": 1.0, "learning_rate": 3e-3, "dtype": "float32"},       # ours
}


# ------------------------------------------------------------------------------------------ the configuration space 𝒜

def depth_order(layers: tuple[int, ...]) -> tuple[int, ...]:
    """Layers by the order in which growing subnets take them: every other one counted from the last, then the same among
    the rest. Any prefix is evenly spread, holds the last layer, and contains every shorter prefix."""
    if len(layers) <= 1:
        return layers
    kept = layers[::-1][::2][::-1]
    return depth_order(kept) + depth_order(tuple(l for l in layers if l not in kept))


def configuration_space(maxnet: SubnetConfig, widths: Iterable[float] = (1, .75, .5), depths: Iterable[float] = (1, .75, .5),
                        hidden: Iterable[float] = (1,)) -> list[SubnetConfig]:
    """𝒜 (Sec. 4), all combinations; the first is the maxnet Φ_1, the last the minnet Φ_min.

    Width shares heads and FFN neurons, depth the layers (rounded, halves down; nested, so that every Φ contains the minnet's
    layers), hidden the embedding dimension. Raises ValueError for a share that this model cannot take.
    """
    def part(share: float, whole: int, what: str) -> int:
        number = math.ceil(share * whole - 0.5) if 0 < share <= 1 else 0
        if number < 1 or (what == "heads" and abs(number - share * whole) > 0.01):
            raise ValueError(f"a share of {share:g} is not possible: this model has {whole} {what}, and {share:g} x {whole} = "
                             f"{share * whole:g} is not a whole number of them from 1 to {whole}")
        return number

    space, order = [], depth_order(maxnet.layers)
    descending = lambda shares: sorted({1.0, *shares}, reverse=True)
    for hidden_share, width, depth in itertools.product(*map(descending, (hidden, widths, depths))):
        H, layers = part(hidden_share, maxnet.hidden_size, "hidden dimensions"), part(depth, len(order), "layers")
        space.append(SubnetConfig(H, part(width, maxnet.num_attention_heads, "heads"),
                                  part(width, maxnet.intermediate_size, "FFN neurons"), tuple(sorted(order[:layers])),
                                  name=f"w{width:g}-d{layers}" + (f"-h{H}" if H < maxnet.hidden_size else "")))
    return list(dict.fromkeys(space))                                # two shares can round to one depth


def sample_sub_transformers(space: list[SubnetConfig], stage: int, num_subnets: int, seed: tuple[int, ...]) -> list[SubnetConfig]:
    """𝒜_s of one iteration (Alg. 1 line 6): Φ_1 always; stage 1 varies width at full depth, stage 2 width and depth (Sec. 5).

    The paper only fixes Φ_1. Ours is the sandwich: maxnet, minnet of the stage, K-2 others drawn without replacement.
    """
    if stage == 0:
        return space[:1]
    allowed = [phi for phi in space if stage == 2 or phi.layers == space[0].layers]
    maxnet, minnet, others = allowed[0], allowed[-1], allowed[1:-1]
    drawn = random.Random(str(seed)).sample(others, min(max(num_subnets - 2, 0), len(others)))
    return list(dict.fromkeys([maxnet, minnet, *drawn]))[:num_subnets]


def gradient_scale(n_1: int, n_j: int, gamma: float) -> float:
    """(n_1/n_j)^γ of Eq. 6: smaller subnets get larger gradients."""
    return (n_1 / n_j) ** gamma


# ---------------------------------------------------------------------------------------------------------- the losses

def task_loss(z: Tensor, y: Tensor) -> Tensor:
    """ℓ_task: cross-entropy, or the squared error where labels are scores (STS-B); z (B, C), y (B,)."""
    return F.mse_loss(z[:, 0], y) if y.is_floating_point() else F.cross_entropy(z, y)


def kd_loss(z_j: Tensor, z_1: Tensor, temperature: float = 1.0, kl: str = "reverse", t2: bool = False) -> Tensor:
    """ℓ_KD = KL[σ(z_j/t), σ(z_1/t)] (Sec. 5), mean over the batch; z_j, z_1 (B, C).

    Printed with the student first: Σ p_j (log p_j - log p_1). "forward" swaps them. One output (regression) has no
    distribution: the squared error between student and teacher takes its place.
    """
    if z_j.size(-1) == 1:
        return F.mse_loss(z_j, z_1)
    p, q = (z_j / temperature).log_softmax(-1), (z_1 / temperature).log_softmax(-1)
    if kl == "forward":
        p, q = q, p
    return (p.exp() * (p - q)).sum(-1).mean() * (temperature ** 2 if t2 else 1)


def feature_projections(layers: Iterable[int], d_low: int, hidden_size: int, seed: int) -> dict[int, Tensor]:
    """U_1^l (d_low, d_1) with orthonormal rows for each layer of g_min. The paper leaves their start open."""
    generator, d_low = torch.Generator().manual_seed(seed), min(d_low, hidden_size)
    return {l: torch.linalg.qr(torch.randn(hidden_size, d_low, generator=generator))[0].T.contiguous() for l in layers}


def fd_loss(h_j: dict[int, Tensor], h_1: dict[int, Tensor], U: dict[int, Tensor], beta: float,
            mask: Tensor | None = None, fd_sum: bool = False) -> Tensor:
    """ℓ_FD = Σ_l β_l ‖U_j^l h_j^l - U_1^l h_1^g(l)‖² over the minnet's layers l in U (Sec. 5); h (B, T, d) keyed by maxnet layer.

    U_j^l = U_1^l[:, :d_j] (Eq. 11). Mean over real tokens (mask (B, T), None: all) and over d_low; `fd_sum`: sum over d_low.
    """
    loss = torch.zeros((), device=next(iter(h_1.values())).device)
    for l, U_1 in U.items():
        projected = [h[l] @ U_1[:, :h[l].size(-1)].T.to(h[l].dtype) for h in (h_j, h_1)]     # Eq. 11, (B, T, d_low)
        square = (projected[0].float() - projected[1].float()).square().sum(-1)              # (B, T)
        distance = square.mean() if mask is None else (square * mask).sum() / mask.sum()
        loss = loss + beta * distance / (1 if fd_sum else len(U_1))
    return loss


def importance(model: SuperTransformer, examples: data.Examples, hp: HyperParameters) -> dict[str, Tensor]:
    """|∂ℓ_task/∂ξ| for a gate ξ = 1 on the output of every head and every FFN neuron, summed over 64 batches of TRAIN.

    With y = W (ξ ⊙ x), ∂ℓ/∂ξ_i = Σ_o W_oi ∂ℓ/∂W_oi: the gradient of the matrix that reads heads or neurons is enough.
    First-order Taylor importance as in DynaBERT (Hou et al., 2020), which takes it on the dev set.
    """
    device, D = next(model.parameters()).device, model.config["head_dim"]
    readers = {f"{l}.{kind}": linear.weight.requires_grad_(True) for l, layer in enumerate(model.layers)
               for kind, linear in (("heads", layer.attention_output), ("neurons", layer.output))}
    scores = dict.fromkeys(readers, 0.0)
    rows = np.random.default_rng(hp.seed).permutation(len(examples.labels))[:64 * 32]
    for x, y in data.batches(examples.take(rows), 32, seed=hp.seed, device=device):
        gradients = torch.autograd.grad(task_loss(model(**x)[0], y), list(readers.values()))
        for (key, W), dW in zip(readers.items(), gradients):
            gate = (W.detach().float() * dW.float()).sum(0)                                  # (N·D,) or (F,)
            scores[key] = scores[key] + (gate.view(-1, D).sum(1) if key.endswith("heads") else gate).abs()
    for W in readers.values():
        W.requires_grad_(False)
    return scores


# --------------------------------------------------------------------------------------------------------- Algorithm 1

@dataclass
class Iteration:
    """What `mlfs` yields: after line 2 (step 0, no losses) and after every line 15."""
    stage: int
    step: int
    steps: int
    optimizer: torch.optim.Optimizer
    U: dict[int, Tensor]
    examples: int = 0
    losses: dict[str, float] = dataclasses.field(default_factory=dict)       # by subnet name
    norm: float = 0.0                                                        # of Eq. 6's gradient, before clipping
    rate: float = 0.0


def mlfs(model: SuperTransformer, examples: data.Examples, space: list[SubnetConfig], hp: HyperParameters,
         resume: dict | None = None) -> Iterator[Iteration]:
    """Algorithm 1 as a generator; the model holds {A_s, B_s} when it ends. Numbers on the right are the paper's lines.

    resume {"stage", "step", "optimizer", "U"} goes on after that iteration: data and subnets depend on (seed, stage, step) only.
    Raises ValueError when a loss or a gradient is not finite, before it reaches any weight.
    """
    first, done, saved = (resume["stage"], resume["step"], resume["optimizer"]) if resume else (0, 0, None)
    device, maxnet, minnet = next(model.parameters()).device, space[0], space[-1]
    U = resume["U"] if resume else feature_projections(minnet.layers, hp.d_low, maxnet.hidden_size, hp.seed)
    U = {l: u.to(device).requires_grad_(hp.learn_u) for l, u in U.items()}
    for stage in range(first, 3):                                                                          # 1
        if model.num_stages == stage:                                # not when resumed in mid-stage
            if stage == 1 and hp.reorder:
                model.reorder(importance(model, examples, hp))
            model.add_stage(hp.rank, hp.seed)                                                              # 2
        trained = [p for p in (*model.parameters(), *U.values()) if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)
        if saved:
            optimizer.load_state_dict(optimizer.state_dict() | {"state": saved})
        steps = hp.epochs[stage] * math.ceil(len(examples.labels) / hp.batch_size)
        n = {phi: model.num_trainable(phi) for phi in space}         # n_j, the same all through a stage         9
        yield Iteration(stage, done, steps, optimizer, U)
        for step, (x, y) in enumerate(stage_batches(examples, hp, stage, done, device), done + 1):         # 3, 4
            losses = {}
            subnets = sample_sub_transformers(space, stage, hp.num_subnets, (hp.seed, stage, step))        # 6
            for phi in subnets:                                                                            # 7
                z, h = model(**x, phi=phi)                           # Π_Φ(W_Sup), inside every layer        5, 8, 10
                if phi == maxnet:
                    loss = task_loss(z, y)                           # α = 0 for Φ_1                           11
                    z_1, h_1 = z.detach(), {l: h[l].detach() for l in U}     # a teacher is not taught by its students
                else:
                    kd = kd_loss(z, z_1, hp.temperature, hp.kl, hp.kd_t2)
                    fd = fd_loss(h, h_1, U, hp.beta, x["mask"], hp.fd_sum)
                    loss = (1 - hp.alpha) * task_loss(z, y) + hp.alpha * (kd + fd)                         # 12
                (gradient_scale(n[maxnet], n[phi], hp.gamma) / len(subnets) * loss).backward()     # .grad sums Eq. 6, 13
                losses[phi.name] = loss.detach()
                del z, h, loss                                       # one subnet's graph is alive at a time
            norm = torch.nn.utils.clip_grad_norm_(trained, hp.clip or math.inf)
            values = check_finite(stage, step, losses, norm)
            rate = learning_rate(hp, step, steps)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()                                                                               # 15
            optimizer.zero_grad()
            if hp.learn_u:
                orthonormalise(U)
            yield Iteration(stage, step, steps, optimizer, U, len(y), values, float(norm), rate)
        done, saved = 0, None


def stage_batches(examples: data.Examples, hp: HyperParameters, stage: int, done: int, device) -> Iterator:
    """All batches of a stage after the first `done`; the order depends on (seed, stage, epoch)."""
    per_epoch = math.ceil(len(examples.labels) / hp.batch_size)
    for epoch in range(done // per_epoch, hp.epochs[stage]):
        for i, batch in enumerate(data.batches(examples, hp.batch_size, (hp.seed, stage, epoch), device)):
            if epoch * per_epoch + i >= done:
                yield batch


def learning_rate(hp: HyperParameters, step: int, steps: int) -> float:
    """Rises linearly over the first `warmup` share of the steps, then falls linearly to 0; step counts from 1."""
    rising = max(1, round(hp.warmup * steps))
    return hp.learning_rate * min(step / rising, (steps - step + 1) / max(1, steps - rising + 1))


def check_finite(stage: int, step: int, losses: dict[str, Tensor], norm: Tensor) -> dict[str, float]:
    """The losses as floats, by subnet name. ValueError names the first that is not finite."""
    values = dict(zip(losses, torch.stack(list(losses.values())).tolist()))
    for name, value in (values | {"gradient": float(norm)}).items():
        if not math.isfinite(value):
            what = "the gradient of all subnets together" if name == "gradient" else f"the loss of subnet {name}"
            raise ValueError(f"stage {stage}, step {step}: {what} is {value}; no weight was changed by it. "
                             f"Try a lower --learning-rate or a --clip above 0")
    return values


@torch.no_grad()
def orthonormalise(U: dict[int, Tensor]) -> None:
    """Bring the rows of each learned U back to orthonormal. Learned freely, U = 0 is the optimum of ℓ_FD."""
    for u in U.values():
        q, r = torch.linalg.qr(u.T)
        u.copy_((q * r.diagonal().sign()).T)


# ---------------------------------------------------------------------------------------------- what a run starts from

BANNER = """
{line}
NO {wanted}: IT IS NOT ON THIS MACHINE AND COULD NOT BE DOWNLOADED
({reason})
What follows is the BUILT-IN TOY, a 0.5M-parameter model on generated sentences. Its figures say nothing about {wanted}.
With network this command downloads BERT-base and the data; without, name your own: --model FOLDER --data-dir FOLDER.
{line}
"""


def find_inputs(task: str, model: Path | None, data_dir: Path | None) -> tuple[str, Path, Path, str]:
    """(task, model folder, data folder, note). On disk, else downloaded, else, when neither folder was named, the toy.

    Whatever was named never falls back: FileNotFoundError says what is missing and how to get it.
    """
    if task not in data.TASKS:
        raise ValueError(f"unknown task {task!r}; choose from {', '.join(data.TASKS)}")
    toy = data.DOWNLOADS / "toy"
    if task == "toy":
        return task, model or toy, data_dir or data.DOWNLOADS, ""
    if model is not None and not (model / "config.json").exists():
        raise FileNotFoundError(f"--model: there is no {model / 'config.json'}; weights/README.md says how to get checkpoints")
    bert, glue, row = data.DOWNLOADS / "bert-base-uncased", data_dir or data.DOWNLOADS / "glue", data.GLUE[task]
    try:
        if model is None and not (bert / "model.safetensors").exists():
            data.download_model(data.BERT_BASE, bert)
        if data_dir is None and not all((glue / row.folder / name).exists() for name in (row.train, *row.dev)):
            data.download_glue(task, glue)
    except OSError as error:
        if model is not None or data_dir is not None:
            raise FileNotFoundError(f"{'the data of ' + task if model else 'BERT-base'} could not be downloaded ({error}); put it "
                                    f"into {glue / row.folder if model else bert} or name its folder with "
                                    f"{'--data-dir' if model else '--model'}") from None
        wanted = f"BERT-BASE ON {task.upper()}"
        print(BANNER.format(line="!" * 110, wanted=wanted, reason=error), flush=True)
        return "toy", toy, glue, f"TOY RUN, not {wanted}: nothing could be downloaded"
    return task, model or bert, glue, ""


def pick_dtype(name: str, device: str) -> torch.dtype:
    """auto: bfloat16 where the hardware multiplies it natively."""
    if name != "auto":
        return getattr(torch, name)
    native = torch.cuda.is_bf16_supported(False) if device.startswith("cuda") else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def hold_out(examples: data.Examples, seed: int) -> tuple[data.Examples, data.Examples]:
    """(train, held-out): 5% of TRAIN, at most 512 examples, to watch the maxnet by; dev is measured, never used."""
    rows = np.random.default_rng(seed).permutation(len(examples.labels))
    size = min(512, len(rows) // 20)
    return examples.take(np.sort(rows[size:])), examples.take(np.sort(rows[:size]))


# -------------------------------------------------------------------------------------------------- what a run leaves

RUN_FILES = ("run.json", "log.jsonl", "palette.json", "palette.md", "adapters.safetensors", "state.safetensors")


def write_json(path: Path, content: dict) -> None:
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def save_state(folder: Path, model: SuperTransformer, at: Iteration) -> None:
    """All that `mlfs` needs to go on after iteration `at`: {A_s, B_s}, head, permutation, U, AdamW's moments."""
    tensors = {f"model.{name}": t for name, t in model.trained_state().items()}
    tensors |= {f"U.{l}": u.detach() for l, u in at.U.items()}
    for i, moments in at.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": t for name, t in moments.items()}
    with replacing(folder / "state.safetensors") as path:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, {"stage": str(at.stage), "step": str(at.step)})


def load_state(folder: Path, model: SuperTransformer) -> dict:
    """The inverse of `save_state`: fills the model, returns `mlfs`'s `resume`."""
    tensors, metadata = evaluate.read_trained(folder / "state.safetensors")
    model.load_trained_state({name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
    resume = {"stage": int(metadata["stage"]), "step": int(metadata["step"]), "optimizer": {}, "U": {}}
    for name, t in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "U":
            resume["U"][int(rest)] = t
        elif kind == "optimizer":
            resume["optimizer"].setdefault(int(rest.partition(".")[0]), {})[rest.partition(".")[2]] = t
    return resume


def peak_memory(device: str) -> int:
    """Bytes: the process's largest resident size, on a GPU the largest allocation there."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    try:
        import resource                                              # absent on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------------- the command line

def parse_arguments(argv: Iterable[str] | None) -> tuple[argparse.Namespace, dict]:
    """The run's options, and the hyper-parameters that were given."""
    parser = argparse.ArgumentParser(description="Fine-tune one transformer once, in three low-rank stages, and get a palette of "
                                     "smaller ones by slicing it (MLFS).", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--task", default="toy", help=f"one of {', '.join(data.TASKS)}")
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: BERT-base; the toy's own for toy)")
    parser.add_argument("--data-dir", type=Path, help="folder that holds SST-2/, MRPC/, ... (default: weights/glue)")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/TASK-MODEL)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the run folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the run folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    group = parser.add_argument_group("hyper-parameters (defaults from App. A, for the task)")
    numbers = {"epochs": int, "widths": float, "depths": float, "hidden": float}
    for field in dataclasses.fields(HyperParameters):
        flag, help = "--" + field.name.replace("_", "-"), f"{field.metadata['help']}; default {field.default}"
        if isinstance(field.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help)
        elif field.name in numbers:
            def several(text, number=numbers[field.name]):
                return tuple(number(part) for part in text.split(","))
            group.add_argument(flag, type=several, metavar="A,B,C", default=argparse.SUPPRESS, help=help)
        else:
            group.add_argument(flag, type=type(field.default), choices=field.metadata["choices"], default=argparse.SUPPRESS, help=help)
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(argv, argparse.Namespace(command=["mlfs.py", *argv]))
    names = {field.name for field in dataclasses.fields(HyperParameters)}
    return args, {name: value for name, value in vars(args).items() if name in names}


def prepare_folder(folder: Path, run: dict, resume: bool, overwrite: bool) -> dict:
    """Refuse, empty or take up the run folder; returns run.json as it stands. Only files of ours are ever deleted."""
    if resume and overwrite:
        raise ValueError("--resume and --overwrite contradict each other; give one of them")
    exists = folder.exists() and any(folder.iterdir())
    if exists and not (resume or overwrite):
        raise FileExistsError(f"{folder} exists already; go on with --resume, replace it with --overwrite, or choose another --out")
    if resume:
        old = evaluate.read_json(folder / "run.json")
        for key in ("task", "base", "data", "hyper_parameters"):
            if old.get(key) != (new := json.loads(json.dumps(run[key]))):
                different = [name for name in new if old.get(key, {}).get(name) != new[name]] if isinstance(new, dict) else []
                raise ValueError(f"{folder} was started with another {key} ({', '.join(different) or old.get(key)}); "
                                 f"--resume needs the command it was started with")
        return old
    folder.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "run.json", run)
    return run


STAGES = ("fine-tune the teacher (𝒜_0 = the maxnet)", "sample widths at full depth", "sample widths and depths")


@dataclass
class Run:
    """What `main` prepares and `train` works on; `settings` is run.json, `rows` the palette with its history."""
    folder: Path
    settings: dict
    hp: HyperParameters
    task: data.Task
    model: SuperTransformer
    space: list[SubnetConfig]
    train: data.Examples
    held_out: data.Examples
    splits: dict[str, data.Examples]
    rows: list[dict]

    def measure(self, moment: str) -> None:
        """Score every subnet on dev; palette.json and palette.md keep the score at every moment."""
        history = [row["history"] for row in self.rows] or [{} for _ in self.space]
        rows = evaluate.palette(self.model, self.space, self.task, self.splits)
        self.rows = [row | {"history": before | {moment: row["score"]}} for row, before in zip(rows, history)]
        evaluate.write_palette(self.folder, self.settings["task"], self.task, self.rows, self.settings["note"])

    def held_out_score(self) -> float:
        """The maxnet's score on the held-out slice of TRAIN."""
        return evaluate.evaluate(self.model, self.space[0], self.task, {"dev": self.held_out})["score"]

    def save(self, at: Iteration) -> None:
        save_state(self.folder, self.model, at)
        self.settings["peak_memory"] = peak_memory(self.settings["device"])
        write_json(self.folder / "run.json", self.settings)


def prepare(args: argparse.Namespace, given: dict) -> tuple[Run, dict | None]:
    """Everything that can go wrong with the input goes wrong here, before the run folder is touched."""
    HyperParameters(**given)                                         # bad values are told before anything is downloaded
    task_name, model_folder, data_folder, note = find_inputs(args.task, args.model, args.data_dir)
    hp, task = HyperParameters(**{**TASK_SETTINGS.get(task_name, {}), **given}), data.TASKS[task_name]
    torch.manual_seed(hp.seed)
    dtype = pick_dtype(hp.dtype, args.device)
    model = load_pretrained(model_folder, max(1, len(task.labels)), dtype)
    positions = model.config["max_position_embeddings"]
    if given.get("max_length", 0) > positions:
        raise ValueError(f"max_length {hp.max_length} exceeds the {positions} positions of {model_folder}")
    hp = dataclasses.replace(hp, max_length=min(hp.max_length, positions))
    space = configuration_space(model.maxnet, hp.widths, hp.depths, hp.hidden)
    tokenizer = data.load_tokenizer(model_folder, model.config["vocab_size"])
    splits = {name: data.encode(tokenizer, rows, hp.max_length) for name, rows in data.load_task(task_name, data_folder).items()}
    train, held_out = hold_out(splits.pop("train"), hp.seed)
    name = "toy" if model_folder == data.DOWNLOADS / "toy" and task_name == "toy" else f"{task_name}-{model_folder.name}"
    folder = args.out or Path("runs") / name
    settings = {
        "task": task_name, "note": note, "num_labels": model.config["num_labels"],
        "base": {"folder": str(model_folder), "sha256": data.sha256(model_folder / "model.safetensors")},
        "data": {"folder": str(data_folder), "train": len(train.labels), "held_out": len(held_out.labels)}
        | {split: len(examples.labels) for split, examples in splits.items()},
        "hyper_parameters": dataclasses.asdict(hp), "space": [evaluate.describe(model, phi) for phi in space],
        "device": args.device, "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
        "machine": platform.platform(), "python": platform.python_version(), "torch": torch.__version__,
        "seconds": [0.0, 0.0, 0.0], "peak_memory": 0, "command": args.command}
    settings = prepare_folder(folder, settings, args.resume, args.overwrite)
    resume = load_state(folder, model) if args.resume and (folder / "state.safetensors").exists() else None
    rows = evaluate.read_json(folder / "palette.json")["subnets"] if resume and (folder / "palette.json").exists() else []
    keep_log(folder / "log.jsonl", resume)
    return Run(folder, settings, hp, task, model.to(args.device), space, train, held_out, splits, rows), resume


def train(run: Run, resume: dict | None) -> None:
    """Runs `mlfs` and does all that is not the algorithm: progress, log, checkpoints, palettes, the watch over the maxnet."""
    hp, model, total, note = run.hp, run.model, run.settings["space"][0]["parameters"], run.settings["note"]
    with open(run.folder / "log.jsonl", "a", encoding="utf-8") as file:
        def log(at: Iteration, **values) -> None:
            file.write(json.dumps({"stage": at.stage, "step": at.step} | values | ({"note": note} if note else {})) + "\n")
            file.flush()

        for at in mlfs(model, run.train, run.space, hp, resume):
            if not at.losses:                                        # a stage begins, or goes on
                if at.step == 0 and at.stage == 1 and hp.reorder:
                    run.measure("reordered")
                head = sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] in model.head)
                n_1 = model.num_trainable(run.space[0])
                print(f"\nStage {at.stage}: {STAGES[at.stage]}; trained: A_{at.stage}, B_{at.stage} ({n_1:,} entries) and the head "
                      f"({head:,}), {(n_1 + head) / total:.1%} of the model; {at.steps} steps", flush=True)
                reference = run.held_out_score() if len(run.held_out.labels) else None
                examples = len(run.train.labels) * hp.epochs[at.stage]
                bar = tqdm(total=examples, initial=min(at.step * hp.batch_size, examples), unit=" examples", desc=f"stage {at.stage}",
                           disable=None, dynamic_ncols=True)
                started = time.monotonic()
            else:
                bar.update(at.examples)
                bar.set_postfix_str(" ".join(f"{name} {loss:.3f}" for name, loss in at.losses.items()), refresh=False)
                if at.step % 10 == 0 or at.step == at.steps:
                    log(at, loss=at.losses, gradient_norm=at.norm, learning_rate=at.rate)
            if at.step == at.steps or (at.losses and at.step % 200 == 0):
                run.settings["seconds"][at.stage] += time.monotonic() - started
                if at.stage > 0 and reference is not None:
                    score = run.held_out_score()
                    log(at, held_out=score, at_stage_start=reference)
                    if score < reference - 0.05:
                        bar.write(f"warning: stage {at.stage}, step {at.step}: the maxnet's {run.task.metrics[0]} on held-out training data "
                                  f"fell from {100 * reference:.1f} to {100 * score:.1f}, and its students follow it; a lower "
                                  f"--learning-rate or --clip helps", file=sys.stderr)
                if at.step == at.steps:
                    bar.close()
                    run.measure(f"stage {at.stage}" if at.stage else "sliced teacher")
                    show_stage(run.rows, at.stage)
                    with replacing(run.folder / "adapters.safetensors") as path:
                        save_file(model.trained_state(), path, {"task": run.settings["task"], "stage": str(at.stage), "note": note})
                run.save(at)
                started = time.monotonic()


def main(argv: Iterable[str] | None = None) -> int:
    args, given = parse_arguments(argv)
    run, resume = prepare(args, given)
    s, hp, space = run.settings, run.hp, run.space
    print(f"MLFS on {s['task']}: {s['base']['folder']} ({type(run.model).__name__}, {s['space'][0]['parameters'] / 1e6:.1f}M parameters), "
          f"{s['data']['train']:,} train, {s['data']['held_out']:,} held out, {s['data']['dev']:,} dev\n"
          f"𝒜: {len(space)} subnets, {space[0].name} to {space[-1].name}; r = {hp.rank}, α = {hp.alpha:g}, γ = {hp.gamma:g}; "
          f"{s['device']}, {s['dtype']}, seed {hp.seed}; writes {run.folder}/", flush=True)
    train(run, resume)
    best, size = evaluate.smallest_as_good(run.rows), (run.folder / "adapters.safetensors").stat().st_size
    print(f"\n{s['task']}, {run.task.metrics[0]} on dev ({s['data']['dev']} examples), in points\n\n{evaluate.final_table(run.rows)}\n")
    print(f"trained in {sum(s['seconds']):.0f} s, at most {s['peak_memory'] / 2**30:.1f} GiB; {run.folder}/adapters.safetensors "
          f"({size / 1e6:.1f} MB) and the base model make all {len(space)} subnets")
    print(f"{s['note'] + '. ' if s['note'] else ''}Ship {best['name']}: {best['parameters'] / 1e6:.2f}M parameters, {100 * best['score']:.1f} ± "
          f"{100 * best['stderr']:.1f}, the smallest within one standard error of the best.")
    return 0


def keep_log(path: Path, resume: dict | None) -> None:
    """On resuming, drop the lines that were logged after the checkpoint: they will be written again."""
    if path.exists():
        at = (resume["stage"], resume["step"]) if resume else (0, 0)
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if json_position(line) <= at]
        with replacing(path) as beside:
            beside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def json_position(line: str) -> tuple[float, float]:
    try:
        entry = json.loads(line)
        return entry["stage"], entry["step"]
    except (ValueError, KeyError, TypeError):                        # a line cut off by a crash
        return math.inf, math.inf


def show_stage(rows: list[dict], stage: int) -> None:
    """The palette before and after a stage."""
    *before, after = list(rows[0]["history"])
    flat = [row | row["history"] for row in rows]
    columns = {"name": "subnet", "parameters": "parameters", "encoder_parameters": "encoder"}
    columns |= {before[-1]: f"before ({before[-1]})"} if before else {}
    print(evaluate.table(flat, columns | {after: f"after stage {stage}" if stage else after, "stderr": "± s.e."}), flush=True)


if __name__ == "__main__":
    sys.exit(evaluate.exit_on_bad_input(main))
