"""What MLFS learns from: GLUE, Python code, the built-in toy; tokenising, batches, downloads.

A task is a row of a table, not a class. Files are GLUE's own TSV: a tab separates, quotes mean
nothing, a byte-order mark and Windows line ends are accepted (in vocab.txt, tokenizer.json and JSON
lines, too), an empty sentence is an example like any other ([CLS] [SEP]).
"""
import gzip
import hashlib
import json
import os
import random
import socket
import sysconfig
import tempfile
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer

DOWNLOADS = Path(__file__).parent / "weights"        # checkpoints and data sets, git-ignored


# ---------------------------------------------------------------------------------------- GLUE

class Task(NamedTuple):
    """A row of the table. Columns are header names, or numbers where the file has no header."""
    folder: str
    archive: str                                     # at GLUE_URL; "" is a task of your own
    dev: tuple[str, ...]                             # MNLI has two: matched and mismatched
    sentences: tuple[str | int, ...]                 # one column, or two for a pair
    label: str | int
    labels: tuple[str, ...]                          # () is regression
    metrics: tuple[str, ...]                         # first: the score; f1, matthews: two classes


DEV, PAIR = ("dev.tsv",), ("sentence1", "sentence2")
ENTAILMENT, DUPLICATE = ("entailment", "not_entailment"), ("different", "duplicate")
MNLI_DEV = ("dev_matched.tsv", "dev_mismatched.tsv")
MNLI_LABELS = ("entailment", "neutral", "contradiction")
ACC, ACC_F1, CORRELATIONS = ("accuracy",), ("accuracy", "f1"), ("pearson", "spearman")
MOOD = ("negative", "positive")
GLUE = {
    "cola": Task("CoLA", "CoLA.zip", DEV, (3,), 1, ("0", "1"), ("matthews",)),
    "sst2": Task("SST-2", "SST-2.zip", DEV, ("sentence",), "label", MOOD, ACC),
    "mrpc": Task("MRPC", "mrpc_dev_ids.tsv", DEV, ("#1 String", "#2 String"), "Quality", DUPLICATE,
                 ACC_F1),
    "stsb": Task("STS-B", "STS-B.zip", DEV, PAIR, "score", (), CORRELATIONS),
    "qqp": Task("QQP", "QQP-clean.zip", DEV, ("question1", "question2"), "is_duplicate", DUPLICATE,
                ACC_F1),
    "mnli": Task("MNLI", "MNLI.zip", MNLI_DEV, PAIR, "gold_label", MNLI_LABELS, ACC),
    "qnli": Task("QNLI", "QNLIv2.zip", DEV, ("question", "sentence"), "label", ENTAILMENT, ACC),
    "rte": Task("RTE", "RTE.zip", DEV, PAIR, "label", ENTAILMENT, ACC),
    "wnli": Task("WNLI", "WNLI.zip", DEV, PAIR, "label", ("0", "1"), ACC),
    # your own, say: "mail": Task("mail", "", DEV, ("text",), "kind", ("ham", "spam"), ACC_F1),
}
TASKS = GLUE | {"toy": Task("", "", DEV, (), "", MOOD, ACC),
                "python": Task("", "", DEV, (), "", (), ("loss",))}      # the next token, in nats
IGNORED = -100                                       # the label of a position without a next token


class Rows(NamedTuple):
    """A split as text: one or two sentences each; class numbers (int64) or scores (float32).

    Code has one file each, no labels (the next token is the label), and what was left out.
    """
    texts: list[tuple[str, ...]]
    labels: np.ndarray | None
    skipped: dict[str, int] = {}


