"""Multistage Low-rank Fine-tuning of Super-transformers (Kundu et al., NAACL 2024).

    python mlfs.py                      # the built-in toy: no download, 75 seconds
    python mlfs.py --task sst2          # BERT-base on SST-2
    python mlfs.py --task python        # SantaCoder on Python code
    torchrun --nproc-per-node 2 mlfs.py --task sst2          # two processes, a GPU each

A run leaves in its folder, each file replaced as a whole:
    adapters.safetensors  {A_s, B_s}, the head, the permutation: all to keep beside the base model
    palette.json, .md     every subnet's sizes and scores, after each stage
    run.json              settings, seed, versions, the base's sha256, seconds per stage
    log.jsonl             losses, gradient norm and learning rate every 10 steps
    state.safetensors     what --resume goes on from, to the same bits; every 200 steps

Exit codes: 0 done; 2 bad input, told in one sentence; 130 or 143 stopped by Ctrl-C or SIGTERM and
saved, the same command with --resume goes on.
"""
# Read from the top: hyper-parameters, the configuration space 𝒜, the losses, then `mlfs`, which is
# Algorithm 1 with the paper's line numbers in the right margin. After it comes what an iteration
# needs and the algorithm does not say, then the run around it, and the command line.
import argparse
import dataclasses
import inspect
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import evaluate
from model import Decoder, SubnetConfig, SuperTransformer, initialise, load_pretrained

# ------------------------------------------------------------------------------ hyper-parameters

@dataclass(frozen=True)
class HyperParameters:
    """Every knob: default, the paper's symbol, its source. Options and --help are made from it."""

    # --- the paper's hyper-parameters (a task's own values: TASK_SETTINGS)
    rank: int = 8                                # r, rank of A_s and B_s (App. A)
    alpha: float = 0.9                           # α, distillation factor in [0, 1] (App. A)
    beta: float = 0.1                            # β_l, weight of ℓ_FD, the same for all l (App. A)
    gamma: float = 2.0                           # γ of the gradient scaling (App. A: 1 for SST-2,
                                                 # otherwise 2; Prop. 2: γ ≥ 1; 0: no scaling)
    temperature: float = 1.0                     # t ≥ 1 of the KD loss (Sec. 5, no value given)
    d_low: int = 64                              # d_low, rows of U (Sec. 5, no value given)
    num_subnets: int = 4                         # K, subnets an iteration (Eq. 4, no value given)
    epochs: tuple[int, ...] = (8, 8, 8)          # E_0,E_1,E_2 (App. A: at most 8; SST-2: 3)
    batch_size: int = 64                         # |ℬ| (App. A: 128 for QQP, MNLI, QNLI)
    learning_rate: float = 1e-3                  # initial one (App. A: 5e-4 for QNLI, MNLI)
    max_length: int = 128                        # tokens per example (App. A)
    seed: int = 0                                # of head, A_s, U, order of data, subnets drawn

    # --- the configuration space 𝒜
    widths: tuple[float, ...] = (1.0, 0.75, 0.5)  # shares of heads and neurons (ours)
    depths: tuple[float, ...] = (1.0, 0.75, 0.5)  # shares of the layers (ours)
    hidden: tuple[float, ...] = (1.0,)           # shares of the hidden size (ours)
    subnets: Literal["grid", "santacoder", "codellama"] = "grid"  # the shares above, or
                                                                  # the sizes of Table 1 or Table 2
    reorder: bool = True                         # after stage 0, important ones first (ours)

    # --- other readings of the paper, and its baselines
    teacher: Literal["maxnet", "fixed"] = "maxnet"  # the maxnet of the moment (Sec. 5), or that
                                                    # of stage 0, its head too, fixed (Sec. 4)
    kl: Literal["reverse", "forward"] = "reverse"  # KL[student, teacher] as printed, or Hinton's
                                                   # KL[teacher, student]
    fd_sum: bool = False                         # sum ℓ_FD over d_low as printed, not average it
    learn_u: bool = False                        # learn U, its rows kept orthonormal (Sec. 5)
    target_modules: Literal["app-a", "all-linear"] = "app-a"  # what A_s, B_s adapt: query, key,
                                                              # value, FFN's intermediate (App. A),
                                                              # or every linear map of a layer
    adapters: Literal["low-rank", "full"] = "low-rank"  # A_s, B_s; or all of W, the
                                                        # full-rank (non-LoRA) MLFS of App. B
    init: Literal["pretrained", "random"] = "pretrained"  # start of W (random: Figs. 5, 6)
    warmup: float = 0.06                         # share of a stage in which the rate rises (ours)
    clip: float = 1.0                            # largest norm of Eq. 6's gradient; 0: any (ours)

    # --- examples, number format, memory
    train_examples: int = 0                      # train on so many, drawn with the seed (Tables 1
                                                 # and 2: 10K to 1.2M); 0: all
    dev_examples: int = 0                        # measure on so many, drawn once; 0: all
    validate_every: int = 0                      # log dev scores after so many steps (the curves
                                                 # of Figs. 5 and 7); 0: never
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of W; auto: bfloat16 where
                                                            # it is faster (ours)
    checkpointing: bool = False                  # keep no activations inside layers: less memory,
                                                 # a third more time

    def __post_init__(self):
        def check(name, holds, rule):
            if not holds:                            # not a number fails every comparison
                raise ValueError(f"{name} must be {rule}, not {getattr(self, name)}")

        least = {"rank": 1, "temperature": 1, "d_low": 1, "num_subnets": 1, "batch_size": 1,
                 "max_length": 4}                    # of all other numbers: 0
        most = {"rank": 1024, "alpha": 1, "gamma": 10, "warmup": 0.99, "seed": 2 ** 32 - 1}
        for name, value in vars(self).items():
            if isinstance(value, str):
                choices = get_args(type(self).__annotations__[name])
                check(name, value in choices, " or ".join(choices))
            elif not isinstance(value, tuple):
                low = least.get(name, 0)
                high = most.get(name, math.inf)
                rule = f"in [{low}, {high}]" if name in most else f"at least {low}"
                check(name, low <= value <= high, rule)
        check("learning_rate", self.learning_rate > 0, "above 0")
        check("epochs", len(self.epochs) == 3 and min(self.epochs) >= 0, "three numbers from 0 on")
        if self.adapters == "full":
            check("dtype", self.dtype != "bfloat16", "auto or float32 with --adapters full")
            check("teacher", self.teacher == "maxnet", "maxnet with --adapters full")


