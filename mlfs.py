"""Multistage Low-rank Fine-tuning of Super-transformers (Kundu et al., NAACL 2024).

    python mlfs.py                      # the built-in toy: no download, 2 to 5 minutes
    python mlfs.py --task sst2          # BERT-base on SST-2
    python mlfs.py --task python        # SantaCoder on Python code

Read from the top: hyper-parameters, the configuration space 𝒜, the losses, then `mlfs`, which is
Algorithm 1 with the paper's line numbers in the right margin. The rest is the command line.
"""
import argparse
import dataclasses
import itertools
import json
import math
import os
import platform
import random
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import evaluate
from model import Decoder, SubnetConfig, SuperTransformer, load_pretrained


# ------------------------------------------------------------------------------ hyper-parameters

def setting(default, help: str, choices: tuple[str, ...] | None = None):
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class HyperParameters:
    """Every knob: default, the paper's symbol, its source. The command line is made from it."""
    rank: int = setting(8, "r, rank of A_s and B_s (App. A)")
    alpha: float = setting(0.9, "α, distillation factor in [0, 1] (App. A)")
    beta: float = setting(0.1, "β_l, weight of the feature loss, the same for all l (App. A)")
    gamma: float = setting(2.0, "γ of the gradient scaling (App. A: 1 for SST-2, 2 otherwise; "
                           "Prop. 2 has γ ≥ 1, 0 switches the scaling off)")
    teacher: str = setting("maxnet", "of the subnets: the maxnet of the moment (Sec. 5), or the "
                           "network of stage 0, fixed from then on (Sec. 4), its head too",
                           ("maxnet", "fixed"))
    temperature: float = setting(1.0, "t ≥ 1 of the KD loss (Sec. 5, no value given)")
    kl: str = setting("reverse", "KL[student, teacher] as printed (reverse), or Hinton's "
                      "KL[teacher, student] (forward)", ("reverse", "forward"))
    kd_t2: bool = setting(False, "multiply the KD loss by t² (not in the paper)")
    d_low: int = setting(64, "d_low, rows of the projections U (Sec. 5, no value given)")
    fd_sum: bool = setting(False, "sum the feature distance over d_low as printed, not average it")
    learn_u: bool = setting(False, "learn U, rows kept orthonormal, rather than draw it once")
    epochs: tuple[int, ...] = setting((8, 8, 8), "E_0,E_1,E_2, epochs of the three stages "
                                      "(App. A: at most 8, SST-2 3)")
    batch_size: int = setting(64, "|ℬ| (App. A: 128 for QQP, MNLI, QNLI, else 64)")
    learning_rate: float = setting(1e-3, "initial one (App. A: 5e-4 for QNLI, MNLI, else 1e-3)")
    warmup: float = setting(0.06, "share of a stage's steps in which the rate rises (ours)")
    clip: float = setting(1.0, "largest norm of Eq. 6's gradient; 0 does not clip (ours)")
    max_length: int = setting(128, "tokens per example (App. A)")
    num_subnets: int = setting(4, "K, subnets an iteration: maxnet, minnet, K-2 drawn (Eq. 4)")
    widths: tuple[float, ...] = setting((1.0, 0.75, 0.5), "shares of heads, neurons in 𝒜 (ours)")
    depths: tuple[float, ...] = setting((1.0, 0.75, 0.5), "shares of the layers in 𝒜 (ours)")
    hidden: tuple[float, ...] = setting((1.0,), "shares of the hidden size in 𝒜 (ours)")
    subnets: str = setting("grid", "𝒜: the grid of the shares above, or the subnets whose sizes "
                           "Table 1 (santacoder) or Table 2 (codellama) gives",
                           ("grid", "santacoder", "codellama"))
    reorder: bool = setting(True, "put important heads, neurons first after stage 0 (ours)")
    adapters: str = setting("low-rank", "train A_s, B_s; or all of W, the full-rank (non-LoRA) "
                            "MLFS of App. B and the supernets before it", ("low-rank", "full"))
    init: str = setting("pretrained", "start of W; random is the baseline of Figs. 5 and 6",
                        ("pretrained", "random"))
    checkpointing: bool = setting(False, "keep no activations inside layers, compute them again in "
                                  "the backward pass: less memory, a third more time")
    train_examples: int = setting(0, "train on so many examples, drawn with the seed (Tables 1-2: "
                                  "10K to 1.2M); 0: all")
    dev_examples: int = setting(0, "evaluate on so many examples, drawn once for all seeds; 0: all")
    validate_every: int = setting(0, "log the dev score of every subnet after so many steps (the "
                                  "curves of Figs. 5 and 7); 0: never")
    seed: int = setting(0, "of the head, A_s, U, the order of the data, the subnets drawn")
    dtype: str = setting("auto", "of the frozen weights; auto: bfloat16 where native (ours)",
                         ("auto", "float32", "bfloat16"))

    def __post_init__(self):
        least = {"rank": 1, "beta": 0, "temperature": 1, "d_low": 1, "batch_size": 1, "clip": 0,
                 "max_length": 4, "num_subnets": 1, "train_examples": 0, "dev_examples": 0,
                 "validate_every": 0}
        rules = {f"{name} must be at least {n}": getattr(self, name) >= n
                 for name, n in least.items()} | {
            "alpha must lie in [0, 1]": 0 <= self.alpha <= 1,
            "gamma must lie in [0, 10]": 0 <= self.gamma <= 10,
            "epochs must be three whole numbers from 0 on":
                len(self.epochs) == 3 and min(self.epochs) >= 0,
            "learning_rate must be above 0": self.learning_rate > 0,
            "warmup must lie in [0, 1)": 0 <= self.warmup < 1,
            "seed must lie in [0, 2^32)": 0 <= self.seed < 2 ** 32,
            "dtype must be auto or float32 with --adapters full":
                self.adapters == "low-rank" or self.dtype != "bfloat16",
            "teacher must be maxnet with --adapters full":
                self.adapters == "low-rank" or self.teacher == "maxnet",
        }
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"] or (getattr(self, field.name),)
            rules[f"{field.name} must be {' or '.join(map(str, choices))}"] = \
                getattr(self, field.name) in choices
        for rule, holds in rules.items():                            # nan fails every comparison
            if not holds:
                raise ValueError(f"{rule}, not {getattr(self, rule.split()[0])}")


