"""Runs of evidence.py on one GPU, many at a time, each subnet's pass recorded as a CUDA graph.

    python tests/by_hand/graphs.py [--workers 12] [--seconds 500] [--out FOLDER] NAME ...
    python tests/by_hand/graphs.py --compare NAME    # 40 iterations, with graphs and without

A GPU waits for Python: MiniLM's kernels take a fraction of the time that asking for them takes. So
a pass (lines 8 to 13 of Algorithm 1 for one Φ) is asked for once for each length of batch, then
replayed as a whole. The kernels are the same; batches are padded to a multiple of 8 tokens, so that
few lengths occur. An encoder with classes, float32, one process a run (--compare: no patch). What
is not done after --seconds is stopped and saved; the same command goes on with it. Raw files go to
FOLDER/GROUP/NAME (default: .github/results), what a run prints to FOLDER/GROUP-NAME.log.
"""
import argparse
import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import data  # noqa: E402
import evaluate  # noqa: E402
import evidence  # noqa: E402
import mlfs  # noqa: E402
import model as models  # noqa: E402

GIVEN = [f"{name}={os.environ[name]}" for name in ("NVIDIA_TF32_OVERRIDE",) if name in os.environ]


class Passes:
    """One stage's passes: a batch and a factor are copied to the GPU, nothing comes back."""

    def __init__(self, model, teacher, maxnet, hp, U, graphs):
        self.model, self.teacher, self.maxnet, self.hp, self.U = model, teacher, maxnet, hp, U
        self.at = {}                                 # by size: what the recorded passes read
        self.met, self.recorded = set(), {}          # Φ and size: once seen; its graph and loss
        # One memory for all: a pass leaves nothing behind that another one reads, but self.at.
        self.pool = torch.cuda.graph_pool_handle() if graphs else None
        self.scale = torch.zeros((), device=model.device)

    def take(self, batch):
        """Pads ℬ and copies it to the tensors of its size, which are made where there are none."""
        if batch.y.is_floating_point():
            raise ValueError("labels must be classes, not scores")
        ids = batch.x["ids"]
        B, T = ids.shape
        mask = torch.ones_like(ids) if batch.x["mask"] is None else batch.x["mask"]
        segments = batch.x.get("segments", torch.zeros_like(ids))
        padding = min(-T % 8, self.model.max_tokens - T)
        parts = [F.pad(part, (0, padding)).flatten() for part in (ids, mask, segments)]
        self.size = size = (B, T + padding)
        if size not in self.at:
            new = self.model.layers[0].query.weight.new_zeros
            H = self.maxnet.hidden_size
            self.at[size] = {"batch": new(3 * math.prod(size) + B, dtype=torch.long),
                             "last_1": new(B, H), "h_1": {l: new(*size, H) for l in self.U}}
        self.at[size]["batch"].copy_(torch.cat([*parts, batch.y]))

    def direct(self, phi):
        """Lines 8 to 13 for Φ, as in `mlfs.mlfs`; its loss, detached."""
        B, T = self.size
        hp, at = self.hp, self.at[self.size]
        ids, mask, segments = at["batch"][:-B].view(3, B, T)
        batch = mlfs.Batch({"ids": ids, "mask": mask, "segments": segments}, at["batch"][-B:], B,
                           mask.sum())
        last, h = self.model.encode(**batch.x, phi=phi, features=self.U)
        if phi == self.maxnet:
            last_1, h_1 = last.detach(), h
            if self.teacher and self.U:
                with torch.no_grad():
                    last_1, h_1 = self.teacher.encode(**batch.x, phi=phi, features=self.U)
            at["last_1"].copy_(last_1)
            for l in self.U:
                at["h_1"][l].copy_(h_1[l].detach())
        alpha = 0.0 if phi == self.maxnet else hp.alpha
        loss = mlfs.output_loss(self.model, last, at["last_1"], batch, alpha, hp)
        if alpha:
            fd = mlfs.fd_loss(h, at["h_1"], self.U, hp.beta, hp.fd_sum)
            loss = loss + alpha * batch.token_mean(fd)
        (self.scale * loss).backward()
        return loss.detach()

    def __call__(self, phi, scale):
        """The same: as it is where Φ meets a size for the first time, at the second recorded."""
        self.scale.fill_(scale)
        key = (phi, *self.size)
        # An epoch's last batch is smaller, and of a new size each time.
        if not self.pool or self.size[0] != self.hp.batch_size or key not in self.met:
            self.met.add(key)
            return self.direct(phi)
        if key not in self.recorded:
            graph, loss = torch.cuda.CUDAGraph(), torch.zeros((), device=self.model.device)
            with torch.cuda.graph(graph, pool=self.pool, stream=torch.cuda.current_stream()):
                loss.copy_(self.direct(phi))         # nothing is computed yet
            self.recorded[key] = graph, loss
        graph, loss = self.recorded[key]
        graph.replay()
        return loss