# -------------------------------------------------------------------- the configuration space 𝒜

def depth_order(layers):
    """Layers (consecutive ones) in the order in which growing subnets take them: of 6, 5 0 3 2 1 4.

    A Φ of n layers keeps the first n, sorted; that tuple is its g_j (4 of 6: 0, 2, 3, 5). The last,
    the first, then each time the middle of the widest gap: each Φ is spread over the whole depth
    and has all layers of every shorter one. Cut out of a fine-tuned MiniLM, layers 0, 3, 5 score
    77.1 on SST-2; 1, 3, 5 score 72.4; no three without the last exceed 48.0 (.github/results).
    """
    order = list(dict.fromkeys((layers[-1], layers[0])))
    while len(order) < len(layers):
        kept = sorted(order)
        before, after = max(itertools.pairwise(kept), key=lambda gap: gap[1] - gap[0])
        order.append((before + after + 1) // 2)
    return tuple(order)


def outside_in(layers):
    """The order for decoders: the last, the first, the last but one, the second, ...

    So a shallow subnet lacks a block in the middle. The layers of a pre-LN model add to one
    residual stream, the middle ones the least. SmolLM2-135M has a loss of 2.5 nats, without layer 1
    10.3, without 10 middle layers 5.6, without 10 by the encoders' order 7.0 (.github/results).
    """
    pairs = zip(layers[::-1], layers)
    return tuple(l for pair in pairs for l in pair)[:len(layers)]


def configuration_space(maxnet, widths=(1, 0.75, 0.5), depths=(1, 0.75, 0.5), hidden=(1,),
                        head_group=1, order=depth_order):
    """𝒜 (Sec. 4), all combinations: the first is the maxnet Φ_1, the last the minnet Φ_min.

    widths are shares of the heads (whole groups of head_group) and of the FFN's neurons. depths are
    shares of the layers, taken in the order that `order` gives; halves round down. hidden are
    shares of the embedding dimension. A share of 1 is always in. ValueError for a share that this
    model cannot take, and for two that get one name.
    """
    def part(share, whole, what, exact=False):
        number = math.ceil(share * whole - 0.5) if 0 < share <= 1 else 0
        if number < 1 or (exact and abs(number - share * whole) > 0.01):
            raise ValueError(f"{share:g} of {whole} {what} is {share * whole:g}, not a whole "
                             f"number from 1 to {whole}")
        return number

    space = {}
    groups = maxnet.num_attention_heads // head_group
    what = f"groups of {head_group} heads" if head_group > 1 else "heads"
    descending = (sorted({1.0, *shares}, reverse=True) for shares in (hidden, widths, depths))
    for h, w, d in itertools.product(*descending):
        size = part(h, maxnet.hidden_size, "hidden dimensions")
        # A share of heads that is no whole number would not be what its name says.
        heads = part(w, groups, what, exact=True) * head_group
        neurons = part(w, maxnet.intermediate_size, "FFN neurons")
        depth = part(d, len(maxnet.layers), "layers")
        layers = tuple(sorted(order(maxnet.layers)[:depth]))
        name = f"w{w:.3g}-d{depth}" + (f"-h{size}" if h < 1 else "")
        phi = SubnetConfig(size, heads, neurons, layers, name)
        if space.setdefault(name, phi) != phi:
            raise ValueError(f"two subnets would be called {name}: give shares that differ in "
                             f"their first three digits")
    return list(dict.fromkeys(space.values()))       # two shares may come to one and the same Φ


def sample_sub_transformers(space, stage, num_subnets, seed):
    """𝒜_s of one iteration (Alg. 1 line 6): Φ_1, then others of the stage's kind (Sec. 5).

    Stage 0 has the teacher alone, stage 1 varies width at full depth, stage 2 width and depth.
    The paper fixes only Φ_1; we add the stage's minnet and K-2 others, without replacement. Three
    widths leave stage 1 nothing to draw: it takes all three each time.
    """
    if stage == 0:
        return space[:1]
    # 𝒜 is ordered by hidden size, width and depth, so the last of those allowed is the minnet.
    maxnet, *others = [phi for phi in space if stage == 2 or phi.layers == space[0].layers]
    minnet = others[-1:]                             # none, if the maxnet is the only one
    rest = others[:-1]
    drawn = random.Random(str(seed)).sample(rest, min(max(num_subnets - 2, 0), len(rest)))
    return [maxnet, *minnet, *drawn][:num_subnets]


def gradient_scale(n_1, n_j, gamma):
    """(n_1/n_j)^γ (Prop. 2, Eqs. 6 and 10): the smaller the subnet, the larger its gradient."""
    return (n_1 / n_j) ** gamma


# ------------------------------------------------------------------------------------ the losses

def task_loss(z, y):
    """ℓ_task^i (B,): cross-entropy; squared error where labels are scores (STS-B).

    z (B, C), y (B,).
    """
    if y.is_floating_point():
        return (z[:, 0] - y).square()
    return F.cross_entropy(z, y, reduction="none")


def kd_loss(z_j, z_1, temperature=1.0, kl="reverse"):
    """ℓ_KD^i = KL[σ(z_j/t), σ(z_1/t)] (B,), the student first as printed (Sec. 5); z (B, C)."""
    if z_j.size(-1) == 1:                            # a score is no distribution: squared error
        return (z_j - z_1).square()[:, 0]
    log_p = (z_j / temperature).log_softmax(-1)
    log_q = (z_1 / temperature).log_softmax(-1)
    if kl == "forward":                              # Hinton's order: the teacher first
        log_p, log_q = log_q, log_p
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def fd_loss(h_j, h_1, U, beta, fd_sum=False):
    """ℓ_FD = Σ_l β_l ‖U_j^l h_j^l - U_1^l h_1^g(l)‖² of each token (B, T) (Sec. 5).

    h (B, T, d) and U are keyed by maxnet layer, so that g_j is a lookup: of a layer of Φ_j and the
    same layer of Φ_1. The sum runs over the minnet's layers g_min(l), the keys of U.
    """
    loss = 0.0
    for l, U_1 in U.items():
        U_j = U_1[:, :h_j[l].size(-1)]               # [U_1^g_j(l)]_Φ_j: leading columns    Eq. 11
        low_j = h_j[l] @ U_j.T.to(h_j[l].dtype)                                  # (B, T, d_low)
        # Sec. 5 prints U_1^l here, Eq. 11 U_1^g_j(l) for the student: we take the maxnet's layer
        # for both. Two different projections of equal states would not be equal.
        low_1 = h_1[l] @ U_1.T.to(h_1[l].dtype)
        square = (low_j.float() - low_1.float()).square().sum(-1)                # (B, T)
        # Ours: a mean. The printed sum over d_low is 64 times as much; with β = 0.1 it pulled as
        # hard as ℓ_KD, and stage 1 collapsed to one class (SST-2, one seed).
        loss = loss + beta * (square if fd_sum else square / len(U_1))
    return loss


def feature_projections(layers, d_low, hidden_size, seed):
    """U_1^l (d_low, d_1), for each layer of g_min (Sec. 5): at most hidden_size rows.

    Drawn, orthonormal and fixed (ours): the paper learns U, whose free optimum is U = 0.
    """
    generator = torch.Generator().manual_seed(seed)
    U = {}
    for l in layers:
        drawn = torch.randn(hidden_size, min(d_low, hidden_size), generator=generator)
        U[l] = torch.linalg.qr(drawn)[0].T.contiguous()
    return U


class Batch(NamedTuple):
    """ℬ, or this process's rows of it. The counts are of the whole ℬ, so that the gradients of all
    processes add up to its gradient."""
    x: dict                                          # "ids" (B, T), "mask" or None, "segments"
    y: Tensor                                        # labels (B,), or next tokens (B, T)
    num_labels: int                                  # |ℬ| of Eq. 5; of code the next tokens
    num_tokens: int                                  # real ones: ℓ_FD is a mean over them (ours)

    def token_mean(self, loss):
        """The mean of loss (B, T) over ℬ's real tokens: this process's share of it."""
        mask = self.x["mask"]
        return (loss if mask is None else loss * mask).sum() / self.num_tokens


def output_loss(model, last_j, last_1, batch, alpha, hp, max_logits=2 ** 22):
    """1/|ℬ| Σ_i (1-α) ℓ_task^i + α ℓ_KD^i: line 12 without ℓ_FD. z_j and z_1 are made here, of the
    last states (B, H) or (B, T, H) of Φ_j and Φ_1; of code at most max_logits at a time, unless all
    of W is trained.
    """
    def loss(last_j, last_1, y):
        z_j = model.logits(last_j)
        value = (1 - alpha) * task_loss(z_j, y)
        if alpha:
            # A target: the head is not to please its students by it.
            with torch.no_grad():
                z_1 = model.logits(last_1)
            value = value + alpha * kd_loss(z_j, z_1, hp.temperature, hp.kl)
        return value.sum() / batch.num_labels

    if batch.y.dim() == 1:
        return loss(last_j, last_1, batch.y)
    # Of code each position that has a next token is a row.
    real = batch.y != data.IGNORED
    rows = [part[real] for part in (last_j, last_1, batch.y)]
    # Full-rank: W has a gradient as well, so all at once. Below, only the states have one: a head
    # that a new family trains would get none.
    if model.word_embeddings.weight.requires_grad:
        return loss(*rows)
    # Where V is 49,152, eight windows of 512 tokens have 0.8 GB of logits, the teacher's are as
    # large, and so is the gradient. So a chunk's gradient is taken while its logits exist. What
    # comes before is given a linear function that has this value and this gradient.
    size = max(1, max_logits // model.config["vocab_size"])
    value = 0.0
    gradient = torch.zeros_like(rows[0])
    for d, last, *targets in zip(*(part.detach().split(size) for part in (gradient, *rows))):
        part = loss(last.requires_grad_(), *targets)
        d += torch.autograd.grad(part, last)[0]
        value += part.detach()
    linear = (rows[0].float() * gradient).sum()      # float32: Prop. 2's factor comes back by it
    return value + linear - linear.detach()          # its derivative by rows[0] is `gradient`


# ----------------------------------------------------------------------------------- Algorithm 1

@dataclass
class State:
    """Where Algorithm 1 stands. With what the model has learned (`trained_state`: adapters, head,
    permutation) a stopped run goes on from it to the same bits: batches and subnets depend on
    (seed, stage, step) alone."""
    stage: int = 0
    step: int = 0                                    # iterations of the stage that are done
    moments: dict = dataclasses.field(default_factory=dict)          # AdamW's
    U: dict[int, Tensor] = dataclasses.field(default_factory=dict)   # empty: to be drawn


class StageBegins(NamedTuple):
    """A stage begins, or goes on after `step` of its `steps` iterations."""
    stage: int
    step: int
    steps: int


class Updated(NamedTuple):
    """Line 15 was done for the step-th time; losses by subnet, Eq. 6's norm before clipping."""
    stage: int
    step: int
    steps: int
    losses: dict[str, float]
    norm: float
    rate: float


def mlfs(model, examples, space, hp, state=None):
    """Algorithm 1 as a generator; when it ends the model holds all {A_s, B_s}.

    An encoder's head is trained with them from stage 0 on (ours). `state` is kept up to date.
    ValueError when a loss or gradient is not finite, before it reaches any weight.

    The toy's first iteration of stage 2, γ = 1:   Φ_j         n_j  (n_1/n_j)^γ  loss_j
    (n_1: 4 layers of 3 (64 + 64) 16 entries for   w1-d4    45,056         1.00   0.007
    q, k, v and (64 + 256) 16 for the FFN;         w0.5-d2  15,360         2.93   2.534
    Eq. 6's norm is 5.36, clipped to 1)            w1-d3    33,792         1.33   0.316
    """
    state = state or State()
    maxnet = space[0]
    for stage in range(state.stage, 3):                                                        # 1
        optimizer, teacher = begin_stage(model, examples, space, hp, state, stage)             # 2
        # It depends on Φ alone: counted once a stage.
        n = {phi: model.num_trainable(phi) for phi in space}                                   # 9
        steps = hp.epochs[stage] * math.ceil(len(examples.ids) / hp.batch_size)
        yield StageBegins(stage, state.step, steps)
        for step, batch in mini_batches(examples, hp, stage, state.step, model.device):        # 3,4
            losses = {}
            # The same seed, stage and step draw the same subnets, also in a run that was resumed.
            subnets = sample_sub_transformers(space, stage, hp.num_subnets,
                                              (hp.seed, stage, step))                          # 6
            # Its keys are g_min(l), the layers to compare. Without students there is nothing to.
            U = state.U if len(subnets) > 1 else {}
            for phi in subnets:                                                                # 7
                # Φ is an argument: nothing is loaded, this pass reads W_Sup's leading parts. Logits
                # are made of `last` in output_loss, for all of them at once may be too many.
                last, h = model.encode(**batch.x, phi=phi, features=U)                    # 5,8,10
                if phi == maxnet:
                    # Targets, h_1 and the states that output_loss makes z_1 of: detached, for no
                    # student's gradient may reach the teacher by them.
                    last_1 = last.detach()
                    h_1 = {l: states.detach() for l, states in h.items()}
                    if teacher and U:                # an option: Sec. 4's teacher, not Sec. 5's
                        with torch.no_grad():
                            last_1, h_1 = teacher.encode(**batch.x, phi=maxnet, features=U)
                # The maxnet has no one to learn from but the labels.
                alpha = 0.0 if phi == maxnet else hp.alpha                                     # 11
                # In two parts: (1-α) ℓ_task + α ℓ_KD of the outputs, then α ℓ_FD of the features.
                loss = output_loss(model, last, last_1, batch, alpha, hp)                      # 12
                if alpha:
                    fd = fd_loss(h, h_1, U, hp.beta, hp.fd_sum)
                    loss = loss + alpha * batch.token_mean(fd)
                # A smaller subnet has fewer adapter entries; Prop. 2 scales its gradient up. Eq. 6
                # has 1/|𝒜_s| as well, which Eq. 10 omits. (1/|ℬ| is in the losses.)
                scale = gradient_scale(n[maxnet], n[phi], hp.gamma) / len(subnets)
                # Eq. 6 is a sum, and backward() adds to .grad: each subnet fills the leading rows
                # of A_s and columns of B_s that it used. One subnet's graph is alive at a time.
                (scale * loss).backward()                                                      # 13
                losses[phi.name] = loss.detach()
            yield update(optimizer, losses, hp, state, step, steps)                            # 15
        state.step = 0
        state.moments = {}


# ------------------------------------------------- what an iteration needs and the paper leaves out

def begin_stage(model, examples, space, hp, state, stage):
    """Line 2, and what has no number: the permutation before stage 1, U, AdamW, a fixed teacher."""
    # Drawn once: a run that goes on compares features by the same projections.
    if not state.U:
        state.U = feature_projections(space[-1].layers, hp.d_low, space[0].hidden_size, hp.seed)
    state.U = {l: u.to(model.device).requires_grad_(hp.learn_u) for l, u in state.U.items()}
    state.stage = stage
    # In a run that goes on in mid-stage the adapters, already permuted, are there.
    if model.num_stages == stage:
        if stage == 1 and hp.reorder:
            model.reorder(importance(model, examples, hp))
        if hp.epochs[stage]:                         # a stage without epochs adds no pair
            model.add_stage(hp.rank if hp.adapters == "low-rank" else None, hp.seed)
        model.num_stages = stage + 1
    teacher = model.fix_teacher(min(1, hp.epochs[0])) if stage and hp.teacher == "fixed" else None
    return make_optimizer(model, state.U, state.moments), teacher


def make_optimizer(model, U, moments):
    """AdamW over all that the stage trains, without weight decay (ours); moments: its state."""
    trained = [p for p in (*model.parameters(), *U.values()) if p.requires_grad]
    if not trained:                                  # a stage of 0 epochs, and no head to train
        return None
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)
    if moments:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return optimizer


def mini_batches(examples, hp, stage, done, device):
    """(step, ℬ) of a stage after the first `done`; their order depends on (seed, stage, epoch)."""
    per_epoch = math.ceil(len(examples.ids) / hp.batch_size)
    for epoch in range(done // per_epoch, hp.epochs[stage]):
        batches = data.batches(examples, hp.batch_size, (hp.seed, stage, epoch), device)
        for step, (x, y) in enumerate(batches, epoch * per_epoch + 1):
            # A run that goes on passes over what it has seen: nothing of the order is stored.
            if step > done:
                yield step, my_rows(whole_batch(x, y))


def whole_batch(x, y):
    mask = x["mask"]
    tokens = x["ids"].numel() if mask is None else int(mask.sum())
    return Batch(x, y, int((y != data.IGNORED).sum()), tokens)


def importance(model, examples, hp):
    """|∂ℓ_task/∂ξ| of a gate ξ = 1 on each head and FFN neuron, summed over TRAIN batches: at most
    64, of at most 32 examples. As DynaBERT's (Hou et al., 2020), but on TRAIN; keys as `reorder`'s.
    """
    D = model.config["head_dim"]
    readers = {}                                     # the matrices whose input the gates scale
    for l, layer in enumerate(model.layers):
        readers[f"{l}.heads"] = layer.attention_output
        readers[f"{l}.neurons"] = layer.output
    weights = [linear.weight for linear in readers.values()]
    # Frozen otherwise: their gradients are asked for here alone.
    frozen = [W.requires_grad_() for W in weights if not W.requires_grad]
    scores = dict.fromkeys(readers, 0.0)
    size = min(32, hp.batch_size)
    rows = np.random.default_rng(hp.seed).permutation(len(examples.ids))[:64 * size]
    for x, y in data.batches(data.take(examples, rows), size, hp.seed, model.device):
        last, _ = model.encode(**x, phi=model.maxnet)
        # α = 0: ℓ_task alone, and the second `last` is not read.
        loss = output_loss(model, last, last, whole_batch(x, y), 0.0, hp)
        gradients = torch.autograd.grad(loss, weights)
        for (key, linear), dW in zip(readers.items(), gradients):
            # From y = W (ξ ⊙ x) follows ∂ℓ/∂ξ_i = Σ_o W_oi ∂ℓ/∂W_oi: no gate is needed. W is all of
            # it, adapters merged, should that matrix have some.
            gate = (linear.merged().detach().float() * dW.float()).sum(0)    # (N·D,) or (I,)
            if key.endswith("heads"):
                # A head has one gate for its D dimensions.
                gate = gate.view(-1, D).sum(1)                       # (N,)
            scores[key] = scores[key] + gate.abs()
    for W in frozen:
        W.requires_grad_(False)
    # One and the same order in all processes, whatever their rounding.
    add_up(list(scores.values()))
    return scores


def update(optimizer, losses, hp, state, step, steps):
    """Line 15: what the stage trains (A_s, B_s, a head) follows Eq. 6's gradient, by AdamW."""
    trained = optimizer.param_groups[0]["params"]
    # Eq. 6 over all processes (ours); nothing to do where there is one.
    add_up([p.grad for p in trained if p.grad is not None] + [*losses.values()])
    norm = torch.nn.utils.clip_grad_norm_(trained, hp.clip or math.inf)
    # One transfer from the device for all losses.
    values = dict(zip(losses, torch.stack(list(losses.values())).tolist()))
    # Before the step: one value that is not a number would spoil all adapters.
    if not all(map(math.isfinite, (*values.values(), norm))):
        raise ValueError(f"stage {state.stage}, step {step}: the losses are {values}, the norm of "
                         f"Eq. 6's gradient is {norm:g}; no weight was changed. Try a lower "
                         f"--learning-rate")
    rate = learning_rate(hp, step, steps)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    if hp.learn_u:
        orthonormalise(state.U)
    state.step = step
    state.moments = optimizer.state_dict()["state"]
    return Updated(state.stage, step, steps, values, float(norm), rate)


@torch.no_grad()
def orthonormalise(U):
    """Bring the rows of each learned U back to orthonormal: ℓ_FD's free optimum is U = 0."""
    for u in U.values():
        q, r = torch.linalg.qr(u.T)
        u.copy_((q * r.diagonal().sign()).T)


def learning_rate(hp, step, steps):
    """Rises linearly over the first `warmup` share of the steps, then falls to 0; step from 1."""
    rising = max(1, round(hp.warmup * steps))
    falling = max(1, steps - rising + 1)
    return hp.learning_rate * min(step / rising, (steps - step + 1) / falling)


# ------------------------------------------------------------------------------ several processes

def processes():
    """(This one's rank, how many): (0, 1) unless started by torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def my_rows(batch):
    """This process's rows of ℬ, all of them where there is one process; its counts stay."""
    rank, world = processes()
    rows = slice(rank, None, world)
    x = {name: None if part is None else part[rows] for name, part in batch.x.items()}
    return batch._replace(x=x, y=batch.y[rows])


def add_up(tensors):
    """Σ over all processes, in place, in one message: a few MB, for adapters and head are all."""
    if processes()[1] > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(total.view_as(t))


def join_processes(args):
    """Under torchrun: one GPU each, or gloo between CPUs; rank 0 alone speaks."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    backend = "gloo"
    if args.device.startswith("cuda"):
        backend = "nccl"
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(evaluate.check_device(args.device))
    dist.init_process_group(backend, timeout=timedelta(days=1))      # rank 0 may measure for long
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w", errors="replace")


def add_in_one_order(device):
    """On a GPU attention's fastest gradient adds up in any order: no two runs get the same bits."""
    if device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch wants to see it
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a check that costs time


@contextmanager
def stoppable():
    """Yields a list, to which SIGINT or SIGTERM adds its number; a second one stops at once (under
    torchrun it is ignored: a Ctrl-C comes twice there, and in the end SIGKILL)."""
    stopped = []

    def stop(number, frame):
        stopped.append(number)
        if processes()[1] == 1:
            signal.signal(number, signal.default_int_handler)

    with ExitStack() as undo:
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):               # Python lets the main thread alone do this
                before = signal.signal(number, stop)
                undo.callback(signal.signal, number, before)
        yield stopped


def told_to_stop(stopped, device):
    """The signal that came to any process (0: none): all leave after one and the same iteration."""
    number = max(stopped, default=0)
    if processes()[1] > 1:
        shared = torch.tensor(number, device=device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        number = int(shared)
    return number


# ------------------------------------------------------------------------------------------ a run

STAGES = ("fine-tune the teacher", "sample widths at full depth", "sample widths and depths")


@dataclass
class Run:
    """What `prepare` makes ready, and what is not the algorithm: log, checkpoints, palettes."""
    folder: Path
    settings: dict                                   # run.json
    hp: HyperParameters
    task: data.Task
    model: SuperTransformer
    space: list[SubnetConfig]
    splits: dict[str, data.Examples]                 # "train", "held_out" and those of dev
    palette: list[dict]                              # with each subnet's scores so far
    bar: tqdm | None = None
    started: float = 0.0                             # when the last checkpoint was written

    def measure(self, when):
        """Score every subnet on dev; the palette files keep the score at every moment."""
        before = self.palette or [{}] * len(self.space)
        rows = evaluate.palette(self.model, self.space, self.task, self.splits)
        self.palette = [row | {"history": old.get("history", {}) | {when: row["score"]}}
                        for row, old in zip(rows, before)]
        measured = {"adapters": evaluate.digest(self.model.trained_state()),
                    "dtype": self.settings["dtype"]}
        evaluate.write_palette(self.folder, self.settings, self.task,
                               {"measured": measured, "subnets": self.palette})

    def log(self, event, **values):
        """A line of log.jsonl."""
        line = {"stage": event.stage, "step": event.step} | values
        if self.settings["note"]:
            line["note"] = self.settings["note"]
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def score(self, phi, split):
        """A subnet's, by the task's first metric."""
        examples = {"dev": self.splits[split]}
        return evaluate.evaluate(self.model, phi, self.task, examples)["score"]

    def validate(self, event):
        """Logs every subnet's score on dev, where --validate-every asks for it."""
        every = self.hp.validate_every
        if every and event.step % every == 0:
            scores = {phi.name: self.score(phi, "dev") for phi in self.space}
            self.log(event, validation=scores)

    def held_out_score(self):
        """The maxnet's score on the held-out slice of TRAIN; 0 where TRAIN is too small for one."""
        return self.score(self.space[0], "held_out") if self.splits["held_out"].ids else 0.0

    def begin(self, event):
        if event.step == 0:
            if event.stage == 1 and self.hp.reorder:
                self.measure("reordered")
            self.settings["start_scores"][event.stage] = self.held_out_score()
            self.validate(event)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        whole = self.settings["space"][0]["parameters"]
        if event.steps:                              # a stage of 0 epochs is passed over
            print(f"\nStage {event.stage}: {STAGES[event.stage]}; trains {trained:,} weights, "
                  f"{trained / whole:.1%} of the model; {event.steps:,} steps", flush=True)
        self.bar = tqdm(total=event.steps, initial=event.step, unit=" steps",
                        desc=f"stage {event.stage}", disable=not event.steps or None)
        self.started = time.monotonic()

    def show(self, event):
        self.bar.update()
        self.bar.set_postfix(event.losses, refresh=False)
        if event.step % 10 == 0 or event.step == event.steps:
            self.log(event, loss=event.losses, gradient_norm=event.norm, learning_rate=event.rate)
        self.validate(event)

    def watch_the_maxnet(self, event):
        """It is its students' teacher, and no one's student: they follow when it gets worse."""
        metric = self.task.metrics[0]
        before = self.settings["start_scores"][event.stage]
        score = self.held_out_score()
        self.log(event, held_out=score, at_stage_start=before)
        if evaluate.gain(metric, before, score) < -0.05:
            self.bar.write(f"warning: on held-out training data the maxnet's {metric} went from "
                           f"{evaluate.show(metric, before)} to {evaluate.show(metric, score)}; a "
                           f"lower --learning-rate helps", file=sys.stderr)

    def checkpoint(self, event, state, stop):
        """At a stage's end, after every 200 iterations, and when the run is told to stop."""
        updated = isinstance(event, Updated)
        ended = event.step == event.steps
        if ended or stop:
            self.bar.close()
        elif not updated or event.step % 200:
            return
        self.settings["seconds"][event.stage] += time.monotonic() - self.started
        if updated and event.stage > 0:
            self.watch_the_maxnet(event)
        if ended:
            if event.steps or event.stage == 0:
                self.measure(f"stage {event.stage}" if event.stage else "sliced teacher")
                print(evaluate.final_table(self.palette, self.task.metrics[0], 2))
            evaluate.save_adapters(self.folder, self.model, self.settings)
        evaluate.save_state(self.folder, self.model, state)
        self.settings["peak_memory"] = evaluate.peak_memory(self.settings["device"])
        evaluate.write_json(self.folder / "run.json", self.settings)
        self.started = time.monotonic()


def train(run, state):
    """Runs `mlfs` to its end: 0. Or to a signal (SIGINT, SIGTERM), whose number it returns."""
    first = processes()[0] == 0                      # it alone measures, prints and writes
    with stoppable() as stopped:
        for event in mlfs(run.model, run.splits["train"], run.space, run.hp, state):
            if first and isinstance(event, Updated):
                run.show(event)
            elif first:
                run.begin(event)
            stop = told_to_stop(stopped, run.settings["device"])
            if first:
                run.checkpoint(event, state, stop)
            if stop:
                return stop
    return 0


# ------------------------------------------------------------------------------ the command line

LARGE = {"batch_size": 128}
TASK_SETTINGS = {                                # App. A, where it departs from the defaults above.
    # App. A also starts RTE and MRPC from a checkpoint fine-tuned on MNLI: name one with --model.
    "sst2": {"epochs": (3, 3, 3), "gamma": 1.0},
    "qqp": LARGE,
    "mnli": LARGE | {"learning_rate": 5e-4},
    "qnli": LARGE | {"learning_rate": 5e-4},
    # Ours. With r = 8 and KL as printed one seed of three may leave the smallest model at 58.
    "toy": {"epochs": (1, 1, 3), "gamma": 1.0, "batch_size": 32, "learning_rate": 5e-3,
            "num_subnets": 3, "dtype": "float32", "rank": 16, "kl": "forward"},
    "python": {"epochs": (1, 1, 1), "gamma": 1.0, "batch_size": 8, "max_length": 512,         # ours
               "validate_every": 100, "dev_examples": 64},
}
RECIPES = {                                      # they override a task's settings, options them
    "paper": {},
    # Ours, the best of what was tried on held-out sentences of a third of SST-2 (.github/results).
    # There --learning-rate 3e-3 gains; at it all of SST-2 (two seeds of three) and CoLA collapse.
    "edge": {"target_modules": "all-linear", "rank": 16, "teacher": "fixed", "kl": "forward",
             "gamma": 0.0, "epochs": (3, 0, 6)},
}


def decoders(hidden_size, depth, *shapes):
    """𝒜 of (name, heads, neurons, layers kept); the first is the maxnet."""
    layers = outside_in(tuple(range(depth)))
    return [SubnetConfig(hidden_size, heads, neurons, tuple(sorted(layers[:kept])), name)
            for name, heads, neurons, kept in shapes]


# The paper gives only the sizes of its decoders (Tables 1 and 2); which shapes is our choice.
SUBNETS = {
    "santacoder": decoders(
        2048, 24, ("w1-d24", 16, 8192, 24), ("0.9B", 12, 6144, 24), ("0.7B", 12, 6144, 18),
        ("0.5B", 8, 4096, 18)),                      # 1.12B, 0.87B, 0.68B, 0.49B parameters
    "codellama": decoders(
        4096, 32, ("w1-d32", 32, 11008, 32), ("6B", 32, 11008, 28), ("5.3B", 32, 11008, 25),
        ("4.5B", 32, 11008, 21)),                    # 6.74B, 5.93B, 5.32B, 4.51B
}


def choose_space(hp, given, model):
    """𝒜: the grid of the shares, or the subnets of a table, if this is the table's model."""
    if hp.subnets == "grid":
        order = outside_in if isinstance(model, Decoder) else depth_order
        return configuration_space(model.maxnet, hp.widths, hp.depths, hp.hidden, model.head_group,
                                   order)
    space = SUBNETS[hp.subnets]
    if space[0] != model.maxnet:
        raise ValueError(f"--subnets {hp.subnets} is not for this model: {model.maxnet} is not "
                         f"{space[0]}")
    if given.keys() & {"widths", "depths", "hidden"}:
        raise ValueError(f"--widths, --depths, --hidden do not go with --subnets {hp.subnets}")
    return space


def pick_dtype(hp, device):
    """auto: bfloat16 where products are faster in it; weights that are trained: float32.

    A learning rate of 1e-3 times a weight is less than bfloat16's last digit: it would be lost.
    """
    if hp.dtype != "auto":
        return hp.dtype
    has = torch.cpu.get_capabilities().get
    # By AVX512, without AMX, an Intel is half as fast in bfloat16 as in float32, an AMD faster.
    half = has("amx_bf16") or has("avx512_bf16") and "AMD" in has("cpu_name")
    if "cuda" in device:
        half = torch.cuda.is_bf16_supported(False)
    return "bfloat16" if half and hp.adapters == "low-rank" else "float32"


def shared_inputs(args):
    """`data.find_inputs`, and the Task: rank 0 downloads, the other processes find it there."""
    rank, world = processes()
    if rank:
        dist.barrier()
    if args.train:
        name, folder, row = data.own_task(args.train, args.dev, args.text, args.label,
                                          args.regression)
        found = (name, data.find_model("", args.model), folder, "", row)
    else:
        found = data.find_inputs(args.task, args.model, args.data_dir)
        found += (data.TASKS[found[0]],)
    if world > 1 and not rank:
        dist.barrier()
    return found


def load_model(row, folder, hp, device):
    """The base model, ready for stage 0; ValueError if it cannot serve the task."""
    torch.manual_seed(hp.seed)
    dtype = getattr(torch, pick_dtype(hp, device))
    model = load_pretrained(folder, max(1, len(row.labels)), dtype, row.labels)
    code = "loss" in row.metrics
    if isinstance(model, Decoder) != code:
        kind = "a decoder" if code else "an encoder"
        raise ValueError(f"this task needs {kind}; {folder} is a {type(model).__name__}")
    if hp.init == "random":
        initialise(model, hp.seed)
        model.drawn = [*model.trained_whole]
    if hp.target_modules == "all-linear":
        model.adapted = model.linears
    model.gradient_checkpointing = hp.checkpointing
    evaluate.pick_threads(model)
    return model


def fit_settings(hp, given, model):
    """The hyper-parameters for this model; ValueError for one that it cannot have."""
    if given.get("max_length", 0) > model.max_tokens:
        raise ValueError(f"max_length {hp.max_length} exceeds the model's {model.max_tokens} "
                         f"positions")
    if model.drawn and not hp.epochs[0]:
        raise ValueError(f"--epochs 0,... would leave the model's new {' and '.join(model.drawn)} "
                         f"untrained; give stage 0 an epoch")
    # Of 2 heads there is no share of 0.75: the palette goes without, unless it was asked for.
    heads = model.config["num_attention_heads"] // model.head_group
    widths = tuple(share for share in hp.widths if "widths" in given or share * heads % 1 == 0)
    return dataclasses.replace(hp, max_length=min(hp.max_length, model.max_tokens), widths=widths)


def prepare(args, given):
    """Reads and checks all input, then takes the run folder: bad input leaves no trace."""
    # Bad values are told before anything is downloaded.
    HyperParameters(**(RECIPES[args.recipe] | given))
    evaluate.check_device(args.device)
    name, model_folder, data_folder, note, row = shared_inputs(args)
    row = evaluate.rank_metrics(row, args.metric)
    if note:                                     # the toy takes no options meant for BERT-base
        given = {key: value for key, value in given.items()
                 if key not in ("max_length", "widths", "depths", "hidden")}
    defaults = {} if args.train else TASK_SETTINGS.get(name, {})
    hp = HyperParameters(**(defaults | RECIPES[args.recipe] | given))
    base = model_folder.resolve().name
    folder = args.out or Path("runs", "toy" if name == base == "toy" else f"{name}-{base}")
    digest = evaluate.base_digest(model_folder)
    model = load_model(row, model_folder, hp, args.device)
    hp = fit_settings(hp, given, model)
    space = choose_space(hp, given, model)
    tokenizer = data.load_tokenizer(model_folder, model.config["vocab_size"])
    rows = data.load_task(row, data_folder)
    splits = {split: data.encode(tokenizer, part, hp.max_length) for split, part in rows.items()}
    train, held_out = data.hold_out(splits.pop("train"), hp.seed, hp.train_examples)
    drawn = {split: data.draw(part, hp.dev_examples) for split, part in splits.items()}
    splits = {"train": train, "held_out": held_out} | drawn
    settings = {
        "task": name, "row": row._asdict(), "note": note,
        "base": evaluate.located(model_folder, folder) | {"sha256": digest},
        "data": evaluate.located(data_folder, folder) | describe_data(row, rows, splits),
        "hyper_parameters": dataclasses.asdict(hp),
        "space": [evaluate.describe(model, phi) for phi in space],
        "device": args.device, "dtype": pick_dtype(hp, args.device),
        "processor": evaluate.device_name(args.device),
        "processes": processes()[1], "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": [0.0] * 3, "start_scores": [0.0] * 3, "peak_memory": 0, "command": args.command,
    }
    run = Run(folder, settings, hp, row, model, space, splits, [])
    return run, claim_folder(run, args)


def describe_data(row, rows, splits):
    """For run.json: how many examples, how many were skipped, and what tells them from others."""
    found = {"skipped": {split: part.skipped for split, part in rows.items() if part.skipped},
             "sha256": {split: data.fingerprint(part) for split, part in rows.items()}}
    found |= {split: len(part.ids) for split, part in splits.items()}
    if row.labels:
        labels = splits["dev"].labels
        found["largest_class"] = float(np.bincount(labels).max() / len(labels))
    return found


def claim_folder(run, args):
    """Claims the run folder; with --resume fills the model, and returns where the run stopped."""
    first = processes()[0] == 0                      # it alone writes
    if first:
        run.settings = evaluate.take_folder(run.folder, run.settings, args.resume, args.overwrite)
    state = State(**evaluate.load_state(run.folder, run.model)) if args.resume else State()
    if first:
        evaluate.cut_log(run.folder / "log.jsonl", state)
        run.palette = evaluate.read_palette(run.folder)["subnets"]
    run.model.to(args.device)
    return state


def main(argv=None):
    args, given = parse_arguments(sys.argv[1:] if argv is None else argv)
    join_processes(args)
    add_in_one_order(args.device)
    run, state = prepare(args, given)
    print(opening(run), flush=True)
    number = train(run, state)
    if processes()[0]:                               # rank 0 speaks for all
        return 0
    if number:
        print("\nstopped and saved; the same command with --resume goes on", file=sys.stderr)
        return 128 + number
    print(closing(run), run.settings["note"], sep="\n")
    return 0


def opening(run):
    """What is about to be done, on what."""
    s = run.settings
    found = s["data"]
    counts = [f"{found[split]:,} {split}" for split in run.splits]
    classes = ", ".join(run.task.labels)[:200] or "none"
    base = Path(s["base"]["folder"]).name
    notes = "".join(f"\n{base}: {note}" for note in run.model.notes)
    changed = [f"{name} {value}" for name, value in vars(run.hp).items()
               if value != getattr(HyperParameters, name)]
    return (f"MLFS on {s['task']}: {base}, "
            f"{evaluate.millions(s['space'][0]['parameters'])} parameters\n"
            f"data: {found['folder']}; {', '.join(counts)}; skipped: {found['skipped'] or 0}\n"
            f"classes: {classes}\n"
            f"settings: {', '.join(changed)}\n"
            f"𝒜: {', '.join(phi.name for phi in run.space)}\n"
            f"{s['device']}, {s['dtype']}; writes {run.folder}/{notes}")


def closing(run):
    """The palette, and what it cost."""
    s = run.settings
    metric = run.task.metrics[0]
    stored = (run.folder / "adapters.safetensors").stat().st_size / 1e6
    return (f"\n{evaluate.title(s, metric)}\n\n"
            f"{evaluate.final_table(run.palette, metric)}\n\n"
            f"Trained in {sum(s['seconds']):.0f} s, {s['peak_memory'] / 2**30:.1f} GiB. "
            f"{run.folder}/adapters.safetensors ({stored:.1f} MB) and the base model make all "
            f"{len(run.space)} subnets.")


def parse_arguments(argv):
    """What is trained on what:
      --task TASK           cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, python; default toy
      --model DIR           a checkpoint; default BERT-base
      --data-dir DIR        holds the task's folder, such as SST-2/; default weights/glue
      --metric METRIC       the score that chooses; default: the task's first
      --recipe RECIPE       paper (the default), or edge: our settings for better small models
      --device DEVICE       cpu, cuda, ...; default: cuda where there is one
      --out DIR             the run folder; default runs/TASK-MODEL
      --resume              go on with the run in this folder
      --overwrite           replace the run in this folder

    A task of your own, in place of --task and --data-dir:
      --train FILE          .csv, .tsv (no quotes, as GLUE's) or .jsonl, or a .gz of them
      --text COLUMN[,COLUMN]
                            one text, or a pair
      --label COLUMN        its different values are the classes
      --regression          labels are scores, not classes
      --dev FILE            default: a tenth of --train
    """
    # --help starts with the docstrings. The hyper-parameters, of which those that are given are
    # returned beside the options, have theirs from the comments at their lines.
    parser = evaluate.Parser(f"{__doc__}\n{inspect.getdoc(parse_arguments)}")
    add = partial(parser.add_argument, help=argparse.SUPPRESS)
    for path in ("--model", "--data-dir", "--out", "--train", "--dev"):
        add(path, type=Path)
    for name in ("--task", "--metric", "--text", "--label"):
        add(name)
    add("--recipe", choices=RECIPES, default="paper")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--regression", action="store_true")
    one_of = parser.add_mutually_exclusive_group()
    for switch in ("--resume", "--overwrite"):
        one_of.add_argument(switch, action="store_true", help=argparse.SUPPRESS)
    fields = {field.name: field for field in dataclasses.fields(HyperParameters)}
    for title, settings in settings_help().items():
        group = parser.add_argument_group(title)
        for name, help in settings.items():
            add_setting(group, fields[name], help)
    args = parser.parse_args(argv)
    check_own(args)
    args.command = ["mlfs.py", *argv]
    given = {name: getattr(args, name) for name in fields if name in args}
    return args, given


def check_own(args):
    """ValueError unless the options of a task of one's own are there together."""
    needed = (args.train, args.text, args.label)
    if any((*needed, args.dev, args.regression)):
        if not all(needed) or args.task or args.data_dir:
            raise ValueError("--train FILE, --text COLUMN and --label COLUMN go together, in place "
                             "of --task and --data-dir; --dev, --regression go with them")
    elif args.task is None:
        args.task = "toy"


def settings_help():
    """{group: {setting: help}}, of the comments above, at and below each setting's line."""
    found = {}
    for line in inspect.getsource(HyperParameters).partition("def ")[0].splitlines():
        code, _, comment = line.partition("# ")
        if comment.startswith("--- "):
            group = found[comment.removeprefix("--- ")] = {}
        elif setting := re.search(r"(\w+): .* = ", code):
            name = setting[1]
            group[name] = comment
        elif comment:
            group[name] += f" {comment}"
    return found


def add_setting(group, field, help):
    """A hyper-parameter as an option: --num-subnets 4, --widths 1,2/3, --reorder, --no-reorder."""
    default = field.default
    options = {"type": type(default), "metavar": "N"}
    if isinstance(default, bool):
        options = {"action": argparse.BooleanOptionalAction}
    elif isinstance(default, str):
        options = {"choices": get_args(field.type)}
    elif isinstance(default, tuple):
        kind = type(default[0])
        options = {"type": lambda text: numbers(text, kind), "metavar": "A,B,C"}
        default = ",".join(f"{value:g}" for value in default)
    group.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
                       help=f"{help}; default {default}", **options)


def numbers(text, kind):
    """"1,2/3" as numbers; argparse tells the user of a ValueError."""
    fraction = r"\d{1,9}/0*[1-9]\d{0,8}" if kind is float else ""
    return tuple(kind(Fraction(part) if re.fullmatch(fraction, part) else part)
                 for part in text.split(","))


if __name__ == "__main__":
    sys.exit(evaluate.exit_on_bad_input(main))