def load_glue(task: str, split: str, folder: str | Path) -> Rows:
    """Split "train", "dev" or (MNLI) "dev_mismatched" of `folder`/TASK/*.tsv.

    Labels may be words, or their numbers from 0. Raises FileNotFoundError, or ValueError naming
    file and line.
    """
    row = GLUE[task]
    path = Path(folder) / row.folder
    path /= "train.tsv" if split == "train" else row.dev[split == "dev_mismatched"]
    if not path.exists():
        get = f"get it with `python mlfs.py --task {task}` where there is network, or "
        raise FileNotFoundError(f"{task}: there is no {path}; {get if row.archive else ''}name the "
                                f"folder that holds {row.folder}/ with --data-dir")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None
    lines = [line.rstrip("\r") for line in text.split("\n")]        # U+2028 ends no line
    while lines and not lines[-1]:
        lines.pop()
    columns, start = (*row.sentences, row.label), 0
    if isinstance(row.label, str) and lines:
        header, start = lines[0].split("\t"), 1
        for column in columns:
            if column not in header:
                raise ValueError(f"{path}, line 1: there is no column {column!r}; the header has "
                                 f"{', '.join(map(repr, header[:20]))[:200]}")
        columns = tuple(header.index(column) for column in columns)
    classes = {word: i for i, word in enumerate(row.labels)}
    if not any(word.isdigit() for word in row.labels):               # then digits name classes, too
        classes |= {str(i): i for i in range(len(row.labels))}
    texts, labels = [], []
    for number, line in enumerate(lines[start:], start + 1):
        cells = line.split("\t")
        if len(cells) <= max(columns):
            raise ValueError(f"{path}, line {number}: {len(cells)} columns, at least "
                             f"{max(columns) + 1} are needed")
        *sentences, label = (cells[column].strip() for column in columns)
        try:
            labels.append(classes[label] if classes else finite(label))
        except (KeyError, ValueError):
            raise ValueError(f"{path}, line {number}: unknown label {label[:80]!r:.80}; expected "
                             f"{', '.join(classes) or 'a number'}") from None
        texts.append(tuple(sentences))
    if not texts:
        raise ValueError(f"{path} has no examples")
    return Rows(texts, np.array(labels, dtype=np.int64 if classes else np.float32))


def finite(text: str) -> float:
    if not abs(value := float(text)) < 3.4e38:       # what float32 holds; false for NaN, too
        raise ValueError(text)
    return value


def load_task(task: str, folder: str | Path, train: bool = True) -> dict[str, Rows]:
    """The labelled splits: train (if wanted), dev and, for MNLI, dev_mismatched."""
    names = ("train", "dev", "dev_mismatched")[not train:1 + len(TASKS[task].dev)]
    if task in GLUE:
        return {split: load_glue(task, split, folder) for split in names}
    splits = load_toy() if task == "toy" else load_code(folder)
    return {split: splits[split] for split in names}


# --------------------------------------------------------------------------------- Python code