LARGE = {"batch_size": 128}
TASK_SETTINGS = {                                # App. A, where it departs from the defaults above.
    # App. A also starts RTE and MRPC from a checkpoint fine-tuned on MNLI: name one with --model.
    "sst2": {"epochs": (3, 3, 3), "gamma": 1.0},
    "qqp": LARGE,
    "mnli": LARGE | {"learning_rate": 5e-4},
    "qnli": LARGE | {"learning_rate": 5e-4},
    "toy": {"epochs": (4, 2, 6), "gamma": 1.0, "learning_rate": 3e-3, "dtype": "float32"},   # ours
    "python": {"epochs": (1, 1, 1), "gamma": 1.0, "batch_size": 8, "max_length": 512,         # ours
               "validate_every": 100, "dev_examples": 64},
}


# -------------------------------------------------------------------- the configuration space 𝒜

def depth_order(layers: tuple[int, ...]) -> tuple[int, ...]:
    """Layers (consecutive ones) in the order in which growing subnets take them.

    The last, the first, then each time the middle of the widest gap: any prefix is spread over the
    whole depth and contains every shorter one. Without either end slices are worse (README).
    """
    order = list(dict.fromkeys((layers[-1], layers[0])))
    while len(order) < len(layers):
        kept = sorted(order)
        before, after = max(zip(kept, kept[1:]), key=lambda gap: gap[1] - gap[0])
        order.append((before + after + 1) // 2)
    return tuple(order)


def outside_in(layers: tuple[int, ...]) -> tuple[int, ...]:
    """The order for decoders: the last, the first, the last but one, the second, ...

    So a shallow subnet lacks a block in the middle: the layers of a pre-LN model add to one
    residual stream, the middle adds the least, and without the first nothing works (README).
    """
    return tuple(l for pair in zip(layers[::-1], layers) for l in pair)[:len(layers)]


def configuration_space(maxnet: SubnetConfig, widths: Iterable[float] = (1, 0.75, 0.5),
                        depths: Iterable[float] = (1, 0.75, 0.5),
                        hidden: Iterable[float] = (1,), head_group: int = 1,
                        order: Callable = depth_order) -> list[SubnetConfig]:
    """𝒜 (Sec. 4), all combinations: the first is the maxnet Φ_1, the last the minnet Φ_min.

    Width shares heads (in whole groups of head_group) and FFN neurons; depth shares layers (halves
    round down), kept in that order, so that every Φ contains the minnet's; hidden shares the
    embedding dimension. A share of 1 is always in. Raises ValueError for a share that this model
    cannot take, and for two that get one name.
    """
    def part(share: float, whole: int, what: str, exact: bool = False) -> int:
        number = math.ceil(share * whole - 0.5) if 0 < share <= 1 else 0
        if number < 1 or (exact and abs(number - share * whole) > 0.01):
            raise ValueError(f"a share of {share:g} is not possible: this model has {whole} "
                             f"{what}, and {share:g} x {whole} = {share * whole:g} is not a whole "
                             f"number of them from 1 to {whole}")
        return number

    space, layers_in_order = [], order(maxnet.layers)
    descending = (sorted({1.0, *shares}, reverse=True) for shares in (hidden, widths, depths))
    for h, w, d in itertools.product(*descending):
        size = part(h, maxnet.hidden_size, "hidden dimensions")
        groups, what = maxnet.num_attention_heads // head_group, f"groups of {head_group} heads"
        heads = part(w, groups, what if head_group > 1 else "heads", exact=True) * head_group
        neurons = part(w, maxnet.intermediate_size, "FFN neurons")
        depth = part(d, len(maxnet.layers), "layers")
        layers = tuple(sorted(layers_in_order[:depth]))
        name = f"w{w:.3g}-d{len(layers)}" + (f"-h{size}" if h < 1 else "")
        space.append(SubnetConfig(size, heads, neurons, layers, name))
    space = list(dict.fromkeys(space))                       # two shares may round to one depth
    names = [phi.name for phi in space]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two subnets would be called {twice[0]}: give shares that differ in "
                         f"their first three digits")
    return space


def nested(depth: int, kept: int) -> tuple[int, ...]:
    return tuple(sorted(outside_in(tuple(range(depth)))[:kept]))


# The paper gives only the sizes of its decoders (Tables 1 and 2); which shapes is our choice.
SUBNETS = {
    "santacoder": [SubnetConfig(2048, 16, 8192, nested(24, 24), "w1-d24"),               # 1.12B
                   SubnetConfig(2048, 12, 6144, nested(24, 24), "0.9B"),                 # 0.87B
                   SubnetConfig(2048, 12, 6144, nested(24, 18), "0.7B"),                 # 0.68B
                   SubnetConfig(2048, 8, 4096, nested(24, 18), "0.5B")],                 # 0.49B
    "codellama": [SubnetConfig(4096, 32, 11008, nested(32, 32), "w1-d32"),               # 6.74B
                  SubnetConfig(4096, 32, 11008, nested(32, 28), "6B"),                   # 5.93B
                  SubnetConfig(4096, 32, 11008, nested(32, 25), "5.3B"),                 # 5.32B
                  SubnetConfig(4096, 32, 11008, nested(32, 21), "4.5B")],                # 4.51B
}


