"""What MLFS learns from: the nine GLUE tasks, the built-in toy task, tokenising, and batches of similar length.

A task is a row of a table, not a class. Files are GLUE's own TSV: a tab separates, quotes mean nothing, a byte-order mark
and Windows line ends are accepted, an empty sentence is an example like any other (it becomes [CLS] [SEP]).
"""
import hashlib
import os
import random
import tempfile
import zipfile
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer

DOWNLOADS = Path(__file__).parent / "weights"                        # models and data sets land here, out of version control


# -------------------------------------------------------------------------------------------------------------- GLUE

class Task(NamedTuple):
    """One row of the table. Columns are header names, or numbers where the file has no header."""
    folder: str
    archive: str
    train: str
    dev: tuple[str, ...]                                             # MNLI has two: matched, mismatched
    sentences: tuple[str | int, ...]                                 # one column, or two for a pair
    label: str | int
    labels: tuple[str, ...]                                          # () is regression
    metrics: tuple[str, ...]                                         # the first is the score


NLI = ("entailment", "not_entailment")
GLUE = {
    "cola": Task("CoLA", "CoLA.zip", "train.tsv", ("dev.tsv",), (3,), 1, ("0", "1"), ("matthews",)),
    "sst2": Task("SST-2", "SST-2.zip", "train.tsv", ("dev.tsv",), ("sentence",), "label", ("negative", "positive"), ("accuracy",)),
    "mrpc": Task("MRPC", "", "train.tsv", ("dev.tsv",), ("#1 String", "#2 String"), "Quality", ("different", "paraphrase"), ("accuracy", "f1")),
    "stsb": Task("STS-B", "STS-B.zip", "train.tsv", ("dev.tsv",), ("sentence1", "sentence2"), "score", (), ("pearson", "spearman")),
    "qqp": Task("QQP", "QQP-clean.zip", "train.tsv", ("dev.tsv",), ("question1", "question2"), "is_duplicate", ("different", "duplicate"), ("accuracy", "f1")),
    "mnli": Task("MNLI", "MNLI.zip", "train.tsv", ("dev_matched.tsv", "dev_mismatched.tsv"), ("sentence1", "sentence2"), "gold_label", ("entailment", "neutral", "contradiction"), ("accuracy",)),
    "qnli": Task("QNLI", "QNLIv2.zip", "train.tsv", ("dev.tsv",), ("question", "sentence"), "label", NLI, ("accuracy",)),
    "rte": Task("RTE", "RTE.zip", "train.tsv", ("dev.tsv",), ("sentence1", "sentence2"), "label", NLI, ("accuracy",)),
    "wnli": Task("WNLI", "WNLI.zip", "train.tsv", ("dev.tsv",), ("sentence1", "sentence2"), "label", ("0", "1"), ("accuracy",)),
}
TASKS = GLUE | {"toy": Task("", "", "train", ("dev",), (), "", ("negative", "positive"), ("accuracy",))}


class Rows(NamedTuple):
    """A split as text: `texts` holds one- or two-sentence tuples, `labels` class numbers (int64) or scores (float32)."""
    texts: list[tuple[str, ...]]
    labels: np.ndarray


def load_glue(task: str, split: str, folder: str | Path) -> Rows:
    """Split "train", "dev" or (MNLI) "dev_mismatched" of `folder`/TASK/*.tsv.

    Labels may be words or digits. Raises FileNotFoundError, or ValueError naming file and line.
    """
    row = GLUE[task]
    name = row.train if split == "train" else row.dev[split == "dev_mismatched"]
    path = Path(folder) / row.folder / name
    if not path.exists():
        raise FileNotFoundError(f"{task}: there is no {path}; get it with `python mlfs.py --task {task}` on a machine with "
                                f"network, or name the folder that holds {row.folder}/ with --data-dir")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")     # not splitlines(): it also cuts at U+2028 and its like
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None
    lines = [line.rstrip("\r").split("\t") for line in lines]
    while lines and lines[-1] == [""]:
        lines.pop()
    columns, start = (*row.sentences, row.label), 0
    if isinstance(row.label, str) and lines:
        header, start = lines[0], 1
        for column in columns:
            if column not in header:
                raise ValueError(f"{path}, line 1: there is no column {column!r}; the header has {', '.join(header)[:200]}")
        columns = tuple(header.index(column) for column in columns)
    numbers = {str(i): i for i in range(len(row.labels))} | {word: i for i, word in enumerate(row.labels)}
    texts, labels = [], []
    for number, cells in enumerate(lines[start:], start + 1):
        if len(cells) <= max(columns):
            raise ValueError(f"{path}, line {number}: {len(cells)} columns, at least {max(columns) + 1} are needed")
        *sentences, label = (cells[column].strip() for column in columns)
        try:
            labels.append(numbers[label] if row.labels else finite(label))
        except (KeyError, ValueError):
            wanted = ", ".join(numbers) if row.labels else "a number"
            raise ValueError(f"{path}, line {number}: unknown label {label[:80]!r}; expected {wanted}") from None
        texts.append(tuple(sentences))
    if not texts:
        raise ValueError(f"{path} has no examples")
    return Rows(texts, np.array(labels, dtype=np.int64 if row.labels else np.float32))


