"""More than one process, and one that is stopped: the same adapters in the end."""

import errno
import fcntl
import io
import os
import resource
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

import data
import evaluate
import mlfs
from conftest import FAMILIES, RUN_OPTIONS, load_small_toy
from model import load_pretrained, replacing, save_pretrained


def examples(family: str, n: int = 9) -> data.Examples:
    """Rows of many lengths, so that padding is shared unevenly; the last batch has one row."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, 50, size=rng.integers(3, 20)).astype(np.int32) for _ in range(n)]
    if family != "bert":
        return data.Examples(ids, None, None)
    return data.Examples(ids, [np.zeros(len(x), np.int8) for x in ids], rng.integers(3, size=n))


def train(rank: int, world: int, family: str, folder: Path) -> None:
    """9 iterations, three a stage; every rank stores what it learned, its gradients and losses."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    model, totals, add_up = FAMILIES[family](num_hidden_layers=2), {}, mlfs.add_up

    def spy(tensors: list[torch.Tensor]) -> None:
        add_up(tensors)
        totals[f"{len(totals):02}"] = torch.cat([t.flatten() for t in tensors])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlfs, "add_up", spy)
        hp = mlfs.HyperParameters(
            dtype="float32",
            batch_size=4,
            rank=2,
            epochs=(1, 1, 1),
            learning_rate=1e-4,
            seed=3,
            teacher="fixed" if family == "llama" else "maxnet",
        )
        space = mlfs.configuration_space(
            model.maxnet, (1, 0.5), (1, 0.5), (1, 0.5), model.head_group
        )
        for _ in mlfs.mlfs(model, examples(family), space, hp):
            pass
    del totals["03"]  # the importance of heads and neurons: only its order matters
    save_file(model.trained_state(), folder / f"{world}-{rank}.safetensors")
    save_file(totals, folder / f"gradients-{world}-{rank}.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_with_half_the_batch_learn_what_one_learns_with_the_whole(family, tmp_path):
    """Labels (code: next tokens) and padding fall unevenly on the two, and the last batch of an
    epoch has one row. In each of 9 iterations gradients and losses agree to 1e-6 of their norm,
    in the end the adapters do to 1e-5, and the two processes hold the same bits.
    """
    train(0, 1, family, tmp_path)
    mp.start_processes(train, (2, family, tmp_path), nprocs=2, start_method="fork")
    one, two = (load_file(tmp_path / f"gradients-{n}.safetensors") for n in ("1-0", "2-0"))
    assert len(one) == len(two) == 9
    for step, gradient in one.items():
        assert (two[step] - gradient).norm() < 1e-6 * gradient.norm()
    one, first, second = (load_file(tmp_path / f"{n}.safetensors") for n in ("1-0", "2-0", "2-1"))
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name]), name
        assert (first[name] - tensor).abs().max() < 1e-5, name


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command of the fixture `run`, into a folder of its own; returns the exit code."""
    monkeypatch.setattr(data, "load_toy", load_small_toy)
    words = ["--out", str(tmp_path / "toy"), *RUN_OPTIONS]
    return lambda *more: evaluate.exit_on_bad_input(lambda: mlfs.main([*words, *more]))


def at_iteration(number: int, do, monkeypatch) -> None:
    """Calls `do` in the so-manieth iteration of the run, as its gradient is added up."""
    count, add_up = [0], mlfs.add_up

    def spy(tensors):
        count[0] += 1
        if count[0] == number:
            do()
        add_up(tensors)

    monkeypatch.setattr(mlfs, "add_up", spy)


@pytest.mark.parametrize(
    "number, when", [(signal.SIGINT, 1), (signal.SIGINT, 3), (signal.SIGTERM, 6)]
)
def test_a_stopped_run_is_saved_and_goes_on_to_the_same_bits(
    run, command, number, when, tmp_path, monkeypatch, capsys
):
    """SIGINT or SIGTERM: the iteration is finished and stored, exit code 128 + the signal's number;
    resumed, the run ends as one that was never stopped, also where the signal comes between two
    stages (3). The old handlers are back."""
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_iteration(when, lambda: os.kill(os.getpid(), number), patch)
        assert command() == 128 + number
    assert "the same command with --resume goes on" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    assert command("--resume") == 0
    for name in ("adapters.safetensors", "palette.md"):
        assert (tmp_path / "toy" / name).read_bytes() == (run / name).read_bytes(), name


def test_a_run_on_a_gpu_asks_for_sums_in_one_order_and_one_on_a_cpu_does_not(command):
    """Without it no two runs of SantaCoder's shape got the same bits (H100): attention's gradient.
    Here there may be no GPU: the run ends with a sentence, after it asked."""
    try:
        assert command("--device", "cpu", "--model", "none") == 2
        assert not torch.are_deterministic_algorithms_enabled()
        assert command("--device", "cuda", "--model", "none") == 2
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def one_of_two(rank: int, folder: Path) -> None:
    """A run of two processes; SIGTERM comes to the second alone, twice, in iteration 1."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_toy", load_small_toy)
        if rank:

            def end_twice() -> None:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)

            at_iteration(1, end_twice, patch)
        code = mlfs.main(["--out", str(folder / "toy"), "--device", "cpu", *RUN_OPTIONS])
    (folder / f"{rank}.txt").write_text(str(code))


