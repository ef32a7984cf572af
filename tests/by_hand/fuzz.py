"""Damaged files, thousands of them: a reader gives the right result or says in a sentence what is
wrong with which file.

    python tests/by_hand/fuzz.py [--cases 4000] [--seed 0]     # every target and mutation: minutes
    python tests/by_hand/fuzz.py --only config/llama/wrong-type/17 --keep DIR      # one case again

A case is TARGET/MUTATION/NUMBER; with the seed it tells all. Each runs in a forked process of its
own and must end in a result (equal to the undamaged one where the mutation is harmless, never where
it must be told; logits finite) or in ValueError or OSError with one line of at most 400 characters
that names the file. Anything else fails: other exceptions, a crash, 10 seconds, or a peak resident
memory more than 2 x the files + 128 MiB above that of reading the undamaged ones (measured by
getrusage; RLIMIT_AS stops a case 4 GiB higher). Exit code 1 if a case failed.

What no reader can find out is no mutation here: a changed word, a weight with another finite value.
"""

import argparse
import gzip
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's threads do not survive a fork

import numpy as np
import torch
from safetensors.torch import load, save

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
import evaluate  # noqa: E402
import mlfs  # noqa: E402
from model import load_pretrained  # noqa: E402

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
SECONDS, MEMORY, ADDRESSES, LONGEST = 10, 128 << 20, 4 << 30, 400

# A folder to read: path -> content. A path may also be a directory (DIRECTORY) or a link (its aim).
Files = dict[str, bytes | Path]
DIRECTORY = Path("a directory")
ANY, SAME, TOLD = "any", "same", "told"  # what may follow: either, the undamaged result, an error


class Target(NamedTuple):
    """What is damaged, how it is read (-> a value to compare), and which mutations suit it."""

    files: Files
    damaged: tuple[str, ...]
    read: Callable[[Path], object]
    mutations: tuple[str, ...]
    crlf: str = SAME  # what Windows line ends and a byte-order mark change
    bom: str = SAME


class Damage(NamedTuple):
    files: Files
    expected: str = ANY


# --------------------------------------------------------------------------------------- reading


def read_glue(task: str, split: str) -> Callable:
    def read(folder: Path) -> object:
        rows = data.load_table(data.GLUE[task], split, folder)
        assert len(rows.texts) == len(rows.labels) > 0 and np.isfinite(rows.labels).all()
        return rows.texts, rows.labels.tolist()

    return read


def read_own(name: str) -> Callable:
    def read(folder: Path) -> object:
        _, place, task = data.own_task(folder / name, None, "text", "kind", False)
        return task.labels, [rows.texts for rows in data.load_task(task, place).values()]

    return read


def read_model(folder: Path) -> object:
    model = load_pretrained(folder, dtype=torch.float32)
    if model.notes:  # a head that was drawn or left out is told, as an error is
        raise ValueError(f"{folder}: {model.notes[0]}"[:LONGEST])
    return show_logits(model)


@torch.inference_mode()
def show_logits(model) -> list:
    ids = torch.arange(8)[None] % model.config["vocab_size"]
    z, _ = model(ids[:, : model.config["max_position_embeddings"]])
    large = max(p.abs().max() for p in model.parameters())
    assert large.isfinite() and (z.isfinite().all() or large > 1e6), "logits are not finite"
    return z.tolist()


def read_tokenizer(folder: Path) -> object:
    tokenizer = data.load_tokenizer(folder, len(WORDS))
    texts = [("this is jacksonville ?", "no"), ("",), ("\u2603 \x00 no",)]
    encoded = data.encode(tokenizer, data.Rows(texts, np.zeros(3)), 8)
    assert all((ids < len(WORDS)).all() and len(ids) <= 8 for ids in encoded.ids)
    vocabulary = sorted(tokenizer.get_vocab().items())
    return vocabulary, [ids.tolist() for ids in encoded.ids + encoded.segments]


def read_run(folder: Path) -> object:
    run, model, space = evaluate.load_run(folder / "run")
    return [phi.name for phi in space], show_logits(model), json.dumps(run["hyper_parameters"])


def read_resumed(folder: Path) -> object:
    """What --resume reads: run.json, state.safetensors, log.jsonl, palette.json."""
    settings = json.loads((SOURCE / "run" / "run.json").read_text())
    evaluate.take_folder(folder / "run", settings, resume=True, overwrite=False)
    model = load_pretrained(SOURCE / "base")
    state = mlfs.State(**evaluate.load_state(folder / "run", model))
    evaluate.cut_log(folder / "run" / "log.jsonl", state)
    log = (folder / "run" / "log.jsonl").read_text()
    place = (state.stage, state.step, sorted(state.moments))
    return place, show_logits(model), len(log)


def read_palette(folder: Path) -> object:
    """palette.json, and every table made of it."""
    palette = evaluate.read_palette(folder / "run")
    rows, metric = palette["subnets"], "accuracy"  # the toy's
    if rows:
        evaluate.choose(rows, {"parameters": 1e9}, metric)
        measured = evaluate.table(rows, evaluate.COLUMNS, metric)
        conditions = evaluate.conditions(palette["measured"])
        return evaluate.final_table(rows, metric) + measured, conditions
    return palette


