"""What MLFS learns from: GLUE, files of your own, Python code, the built-in toy; tokens, batches.

A task is a row of a table, not a class. In a .tsv, as GLUE has them, quotes mean nothing; a .csv
has quotes; a .jsonl has an object a line. A .gz of these is read, too. A byte-order mark and
Windows line ends are accepted. An empty sentence is an example like any other: [CLS] [SEP].

The way of an example: a line of a file, `Rows` (text), `Examples` (token ids), a padded batch.
"""
import csv
import functools
import gzip
import hashlib
import json
import os
import random
import re
import socket
import tempfile
import zipfile
import zlib
from codecs import BOM_UTF8
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.processors import BertProcessing
from torch.nn.utils.rnn import pad_sequence

DOWNLOADS = Path(__file__).parent / "weights"        # checkpoints and data sets, git-ignored


# -------------------------------------------------------------------------------- the task table

class Task(NamedTuple):
    """A row of the table."""
    folder: str
    archive: str                                     # at GLUE_URL; "" where GLUE has none
    dev: tuple[str, ...]                             # MNLI has two; none: 1 in 10 of train
    sentences: tuple[str, ...]                       # one column, or two for a pair
    label: str                                       # another column
    labels: tuple[str, ...]                          # the classes' names; () is regression
    metrics: tuple[str, ...]                         # the first is the score
    train: str = "train.tsv"
    header: tuple[str, ...] = ()                     # the columns, where the files do not say

    @property
    def files(self):
        """Split -> the name of its file."""
        return dict(zip(("train", "dev", "dev_mismatched"), (self.train, *self.dev)))


DEV = ("dev.tsv",)
MNLI_DEV = ("dev_matched.tsv", "dev_mismatched.tsv")
PAIR = ("sentence1", "sentence2")
MOOD = ("negative", "positive")
DUPLICATE = ("different", "duplicate")
ENTAILMENT = ("entailment", "not_entailment")
ACC = ("accuracy",)
ACC_F1 = ("accuracy", "f1")
GLUE = {
    "cola": Task("CoLA", "CoLA.zip", DEV, ("sentence",), "label", ("0", "1"), ("matthews",),
                 header=("source", "label", "mark", "sentence")),
    "sst2": Task("SST-2", "SST-2.zip", DEV, ("sentence",), "label", MOOD, ACC),
    "mrpc": Task("MRPC", "mrpc_dev_ids.tsv", DEV, ("#1 String", "#2 String"), "Quality", DUPLICATE,
                 ACC_F1),
    "stsb": Task("STS-B", "STS-B.zip", DEV, PAIR, "score", (), ("pearson", "spearman")),
    "qqp": Task("QQP", "QQP-clean.zip", DEV, ("question1", "question2"), "is_duplicate", DUPLICATE,
                ACC_F1),
    "mnli": Task("MNLI", "MNLI.zip", MNLI_DEV, PAIR, "gold_label",
                 ("entailment", "neutral", "contradiction"), ACC),
    "qnli": Task("QNLI", "QNLIv2.zip", DEV, ("question", "sentence"), "label", ENTAILMENT, ACC),
    "rte": Task("RTE", "RTE.zip", DEV, PAIR, "label", ENTAILMENT, ACC),
    "wnli": Task("WNLI", "WNLI.zip", DEV, PAIR, "label", ("0", "1"), ACC),
    # your own, say: "mail": Task("mail", "", DEV, ("text",), "kind", ("ham", "spam"), ACC_F1),
}
TASKS = GLUE | {
    "toy": Task("", "", DEV, (), "", MOOD, ACC),
    "python": Task("", "", DEV, (), "", (), ("loss",)),     # the next token, in nats
}


# ------------------------------------------------------------------------------- readers: tables

class Rows(NamedTuple):
    """A split as text: one or two sentences each; class numbers (int64) or scores (float32).

    Code has one file each, no labels (the next token is the label), and what was left out.
    """
    texts: list[tuple[str, ...]]
    labels: np.ndarray | None
    skipped: dict[str, int] = {}