def finite(text: str) -> float:
    if not np.isfinite(value := float(text)):
        raise ValueError(text)
    return value


def load_task(task: str, folder: str | Path) -> dict[str, Rows]:
    """All labelled splits of a task: train, dev and, for MNLI, dev_mismatched. Raises ValueError if the task is unknown."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    if task == "toy":
        return load_toy()
    names = ("train", "dev", "dev_mismatched")[:1 + len(TASKS[task].dev)]
    return {split: load_glue(task, split, folder) for split in names}


# --------------------------------------------------------------------------------------------------------- downloads

GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data/"
MRPC_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase_train.txt"
MRPC_DEV_IDS = "https://dl.fbaipublicfiles.com/glue/data/mrpc_dev_ids.tsv"
BERT_BASE = "google-bert/bert-base-uncased"
MODEL_FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]


def download_glue(task: str, folder: Path) -> None:
    """Fetch a GLUE task into `folder`/TASK, with progress bars. OSError if it cannot be had whole; never a partial file."""
    row, target = GLUE[task], Path(folder) / GLUE[task].folder
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        def fetch(url: str) -> Path:
            path = Path(scratch) / url.rpartition("/")[2]
            torch.hub.download_url_to_file(url, str(path))
            return path
        try:
            if row.archive:
                with zipfile.ZipFile(fetch(GLUE_URL + row.archive)) as archive:    # a broken download is no zip file
                    files = {name: archive.read(f"{row.folder}/{name}") for name in (row.train, *row.dev)}
            else:
                files = split_mrpc(fetch(MRPC_URL).read_bytes(), fetch(MRPC_DEV_IDS).read_bytes())
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise OSError(f"the download of {task} is not whole: {error}") from None
        for name, content in files.items():
            (Path(scratch) / name).write_bytes(content)
        for name in files:
            os.replace(Path(scratch) / name, target / name)


def split_mrpc(corpus: bytes, dev_ids: bytes) -> dict[str, bytes]:
    """MRPC comes as one file of 4,076 pairs and the id pairs of the 408 that GLUE calls dev."""
    dev = {tuple(line.split(b"\t")) for line in dev_ids.replace(b"\r", b"").splitlines()}
    header, *lines = corpus.replace(b"\r", b"").removesuffix(b"\n").split(b"\n")
    parts = {"train.tsv": [], "dev.tsv": []}
    for line in lines:
        parts["dev.tsv" if tuple(line.split(b"\t")[1:3]) in dev else "train.tsv"].append(line)
    if (len(parts["train.tsv"]), len(parts["dev.tsv"])) != (3668, 408):
        raise ValueError(f"{len(parts['train.tsv'])} train and {len(parts['dev.tsv'])} dev pairs, not 3668 and 408")
    return {name: b"\n".join([header, *lines]) + b"\n" for name, lines in parts.items()}


def download_model(name: str, folder: Path) -> None:
    """Fetch a checkpoint from the Hugging Face hub into `folder`, with progress bars. OSError if it cannot be had."""
    from huggingface_hub import snapshot_download                    # comes with tokenizers; caches, resumes, honours HF_*
    try:
        snapshot_download(name, local_dir=folder, allow_patterns=MODEL_FILES, etag_timeout=5)
    except Exception as error:                                       # httpx's own errors are no OSErrors
        raise OSError(str(error).splitlines()[0]) from None


def sha256(path: Path) -> str:
    """The file's digest in hexadecimal; FileNotFoundError says which file is missing."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------------------------------- the built-in toy
# A small language of film reviews. Every adjective has a sign and a strength; "not" and "nobody says that" flip a clause,
# "very" and "slightly" scale it, "and" adds two clauses, "but" and "although" tell which of two decides. The label is the
# sign of the whole: no word list solves it, a model has to compose.

NOUNS = "film plot cast score ending script dialogue humour pace music hero story scene idea voice".split()
ADJECTIVES = {"superb": 2, "brilliant": 2, "gripping": 2, "wonderful": 2, "moving": 2,
              "good": 1, "nice": 1, "charming": 1, "clever": 1, "warm": 1, "fresh": 1, "funny": 1,
              "dull": -1, "slow": -1, "weak": -1, "thin": -1, "flat": -1, "cold": -1, "clumsy": -1,
              "awful": -2, "terrible": -2, "dreadful": -2, "boring": -2, "hopeless": -2}