def read_code(folder: Path) -> object:
    return {name: rows.texts for name, rows in data.load_code(folder).items()}


def read_problems(name: str) -> Callable:
    return lambda folder: evaluate.read_lines(folder / name, evaluate.PROBLEM)


# --------------------------------------------------------------------------------------- targets

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] is this jack ##son ##ville ? no it not .".split()
SOURCE = Path()  # the undamaged run folder and its base, made once
GLUE = {
    "sst2": ("dev", "SST-2/dev.tsv", "sentence\tlabel\ra gripping film\t1\r\t0\rdull \u2603\t0"),
    "cola": ("train", "CoLA/train.tsv", "gj04\t0\t*\tThe car drove.\rgj04\t1\t\tIt is \u00e9."),
    "stsb": ("dev", "STS-B/dev.tsv", "sentence1\tsentence2\tscore\ra\tb\t3.750\r\t\t0\rc\td\t5"),
    "mnli": (
        "dev_mismatched",
        "MNLI/dev_mismatched.tsv",
        "index\tsentence1\tsentence2\tgold_label\r0\tP.\tH.\tneutral\r1\ta\tb\tentailment",
    ),
}
OWN = {
    "mail.csv": 'text,kind\n"buy, ""now""",spam\nsee you,ham\n\u2603,ham\n',
    "mail.jsonl": "".join(f'{{"text": "{i}", "kind": "{i % 2}"}}\n' for i in range(4)),
}
BYTES = (
    "random-bytes random-part bit-flip truncate insert delete repeat empty nul bad-utf8 utf16 "
    "huge-line directory dangling-link link-loop missing"
).split()
TEXT = (*BYTES, "crlf", "bom")
TSV = (*TEXT, "tabs", "missing-column", "empty-cell", "label")
JSON = (
    *TEXT,
    *"wrong-type no-field extra-field deep huge-number nan duplicate-key not-an-object".split(),
)
TENSORS = (
    *BYTES,
    *"swap copy rename drop dtype shape tensor-nan tensor-inf".split(),
    *"header-length header-text header-field".split(),
)
SIGNED = (*TENSORS, "signed-tensors", "signed-origin")


def make_targets() -> dict[str, Target]:
    targets = {}
    for task, (split, path, text) in GLUE.items():
        files: Files = {path: (text.replace("\r", "\n") + "\n").encode()}
        targets[f"glue/{task}"] = Target(files, (path,), read_glue(task, split), TSV)
    for name, text in OWN.items():
        own_files: Files = {name: text.encode()}
        mutations = (*TEXT, "line-field") if name.endswith("l") else TEXT
        targets[f"own/{name}"] = Target(own_files, (name,), read_own(name), mutations)
    for name in ("bert-classifier", "llama-gqa", "gpt-bigcode-head", "gpt2-custom"):
        files, short = content(REFERENCE / name), name.split("-")[0]
        targets[f"config/{short}"] = Target(files, ("config.json",), read_model, JSON)
        weights = ("model.safetensors",)
        targets[f"tensors/{short}"] = Target(files, weights, read_model, TENSORS)
    files = content(REFERENCE / "llama-mqa")
    shards = tuple(name for name in files if name.startswith("model-"))
    targets["tensors/shards"] = Target(files, shards, read_model, TENSORS)
    index = ("model.safetensors.index.json",)
    targets["index"] = Target(files, index, read_model, (*JSON, "places"))

    words = {"vocab.txt": ("\n".join(WORDS) + "\n").encode()}
    targets["vocab.txt"] = Target(words, ("vocab.txt",), read_tokenizer, TEXT)
    write(SOURCE.with_name("words"), words)
    text = data.load_tokenizer(SOURCE.with_name("words")).to_str(pretty=True)
    files = {"tokenizer.json": text.encode()}
    parts = (*JSON, "tokenizer-part")
    targets["tokenizer.json"] = Target(files, tuple(files), read_tokenizer, parts)

    files = content(SOURCE)
    for name, read, mutations in (
        ("run.json", read_run, JSON),
        ("run.json", read_resumed, JSON),
        ("adapters.safetensors", read_run, SIGNED),
        ("state.safetensors", read_resumed, SIGNED),
        ("log.jsonl", read_resumed, (*TEXT, "line-field")),
        ("palette.json", read_palette, (*JSON, "row-field")),
    ):
        prefix = "resume/" if read is read_resumed else "run/"
        target = Target(files, (f"run/{name}",), read, mutations, crlf=ANY)
        targets[prefix + name] = target

    code = {f"m{i}.py": f"def f{i}(x):\n    return x + {i}\n".encode() for i in range(4)}
    lines = [json.dumps({"content": f"x = {i}\n", "id": i}) for i in range(5)]
    files = code | {"more/a.jsonl": ("\n".join(lines) + "\n").encode()}
    files["more/b.jsonl.gz"] = gzip.compress(files["more/a.jsonl"], mtime=0)
    for name, mutations in (
        ("m1.py", TEXT),
        ("more/a.jsonl", (*TEXT, "line-field")),
        ("more/b.jsonl.gz", (*BYTES, "bomb")),
    ):
        damaged = Target(files, (name,), read_code, mutations, crlf=ANY, bom=ANY)
        targets[f"code/{name.rpartition('/')[2]}"] = damaged
    problem = {"task_id": "Test/0", "prompt": "def f():\n", "entry_point": "f", "test": "pass"}
    text = "".join(json.dumps(problem | {"task_id": f"Test/{i}"}) + "\n" for i in range(4))
    for name, plain in (("HumanEval.jsonl", True), ("HumanEval.jsonl.gz", False)):
        files = {name: text.encode() if plain else gzip.compress(text.encode(), mtime=0)}
        mutations = (*TEXT, "line-field") if plain else (*BYTES, "bomb")
        targets[name] = Target(files, (name,), read_problems(name), mutations)
    return targets