def load_task(row, folder, train=True):
    """The labelled splits of a Task: train (if wanted), dev and, for MNLI, dev_mismatched.

    GLUE's test.tsv is never read: its labels are not public.
    """
    if "loss" in row.metrics:
        rows = load_code(folder)
    elif not row.sentences:
        rows = load_toy()
    elif not row.dev:
        rows = divide(load_table(row, "train", folder), 10, Path(folder, row.train))
    else:
        rows = {split: load_table(row, split, folder) for split in row.files
                if train or split != "train"}
    if not train:
        rows.pop("train", None)
    return rows


def load_table(row, split, folder):
    """Rows of a split's file; those without a label are skipped and counted.

    GLUE's labels may be words, or their numbers from 0. Raises FileNotFoundError, or ValueError
    naming file and line.
    """
    name = Path(row.folder, row.files[split])
    path = Path(folder, name)
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; name the folder that holds {name} with "
                                f"--data-dir")
    classes = {word: i for i, word in enumerate(row.labels)}
    # GLUE writes SST-2's classes as digits, RTE's as words. Where digits are the words themselves
    # (say 1 to 5 stars), or the words come from the user's file, a digit is not a number from 0.
    if row.folder and not any(word.isdigit() for word in row.labels):
        classes |= {str(i): i for i in classes.values()}

    def read(*cells):
        "".join(cells).encode()                      # ValueError: JSON may hold half a character
        # SST-2's sentences end with a blank, of which some tokenizers would make a token.
        *sentences, word = map(str.strip, cells)
        label = classes.get(word) if classes else read_score(word)
        if label is not None:
            return tuple(sentences), label
        if word not in NO_LABEL:
            expected = ", ".join(classes) or "a number"
            raise ValueError(f"unknown label {word[:80]!r:.80}; expected {expected[:200]}")

    found = read_table(path, (*row.sentences, row.label), read, row.header)
    labelled = list(filter(None, found))
    if not labelled:
        raise ValueError(f"{path} has no examples with a label")
    texts, labels = zip(*labelled)
    labels = np.array(labels, np.int64 if classes else np.float32)
    skipped = len(found) - len(texts)
    return Rows(list(texts), labels, {"without a label": skipped} if skipped else {})


NO_LABEL = ("", "-", "-1")                           # SNLI's for no majority; GLUE's in test.tsv
# What the datasets library calls the columns of GLUE's MRPC, QQP and MNLI.
EXPORTED = {"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label",
            "is_duplicate": "label", "gold_label": "label"}
csv.field_size_limit(2 ** 31 - 1)                    # a long text is no error


def read_table(path, columns, read, header=()):
    """read(texts in these columns) of every row; without a header the first line is one."""
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in (".csv", ".tsv", ".jsonl", ".json"):
        raise ValueError(f"{path}: convert it to .csv, .tsv or .jsonl, or a .gz of these")

    def records(lines):
        if "json" in suffix:
            return json_lines(lines)
        rows = (line.rstrip("\r\n").split("\t") for line in lines)
        if suffix == ".csv":
            rows = csv.reader(lines, strict=True)
        return named(rows, header, columns)

    return read_file(path, records, lambda record: read(*[cell(record, c) for c in columns]))


def read_file(path, records, read):
    """read(record) of all that `records` makes of the lines; ValueError names file and line."""
    refuse_pointer(path)
    number = 0

    def lines(file):
        nonlocal number
        for line in file:                            # in bytes, a U+2028 ends no line
            number += 1
            yield line.removeprefix(BOM_UTF8).decode()

    unpack = gzip.open if path.suffix == ".gz" else open
    try:
        with BufferedReader(unpack(path, "rb")) as file:             # gzip's own is slow by line
            return [read(record) for record in records(lines(file))]
    except (ValueError, csv.Error, EOFError, OSError, zlib.error, RecursionError) as error:
        raise ValueError(f"{path}, line {number}: {error}") from None


def json_lines(lines):
    """The value on each line that is not blank; NaN, an empty cell to some libraries, is None."""
    return (json.loads(line, parse_constant=lambda name: None) for line in lines if line.strip())


def named(rows, header, columns):
    """{column: text} of each row that is not empty; the first one may be the header."""
    rows = filter(any, rows)
    header = header or next(rows, columns)
    for column in columns:
        cell(dict.fromkeys(header), column)          # ValueError if there is none
    if len(set(header)) < len(header):
        raise ValueError("the header has a name twice")
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"{len(row)} columns, not {len(header)} as in the header")
        yield dict(zip(header, row))