DEGREES = {"": 1.0, "very": 2.0, "so": 2.0, "rather": 1.0, "slightly": 0.5}
FRAMES = {"": 1, "it is true that": 1, "i think that": 1, "nobody says that": -1, "it is wrong that": -1}
VERDICTS = {True: "recommended", False: "avoid"}                     # closes a review in the pre-training corpus only
TOY_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def toy_clause(rng: random.Random) -> tuple[str, float]:
    """A clause such as "nobody says that the plot is not very good", and its sentiment."""
    adjective = rng.choice(list(ADJECTIVES))
    degree, frame = rng.choices(list(DEGREES), (6, 2, 2, 1, 2))[0], rng.choices(list(FRAMES), (8, 1, 1, 1, 1))[0]
    negation = rng.choices(("", "not", "never"), (6, 2, 1))[0]
    words = (frame, "the", rng.choice(NOUNS), "is", negation, degree, adjective)
    return " ".join(filter(None, words)), ADJECTIVES[adjective] * DEGREES[degree] * FRAMES[frame] * (-1 if negation else 1)


def toy_review(rng: random.Random) -> tuple[str, float]:
    """One sentence of one or two clauses, and its sentiment (never 0)."""
    (a, x), (b, y) = toy_clause(rng), toy_clause(rng)
    text, score = rng.choice(((a, x), (f"{a} and {b}", x + y), (f"{a} but {b}", y), (f"although {a} , {b}", y), (f"{a} although {b}", x)))
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


# --------------------------------------------------------------------------------------------------- tokens, batches

class Examples(NamedTuple):
    """A tokenised split.    [CLS] is this jack ##son ##ville ? [SEP] no it is not . [SEP]
                  segments:    0    0   0    0     0      0   0   0    1  1  1  1  1   1  """
    ids: list[np.ndarray]
    segments: list[np.ndarray]
    labels: np.ndarray

    def take(self, rows: np.ndarray) -> "Examples":
        return Examples([self.ids[i] for i in rows], [self.segments[i] for i in rows], self.labels[rows])


def load_tokenizer(folder: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """tokenizer.json, or uncased WordPiece from vocab.txt. ValueError if it is damaged or its ids exceed `vocab_size`."""
    folder = Path(folder)
    whole, words = folder / "tokenizer.json", folder / "vocab.txt"
    path = whole if whole.exists() else words
    if not path.exists():
        raise FileNotFoundError(f"there is neither {whole} nor {words}")
    try:
        if path is whole:
            tokenizer = Tokenizer.from_file(str(path))
        else:
            tokenizer = BertWordPieceTokenizer(str(path), lowercase=True)._tokenizer
    except Exception as error:                                       # the library raises bare Exception for every fault
        raise ValueError(f"{path} is not a tokenizer: {error}") from None
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(f"{path} has token ids up to {largest}; the model's embedding has {vocab_size} rows")
    return tokenizer


def encode(tokenizer: Tokenizer, rows: Rows, max_length: int) -> Examples:
    """Token and segment ids; at most `max_length` tokens, cut from the longer sentence of a pair first."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    ids, segments = [], []
    for start in range(0, len(rows.texts), 8192):                    # a bounded number of bulky Encoding objects at a time
        texts = [text if len(text) > 1 else text[0] for text in rows.texts[start:start + 8192]]
        for encoding in tokenizer.encode_batch_fast(texts):
            ids.append(np.array(encoding.ids, dtype=np.int32))
            segments.append(np.array(encoding.type_ids, dtype=np.int8))
    return Examples(ids, segments, rows.labels)


def batches(examples: Examples, batch_size: int, seed: int | tuple[int, ...] | None = None,
            device: str | torch.device = "cpu") -> Iterator[tuple[dict[str, torch.Tensor | None], torch.Tensor]]:
    """One epoch of ({ids, mask, segments} each (B, T), labels (B,)), T the longest of the batch; mask is None without padding.

    seed None: sorted by length (for evaluation). Else every example once, in a random order that only depends on the seed:
    shuffled, sorted by length within stretches of 50 batches so that little is padded, and the batches shuffled again.
    """
    lengths = np.array([len(x) for x in examples.ids])
    if seed is None:
        order = np.argsort(lengths, kind="stable")
        groups = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    else:
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(lengths))
        stretches = [order[i:i + 50 * batch_size] for i in range(0, len(order), 50 * batch_size)]
        order = np.concatenate([s[np.argsort(lengths[s], kind="stable")] for s in stretches])
        groups = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
        groups = [groups[i] for i in rng.permutation(len(groups))]
    for group in groups:
        ids = np.zeros((len(group), lengths[group].max()), dtype=np.int64)
        segments, mask = ids.copy(), ids.copy()
        for row, i in enumerate(group):
            ids[row, :lengths[i]], segments[row, :lengths[i]], mask[row, :lengths[i]] = examples.ids[i], examples.segments[i], 1
        inputs = {"ids": ids, "segments": segments, "mask": None if mask.all() else mask}
        yield ({key: None if x is None else torch.from_numpy(x).to(device) for key, x in inputs.items()},
               torch.from_numpy(examples.labels[group]).to(device))