def content(folder: Path) -> Files:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "expected.safetensors"
    }


def write(folder: Path, files: Files) -> None:
    folder.mkdir()
    for name, part in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if part is DIRECTORY:
            path.mkdir()
        elif isinstance(part, Path):
            path.symlink_to(part)
        else:
            path.write_bytes(part)


def make_source(folder: Path) -> None:
    """A tiny base and a run folder as `mlfs` leaves it after two iterations of stage 1."""
    torch.manual_seed(0)
    (folder / "run").mkdir(parents=True)
    write(folder / "base", content(REFERENCE / "bert-classifier"))
    words = WORDS + [f"word{i}" for i in range(50 - len(WORDS))]
    (folder / "base" / "vocab.txt").write_text("\n".join(words) + "\n")
    model = load_pretrained(folder / "base")
    hp = mlfs.HyperParameters(epochs=(1, 1, 0), rank=2, batch_size=4, max_length=8)
    space = mlfs.configuration_space(model.maxnet, (1, 0.5), (1, 0.5))
    settings = {
        "task": "mnli",
        "row": data.TASKS["mnli"]._asdict(),
        "note": "",
        "base": evaluate.located(folder / "base", folder / "run")
        | {"sha256": evaluate.base_digest(folder / "base")},
        "data": evaluate.located(folder / "glue", folder / "run")
        | {"train": 8, "held_out": 0, "dev": 8, "sha256": {"dev": "0"}},
        "hyper_parameters": vars(hp) | {"max_length": 8},
        "space": [evaluate.describe(model, phi) for phi in space],
        "device": "cpu",
        "dtype": "float32",
        "seconds": [0.0] * 3,
        "start_scores": [0.0] * 3,
    }
    ids = [np.arange(2, 8, dtype=np.int32) + i for i in range(8)]
    examples = data.Examples(ids, [np.zeros(6, np.int8)] * 8, np.arange(8) % 3)
    log = ""
    state = mlfs.State()
    for at in mlfs.mlfs(model, examples, space, hp, state):
        loss = {"w": 1.0} if isinstance(at, mlfs.Updated) else {}
        log += json.dumps({"stage": at.stage, "step": at.step, "loss": loss}) + "\n"
        if (at.stage, at.step) == (1, 2):
            break
    rows = settings["space"]
    rows = [row | {"score": 0.9, "stderr": 0.01, "accuracy": 0.9} for row in rows]
    times = {"latency_ms": 1.0, "latency_ms_range": [0.9, 1.2]}
    rows = [row | times | {"history": {"stage 1": 0.9}} for row in rows]
    measured = {"device": "a", "threads": 1, "dtype": "float32", "batch_size": 1, "length": 8}
    measured |= {"torch": "2", "adapters": "0"}
    run = folder / "run"
    evaluate.write_json(run / "run.json", settings)
    evaluate.save_adapters(run, model, settings)
    evaluate.save_state(run, model, state)
    palette = {"measured": measured, "subnets": rows}
    evaluate.write_palette(run, settings, data.TASKS["mnli"], palette)
    (run / "log.jsonl").write_text(log)


# ------------------------------------------------------------------------- mutations, of any bytes
# Each takes (rng, target, number, path, old bytes) and gives new bytes, or a Damage.


def random_bytes(rng, target, n, path, old):
    return rng.randbytes(rng.choice((1, 8, 100, len(old), 10_000)))


def random_part(rng, target, n, path, old):
    start, size = rng.randrange(len(old)), rng.randrange(1, 40)
    return old[:start] + rng.randbytes(size) + old[start + size :]


def bit_flip(rng, target, n, path, old):
    new = bytearray(old)
    for _ in range(rng.choice((1, 1, 3, 20))):
        new[head(rng, old)] ^= 1 << rng.randrange(8)
    return bytes(new)