def test_a_signal_to_one_process_stops_all_after_the_same_iteration(tmp_path):
    """torchrun passes a Ctrl-C on, so it comes twice; rank 0 saves and tells, others just end."""
    mp.start_processes(one_of_two, (tmp_path,), nprocs=2, start_method="fork")
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["143", "0"]
    log = (tmp_path / "toy" / "log.jsonl").read_text()
    assert log == ""  # ten iterations are between two lines
    _, at = evaluate.read_tensors(tmp_path / "toy" / "state.safetensors")
    assert (int(at["stage"]), int(at["step"])) == (0, 1)


def test_two_runs_cannot_write_to_one_folder(run, command, tmp_path, capsys):
    """Even with --overwrite or --resume; when the other has ended they can."""
    shutil.copytree(run, tmp_path / "toy")
    held, let_go = os.pipe(), os.pipe()
    if not (child := os.fork()):
        evaluate.lock(tmp_path / "toy")
        os.write(held[1], b".")
        os.read(let_go[0], 1)
        os._exit(0)
    os.read(held[0], 1)
    before = (tmp_path / "toy" / "adapters.safetensors").read_bytes()
    assert command("--overwrite") == command("--resume") == 2
    assert capsys.readouterr().err.count("another run is writing to") == 2
    assert (tmp_path / "toy" / "adapters.safetensors").read_bytes() == before
    os.write(let_go[1], b".")
    os.waitpid(child, 0)
    assert command("--resume") == 0


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_two_errors_mean_that_a_folder_is_locked(number, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "lockf", refusing(number))
    with pytest.raises(FileExistsError, match="another run is writing"):
        evaluate.lock(tmp_path)


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EOPNOTSUPP", "EINVAL", "EIO", "EPERM"])
def test_a_file_system_without_locks_is_warned_of_once(name, tmp_path, monkeypatch, capsys):
    """FUSE, NFS without its lock service: nobody else is known to write there."""
    monkeypatch.setattr(fcntl, "lockf", refusing(getattr(errno, name)))
    evaluate.lock(tmp_path)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and f"warning: {tmp_path} cannot be locked" in warning


def refusing(number: int):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("name", ["EPERM", "EACCES", "EINVAL", "ENOTSUP", "ENOSYS", "EROFS"])
@pytest.mark.parametrize("call", ["chmod", "fsync"])
def test_a_file_is_replaced_where_rights_or_flushing_are_refused(call, name, tmp_path, monkeypatch):
    """As CIFS and S3 mounts do."""
    monkeypatch.setattr(os, call, refusing(getattr(errno, name)))
    (tmp_path / "x").write_text("old")
    with replacing(tmp_path / "x") as beside:
        beside.write_text("new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("name", ["EIO", "ENOSPC", "EDQUOT"])
def test_a_file_that_does_not_reach_the_disk_replaces_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refusing(getattr(errno, name)))
    (tmp_path / "x").write_text("old")
    with pytest.raises(OSError), replacing(tmp_path / "x") as beside:
        beside.write_text("new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_run_in_a_thread_leaves_signals_alone():
    """Only the main thread may handle them."""
    seen = []

    def work():
        with mlfs.stoppable() as stopped:
            seen.append((stopped, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [([], before)]


@pytest.mark.parametrize("stream", [None, io.StringIO(), SimpleNamespace(write=len, flush=int)])
def test_a_command_needs_no_terminal(stream, capsys, monkeypatch):
    """None: the shell closed it (>&-). A notebook's has no `reconfigure`."""

    def main():
        print("Φ", flush=True)
        print("𝒜", file=sys.stderr)
        return 7

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)
    assert evaluate.exit_on_bad_input(main) == 7
    assert sys.stdout is not None and sys.stderr is not None


@pytest.mark.parametrize("value", ["", "abc", "0", "2", " "])
def test_what_another_tool_left_in_the_environment_starts_no_processes(value, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", value)
    mlfs.join_processes(SimpleNamespace(device="cpu"))
    assert mlfs.processes() == (0, 1) and not dist.is_initialized()


def test_a_new_volume_is_an_empty_run_folder(tmp_path):
    """Its lost+found and hidden folders are the system's; anything else is somebody's."""
    (tmp_path / "lost+found").mkdir()
    (tmp_path / ".Trash-1000").mkdir()
    evaluate.take_folder(tmp_path, {"task": "toy"}, resume=False, overwrite=False)
    assert {path.name for path in tmp_path.iterdir()} == {
        "lost+found", ".Trash-1000", "run.json", ".lock"
    }  # fmt: skip
    with pytest.raises(FileExistsError, match="exists already; go on with --resume"):
        evaluate.take_folder(tmp_path, {"task": "toy"}, resume=False, overwrite=False)


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(
    command, tmp_path, monkeypatch, capsys
):
    """Nothing more can be written from iteration 6 (stage 2) on: what was there still loads."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    at_iteration(6, fill, monkeypatch)
    try:
        assert command() == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and "File too large" in message
    assert evaluate.load_run(tmp_path / "toy")[1].num_stages == 2
    monkeypatch.undo()
    monkeypatch.setattr(data, "load_toy", load_small_toy)
    assert command("--resume") == 0


def test_a_folder_that_vanishes_is_one_sentence(command, tmp_path, monkeypatch, capsys):
    at_iteration(2, lambda: shutil.rmtree(tmp_path / "toy"), monkeypatch)
    assert command() == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and str(tmp_path / "toy") in message


@pytest.mark.parametrize("write", [save_pretrained, lambda m, f: evaluate.save_tensors(f, {}, {})])
def test_a_checkpoint_that_cannot_be_written_is_an_oserror(write, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        write(load_pretrained(data.DOWNLOADS / "toy"), tmp_path / "file" / "x")