def load_code(folder: str | Path) -> dict[str, Rows]:
    """All Python of a folder, split by file: 1 in 20, drawn with a fixed seed, is for validation.

    Reads *.py, and *.jsonl or *.jsonl.gz with a "content" field (the layout of the-stack), in all
    sub-folders but site-packages. Text that is not UTF-8, is empty or looks generated is skipped
    and counted. Raises FileNotFoundError or ValueError if fewer than two files remain.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder} to read Python code from")
    texts, skipped = [], {"not UTF-8": 0, "empty": 0, "generated": 0}
    for path in sorted(Path(folder).rglob("*")):
        if "site-packages" in path.relative_to(folder).parts or not path.is_file():
            continue
        for content in sources(path):
            text = content.decode("utf-8", errors="ignore")
            reason = why_not(text) if text.encode() == content else "not UTF-8"
            if reason:
                skipped[reason] += 1
            else:
                texts.append((text,))
    if len(texts) < 2:
        raise ValueError(f"{folder} has {len(texts)} usable Python files; at least 2 are needed, "
                         f"one to train on and one to validate on (skipped: {skipped})")
    random.Random(0).shuffle(texts)
    dev = max(1, len(texts) // 20)
    return {"train": Rows(texts[dev:], None, skipped), "dev": Rows(texts[:dev], None)}


def sources(path: Path) -> Iterator[bytes]:
    """The file itself, or the "content" of each line; ValueError names file and line."""
    if path.suffix == ".py":
        yield path.read_bytes()
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        number = 0
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    content = json.loads(line)["content"] if line.strip() else ""
                    if not isinstance(content, str):
                        raise ValueError("\"content\" is no text")
                    yield content.encode("utf-8", errors="surrogatepass")    # JSON may hold halves
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError,
                RecursionError) as error:
            raise ValueError(f"{path}, after line {max(0, number - 1)}: not JSON lines with a "
                             f"\"content\" field ({error})") from None


def why_not(text: str) -> str:
    """Why a file is no good example; "" if it is. Long lines, a notice: made by a program."""
    lines = text.splitlines()
    if not text.strip():
        return "empty"
    top = " ".join(lines[:10]).lower()
    notice = any(f"{a}{b}generated" in top for a in ("auto", "automatically") for b in " -")
    long = max(map(len, lines)) > 1000 or len(text) / len(lines) > 100
    return "generated" if long or notice or "do not edit" in top else ""


# ----------------------------------------------------------------------------------- downloads

GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data/"
MRPC_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase_train.txt"
BERT_BASE = "google-bert/bert-base-uncased"
SANTACODER = "bigcode/gpt_bigcode-santacoder"
MODEL_FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json",
               "tokenizer.json", "vocab.txt"]


def download_glue(task: str, folder: Path) -> None:
    """Fetch a GLUE task into `folder`/TASK, with progress bars.

    Raises OSError if it cannot be had whole; never leaves a partial file.
    """
    row, target = GLUE[task], Path(folder) / GLUE[task].folder
    if not row.archive:
        raise OSError(f"{task} is not one of GLUE's tasks")
    target.mkdir(parents=True, exist_ok=True)
    patience = socket.getdefaulttimeout()
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        def fetch(url: str) -> Path:
            path = Path(scratch) / url.rpartition("/")[2]
            socket.setdefaulttimeout(5)              # seconds of silence, not of the whole download
            try:
                torch.hub.download_url_to_file(url, str(path))
            finally:
                socket.setdefaulttimeout(patience)
            return path

        try:
            first = fetch(GLUE_URL + row.archive)
            if task == "mrpc":
                files = split_mrpc(fetch(MRPC_URL).read_bytes(), first.read_bytes())
            else:
                with zipfile.ZipFile(first) as archive:
                    files = {name: archive.read(f"{row.folder}/{name}")       # checks its digest
                             for name in ("train.tsv", *row.dev)}
        except (zipfile.BadZipFile, zlib.error, EOFError, HTTPException, KeyError,
                ValueError) as error:
            raise OSError(f"the download of {task} is not whole: {error}") from None
        for name, content in files.items():
            (Path(scratch) / name).write_bytes(content)
        for name in files:
            os.replace(Path(scratch) / name, target / name)


def split_mrpc(corpus: bytes, dev_ids: bytes) -> dict[str, bytes]:
    """MRPC comes as one file of 4,076 pairs, and the id pairs of the 408 that GLUE calls dev."""
    dev = {tuple(line.split(b"\t")) for line in dev_ids.replace(b"\r", b"").split(b"\n")}
    header, *lines = corpus.replace(b"\r", b"").removesuffix(b"\n").split(b"\n")
    parts = {"train.tsv": [], "dev.tsv": []}
    for line in lines:
        in_dev = tuple(line.split(b"\t")[1:3]) in dev
        parts["dev.tsv" if in_dev else "train.tsv"].append(line)
    sizes = [len(part) for part in parts.values()]
    if sizes != [3668, 408]:
        raise ValueError(f"{sizes[0]} train and {sizes[1]} dev pairs, not 3668 and 408")
    return {name: b"\n".join([header, *part]) + b"\n" for name, part in parts.items()}


def download_model(name: str, folder: Path) -> None:
    """Fetch a checkpoint from the Hugging Face hub, with progress bars; OSError if it fails."""
    from huggingface_hub import HfApi, snapshot_download     # comes with tokenizers; honours HF_*
    try:
        HfApi().model_info(name, timeout=3)          # a silent network is found out in seconds
        snapshot_download(name, local_dir=folder, allow_patterns=MODEL_FILES, etag_timeout=5)
    except Exception as error:                       # its HTTP errors are no OSErrors
        raise OSError((str(error) or type(error).__name__).splitlines()[0]) from None
    if not any(folder.glob("model*.safetensors")):
        raise OSError(f"the download of {name} is not whole: it has no model.safetensors")


BANNER = """{line}
NO {wanted}: IT IS NOT ON THIS MACHINE AND COULD NOT BE DOWNLOADED
({reason})
What follows is the BUILT-IN TOY, a 0.5M-parameter model on generated sentences.
Its figures say nothing about {wanted}.
With network, this command downloads BERT-base and the data.
Without, name your own: --model FOLDER --data-dir FOLDER
{line}"""


def find_inputs(task: str, model: Path | None,
                data_dir: Path | None) -> tuple[str, Path, Path, str]:
    """(task, model folder, data folder, note): on disk, else downloaded, else the toy and a banner.

    What was named never falls back: ValueError for an unknown task, FileNotFoundError saying what
    is missing, where it was looked for, and how to get it.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose from {', '.join(TASKS)}; a task "
                         f"of your own is one more row of the table in data.py")
    if model and not (model / "config.json").exists():
        raise FileNotFoundError(f"--model: there is no {model / 'config.json'}; weights/README.md "
                                f"tells how to get a checkpoint")
    toy, bert = DOWNLOADS / "toy", DOWNLOADS / "bert-base-uncased"
    glue = data_dir or DOWNLOADS / "glue"
    if task == "toy":
        if data_dir:
            raise ValueError(f"--data-dir {data_dir}: the toy's sentences are generated; name the "
                             f"--task that these data are of")
        return task, model or toy, glue, ""
    if task == "python":                             # by default, this Python's standard library
        coder = model or DOWNLOADS / "santacoder"
        if not model and not any(coder.glob("model*.safetensors")):
            try:
                download_model(SANTACODER, coder)
            except OSError as error:
                raise FileNotFoundError(f"SantaCoder is not in {coder} and could not be downloaded "
                                        f"({error}); name a decoder with --model") from None
        return task, coder, data_dir or Path(sysconfig.get_paths()["stdlib"]), ""
    row, missing, place, option = GLUE[task], "BERT-base", bert, "--model"
    try:
        if not model and not (bert / "model.safetensors").exists():
            download_model(BERT_BASE, bert)
        missing, place, option = f"the data of {task}", glue / row.folder, "--data-dir"
        if not data_dir and not all((place / name).exists() for name in ("train.tsv", *row.dev)):
            download_glue(task, glue)
    except OSError as error:
        if model or data_dir or not row.archive:
            raise FileNotFoundError(f"{missing} is not in {place} and could not be downloaded "
                                    f"({error}); put it there, or name its folder with "
                                    f"{option}") from None
        wanted = f"BERT-BASE ON {task.upper()}"
        print(BANNER.format(line="!" * 90, wanted=wanted, reason=error), flush=True)
        return "toy", toy, glue, f"TOY RUN, not {wanted}: nothing could be downloaded"
    return task, model or bert, glue, ""