def sample_sub_transformers(space: list[SubnetConfig], stage: int, num_subnets: int,
                            seed: tuple[int, ...]) -> list[SubnetConfig]:
    """𝒜_s of one iteration (Alg. 1 line 6): Φ_1, then others of the stage's kind (Sec. 5).

    Stage 0 has the teacher alone, stage 1 varies width at full depth, stage 2 width and depth.
    The paper fixes only Φ_1; we add the stage's minnet and K-2 others, without replacement.
    """
    if stage == 0:
        return space[:1]
    allowed = [phi for phi in space if stage == 2 or phi.layers == space[0].layers]
    maxnet, minnet, others = allowed[0], allowed[-1], allowed[1:-1]
    drawn = random.Random(str(seed)).sample(others, min(max(num_subnets - 2, 0), len(others)))
    return list(dict.fromkeys([maxnet, minnet, *drawn]))[:num_subnets]


def gradient_scale(n_1: int, n_j: int, gamma: float) -> float:
    """(n_1/n_j)^γ (Prop. 2, Eqs. 6 and 10): the smaller the subnet, the larger its gradient."""
    return (n_1 / n_j) ** gamma


# ------------------------------------------------------------------------------------ the losses

def task_loss(z: Tensor, y: Tensor) -> Tensor:
    """ℓ_task: cross-entropy; squared error where labels are scores (STS-B). z (B, C), y (B,)."""
    return F.mse_loss(z[:, 0], y) if y.is_floating_point() else F.cross_entropy(z, y)


def kd_loss(z_j: Tensor, z_1: Tensor, temperature: float = 1.0, kl: str = "reverse",
            t2: bool = False) -> Tensor:
    """ℓ_KD = KL[σ(z_j/t), σ(z_1/t)] (Sec. 5), mean over the batch; z_j, z_1 (B, C).

    Printed with the student first: Σ p_j (log p_j - log p_1). "forward" swaps them. One output
    (regression) is no distribution: squared error between student and teacher instead.
    """
    if z_j.size(-1) == 1:
        return F.mse_loss(z_j, z_1)
    p, q = (z_j / temperature).log_softmax(-1), (z_1 / temperature).log_softmax(-1)
    if kl == "forward":
        p, q = q, p
    return (p.exp() * (p - q)).sum(-1).mean() * (temperature ** 2 if t2 else 1)


class InChunks(torch.autograd.Function):
    """Σ loss(s[rows], rows) over chunks of rows, whose gradient is taken chunk by chunk.

    One chunk's logits are alive at a time: with V = 49,152, 16 MB of float32 logits hold 85 tokens.
    weights: what `loss` reads beside s (M, H) and may be trained.
    """

    @staticmethod
    def forward(ctx, loss: Callable, size: int, s: Tensor, *weights: Tensor) -> Tensor:
        total, ds, dW = 0.0, torch.zeros_like(s), [None] * len(weights)
        wanted = [i for i, W in enumerate(weights) if W.requires_grad]
        for start in range(0, len(s), size):
            rows = slice(start, start + size)
            with torch.enable_grad():
                part = s[rows].detach().requires_grad_()
                value = loss(part, rows)
            d, *d_wanted = torch.autograd.grad(value, [part, *(weights[i] for i in wanted)])
            total, ds[rows] = total + value.detach(), d
            for i, d in zip(wanted, d_wanted):
                dW[i] = d if dW[i] is None else dW[i] + d
        ctx.save_for_backward(ds, *dW)
        return total

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple:
        return None, None, *(None if d is None else g * d for d in ctx.saved_tensors)