def cell(record, column):
    """The text in a column of a row; ValueError if there is none."""
    if not isinstance(record, dict):
        raise ValueError("this is no JSON object")
    if column not in record and EXPORTED.get(column) in record:
        column = EXPORTED[column]
    if column not in record:
        raise ValueError(f"there is no column {column!r}; the header has {str([*record])[:200]}")
    value = record[column]
    if isinstance(value, (dict, list)):
        raise ValueError(f"column {column!r} holds neither text nor a number")
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def own_task(train, dev, text, label, regression):
    """(name, folder, Task) of files of one's own: columns by name, classes as train has them.

    The classes are train's distinct labels in order, as numbers if all are numbers. Without `dev`
    a tenth of train is held out. Raises FileNotFoundError or ValueError.
    """
    paths = [Path(path).absolute() for path in (train, dev) if path]
    for path in paths:
        path.stat()                                  # FileNotFoundError if there is none
    folder = paths[0].parent
    files = [os.path.relpath(path, folder) for path in paths]
    sentences = tuple(text.split(","))
    if len(sentences) > 2:
        raise ValueError(f"--text {text}: name one column, or two for a pair")
    labels = () if regression else distinct_labels(paths[0], label)
    metrics = ("accuracy", "macro_f1", "matthews") if labels else ("pearson", "spearman")
    task = Task("", "", tuple(files[1:]), sentences, label, labels, metrics, files[0])
    return paths[0].name.partition(".")[0], folder, task


def distinct_labels(path, column):
    """The classes of a file, in order; ValueError if there are fewer than two."""
    words = sorted(set(read_table(path, (column,), str.strip)) - set(NO_LABEL))
    if len(words) < 2:
        raise ValueError(f"{path}: column {column!r} has {len(words)} classes; at least 2 are "
                         f"needed")
    if None not in map(read_score, words):
        words.sort(key=read_score)
    return tuple(words)