def algorithm(model, examples, space, hp, state=None, graphs=True) -> Iterator:
    """`mlfs.mlfs` by passes that can be recorded."""
    state = state or mlfs.State()
    for stage in range(state.stage, 3):
        optimizer, teacher = mlfs.begin_stage(model, examples, space, hp, state, stage)
        n = {phi: model.num_trainable(phi) for phi in space}
        steps = hp.epochs[stage] * math.ceil(len(examples.ids) / hp.batch_size)
        yield mlfs.StageBegins(stage, state.step, steps)
        if optimizer:
            # A recorded pass adds to the same tensors each time: they are zeroed, never replaced.
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                p.grad = torch.zeros_like(p)
            optimizer.zero_grad = lambda: torch.optim.Optimizer.zero_grad(optimizer, False)
        one_alone = len(mlfs.sample_sub_transformers(space, stage, hp.num_subnets, 0)) == 1
        passes = Passes(model, teacher, space[0], hp, {} if one_alone else state.U, graphs)
        for step, batch in mlfs.mini_batches(examples, hp, stage, state.step, "cpu"):
            subnets = mlfs.sample_sub_transformers(space, stage, hp.num_subnets,
                                                   (hp.seed, stage, step))
            passes.take(batch)
            losses = {phi.name: passes(phi, mlfs.gradient_scale(n[space[0]], n[phi], hp.gamma)
                                       / len(subnets)) for phi in subnets}
            yield mlfs.update(optimizer, losses, hp, state, step, steps)
        state.step, state.moments = 0, {}


def work(name: str, out: Path, device: str) -> int:
    """One run, in a process of its own: its exit code."""
    argv = [*evidence.commands()[name], "--device", device, "--dtype", "float32"]
    patch = evidence.PATCHES.get(name.split("/")[1].rpartition("-")[0])
    if patch:
        exec(patch, {"sys": sys, "mlfs": mlfs, "model": models})
    gpu = device.startswith("cuda")
    mlfs.mlfs = lambda *args: algorithm(*args, graphs=gpu)
    evaluate.pick_threads = lambda model: torch.set_num_threads(1)
    if gpu:
        torch.cuda.set_stream(torch.cuda.Stream())   # the first one's work cannot be recorded
    code = mlfs.main([*argv, *["--resume"] * Path("runs/evidence", name).exists()])
    if not code:
        evidence.RESULTS = out
        evidence.keep(name, [*GIVEN, "tests/by_hand/graphs.py", name])
    return code


def start(name: str, out: Path, device: str) -> int:
    """Forks, which saves each run the imports."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        path = out / (name.replace("/", "-") + ".log")
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = work(name, out, device)
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(wanted: list[str], out: Path, workers: int, seconds: float, device: str) -> None:
    """The runs that are not there yet, in the order asked for."""
    os.chdir(evidence.ROOT)
    out.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(name for part in wanted for name in evidence.commands()
                          if part in name and not (out / name).exists())
    left, running, begun = [*names], {}, time.monotonic()
    while left or running:
        while left and len(running) < workers:
            name = left.pop(0)
            running[start(name, out, device)] = name, time.monotonic()
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            name, since = running.pop(child)
            print(f"{name}: exit code {os.waitstatus_to_exitcode(status)} after "
                  f"{time.monotonic() - since:.0f} s", flush=True)
        elif time.monotonic() - begun > seconds:
            left, seconds = [], math.inf
            for child in running:
                os.kill(child, signal.SIGTERM)
        else:
            time.sleep(0.05)


def compare(name: str, device: str, iterations: int) -> None:
    """A run's first iterations by `mlfs.mlfs` and by `algorithm`: time, losses, what is learned."""
    os.chdir(evidence.ROOT)
    mlfs.add_in_one_order(device)
    gpu = device.startswith("cuda")
    if gpu:
        torch.cuda.set_stream(torch.cuda.Stream())
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for what in ["mlfs.mlfs", "algorithm", *["graphs"] * gpu]:
        argv = [*evidence.commands()[name], "--device", device, "--dtype", "float32",
                "--out", "runs/compare", "--overwrite"]
        run, state = mlfs.prepare(*mlfs.parse_arguments(argv))
        few = data.take(run.splits["train"], range(iterations * run.hp.batch_size))
        loop = mlfs.mlfs if what == "mlfs.mlfs" else (
            lambda *args: algorithm(*args, graphs=what == "graphs"))
        losses, times = [], []
        for event in loop(run.model, few, run.space, run.hp, state):
            if isinstance(event, mlfs.Updated):
                losses += event.losses.values()
                times.append(time.monotonic())
        learned = [t.detach().flatten().cpu() for t in run.model.trained_state().values()
                   if t.is_floating_point()]
        found[what] = (torch.tensor(losses), torch.cat(learned))
        turns = torch.tensor(times, dtype=torch.float64).diff() * 1e3
        halves = [turns[iterations // 2:iterations], turns[-iterations // 2:]]
        print(f"{what}: {halves[0].median():.1f} and {halves[1].median():.1f} ms an iteration of "
              f"the first and the last stage, medians of the last {iterations // 2}", flush=True)
        for other, (losses_of, learned_of) in found.items():
            loss, weights = found[what][0] - losses_of, found[what][1] - learned_of
            print(f"  from {other}: largest difference of a loss {loss.abs().max():.1e}, norm of "
                  f"what is learned differently {weights.norm() / learned_of.norm():.1e}",
                  flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--out", type=Path, default=evidence.RESULTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--iterations", type=int, default=40)
    args = parser.parse_args()
    if args.compare:
        compare(args.names[0], args.device, args.iterations)
    else:
        run(args.names, args.out, args.workers, args.seconds, args.device)


if __name__ == "__main__":
    main()