def output_loss(model: SuperTransformer, s_j: Tensor, s_1: Tensor | None, y: Tensor,
                hp: HyperParameters, logits: int = 2 ** 22) -> Tensor:
    """(1-α) ℓ_task + α ℓ_KD from last states s_j, s_1 (B, H) or (B, T, H); s_1 None: α is 0.

    Only so many logits are alive at a time (`InChunks`): each chunk's mean is weighted by its share
    of the rows, so that they add up to the mean over all.
    """
    if y.dim() > 1:                                  # each position that has a next token is a row
        real = y != data.IGNORED
        s_j, s_1, y = s_j[real], None if s_1 is None else s_1[real], y[real]

    def loss(s: Tensor, rows: slice) -> Tensor:
        z = model.logits(s)
        value = task_loss(z, y[rows])
        if s_1 is not None:
            with torch.no_grad():
                z_1 = model.logits(s_1[rows])
            kd = kd_loss(z, z_1, hp.temperature, hp.kl, hp.kd_t2)
            value = (1 - hp.alpha) * value + hp.alpha * kd
        return value * (len(s) / len(y))

    weights = model.readout()
    return InChunks.apply(loss, max(1, logits // len(weights[-1])), s_j, *weights)


def feature_projections(layers: Iterable[int], d_low: int, hidden_size: int,
                        seed: int) -> dict[int, Tensor]:
    """U_1^l (d_low, d_1), for each layer of g_min (Sec. 5): at most hidden_size rows.

    Drawn, orthonormal and fixed (ours): the paper learns U, whose free optimum is U = 0.
    """
    generator, d_low = torch.Generator().manual_seed(seed), min(d_low, hidden_size)
    draw = lambda: torch.randn(hidden_size, d_low, generator=generator)
    return {l: torch.linalg.qr(draw())[0].T.contiguous() for l in layers}


@torch.no_grad()
def orthonormalise(U: dict[int, Tensor]) -> None:
    """Bring the rows of each learned U back to orthonormal: ℓ_FD's free optimum is U = 0."""
    for u in U.values():
        q, r = torch.linalg.qr(u.T)
        u.copy_((q * r.diagonal().sign()).T)


def fd_loss(h_j: dict[int, Tensor], h_1: dict[int, Tensor], U: dict[int, Tensor], beta: float,
            mask: Tensor | None = None, fd_sum: bool = False) -> Tensor:
    """ℓ_FD = Σ_l β_l ‖U_j^l h_j^l - U_1^l h_1^g(l)‖² (Sec. 5); h (B, T, d) keyed by maxnet layer.

    l runs over the minnet's layers g_min(l), the keys of U; U_j^l = U_1^l[:, :d_j] (Eq. 11).
    Mean over real tokens (mask (B, T); None: all) and over d_low (ours: the printed sum pulls as
    hard as ℓ_KD, and a run collapsed); fd_sum sums over d_low.
    """
    loss = torch.zeros((), device=next(iter(h_1.values())).device)
    for l, U_1 in U.items():
        low_j, low_1 = (h @ U_1[:, :h.size(-1)].T.to(h.dtype) for h in (h_j[l], h_1[l]))  # Eq. 11
        square = (low_j.float() - low_1.float()).square().sum(-1)                         # (B, T)
        distance = square.mean() if mask is None else (square * mask).sum() / mask.sum()
        loss = loss + beta * distance / (1 if fd_sum else len(U_1))
    return loss


def importance(model: SuperTransformer, examples: data.Examples,
               hp: HyperParameters) -> dict[str, Tensor]:
    """|∂ℓ_task/∂ξ| of a gate ξ = 1 on each head and FFN neuron, summed over TRAIN batches: at most
    64, of at most 32 examples.

    With y = W (ξ ⊙ x), ∂ℓ/∂ξ_i = Σ_o W_oi ∂ℓ/∂W_oi: the gradient of the matrix that reads heads or
    neurons is enough. As DynaBERT's (Hou et al., 2020), but on TRAIN. Keys as in `reorder`.
    """
    device, D = next(model.parameters()).device, model.config["head_dim"]
    readers = {f"{l}.{kind}": linear.weight
               for l, layer in enumerate(model.layers)
               for kind, linear in (("heads", layer.attention_output), ("neurons", layer.output))}
    frozen = [W.requires_grad_() for W in readers.values() if not W.requires_grad]
    scores, size = dict.fromkeys(readers, 0.0), min(32, hp.batch_size)
    rows = np.random.default_rng(hp.seed).permutation(len(examples.ids))[:64 * size]
    for x, y in data.batches(examples.take(rows), size, seed=hp.seed, device=device):
        s, _ = model.encode(**x, phi=model.maxnet)
        gradients = torch.autograd.grad(output_loss(model, s, None, y, hp), list(readers.values()))
        for (key, W), dW in zip(readers.items(), gradients):
            gate = (W.detach().float() * dW.float()).sum(0)                      # (N·D,) or (F,)
            gate = gate.view(-1, D).sum(1) if key.endswith("heads") else gate    # (N,) or (F,)
            scores[key] = scores[key] + gate.abs()
    for W in frozen:
        W.requires_grad_(False)
    add_up(list(scores.values()))                    # one and the same order in all processes
    return scores


# ----------------------------------------------------------------------------------- Algorithm 1

@dataclass
class Iteration:
    """What `mlfs` yields: as a stage begins or goes on (no losses), and after every line 15."""
    stage: int
    step: int
    steps: int
    optimizer: torch.optim.Optimizer
    U: dict[int, Tensor]
    examples: int = 0
    losses: dict[str, float] = dataclasses.field(default_factory=dict)           # by subnet name
    norm: float = 0.0                                    # of Eq. 6's gradient, before clipping
    rate: float = 0.0


def mlfs(model: SuperTransformer, examples: data.Examples, space: list[SubnetConfig],
         hp: HyperParameters, resume: dict | None = None) -> Iterator[Iteration]:
    """Algorithm 1 as a generator; when it ends the model holds all {A_s, B_s}.

    resume {"stage", "step", "optimizer", "U"} goes on after that iteration: batches and subnets
    depend on (seed, stage, step) alone. Raises ValueError when a loss or gradient is not finite,
    before it reaches any weight.
    """
    device, maxnet, minnet = next(model.parameters()).device, space[0], space[-1]
    at = resume or {"stage": 0, "step": 0, "optimizer": {}, "U": feature_projections(
        minnet.layers, hp.d_low, maxnet.hidden_size, hp.seed)}
    done, moments = at["step"], at["optimizer"]
    U = {l: u.to(device).requires_grad_(hp.learn_u) for l, u in at["U"].items()}
    for stage in range(at["stage"], 3):                                                        # 1
        if model.num_stages == stage:                        # not when resumed in mid-stage
            if stage == 1 and hp.reorder:
                model.reorder(importance(model, examples, hp))
            model.add_stage(hp.rank if hp.adapters == "low-rank" else None, hp.seed)           # 2
        fixed = model.fix_teacher() if stage > 0 and hp.teacher == "fixed" else None
        trained, optimizer = make_optimizer(model, U, moments)
        n = {phi: model.num_trainable(phi) for phi in space}                                   # 9
        batches = stage_batches(examples, hp, stage, done, device)
        steps = hp.epochs[stage] * math.ceil(len(examples.ids) / hp.batch_size)
        yield Iteration(stage, done, steps, optimizer, U)
        for step, batch in enumerate(batches, done + 1):                                       # 3,4
            losses, seed = {}, (hp.seed, stage, step)
            x, y, of_labels, of_tokens = my_share(*batch)    # all of it, 1 and 1, but in torchrun
            subnets = sample_sub_transformers(space, stage, hp.num_subnets, seed)              # 6
            for phi in subnets:                                                                # 7
                s, h = model.encode(**x, phi=phi, features=U if stage else ())         # 5,8,10
                if phi == maxnet:                            # α = 0; z_1, h_1 are constants
                    loss = of_labels * output_loss(model, s, None, y, hp)                      # 11
                    s_1, h_1 = s.detach(), {l: t.detach() for l, t in h.items()}
                    if fixed:                                # an option: Sec. 4's, not Sec. 5's
                        with torch.no_grad():
                            s_1, h_1 = fixed.encode(**x, phi=maxnet, features=U)
                else:                                        # (1-α) ℓ_task + α (ℓ_KD + ℓ_FD)
                    fd = of_tokens * fd_loss(h, h_1, U, hp.beta, x["mask"], hp.fd_sum)
                    loss = of_labels * output_loss(model, s, s_1, y, hp) + hp.alpha * fd       # 12
                scale = gradient_scale(n[maxnet], n[phi], hp.gamma) / len(subnets)
                (scale * loss).backward()                    # .grad adds up to Eq. 6          # 13
                losses[phi.name] = loss.detach()
                del s, h, loss                               # one subnet's graph at a time
            # Eq. 6 over all processes (ours); nothing to do where there is one.
            add_up([p.grad for p in trained if p.grad is not None] + [*losses.values()])
            norm = torch.nn.utils.clip_grad_norm_(trained, hp.clip or math.inf)
            losses = finite_losses(stage, step, losses, norm)
            rate = optimizer.param_groups[0]["lr"] = learning_rate(hp, step, steps)
            optimizer.step()                                                                   # 15
            optimizer.zero_grad()
            if hp.learn_u:
                orthonormalise(U)
            size = len(batch[1])
            yield Iteration(stage, step, steps, optimizer, U, size, losses, float(norm), rate)
        done, moments = 0, {}


def processes() -> tuple[int, int]:
    """(This one's rank, how many): (0, 1) unless started by torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def my_share(x: dict, y: Tensor) -> tuple[dict, Tensor, float, float]:
    """This process's rows of a batch, and their share of all its labels and of all its real tokens.

    Losses are means: weighted by these shares, the processes' gradients add up to the batch's.
    """
    rank, world = processes()
    if world == 1:
        return x, y, 1.0, 1.0
    rows, real = (slice(rank, None, world), 1) if rank < len(y) else (slice(1), 0)   # a tiny batch
    part = {name: None if t is None else t[rows] for name, t in x.items()}
    labels = y != data.IGNORED
    mask = torch.ones_like(x["ids"]) if x["mask"] is None else x["mask"]
    of_labels, of_tokens = (float(t[rows].sum() / t.sum()) * real for t in (labels, mask))
    return part, y[rows], of_labels, of_tokens


def add_up(tensors: list[Tensor]) -> None:
    """Σ over all processes, in place, in one message: a few MB, for adapters and head are all."""
    if processes()[1] > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(total.view_as(t))


def make_optimizer(model: SuperTransformer, U: dict[int, Tensor],
                   moments: dict) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """What the stage trains, and AdamW over it (no weight decay: ours); moments: its state."""
    trained = [p for p in (*model.parameters(), *U.values()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)
    if moments:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return trained, optimizer


def stage_batches(examples: data.Examples, hp: HyperParameters, stage: int, done: int,
                  device: torch.device) -> Iterator:
    """A stage's batches after the first `done`; their order depends on (seed, stage, epoch)."""
    per_epoch = math.ceil(len(examples.ids) / hp.batch_size)
    for epoch in range(done // per_epoch, hp.epochs[stage]):
        seed = (hp.seed, stage, epoch)
        for i, batch in enumerate(data.batches(examples, hp.batch_size, seed, device)):
            if epoch * per_epoch + i >= done:
                yield batch


def learning_rate(hp: HyperParameters, step: int, steps: int) -> float:
    """Rises linearly over the first `warmup` share of the steps, then falls to 0; step from 1."""
    rising = max(1, round(hp.warmup * steps))
    falling = max(1, steps - rising + 1)
    return hp.learning_rate * min(step / rising, (steps - step + 1) / falling)


def finite_losses(stage: int, step: int, losses: dict[str, Tensor],
                  norm: Tensor) -> dict[str, float]:
    """The losses as floats. ValueError names stage, step and subnet of the first not finite."""
    values = dict(zip(losses, torch.stack(list(losses.values())).tolist()))
    named = {f"the loss of subnet {name}": value for name, value in values.items()}
    for what, value in (named | {"the norm of Eq. 6's gradient": float(norm)}).items():
        if not math.isfinite(value):
            raise ValueError(f"stage {stage}, step {step}: {what} is {value}; no weight was "
                             f"changed by it. Try a lower --learning-rate, or a --clip above 0")
    return values


# ------------------------------------------------------------------------------ the command line

MODEL_OPTIONS = ("max_length", "widths", "depths", "hidden")
STAGES = ("fine-tune the teacher (𝒜_0 = the maxnet)", "sample widths at full depth",
          "sample widths and depths")


@dataclass
class Run:
    """What `prepare` makes ready. `settings` is run.json, `rows` the palette with its history."""
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
        """Score every subnet on dev; the palette files keep the score at every moment."""
        history = [row["history"] for row in self.rows] or [{} for _ in self.space]
        rows = evaluate.palette(self.model, self.space, self.task, self.splits)
        self.rows = [row | {"history": past | {moment: row["score"]}}
                     for row, past in zip(rows, history)]
        measured = {"adapters": evaluate.digest(self.model.trained_state()),
                    "dtype": self.settings["dtype"]}
        evaluate.write_palette(self.folder, self.settings, self.task, self.rows, measured)

    def validate(self) -> dict[str, float]:
        """Every subnet's score on dev."""
        return {phi.name: evaluate.evaluate(self.model, phi, self.task, self.splits)["score"]
                for phi in self.space}

    def held_out_score(self) -> float:
        """The maxnet's score on the held-out slice of TRAIN; 0 where TRAIN is too small for one."""
        if not self.held_out.ids:
            return 0.0
        held_out = {"dev": self.held_out}
        return evaluate.evaluate(self.model, self.space[0], self.task, held_out)["score"]

    def save(self, at: Iteration) -> None:
        evaluate.save_state(self.folder, self.model, at.optimizer, at.U, at.stage, at.step)
        self.settings["peak_memory"] = evaluate.peak_memory(self.settings["device"])
        evaluate.write_json(self.folder / "run.json", self.settings)


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, dict]:
    """The run's options, and those hyper-parameters that were given."""
    parser = argparse.ArgumentParser(
        description="Fine-tune one transformer once, in three low-rank stages, and get a palette "
                    "of smaller ones by slicing it (MLFS).")
    parser.add_argument("--task", default="toy", help=f"{', '.join(data.TASKS)}; default toy")
    parser.add_argument("--model", type=Path, help="checkpoint folder; default BERT-base")
    parser.add_argument("--data-dir", type=Path, help="holds SST-2/ etc.; default weights/glue")
    parser.add_argument("--out", type=Path, help="run folder; default runs/TASK-MODEL")
    parser.add_argument("--resume", action="store_true", help="go on with the run in its folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in its folder")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"cpu, cuda, ...; default {device}")
    group = parser.add_argument_group("hyper-parameters (a task's own values: TASK_SETTINGS)")
    fields = dataclasses.fields(HyperParameters)
    for field in fields:
        flag, default = "--" + field.name.replace("_", "-"), field.default
        help = f"{field.metadata['help']}; default {default}"
        options = {"default": argparse.SUPPRESS, "help": help}
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, tuple):
            def numbers(text: str, kind=type(default[0])) -> tuple:      # 2/3 is a share, too
                try:
                    return tuple(kind(Fraction(part) if "/" in part and kind is float else part)
                                 for part in text.split(","))
                except ArithmeticError as error:
                    raise ValueError(text) from error
            options |= {"type": numbers, "metavar": "A,B,C"}
        else:
            options |= {"type": type(default), "choices": field.metadata["choices"]}
        group.add_argument(flag, **options)
    args = vars(parser.parse_args(argv))
    given = {field.name: args.pop(field.name) for field in fields if field.name in args}
    return argparse.Namespace(**args, command=["mlfs.py", *argv]), given