def sha256(paths: list[Path]) -> str:
    """The digest, in hexadecimal, of files in a row; FileNotFoundError names a missing one."""
    digest = hashlib.sha256()
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}")
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


# ----------------------------------------------------------------------------- the built-in toy
# A small language of film reviews. Every adjective has a sign and a strength; "not" and "nobody
# says that" flip a clause, "very" and "slightly" scale it, "and" adds two clauses, "but" and
# "although" tell which of two decides. The label is the sign of the whole: no word list solves it,
# a model has to compose.

NOUNS = ("film plot cast score ending script dialogue humour pace music hero story scene idea "
         "voice").split()
ADJECTIVES = {"superb": 2, "brilliant": 2, "gripping": 2, "wonderful": 2, "moving": 2,
              "good": 1, "nice": 1, "charming": 1, "clever": 1, "warm": 1, "fresh": 1, "funny": 1,
              "dull": -1, "slow": -1, "weak": -1, "thin": -1, "flat": -1, "cold": -1, "clumsy": -1,
              "awful": -2, "terrible": -2, "dreadful": -2, "boring": -2, "hopeless": -2}
DEGREES = {"": 1.0, "very": 2.0, "so": 2.0, "rather": 1.0, "slightly": 0.5}
FRAMES = {"": 1, "it is true that": 1, "i think that": 1, "nobody says that": -1,
          "it is wrong that": -1}
VERDICTS = {True: "recommended", False: "avoid"}     # closes a review, in pre-training only
TOY_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def toy_clause(rng: random.Random) -> tuple[str, float]:
    """A clause such as "nobody says that the plot is not very good", and its sentiment."""
    adjective = rng.choice(list(ADJECTIVES))
    degree = rng.choices(list(DEGREES), (6, 2, 2, 1, 2))[0]
    frame = rng.choices(list(FRAMES), (8, 1, 1, 1, 1))[0]
    negation = rng.choices(("", "not", "never"), (6, 2, 1))[0]
    words = (frame, "the", rng.choice(NOUNS), "is", negation, degree, adjective)
    sentiment = ADJECTIVES[adjective] * DEGREES[degree] * FRAMES[frame] * (-1 if negation else 1)
    return " ".join(filter(None, words)), sentiment