def divide(rows, parts, where):
    """{"train", "dev"}: 1 in so many rows is for dev, with all copies of its text.

    Drawn with one seed for all runs, so that two of them are measured on the same rows.
    """
    order = list(range(len(rows.texts)))
    random.Random(0).shuffle(order)
    distinct = list(dict.fromkeys(rows.texts[i] for i in order))
    if len(distinct) < 2:
        raise ValueError(f"{where} has {len(distinct)} different texts; at least 2 are needed")
    drawn = set(distinct[:max(1, len(distinct) // parts)])
    train = [i for i in order if rows.texts[i] not in drawn]
    dev = [i for i in order if rows.texts[i] in drawn]
    return {"train": take(rows, train), "dev": take(rows, dev)}


def take(split, numbers):
    """These rows of a split, as text or tokenised."""
    def part(field):
        if isinstance(field, list):
            return [field[i] for i in numbers]
        return field[numbers] if isinstance(field, np.ndarray) else field
    return type(split)(*map(part, split))


def fingerprint(rows):
    """sha256 of texts and labels: tells data from other data, wherever they lie."""
    sha = hashlib.sha256()
    for text in rows.texts:
        sha.update(json.dumps(text).encode())
    if rows.labels is not None:
        sha.update(rows.labels)
    return sha.hexdigest()


def read_score(text):
    """The number that a text is, None if it is none or not finite in float32."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < 3.4e38 else None                # NaN is not below it, either


# -------------------------------------------------------------------------- readers: Python code

def load_code(folder):
    """All Python of a folder, split by file: 1 in 20, drawn with a fixed seed, is for validation.

    Reads *.py, and *.jsonl, *.jsonl.gz or *.json.gz with a "content" field (the layout of
    the-stack), in all sub-folders but site-packages. Text that is not UTF-8, is empty or looks
    generated is skipped and counted. Raises FileNotFoundError or ValueError if fewer than two
    files remain.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    texts = []
    skipped = {"not UTF-8": 0, "empty": 0, "generated": 0}
    for path in sorted(folder.rglob("*")):
        if "site-packages" in path.relative_to(folder).parts or not path.is_file():
            continue
        for text in sources(path):
            if reason := why_not(text):
                skipped[reason] += 1
            else:
                texts.append((text,))
    # Whole files, for two windows of one file share names and lines.
    return divide(Rows(texts, None, skipped), 20, f"{folder} (skipped: {skipped})")


def sources(path):
    """The text of the file, or the "content" of each line; ValueError names file and line."""
    if path.suffix == ".py":
        return [path.read_bytes().decode(errors="surrogateescape")]
    if path.name.endswith((".jsonl", ".jsonl.gz", ".json.gz")):      # the last are codeparrot's
        return read_table(path, ("content",), str)
    return []


def why_not(text):
    """Why it is no good example: "not UTF-8", "empty", "generated", or "" if it is one."""
    if re.search("[\ud800-\udfff]", text):           # what decodes no byte, and half a character
        return "not UTF-8"
    if not text.strip():
        return "empty"
    # What a program wrote (tables, bindings) would teach its pattern, thousands of times over.
    lines = text.splitlines()
    top = " ".join(lines[:10]).lower()
    notice = re.search("auto(matically)?[ -]generated|do not edit", top)
    long = max(map(len, lines)) > 1000 or len(text) / len(lines) > 100
    return "generated" if notice or long else ""


# ---------------------------------------------------------------------------------------- tokens

class Examples(NamedTuple):
    """A tokenised split.
    ids:       [CLS] is this jack ##son ##ville ? [SEP] no it is not . [SEP]
    segments:    0    0   0    0     0      0   0   0    1  1  1  1  1   1
    Code has no segments, and no labels but its next tokens.
    """
    ids: list[np.ndarray]
    segments: list[np.ndarray] | None
    labels: np.ndarray | None


# What a checkpoint folder may hold beside config.json and the weights.
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "vocab.json",
                   "merges.txt", "special_tokens_map.json", "added_tokens.json")
# These change no token, so a run may go on without them; an export keeps them.
GENERATION_FILES = ("generation_config.json", "chat_template.jinja")


def tokenizer_file(folder):
    """tokenizer.json, otherwise vocab.txt; FileNotFoundError if there is neither."""
    for name in ("tokenizer.json", "vocab.txt"):
        path = Path(folder) / name
        if path.exists():
            refuse_pointer(path)
            return path
    raise FileNotFoundError(f"there is neither tokenizer.json nor vocab.txt in {folder}; copy the "
                            f"checkpoint's there")


def load_tokenizer(folder, vocab_size=None):
    """tokenizer.json, or WordPiece from vocab.txt; a byte-order mark is no part of either.

    Its `settings` are what files beside it say. Ids from `vocab_size` on are refused when a text
    has one (`check_ids`). Raises FileNotFoundError, or ValueError if a file is damaged.
    """
    path = tokenizer_file(folder)
    try:
        fields = read_fields(path.with_name("tokenizer_config.json"))
        added = fields.pop("added_tokens_decoder", {})
        settings = {}
        for name, value in fields.items():
            if isinstance(value, dict):              # a token, with how blanks around it are read
                value = value.get("content", value)
            if value is not None:
                settings[name] = value
        text = path.read_text("utf-8-sig")
        if path.suffix == ".json":
            tokenizer = Tokenizer.from_str(text)
        else:
            older = read_fields(path.with_name("added_tokens.json"))
            added = {str(i): {"content": word} for word, i in older.items()} | added
            tokenizer = word_pieces(text, added, settings)
        if tokenizer.truncation:
            settings.setdefault("truncation_side", tokenizer.truncation["direction"])
        tokenizer.no_truncation()                    # `sentence_tokenizer` cuts
        tokenizer.no_padding()                       # the file's own may be of any size; `pad` pads
        # A trial of a copy, which `encode` makes: a missing unknown-token fails only here.
        Tokenizer.from_str(tokenizer.to_str()).encode("a \u2603", "a")
        tokenizer.settings = settings
        tokenizer.end = read_fields(path.with_name("config.json")).get("eos_token_id")
        tokenizer.rows = vocab_size
        tokenizer.path = path
    except KeyboardInterrupt:
        raise
    except BaseException as error:                   # the library raises bare Exception, or panics
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not a tokenizer: {reason}") from None
    return tokenizer


def read_fields(path):
    """A JSON object, {} if there is no file."""
    if not path.exists():
        return {}
    return read_file(path, lambda lines: [json.loads("".join(lines))], dict)[0]


def word_pieces(text, added, settings):
    """The tokenizer of a vocab.txt; added: id -> a token that the file may lack, and its flags."""
    lines = text.removesuffix("\n").split("\n")
    words = {token["content"]: int(i) for i, token in added.items()}
    words |= {line.rstrip(): i for i, line in enumerate(lines)}
    pieces = BertWordPieceTokenizer(
        words, lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True))
    tokenizer = pieces._tokenizer
    tokenizer.add_tokens([AddedToken(**token) for token in added.values()])
    return tokenizer


@functools.lru_cache(maxsize=8)
def sentence_tokenizer(tokenizer, max_length):
    """A copy that frames and cuts: threads with other lengths may share the tokenizer itself."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    settings = getattr(tokenizer, "settings", {})
    frame(copy, settings)
    # Of a pair the longer is cut first: cut at its end, it could lose the second one whole.
    copy.enable_truncation(max_length, direction=settings.get("truncation_side", "right"))
    return copy


def frame(tokenizer, settings):
    """[CLS] before a text and [SEP] after each, where tokenizer.json does not see to it.

    ValueError if there are no such tokens.
    """
    one = tokenizer.encode("a").special_tokens_mask
    two = tokenizer.encode("a", "a").special_tokens_mask
    if one[0] and two[0] and sum(two) > 2:
        return
    vocab = tokenizer.get_vocab()
    cls = settings.get("cls_token", "[CLS]")
    sep = settings.get("sep_token", "[SEP]")
    if cls not in vocab or sep not in vocab:
        raise ValueError(f"tokenizer.json has no {cls} and {sep}; name its own as cls_token and "
                         f"sep_token in tokenizer_config.json")
    tokenizer.post_processor = BertProcessing((sep, vocab[sep]), (cls, vocab[cls]))


# The usual names of the end of a text.
ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "<eos>")


def encode(tokenizer, rows, max_length):
    """Token and segment ids, at most `max_length`; the longer sentence of a pair is cut first.

    Code: the files joined by the end-of-text token, cut into windows of `max_length`.
    """
    if rows.labels is None:
        return Examples(windows(tokenizer, rows, max_length), None, None)
    ids, segments = [], []
    for encoding in encodings(sentence_tokenizer(tokenizer, max_length), rows):
        ids.append(np.array(encoding.ids, dtype=np.int32))
        segments.append(np.array(encoding.type_ids, dtype=np.int8))
        check_ids(tokenizer, ids[-1])
    return Examples(ids, segments, rows.labels)


def windows(tokenizer, rows, max_length):
    """Files as pieces of one long stream, as in pre-training; nothing is cut off."""
    end = end_of_text(tokenizer)[:1]
    files = [np.array(encoding.ids + end, dtype=np.int32)
             for encoding in encodings(tokenizer, rows, add_special_tokens=False)]
    stream = np.concatenate(files)
    check_ids(tokenizer, stream)
    # A last window of one token has no next token to learn from.
    return [window for window in cut(stream, max_length) if len(window) > 1]


def encodings(tokenizer, rows, **options):
    """What the library makes of each text, or pair."""
    # In portions: an Encoding keeps offsets, too; those of a whole task would fill memory.
    for texts in cut(rows.texts, 1024):
        texts = [text if len(text) > 1 else text[0] for text in texts]
        yield from tokenizer.encode_batch_fast(texts, **options)


def check_ids(tokenizer, ids):
    """ValueError for an id that has no row in the model's embedding."""
    largest = int(np.max(ids))
    rows = getattr(tokenizer, "rows", None)
    if rows and largest >= rows:
        token = tokenizer.id_to_token(largest)
        raise ValueError(f"{tokenizer.path}: a text has the token {token!r}, id {largest}; the "
                         f"embedding has {rows} rows")


def end_of_text(tokenizer):
    """The ids that end a text, a file's first; ValueError if there are none.

    config.json decides, then tokenizer_config.json, then the usual names.
    """
    vocab = tokenizer.get_vocab()
    given = np.ravel(getattr(tokenizer, "end", None)).tolist()       # a number or a list
    names = (getattr(tokenizer, "settings", {}).get("eos_token"), *ENDS)
    usual = [vocab[name] for name in names if name in vocab][:1]
    # config.json may hold an id of another vocabulary: GPT-2's, in smaller models.
    ends = [i for i in given if i in vocab.values()] or usual
    if not ends:
        raise ValueError("the tokenizer has no end-of-text token; name it as eos_token in "
                         "tokenizer_config.json")
    return ends


# --------------------------------------------------------------------------------------- batches

IGNORED = -100      # the label where there is no next token; torch's cross_entropy leaves -100 out


def cut(items, size):
    """Pieces of `size`; the last may be shorter."""
    return [items[start:start + size] for start in range(0, len(items), size)]


def hold_out(examples, seed, most=0):
    """(train, held-out): 5% of TRAIN, at most 512 examples, to watch the maxnet by.

    At most `most` are trained on (0: all), drawn with the seed.
    """
    # Why not dev: a split that decides something while training is no longer unseen.
    most = most or len(examples.ids)
    # Of so many 5% leave `most`.
    order = np.random.default_rng(seed).permutation(len(examples.ids))[:most + most // 19]
    size = min(512, len(order) // 20)
    train = order[size:size + most]
    return take(examples, np.sort(train)), take(examples, np.sort(order[:size]))


def draw(examples, most):
    """At most so many examples (0: all), the same ones every time."""
    order = np.random.default_rng(0).permutation(len(examples.ids))
    return take(examples, np.sort(order[:most or None]))


def batches(examples, batch_size, seed=None, device="cpu"):
    """One epoch of ({"ids", "segments", "mask"} each (B, T), labels (B,)).

    T is the longest of the batch; mask (1 where a token is real) is None when nothing is padded.
    Code has no segments; its labels (B, T) are the next tokens, IGNORED where there is none.
    The order depends on the seed alone (`batch_rows`); without one it is by length.
    """
    lengths = np.array([len(ids) for ids in examples.ids])
    for rows in batch_rows(lengths, batch_size, seed):
        part = take(examples, rows)
        mask = pad([np.ones_like(ids) for ids in part.ids])
        x = {"ids": pad(part.ids), "mask": mask}
        if part.segments:
            x["segments"] = pad(part.segments)
        if part.labels is None:
            y = pad([np.append(ids[1:], IGNORED) for ids in part.ids], IGNORED)
        else:
            y = torch.from_numpy(part.labels)
        x = {name: tensor.to(device) for name, tensor in x.items()}
        if mask.all():
            x["mask"] = None                         # nothing to hide from attention
        yield x, y.to(device)


def batch_rows(lengths, batch_size, seed):
    """The rows of each batch of an epoch: every example once.

    Eqs. 1 and 5 draw uniformly; ours groups examples of like length, for less padding.
    """
    if seed is None:
        return cut(np.argsort(lengths, kind="stable"), batch_size)
    # Sorted all through, they would be padded least, but the same would meet in every epoch.
    # So they are shuffled, and sorted only within stretches of 50 batches. Then the batches are
    # shuffled, or each stretch would run from short sentences to long ones.
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    stretches = [rows[np.argsort(lengths[rows], kind="stable")]
                 for rows in cut(order, 50 * batch_size)]
    groups = cut(np.concatenate(stretches), batch_size)
    return [groups[i] for i in rng.permutation(len(groups))]


def pad(rows, filler=0):
    """(B, T) in int64, T the longest row's length; the others are filled up."""
    rows = [torch.from_numpy(row) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_value=filler).long()


# ----------------------------------------------------------------------------- the built-in toy
# A small language of film reviews. Every adjective has a sign and a strength; "not" and "nobody
# says that" flip a clause, "very" and "slightly" scale it, "and" adds two clauses, "but" and
# "although" tell which of two decides. The label is the sign of the whole: no word list solves it,
# a model has to compose.

NOUNS = ("film plot cast score ending script dialogue humour pace music hero story scene idea "
         "voice").split()
STRENGTHS = {2: "superb brilliant gripping wonderful moving",
             1: "good nice charming clever warm fresh funny",
             -1: "dull slow weak thin flat cold clumsy",
             -2: "awful terrible dreadful boring hopeless"}
ADJECTIVES = {word: value for value, words in STRENGTHS.items() for word in words.split()}
DEGREES = {"": 1.0, "very": 2.0, "so": 2.0, "rather": 1.0, "slightly": 0.5}
FRAMES = {"": 1, "it is true that": 1, "i think that": 1, "nobody says that": -1,
          "it is wrong that": -1}


def toy_clause(rng):
    """A clause such as "nobody says that the plot is not very good", and its sentiment."""
    adjective = rng.choice(list(ADJECTIVES))
    degree = rng.choices(list(DEGREES), (6, 2, 2, 1, 2))[0]
    frame = rng.choices(list(FRAMES), (8, 1, 1, 1, 1))[0]
    negation = rng.choices(("", "not", "never"), (6, 2, 1))[0]
    words = (frame, "the", rng.choice(NOUNS), "is", negation, degree, adjective)
    sentiment = ADJECTIVES[adjective] * DEGREES[degree] * FRAMES[frame] * (-1 if negation else 1)
    return " ".join(filter(None, words)), sentiment


def toy_review(rng):
    """One sentence of one or two clauses, and its sentiment (never 0)."""
    a, x = toy_clause(rng)
    b, y = toy_clause(rng)
    text, sentiment = rng.choice((
        (a, x),
        (f"{a} and {b}", x + y),
        (f"{a} but {b}", y),
        (f"although {a} , {b}", y),
        (f"{a} although {b}", x),
    ))
    if sentiment == 0:                               # "good and dull" is neither: draw again
        return toy_review(rng)
    return f"{text} .", sentiment


def load_toy(train=5_000, dev=1_000):
    """Train and dev splits, disjoint as texts, each half positive."""
    rng = random.Random(0)
    label_of = {}                                    # (text,) -> 1 if positive; dev, then train
    for size in (dev, train):
        wanted = [size - size // 2, size // 2]
        while any(wanted):
            text, sentiment = toy_review(rng)
            label = int(sentiment > 0)
            if (text,) not in label_of and wanted[label]:
                label_of[text,] = label
                wanted[label] -= 1
    texts = list(label_of)
    labels = np.array(list(label_of.values()))
    return {"dev": Rows(texts[:dev], labels[:dev]), "train": Rows(texts[dev:], labels[dev:])}


# ------------------------------------------------------------------------------------- downloads

def refuse_pointer(path):
    """ValueError if this is no file but the three lines that Git LFS keeps in its place."""
    small = 0 < path.stat().st_size < 1024           # a pipe has 0: it can be read but once
    if small and path.read_bytes().startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer; git lfs pull fetches the file")


GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data/"
MRPC_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase_train.txt"


def find_inputs(task, model, data_dir):
    """(task, model folder, data folder, note): on disk, or downloaded, or the toy and a banner.

    The toy stands in only where there is no network, and never for what was named: ValueError for
    an unknown task, FileNotFoundError saying what is missing, where it was looked for, and how to
    get it.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    if task == "toy" and data_dir:
        raise ValueError(f"--data-dir {data_dir}: name its --task")
    try:
        return task, find_model(task, model), data_dir or find_data(task), ""
    except Offline as error:
        # The toy stands in only for BERT-base on GLUE, and only if the user named neither.
        if model or data_dir or not TASKS[task].archive:
            raise
        note = f"TOY RUN, not BERT-BASE ON {task.upper()}"
        line = "!" * 90
        print(f"{line}\n{note}: {error}\n{line}", flush=True)
    return "toy", find_model("toy"), find_data("toy"), note


def find_model(task, model=None):
    """The folder of the checkpoint that is named, or that a task starts from by default."""
    if model:
        config = Path(model, "config.json")
        if not config.exists():
            raise FileNotFoundError(f"--model: there is no {config}; weights/README.md tells how "
                                    f"to get a checkpoint")
        return model
    if task == "toy":
        return DOWNLOADS / "toy"                     # comes with the repository
    if task == "python":
        return obtain(download_model, "bigcode/gpt_bigcode-santacoder", DOWNLOADS / "santacoder")
    return obtain(download_model, "google-bert/bert-base-uncased", DOWNLOADS / "bert-base-uncased")


def find_data(task):
    """The folder of a task's data by default."""
    if task == "python":
        return Path(os.__file__).parent              # this Python's standard library
    glue = DOWNLOADS / "glue"
    if not TASKS[task].archive:
        return glue
    return obtain(download_glue, task, glue)


class Offline(FileNotFoundError):
    """What is missing could not be downloaded, for there is no network."""


def nothing_answers(error):
    """Whether there is no host, connection or reply in time. Status 401 or 500 is a reply."""
    kinds = str(type(error).__mro__)                 # errors of urllib, requests, httpx
    silence = re.search("URLError|ConnectionError|NetworkError|Timeout", kinds)
    return silence and "urllib.error.HTTPError" not in kinds and "SSL" not in f"{kinds} {error}"


def obtain(download, name, folder):
    """The way of all downloads: the folder, or FileNotFoundError saying why not and what to do."""
    try:
        return download(name, folder) or folder
    except Exception as error:                       # the hub, zipfile and sockets have their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        kind = Offline if nothing_answers(error) else FileNotFoundError
        raise kind(f"{name} is not in {folder} and could not be downloaded ({reason}); put it "
                   f"there, or name --model and --data-dir") from error


def has_weights(folder):
    return any(folder.glob("model*.safetensors"))


def download_model(name, folder):
    """Fetch a checkpoint from the Hugging Face hub unless it is there, with progress bars.

    Returns its folder in the hub's cache if it is whole there: nothing is fetched then.
    """
    from huggingface_hub import HfApi, snapshot_download  # comes with tokenizers

    if has_weights(folder):
        return
    wanted = ["config.json", "model*.safetensors*", *TOKENIZER_FILES, *GENERATION_FILES]
    for known in (name, name.rpartition("/")[2]):    # BERT-base has an older name, without a slash
        with suppress(OSError, ValueError):
            cached = Path(snapshot_download(known, allow_patterns=wanted, local_files_only=True))
            if has_weights(cached) and tokenizer_file(cached):
                return cached
    HfApi().model_info(name, timeout=3)              # a silent network is found out in seconds
    snapshot_download(name, local_dir=folder, allow_patterns=wanted, etag_timeout=5)


def download_glue(task, folder):
    """Fetch a GLUE task into `folder`/TASK unless it is there; never leaves a partial file."""
    row = GLUE[task]
    target = folder / row.folder
    if all((target / name).exists() for name in row.files.values()):
        return
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        archive = fetch(GLUE_URL + row.archive, scratch)
        if task == "mrpc":
            files = split_mrpc(fetch(MRPC_URL, scratch).read_bytes(), archive.read_bytes())
        else:
            with zipfile.ZipFile(archive) as packed:             # read() compares the checksum
                files = {name: packed.read(f"{row.folder}/{name}") for name in row.files.values()}
        for name, content in files.items():
            part = Path(scratch) / name
            part.write_bytes(content)
            os.replace(part, target / name)


def fetch(url, folder):
    """Fetch one file, with a progress bar."""
    path = Path(folder, Path(url).name)
    socket.setdefaulttimeout(5)                      # seconds of silence, not of the whole download
    try:
        torch.hub.download_url_to_file(url, str(path))
    finally:
        socket.setdefaulttimeout(None)
    return path


def split_mrpc(corpus, dev_ids):
    """MRPC comes as one file of 4,076 pairs, and the id pairs of the 408 that GLUE calls dev."""
    header, *lines = corpus.splitlines(keepends=True)
    wanted = set(dev_ids.splitlines())
    train, dev = [], []
    for line in lines:
        ids = b"\t".join(line.split(b"\t")[1:3])
        part = dev if ids in wanted else train
        part.append(line)
    if (len(train), len(dev)) != (3668, 408):
        raise ValueError(f"{len(train)} train and {len(dev)} dev pairs, not 3668 and 408")
    return {"train.tsv": b"".join([header, *train]), "dev.tsv": b"".join([header, *dev])}


def sha256(paths):
    """The digest, in hexadecimal, of files in a row; FileNotFoundError names a missing one."""
    digest = hashlib.sha256()
    for path in paths:
        refuse_pointer(path)
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)            # one digest goes on over all files
    return digest.hexdigest()