def join_processes(args: argparse.Namespace) -> None:
    """Under torchrun: one GPU each, or gloo between CPUs; rank 0 alone speaks."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if args.device.startswith("cuda"):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(evaluate.check_device(args.device))
    backend = "nccl" if args.device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))      # rank 0 may measure for long
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")


def prepare(args: argparse.Namespace, given: dict) -> tuple[Run, dict | None]:
    """Reads and checks all input, then takes the run folder: bad input leaves no trace."""
    HyperParameters(**given)                     # bad values are told before anything is downloaded
    evaluate.check_device(args.device)
    rank, world = processes()
    if rank:
        dist.barrier()                               # rank 0 downloads, the others find it there
    name, model_folder, data_folder, note = data.find_inputs(args.task, args.model, args.data_dir)
    if world > 1 and not rank:
        dist.barrier()
    if note:                                     # the toy takes no options meant for BERT-base
        given = {key: value for key, value in given.items() if key not in MODEL_OPTIONS}
    hp = HyperParameters(**{**TASK_SETTINGS.get(name, {}), **given})
    task, dtype = data.TASKS[name], pick_dtype(hp, args.device)
    torch.manual_seed(hp.seed)
    model = load_pretrained(model_folder, max(1, len(task.labels)), dtype)
    if isinstance(model, Decoder) != (name == "python"):
        kind = "a decoder" if name == "python" else "an encoder"
        raise ValueError(f"--task {name} needs {kind}; {model_folder} is a {type(model).__name__}")
    if hp.init == "random":
        model.initialise(hp.seed)
    model.gradient_checkpointing = hp.checkpointing
    positions = model.config["max_position_embeddings"]
    if given.get("max_length", 0) > positions:
        raise ValueError(f"max_length {hp.max_length} exceeds the {positions} positions of "
                         f"{model_folder}")
    hp = dataclasses.replace(hp, max_length=min(hp.max_length, positions))
    if hp.rank > model.config["hidden_size"]:
        raise ValueError(f"rank {hp.rank} exceeds the hidden size {model.config['hidden_size']} of "
                         f"{model_folder}")
    if hp.batch_size < world:
        raise ValueError(f"--batch-size {hp.batch_size} is shared by {world} processes: one row "
                         f"each, at least")
    space = choose_space(hp, given, model, model_folder)
    tokenizer = data.load_tokenizer(model_folder, model.config["vocab_size"])
    rows = data.load_task(name, data_folder)
    splits = {split: data.encode(tokenizer, part, hp.max_length) for split, part in rows.items()}
    skipped = {"skipped": rows["train"].skipped} if rows["train"].skipped else {}
    train_split, held_out = data.hold_out(splits.pop("train"), hp.seed, hp.train_examples)
    splits = {split: data.draw(part, hp.dev_examples) for split, part in splits.items()}

    own = name == "toy" and model_folder == data.DOWNLOADS / "toy"
    default = "toy" if own else f"{name}-{model_folder.resolve().name}"
    folder = args.out or Path("runs") / default
    counts = {"train": train_split, "held_out": held_out} | splits
    settings = {
        "task": name, "note": note, "num_labels": max(1, len(task.labels)),
        "base": {"folder": str(model_folder.resolve()),
                 "sha256": evaluate.base_digest(model_folder)},
        "data": {"folder": str(data_folder.resolve())} | skipped
                | {split: len(part.ids) for split, part in counts.items()},
        "hyper_parameters": dataclasses.asdict(hp),
        "space": [evaluate.describe(model, phi) for phi in space],
        "device": args.device, "dtype": str(dtype).removeprefix("torch."),
        "processes": world, "threads": torch.get_num_threads(), "machine": platform.platform(),
        "processor": evaluate.device_name(args.device), "python": platform.python_version(),
        "torch": torch.__version__,
        "seconds": [0.0] * 3, "start_scores": [0.0] * 3, "peak_memory": 0, "command": args.command,
    }
    if not rank:
        settings = evaluate.take_folder(folder, settings, args.resume, args.overwrite)
    resume = evaluate.load_state(folder, model) if args.resume else None
    if not rank:
        evaluate.cut_log(folder / "log.jsonl", resume)
    rows = evaluate.read_palette(folder)["subnets"] if resume and not rank else []
    return Run(folder, settings, hp, task, model.to(args.device), space, train_split, held_out,
               splits, rows), resume


def choose_space(hp: HyperParameters, given: dict, model: SuperTransformer,
                 folder: Path) -> list[SubnetConfig]:
    """𝒜: the grid of the shares, or the subnets of a table, if this is the table's model."""
    if hp.subnets == "grid":
        order = outside_in if isinstance(model, Decoder) else depth_order
        return configuration_space(model.maxnet, hp.widths, hp.depths, hp.hidden, model.head_group,
                                   order)
    space = SUBNETS[hp.subnets]
    if space[0] != model.maxnet:
        raise ValueError(f"--subnets {hp.subnets} is not for {folder}: that is a model of "
                         f"{model.maxnet.name}, hidden size {model.maxnet.hidden_size}, not "
                         f"{space[0].name}, {space[0].hidden_size}")
    if shares := [key for key in ("widths", "depths", "hidden") if key in given]:
        raise ValueError(f"--{shares[0]} and --subnets {hp.subnets} contradict each other")
    return space


