"""A run killed with SIGKILL at random moments and resumed ends with the bits of a run never killed.

    python tests/by_hand/crash.py [kills] [seed]

The toy, three stages of 300 iterations, one thread. A moment is drawn from the whole time that an
undisturbed run takes (the shortest seen); when a run comes to its end before, its adapters are
compared and the next one begins. Also: a disk that is full (where a small tmpfs can be mounted), a
folder that cannot be written to. Not a test: run it by hand (about 8 minutes).
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [
    sys.executable,
    str(ROOT / "mlfs.py"),
    "--epochs",
    "1,1,1",
    "--train-examples",
    "2400",
    "--batch-size",
    "8",
    "--widths",
    "1,.5",
    "--depths",
    "1,.5",
]


def start(folder: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, "--out", str(folder), *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def state(folder: Path) -> str:
    """The last logged place of a run."""
    try:
        return (folder / "log.jsonl").read_text().splitlines()[-1][:26]
    except (OSError, IndexError):
        return "nothing logged"


def main(kills: int, seed: int) -> None:
    draw, wrong = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as scratch:
        whole, began = Path(scratch) / "whole", time.monotonic()
        assert start(whole).wait() == 0
        seconds = time.monotonic() - began
        wanted = (whole / "adapters.safetensors").read_bytes()
        print(f"never killed: {seconds:.0f} s")
        done = runs = 0
        while done < kills:
            folder, more = Path(scratch) / f"run{runs}", []
            while True:
                began = time.monotonic()
                process = start(folder, *more)
                try:
                    rc = process.wait(draw.uniform(0.5, seconds) if done < kills else None)
                    if not more:
                        seconds = min(seconds, time.monotonic() - began)
                    break
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    done += 1
                    print(f"kill {done} after {state(folder)}", flush=True)
                    more = ["--resume"] if (folder / "run.json").exists() else []
            same = rc == 0 and (folder / "adapters.safetensors").read_bytes() == wanted
            wrong += not same
            left = [path.name for path in folder.iterdir() if path.name.endswith(".part")]
            print(
                f"run {runs}: exit {rc}, {'the same bits' if same else 'OTHER BITS'}"
                + f"{process.stderr.read() if rc else ''}; left behind: {left or 'nothing'}"
            )
            runs += 1

        small = Path(scratch) / "small"
        small.mkdir()
        if (
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(small)],
                capture_output=True,
            ).returncode
            == 0
        ):
            process = start(small / "run")
            print(
                "full disk:",
                process.communicate()[1].splitlines()[-1],
                process.returncode,
                sorted(path.name for path in (small / "run").iterdir()),
            )
            subprocess.run(["umount", str(small)])
        process = start(Path("/proc/run"))
        print(
            "a folder that cannot be made:",
            process.communicate()[1].splitlines()[-1],
            process.returncode,
        )
    print(f"{done} kills, {runs} runs, {wrong} with other bits")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    given = sys.argv[1:]
    if len(given) > 2 or not all(word.isdecimal() for word in given):
        sys.exit(__doc__)
    kills = int(given[0]) if given else 20
    seed = int(given[1]) if len(given) > 1 else 0
    main(kills, seed)