def toy_review(rng: random.Random) -> tuple[str, float]:
    """One sentence of one or two clauses, and its sentiment (never 0)."""
    (a, x), (b, y) = toy_clause(rng), toy_clause(rng)
    text, score = rng.choice(((a, x), (f"{a} and {b}", x + y), (f"{a} but {b}", y),
                              (f"although {a} , {b}", y), (f"{a} although {b}", x)))
    return (text + " .", score) if score else toy_review(rng)


def load_toy(train: int = 12_000, dev: int = 1_000, seed: int = 0) -> dict[str, Rows]:
    """Train and dev splits, disjoint as texts, each half positive."""
    rng, seen, splits = random.Random(seed), set(), {}
    for split, size in (("dev", dev), ("train", train)):
        wanted = {True: size // 2, False: size - size // 2}
        texts, labels = [], []
        while len(texts) < size:
            text, score = toy_review(rng)
            if text not in seen and wanted[score > 0]:
                seen.add(text)
                wanted[score > 0] -= 1
                texts.append((text,))
                labels.append(int(score > 0))
        splits[split] = Rows(texts, np.array(labels, dtype=np.int64))
    return splits


# ----------------------------------------------------------------------------- tokens, batches

class Examples(NamedTuple):
    """A tokenised split.
    ids:       [CLS] is this jack ##son ##ville ? [SEP] no it is not . [SEP]
    segments:    0    0   0    0     0      0   0   0    1  1  1  1  1   1
    Code has no segments, and no labels but its next tokens.
    """
    ids: list[np.ndarray]
    segments: list[np.ndarray] | None
    labels: np.ndarray | None

    def take(self, rows: np.ndarray) -> "Examples":
        ids, segments = (part and [part[i] for i in rows] for part in (self.ids, self.segments))
        return Examples(ids, segments, None if self.labels is None else self.labels[rows])


# What a checkpoint folder may hold beside config.json and the weights.
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "vocab.json",
                   "merges.txt", "special_tokens_map.json", "added_tokens.json")


def tokenizer_file(folder: str | Path) -> Path:
    """tokenizer.json, else vocab.txt; FileNotFoundError if there is neither."""
    whole, words = Path(folder) / "tokenizer.json", Path(folder) / "vocab.txt"
    if not whole.exists() and not words.exists():
        raise FileNotFoundError(f"there is neither {whole} nor {words}; copy the checkpoint's "
                                f"tokenizer there")
    return whole if whole.exists() else words