def pick_dtype(hp: HyperParameters, device: str) -> torch.dtype:
    """auto: bfloat16 where the hardware multiplies it natively; weights that are trained: float32.

    A learning rate of 1e-3 times a weight is less than bfloat16's last digit: it would be lost.
    """
    if hp.dtype != "auto" or hp.adapters == "full":
        return torch.bfloat16 if hp.dtype == "bfloat16" else torch.float32
    gpu = device.startswith("cuda")
    native = torch.cuda.is_bf16_supported(False) if gpu else torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


@contextmanager
def stoppable() -> Iterator[list[int]]:
    """Yields a list, to which SIGINT or SIGTERM adds its number; a second one stops at once (under
    torchrun it is ignored: a Ctrl-C comes twice there, and in the end SIGKILL)."""
    stopped: list[int] = []

    def stop(number: int, frame) -> None:
        stopped.append(number)
        if processes()[1] == 1:
            signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def told_to_stop(stopped: list[int], device: str) -> int:
    """The signal that came to any process (0: none): all leave after one and the same iteration."""
    number = stopped[0] if stopped else 0
    if processes()[1] > 1:
        shared = torch.tensor(number, device=device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        number = int(shared)
    return number


def train(run: Run, resume: dict | None) -> int:
    """Runs `mlfs` and does what is not the algorithm: progress, log, checkpoints, palettes.

    Returns 0, or the number of the signal (SIGINT, SIGTERM) after which it has saved and stopped.
    """
    hp, settings, rows = run.hp, run.settings, len(run.train.ids)
    with open(run.folder / "log.jsonl", "a", encoding="utf-8") as file, stoppable() as stopped:
        def log(at: Iteration, **values) -> None:
            note = {"note": settings["note"]} if settings["note"] else {}
            file.write(json.dumps({"stage": at.stage, "step": at.step} | values | note) + "\n")
            file.flush()

        for at in mlfs(run.model, run.train, run.space, hp, resume):
            stop = told_to_stop(stopped, settings["device"])
            if not at.losses:                                        # a stage begins, or goes on
                if at.stage == 1 and at.step == 0 and hp.reorder:
                    run.measure("reordered")
                announce(run, at)
                if at.step == 0:
                    settings["start_scores"][at.stage] = run.held_out_score()
                start_score, started = settings["start_scores"][at.stage], time.monotonic()
                total = rows * hp.epochs[at.stage]
                bar = tqdm(total=total, initial=min(at.step * hp.batch_size, total), disable=None,
                           unit=" examples", desc=f"stage {at.stage}", dynamic_ncols=True)
            else:
                bar.update(at.examples)
                text = " ".join(f"{name} {loss:.3f}" for name, loss in at.losses.items())
                bar.set_postfix_str(text, refresh=False)
                if at.step % 10 == 0 or at.step == at.steps:
                    log(at, loss=at.losses, gradient_norm=at.norm, learning_rate=at.rate)
            fresh = at.losses or at.step == 0                        # not what a checkpoint repeats
            if fresh and hp.validate_every and at.step % hp.validate_every == 0:
                log(at, validation=run.validate())
            if at.step == at.steps or stop or (at.losses and at.step % 200 == 0):
                settings["seconds"][at.stage] += time.monotonic() - started
                if at.stage > 0 and fresh:
                    score = run.held_out_score()
                    log(at, held_out=score, at_stage_start=start_score)
                    metric = run.task.metrics[0]
                    if evaluate.gain(metric, start_score, score) < -0.05:
                        bar.write(f"warning: stage {at.stage}, step {at.step}: on held-out "
                                  f"training data the maxnet's {metric} went from "
                                  f"{evaluate.show(metric, start_score)} to "
                                  f"{evaluate.show(metric, score)}, and its students follow it; a "
                                  f"lower --learning-rate or --clip helps, or, with low-rank "
                                  f"adapters, --teacher fixed", file=sys.stderr)
                if at.step == at.steps:
                    bar.close()
                    run.measure(f"stage {at.stage}" if at.stage else "sliced teacher")
                    print(evaluate.final_table(run.rows, run.task.metrics[0], 2), flush=True)
                    evaluate.save_adapters(run.folder, run.model, settings)
                run.save(at)                                         # a checkpoint
                started = time.monotonic()
                if stop:
                    bar.close()
                    return stop
    return 0


def announce(run: Run, at: Iteration) -> None:
    """What a stage trains, in one line."""
    n_1, whole = run.model.num_trainable(run.space[0]), run.settings["space"][0]["parameters"]
    head = sum(p.numel() for name, p in run.model.named_parameters()
               if name.split(".")[0] in run.model.head and p.requires_grad)
    what = f"A_{at.stage}, B_{at.stage} ({n_1:,} entries)"
    what += f" and the head ({head:,})" if head else ""
    if run.hp.adapters == "full":
        what, n_1, head = "all of W", whole, 0
    world = processes()[1]
    sent = f", of which each of {world} processes sends {4e-6 * (n_1 + head):.1f} MB"
    print(f"\nStage {at.stage}: {STAGES[at.stage]}; trains {what}, {(n_1 + head) / whole:.1%} of "
          f"the model; {at.steps:,} steps{sent if world > 1 else ''}", flush=True)


def main(argv: Iterable[str] | None = None) -> int:
    args, given = parse_arguments(list(sys.argv[1:] if argv is None else argv))
    join_processes(args)
    run, resume = prepare(args, given)
    s, hp, space, metric = run.settings, run.hp, run.space, run.task.metrics[0]
    size, skipped = s["space"][0]["parameters"] / 1e6, s["data"].get("skipped", {})
    rank = f"r = {hp.rank}" if hp.adapters == "low-rank" else "full rank"
    print(f"MLFS on {s['task']}: {Path(s['base']['folder']).name} "
          f"({type(run.model).__name__}, {size:.1f}M parameters); {s['data']['train']:,} examples "
          f"to train on, {s['data']['held_out']:,} held out, {s['data']['dev']:,} dev"
          + ("; skipped files: " + ", ".join(f"{n} {why}" for why, n in skipped.items() if n)
             if any(skipped.values()) else "") + "\n"
          f"𝒜: {len(space)} subnets, {space[0].name} to {space[-1].name}; {rank}, "
          f"α = {hp.alpha:g}, γ = {hp.gamma:g}; {s['device']}, {s['dtype']}, seed {hp.seed}; "
          f"writes {run.folder}/", flush=True)
    if processes()[0]:                               # rank 0 alone measures, prints and writes
        with stoppable() as stopped:
            for _ in mlfs(run.model, run.train, run.space, hp, resume):
                if told_to_stop(stopped, s["device"]):
                    break
        return 0
    if number := train(run, resume):
        print("\nstopped and saved; the same command with --resume goes on from there",
              file=sys.stderr)
        return 128 + number
    stored = (run.folder / "adapters.safetensors").stat().st_size / 1e6
    print(f"\n{evaluate.title(s['task'], metric, s['data']['dev'])}\n\n"
          f"{evaluate.final_table(run.rows, metric)}\n\n"
          f"Trained in {sum(s['seconds']):.0f} s, at most {s['peak_memory'] / 2**30:.1f} GiB. "
          f"{run.folder}/adapters.safetensors ({stored:.1f} MB) and the base model make all "
          f"{len(space)} subnets.")
    choices = [f"{row['name']} ({evaluate.quality(row, metric)}) from {most / 1e6:.2f}M parameters "
               f"on"
               for most, row in evaluate.worth_shipping(run.rows, metric)]
    print((s["note"] + ". " if s["note"] else "")
          + "Ship the smallest within one standard error of the best that fits: "
          + ", ".join(choices) + ".")
    return 0


if __name__ == "__main__":
    sys.exit(evaluate.exit_on_bad_input(main))