def head(rng, old: bytes) -> int:
    """A position, half of the time in the first 1,000 bytes, where headers are."""
    return rng.randrange(min(len(old), rng.choice((1000, len(old)))))


def truncate(rng, target, n, path, old):
    return old[: rng.choice((head(rng, old), len(old) - 1, rng.randrange(len(old))))]


def insert(rng, target, n, path, old):
    at = head(rng, old)
    return old[:at] + rng.randbytes(rng.choice((1, 5, 500))) + old[at:]


def delete(rng, target, n, path, old):
    at = head(rng, old)
    return old[:at] + old[at + rng.choice((1, 5, 100)) :]


def repeat(rng, target, n, path, old):
    at, size = head(rng, old), rng.choice((1, 10, 1000))
    return old[:at] + old[at : at + size] * rng.choice((2, 50)) + old[at + size :]


def empty(rng, target, n, path, old):
    return (b"", b"\n", b" " * 100, b"\n" * 5000, b"\r\n\t")[n % 5]


def nul(rng, target, n, path, old):
    if n % 4 == 0:
        return bytes(len(old))
    at = head(rng, old)
    return old[:at] + bytes(rng.choice((1, 100))) + old[at:]


def bad_utf8(rng, target, n, path, old):
    at = head(rng, old)
    odd = (b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf0\x28\x8c\xbc", b"\xc0\x80", b"\xf5\x80")
    return old[:at] + odd[n % len(odd)] + old[at:]


def utf16(rng, target, n, path, old):
    text = old.decode("latin-1")
    return text.encode(("utf-16", "utf-16-le", "utf-16-be", "utf-32")[n % 4])


def huge_line(rng, target, n, path, old):
    unit = (b"x", b"word ", b"\t", b"[", b'"', "\u2603".encode())[n % 6]
    text = unit * (10_000_000 // len(unit))
    return (old + text, text + b"\n" + old, text)[n // 6 % 3]


def directory(rng, target, n, path, old):
    return Damage(target.files | {path: DIRECTORY})


def dangling_link(rng, target, n, path, old):
    return Damage(target.files | {path: Path("nowhere")})


def link_loop(rng, target, n, path, old):
    return Damage(target.files | {path: Path(Path(path).name)})


def missing(rng, target, n, path, old):
    return Damage({name: part for name, part in target.files.items() if name != path})


def crlf(rng, target, n, path, old):
    return Damage(target.files | {path: old.replace(b"\n", b"\r\n")}, target.crlf)


def bom(rng, target, n, path, old):
    return Damage(target.files | {path: b"\xef\xbb\xbf" + old}, target.bom)


def bomb(rng, target, n, path, old):
    """Much text in few bytes, after a good line; its memory is weighed against the text."""
    line = gzip.decompress(old).split(b"\n")[0] + b"\n"
    return gzip.compress(line + (b" ", b"[", b"\n")[n % 3] * 10_000_000, mtime=0)


# ------------------------------------------------------------------------------- mutations, of TSV


def edit_cell(rng, old: bytes, edit: Callable) -> bytes:
    lines = [line.split("\t") for line in old.decode().split("\n")[:-1]]
    row = rng.randrange(len(lines))
    edit(lines[row], rng.randrange(len(lines[row])))
    return ("\n".join("\t".join(line) for line in lines) + "\n").encode()


def tabs(rng, target, n, path, old):
    def edit(cells, at):
        cells[at] += "\t" * rng.choice((1, 3000, 100_000))

    return edit_cell(rng, old, edit)


def missing_column(rng, target, n, path, old):
    return edit_cell(rng, old, lambda cells, at: cells.pop(at))


def empty_cell(rng, target, n, path, old):
    return edit_cell(rng, old, lambda cells, at: cells.__setitem__(at, ""))


LABELS = (
    "nan inf -inf 1e400 1e39 -1e39 1_0 0x1 \u0661 2 -1 1.0 true None positive\x0b\u2028x".split(" ")
)


def label(rng, target, n, path, old):
    """The last cell of the last line (CoLA: the second): a label that is none, or hardly one."""
    *lines, last = old.decode().split("\n")[:-1]
    cells = last.split("\t")
    odd = (*LABELS, "9" * 5000, "x" * 100_000)
    cells[1 if path.startswith("CoLA") else -1] = odd[n % len(odd)]
    return ("\n".join([*lines, "\t".join(cells)]) + "\n").encode()


# ------------------------------------------------------------------------------ mutations, of JSON

ODD = (
    None,
    True,
    False,
    0,
    -1,
    1,
    0.5,
    3,
    7,
    2**31,
    2**63,
    10**30,
    10**400,
    float("nan"),
    float("inf"),
    1e308,
    5e-324,
    "",
    "x",
    "12",
    "a\nb\u2028\x00\ud800",
    "y" * 100_000,
    [],
    [1],
    ["a", None],
    [[]],
    {},
    {"a": 1},
    {"type": "default", "rope_theta": "x"},
)


def places(value, at: tuple = ()) -> Iterator[tuple]:
    """The way to every field and entry inside."""
    inside = value.items() if isinstance(value, dict) else ()
    inside = enumerate(value) if isinstance(value, list) else inside
    for key, part in inside:
        yield (*at, key)
        yield from places(part, (*at, key))


def put(value, at: tuple, new=None, drop: bool = False) -> None:
    for key in at[:-1]:
        value = value[key]
    if drop:
        del value[at[-1]]
    else:
        value[at[-1]] = new


def pick_place(value, n: int, rng) -> tuple:
    """Every field of the top in its turn; every third time around something inside it."""
    inside = [at for at in places(value) if at[0] == list(value)[n % len(value)]]
    return rng.choice(inside) if n // len(value) % 3 == 2 else inside[0]


def wrong_type(rng, target, n, path, old):
    """Field after field, each with one odd value after the other; a config's own fields only."""
    value = json.loads(old)
    fields = list(value)
    at = (fields[n % len(fields)],) if path == "config.json" else pick_place(value, n, rng)
    put(value, at, ODD[(n // len(fields) * 8 + n) % len(ODD)])
    return json.dumps(value).encode()


def no_field(rng, target, n, path, old):
    value = json.loads(old)
    put(value, pick_place(value, n, rng), drop=True)
    return json.dumps(value).encode()


def extra_field(rng, target, n, path, old):
    value = json.loads(old)
    name = ("rope_scaling", "head_dim", "num_key_value_heads", "quantization", "x\n")[n % 5]
    value[name] = rng.choice(ODD)
    return json.dumps(value).encode()


def deep(rng, target, n, path, old):
    depth = (900, 5000, 100_000)[n % 3]
    pair = (("[", "]"), ('{"a":', "}"), ("[", ""))[n // 3 % 3]
    text = pair[0] * depth + "1" * bool(pair[1]) + pair[1] * depth
    if n // 9 % 2:
        return text.encode()
    return (old.decode().rstrip()[:-1] + ', "deep": ' + text + "}").encode()


def huge_number(rng, target, n, path, old):
    value = json.loads(old)
    put(value, pick_place(value, n, rng), "@@")
    big = ("9" * 4000, "9" * 100_000, "1" * 30, "1e999", "-1e999", "1e-999", "0." + "1" * 50_000)
    return json.dumps(value).replace('"@@"', big[n % len(big)]).encode()


def nan_(rng, target, n, path, old):
    value = json.loads(old)
    put(value, pick_place(value, n, rng), float(("nan", "inf", "-inf")[n % 3]))
    return json.dumps(value).encode()


def duplicate_key(rng, target, n, path, old):
    """The last one counts in Python; the tokenizers library may refuse it."""
    value = json.loads(old)
    key = list(value)[n % len(value)]
    first = json.dumps({key: rng.choice(ODD)})[1:-1]
    return ("{" + first + ", " + old.decode().lstrip()[1:]).encode()


def not_an_object(rng, target, n, path, old):
    return json.dumps((*ODD, [json.loads(old)])[n % (len(ODD) + 1)]).encode()


PADDING = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
PADDING |= {"pad_token": "[PAD]", "strategy": {"Fixed": 2**45}}
CUT = {"direction": "Left", "max_length": 1, "strategy": "OnlySecond", "stride": 5}
PARTS = {
    "padding": (PADDING, PADDING | {"strategy": {"Fixed": 9**9}, "pad_id": 2**31}, 7),
    "truncation": (CUT, CUT | {"max_length": 0, "stride": 0}, CUT | {"max_length": 2**63}),
    "post_processor": (
        {"type": "BertProcessing", "sep": ["[SEP]", 99999], "cls": ["[CLS]", 2]},
        {"type": "RobertaProcessing", "sep": ["x", 2**31], "cls": ["y", 2**32]},
        None,
    ),
    "normalizer": (
        {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
        {"type": "Prepend", "prepend": "x" * 100_000},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    ),
    "pre_tokenizer": (
        {"type": "FixedLength", "length": 0},
        {"type": "y" * 100_000},
        {"type": "Split", "pattern": {"Regex": "(a*)*$"}, "behavior": "Removed", "invert": False},
    ),
    "model": (
        {"type": "WordLevel", "vocab": {"a": 2**32 - 1, "u": 0}, "unk_token": "u"},
        {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]},
        {"type": "Unigram", "vocab": [["a", float("-inf")]], "unk_id": 5},
    ),
    "decoder": ({"type": "x\ny"}, 7, []),
    "added_tokens": ([{"id": 2**32, "content": "x"}], [{"id": -1}], [7] * 1000),
}


def tokenizer_part(rng, target, n, path, old):
    key = list(PARTS)[n % len(PARTS)]
    part = PARTS[key][n // len(PARTS) % 3]
    return json.dumps(json.loads(old) | {key: part}).encode()


def index_places(rng, target, n, path, old):
    value, odd = json.loads(old), ("../x", "/etc/passwd", "a\nb", "\x00", "z" * 300, "", "config")
    name = rng.choice(list(value["weight_map"]))
    value["weight_map"][name] = odd[n % 7] + ".safetensors" * (n // 7 % 2)
    return Damage(target.files | {path: json.dumps(value).encode()}, TOLD)


def line_field(rng, target, n, path, old):
    """One field of one line wrong, or gone; or the line is no object."""
    lines = [json.loads(line) for line in old.splitlines()]
    at = rng.randrange(len(lines))
    key = list(lines[at])[n % len(lines[at])]
    odd = ODD[n // 2 % len(ODD)]
    if n % 7 == 0:
        del lines[at][key]
    elif n % 7 == 1:
        lines[at] = odd
    else:
        lines[at][key] = odd
    text = "\n".join(json.dumps(line) for line in lines) + "\n"
    return text.replace("null", "[" * 100_000, n % 11 == 0).encode()


def row_field(rng, target, n, path, old):
    """palette.json: one field of one row, or of where it was measured, wrong or gone."""
    value = json.loads(old)
    part = value["measured"] if n % 4 == 0 else rng.choice(value["subnets"])
    key = rng.choice(list(part))
    if n % 3 == 0:
        del part[key]
    else:
        part[key] = rng.choice(ODD)
    return json.dumps(value).encode()


# --------------------------------------------------------------------------- mutations, of tensors


UNREAD = re.compile(r"attn\.(masked_)?bias$|position_ids|inv_freq|^cls\.")


def tensors_of(old: bytes) -> tuple[dict[str, torch.Tensor], dict]:
    size = int.from_bytes(old[:8], "little")
    return load(old), json.loads(old[8 : 8 + size]).get("__metadata__")


def edit_tensors(change: Callable, expected: str = TOLD) -> Callable:
    def mutate(rng, target, n, path, old):
        tensors, metadata = tensors_of(old)
        outcome = change(rng, n, tensors) or expected
        tensors = {name: t.contiguous().clone() for name, t in tensors.items()}
        return Damage(target.files | {path: save(tensors, metadata)}, outcome)

    return mutate


def pick(rng, tensors: dict) -> str:
    """Any but the buffers and the heads that no model of ours has."""
    return rng.choice(sorted(n for n in tensors if not UNREAD.search(n)))


def swap(rng, n, tensors):
    a, b = pick(rng, tensors), pick(rng, tensors)
    tensors[a], tensors[b] = tensors[b], tensors[a]
    return SAME if torch.equal(tensors[a], tensors[b]) else ANY


def copy(rng, n, tensors):
    name = pick(rng, tensors)
    names = ("x." + name, "bert." + name, name + "2", name.replace(".", ".9.", 1), "", "a\nb")
    tensors[names[n % 6]] = tensors[name].clone()


def rename(rng, n, tensors):
    name = pick(rng, tensors)
    names = (name[1:], name + "\n", name.upper(), "\u2603", "z" * 50_000, "layers.1.5")
    tensors[names[n % 6]] = tensors.pop(name)


def drop(rng, n, tensors):
    """One is missing; of an embedding tied to the output, stored twice, one will do."""
    name = pick(rng, tensors)
    del tensors[name]
    return ANY if name.endswith(("lm_head.weight", "wte.weight")) else TOLD


def dtype(rng, n, tensors):
    name = pick(rng, tensors)
    kinds = (torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.complex64)
    kinds += (torch.float16, torch.bfloat16, torch.float64)
    tensors[name] = tensors[name].to(kinds[n % 8])
    return ANY if n % 8 > 4 else TOLD


def shape(rng, n, tensors):
    name = pick(rng, tensors)
    t = tensors[name]
    flat = t.flatten()
    odd = (t[None], flat[:0], flat[0], flat[:-1], torch.cat((flat, flat)), flat[None, :, None])
    tensors[name] = odd[n % 6]
    return SAME if tensors[name].shape == t.shape else None  # a number's first one is itself


def not_finite(value: float) -> Callable:
    def change(rng, n, tensors):
        t = tensors[pick(rng, tensors)]
        if not t.is_floating_point():
            return ANY
        t.view(-1)[rng.randrange(t.numel())] = value

    return change


def header(old: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(old[:8], "little")
    return json.loads(old[8 : 8 + size]), old[8 + size :]


def header_length(rng, target, n, path, old):
    size = int.from_bytes(old[:8], "little")
    odd = (0, 1, 2**63, 2**64 - 1, len(old), len(old) - 8, len(old) - 7, 100_000_001, size - 1)
    odd += (size + 1, 2, 2**32)
    return Damage(target.files | {path: odd[n % 12].to_bytes(8, "little") + old[8:]}, TOLD)


def pack_header(text: bytes, body: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + body


def header_text(rng, target, n, path, old):
    _, body = header(old)
    odd = (b"{}", b"[]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"", b"\xff" * 9, b'{"":{}}')
    return Damage(target.files | {path: pack_header(odd[n % 8], body)}, TOLD)


def header_field(rng, target, n, path, old):
    value, body = header(old)
    name = rng.choice([name for name in value if name != "__metadata__"])
    field = rng.choice(("dtype", "shape", "data_offsets"))
    odd = (
        *ODD[:20],
        [0, 2**63],
        [2**40, 2**41],
        [5, 1],
        [-1, 3],
        [2**32, 2**32],
        "F8",
        "F64",
        "F4",
    )
    odd += ("F8_E8M0", "F8_E5M2", "C64", "U64", "I8", "BOOL", "F6_E2M3", [], [0], [1] * 200)
    value[name][field] = odd[n % len(odd)]
    if n % 5 == 0:
        value["__metadata__"] = rng.choice(ODD)
    return pack_header(json.dumps(value).encode(), body)


def signed_tensors(rng, target, n, path, old):
    """Wrong tensors with the right checksum, as another version or another hand would store."""
    tensors, metadata = tensors_of(old)
    change = (swap, copy, rename, drop, dtype, shape, not_finite(float("nan")))[n % 7]
    change(rng, n // 7, tensors)
    return sign(target, path, tensors, json.loads(metadata["mlfs"]))


def signed_origin(rng, target, n, path, old):
    tensors, metadata = tensors_of(old)
    origin = json.loads(metadata["mlfs"])
    key = list(origin)[n % len(origin)]
    if n % 9 == 0:
        return sign(target, path, tensors, ODD[n // 9 % len(ODD)])
    if n % 9 == 1:
        return sign(target, path, tensors, "[" * 100_000)
    origin[key] = ODD[n // 2 % len(ODD)]
    return sign(target, path, tensors, origin)


def sign(target: Target, path: str, tensors: dict, origin) -> Damage:
    tensors = {name: t.contiguous().clone() for name, t in tensors.items()}
    if isinstance(origin, dict):
        origin = origin | {"sha256": evaluate.digest(tensors)}
    text = origin if isinstance(origin, str) and origin[:1] == "[" else json.dumps(origin)
    return Damage(target.files | {path: save(tensors, {"mlfs": text})})


MUTATIONS: dict[str, Callable] = {
    f.__name__.strip("_").replace("_", "-"): f
    for f in (
        *(random_bytes, random_part, bit_flip, truncate, insert, delete, repeat, empty, nul),
        *(bad_utf8, utf16, huge_line, directory, dangling_link, link_loop, missing, crlf, bom),
        *(bomb, tabs, missing_column, empty_cell, label, wrong_type, no_field, extra_field, deep),
        *(huge_number, nan_, duplicate_key, not_an_object, line_field, row_field, header_length),
        *(header_text, header_field, signed_tensors, signed_origin, tokenizer_part),
    )
}
MUTATIONS |= {f.__name__: edit_tensors(f) for f in (swap, copy, rename, drop, dtype, shape)}
MUTATIONS |= {
    "tensor-nan": edit_tensors(not_finite(float("nan"))),
    "tensor-inf": edit_tensors(not_finite(float("-inf"))),
    "places": index_places,
}
WEIGHTS = {"wrong-type": 9, "bit-flip": 3, "random-part": 3, "label": 4, "row-field": 5}
WEIGHTS |= {
    "config/wrong-type": 80,
    "tokenizer-part": 9,
    "line-field": 4,
    "signed-tensors": 6,
    "signed-origin": 3,
    "header-field": 4,
}
WEIGHTS |= dict.fromkeys(
    ("huge-number", "header-length", "shape", "rename", "tensor-nan", "drop"), 2
)
WEIGHTS |= dict.fromkeys(("crlf", "bom", "directory", "dangling-link", "link-loop", "missing"), 0.3)


# --------------------------------------------------------------------------------------- one case


def damage(targets: dict[str, Target], seed: int, case: str) -> Damage:
    name, mutation, number = case.rsplit("/", 2)
    target, rng = targets[name], random.Random(f"{seed}/{case}")
    n = int(number) + first_variant(name, seed)
    path = target.damaged[n % len(target.damaged)]
    new = MUTATIONS[mutation](rng, target, n, path, target.files[path])
    return new if isinstance(new, Damage) else Damage(target.files | {path: new})


def first_variant(name: str, seed: int) -> int:
    """Where a target starts in a mutation's list of variants: others start elsewhere."""
    return random.Random(f"{seed}/{name}").randrange(10_000)


def in_a_fork(read: Callable[[Path], object], folder: Path) -> dict:
    """What came of read(folder) in a process of its own: a result's digest, or an error."""
    receive, send = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(receive)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # its default action ends the process
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES,) * 2)
        try:
            result = {"digest": hashlib.sha256(repr(read(folder)).encode()).hexdigest()}
        except BaseException as error:
            text = str(error).encode(errors="backslashreplace").decode()
            result = {"error": type(error).__name__, "text": text[:2000]}
            result["told"] = isinstance(error, (ValueError, OSError))
            trace = error.__traceback__
            while trace.tb_next and trace.tb_next.tb_frame.f_code.co_filename.startswith(ROOT):
                trace = trace.tb_next
            result["at"] = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
        result["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        os.write(send, json.dumps(result).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    died = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    result = json.loads(text) if text else {"died": signal.Signals(died).name if died else status}
    return result | {"seconds": time.monotonic() - start}


ROOT = str(Path(__file__).resolve().parents[2])


def judge(
    found: dict, plain: dict, expected: str, target: Target, folder: Path, size: int
) -> tuple[str, str]:
    """("result", "refusal" or "failure", why)."""
    if "died" in found:
        return "failure", "no answer in time" if found["died"] == "SIGALRM" else found["died"]
    if (more := found["peak"] - plain["peak"] - 2 * size) > MEMORY:
        return "failure", f"{more / 2**20:.0f} MiB more than twice its files"
    if "error" in found:
        text, kind = found["text"], f"{found['error']} at {found['at']}: {found['text'][:300]!r}"
        names = [Path(path).name for path in target.damaged] + [str(folder), str(SOURCE / "base")]
        if not found["told"]:
            return "failure", kind
        if expected == SAME:
            return "failure", f"harmless, but {kind}"
        if len(text.splitlines()) != 1 or not text.strip() or len(text) > LONGEST:
            return "failure", f"not one clear sentence: {kind}"
        if not any(name in text for name in names):
            return "failure", f"names no file: {kind}"
        return "refusal", text
    if expected == TOLD:
        return "failure", "was not told"
    if expected == SAME and found["digest"] != plain["digest"]:
        return "failure", "harmless, but another result"
    return "result", ""


def plan(targets: dict[str, Target], cases: int) -> list[str]:
    """Case names; each mutation of each target its weight's share, at least one case."""
    shares = {
        (name, kind): WEIGHTS.get(f"{name.split('/')[0]}/{kind}", WEIGHTS.get(kind, 1.0))
        for name, target in targets.items()
        for kind in target.mutations
    }
    unit = cases / sum(shares.values())
    return [
        f"{name}/{kind}/{n}"
        for (name, kind), share in shares.items()
        for n in range(max(1, round(share * unit)))
    ]


def main() -> int:
    global SOURCE
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=4000, help="about so many; default 4000")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--only", metavar="CASE", help="TARGET/MUTATION/NUMBER, or its beginning")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="with --only: leave the files here"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts, failures = defaultdict(Counter), []
    with tempfile.TemporaryDirectory() as scratch:
        SOURCE = Path(scratch) / "source"
        make_source(SOURCE)
        targets, plain, begun = make_targets(), {}, time.monotonic()
        names = [args.only] if args.only and args.only[-1].isdigit() else plan(targets, args.cases)
        for case in names:
            if not case.startswith(args.only or ""):
                continue
            name, kind, _ = case.rsplit("/", 2)
            target, folder = targets[name], Path(scratch) / "case"
            if name not in plain:
                write(folder, target.files)
                plain[name] = in_a_fork(target.read, folder)
                assert "digest" in plain[name], f"{name}, undamaged: {plain[name]}"
                shutil.rmtree(folder)
            files, expected = damage(targets, args.seed, case)
            write(folder, files)
            if args.keep:
                shutil.copytree(folder, args.keep, symlinks=True)
            size = sum(weight(part, kind) for part in files.values())
            found = in_a_fork(target.read, folder)
            shutil.rmtree(folder)
            verdict, why = judge(found, plain[name], expected, target, folder, size)
            counts[name, kind] += Counter({verdict: 1, "cases": 1, "seconds": found["seconds"]})
            if verdict == "failure":
                failures.append((case, why))
            if args.only:
                print(f"{case}: {verdict} {why}")
    print_table(counts)
    for case, why in failures:
        print(f"FAILED {case} (--seed {args.seed}): {why}")
    total = sum((row for row in counts.values()), Counter())
    print(
        f"\n{total['cases']} cases in {time.monotonic() - begun:.0f} s: {total['result']} results, "
        f"{total['refusal']} refusals, {len(failures)} failures"
    )
    return 1 if failures else 0


def weight(part: bytes | Path, kind: str) -> int:
    """What a file weighs in memory's account: a compressed one as much as its text."""
    return 10_000_000 if kind == "bomb" else 0 if isinstance(part, Path) else len(part)


def print_table(counts: dict[tuple[str, str], Counter]) -> None:
    columns = ("cases", "result", "refusal", "failure", "seconds")
    print(f"{'target':22} {'mutation':16}" + "".join(f"{name:>9}" for name in columns))
    for name in dict.fromkeys(name for name, _ in counts):
        kinds = {kind: row for (other, kind), row in counts.items() if other == name}
        for kind, row in (kinds | {"all": sum(kinds.values(), Counter())}).items():
            cells = [f"{row[key]:9.1f}" if key == "seconds" else f"{row[key]:9}" for key in columns]
            print(f"{name:22} {kind:16}" + "".join(cells))


if __name__ == "__main__":
    sys.exit(main())