def load_tokenizer(folder: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """tokenizer.json, or uncased WordPiece from vocab.txt; a byte-order mark is no part of either.

    Raises FileNotFoundError, or ValueError if it is damaged or its ids exceed `vocab_size`.
    """
    path = tokenizer_file(folder)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix == ".json":
            tokenizer = Tokenizer.from_str(text)
        else:
            lines = text.removesuffix("\n").split("\n")
            words = {line.rstrip(): i for i, line in enumerate(lines)}
            tokenizer = BertWordPieceTokenizer(words, lowercase=True)._tokenizer
        tokenizer.no_padding()                       # the file's own may be of any size
        probe = tokenizer.encode("a \u2603", "a").ids        # fails without an unknown-token
    except KeyboardInterrupt:
        raise
    except BaseException as error:                   # the library raises bare Exception, or panics
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not a tokenizer: {reason}") from None
    largest = max(*tokenizer.get_vocab().values(), *probe, -1, -1)
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(f"{path} has token ids up to {largest}; the model's embedding has "
                         f"{vocab_size} rows")
    return tokenizer


def encode(tokenizer: Tokenizer, rows: Rows, max_length: int) -> Examples:
    """Token and segment ids, at most `max_length`; the longer sentence of a pair is cut first.

    Code: the files joined by the end-of-text token, cut into windows of `max_length`.
    """
    tokenizer.no_padding()
    if rows.labels is None:
        tokenizer.no_truncation()
        files, end = [text for text, in rows.texts], [end_of_text(tokenizer)]
        stream = [np.zeros(0, dtype=np.int32)]
        for start in range(0, len(files), 1024):     # a bounded number of bulky Encodings at a time
            some = tokenizer.encode_batch_fast(files[start:start + 1024], add_special_tokens=False)
            stream += [np.array(encoding.ids + end, dtype=np.int32) for encoding in some]
        stream = np.concatenate(stream)
        windows = np.split(stream, range(max_length, len(stream), max_length))
        return Examples([w for w in windows if len(w) > 1], None, None)
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    ids, segments = [], []
    for start in range(0, len(rows.texts), 8192):    # a bounded number of bulky Encodings at a time
        texts = [text if len(text) > 1 else text[0] for text in rows.texts[start:start + 8192]]
        for encoding in tokenizer.encode_batch_fast(texts):
            ids.append(np.array(encoding.ids, dtype=np.int32))
            segments.append(np.array(encoding.type_ids, dtype=np.int8))
    return Examples(ids, segments, rows.labels)


def end_of_text(tokenizer: Tokenizer) -> int:
    """The token that ends a file; ValueError if the tokenizer has none of the usual ones."""
    names = ("<|endoftext|>", "</s>")
    for name in names:
        if (token := tokenizer.token_to_id(name)) is not None:
            return token
    raise ValueError(f"the tokenizer has no end-of-text token ({' or '.join(names)})")


def hold_out(examples: Examples, seed: int, most: int = 0) -> tuple[Examples, Examples]:
    """(train, held-out): 5% of TRAIN, at most 512 examples, to watch the maxnet by.

    At most `most` are trained on (0: all), drawn with the seed.
    """
    rows = np.random.default_rng(seed).permutation(len(examples.ids))
    rows = rows[:most + most // 19] if most else rows
    size = min(512, len(rows) // 20)
    train = rows[size:][:most or None]
    return examples.take(np.sort(train)), examples.take(np.sort(rows[:size]))


def draw(examples: Examples, most: int) -> Examples:
    """At most so many examples (0: all), the same ones every time."""
    rows = np.random.default_rng(0).permutation(len(examples.ids))[:most or None]
    return examples.take(np.sort(rows)) if most else examples


def batches(examples: Examples, batch_size: int, seed: int | tuple[int, ...] | None = None,
            device: str | torch.device = "cpu") -> Iterator[tuple[dict, torch.Tensor]]:
    """One epoch of ({"ids", "segments", "mask"} each (B, T), labels (B,)).

    Code has no segments; its labels (B, T) are the next tokens, IGNORED where there is none.

    T is the longest of the batch; mask (1 where a token is real) is None when nothing is padded.
    seed None: by length. Else each example once, in an order that depends on the seed alone:
    shuffled, sorted by length within stretches of 50 batches, and the batches shuffled again (ours:
    Eqs. 1 and 5 draw uniformly; this pads less).
    """
    lengths = np.array([len(x) for x in examples.ids])
    if seed is None:
        order = np.argsort(lengths, kind="stable")
    else:
        rng, stretch = np.random.default_rng(seed), 50 * batch_size
        order = rng.permutation(len(lengths))
        stretches = (order[i:i + stretch] for i in range(0, len(order), stretch))
        order = np.concatenate([s[np.argsort(lengths[s], kind="stable")] for s in stretches])
    groups = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    for group in groups if seed is None else [groups[i] for i in rng.permutation(len(groups))]:
        ids = np.zeros((len(group), lengths[group].max()), dtype=np.int64)
        segments, mask = ids.copy(), ids.copy()
        for row, i in enumerate(group):
            ids[row, :lengths[i]], mask[row, :lengths[i]] = examples.ids[i], 1
            if examples.segments:
                segments[row, :lengths[i]] = examples.segments[i]
        x = {"ids": ids, "mask": mask} | ({"segments": segments} if examples.segments else {})
        if examples.labels is None:
            y = np.full_like(ids, IGNORED)
            y[:, :-1] = np.where(mask[:, 1:] == 1, ids[:, 1:], IGNORED)
        else:
            y = examples.labels[group]
        x = {name: torch.from_numpy(part).to(device) for name, part in x.items()}
        yield x | {"mask": None if mask.all() else x["mask"]}, torch.from_numpy(y).to(device)
