"""Readers, tokenising, batches, downloads and the toy language."""

import errno
import json
import os
import socket
import ssl
import tempfile
import threading
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError, URLError

import huggingface_hub
import huggingface_hub.errors
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.implementations import BertWordPieceTokenizer

import data
import evaluate
from model import load_pretrained


def write(folder, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(text.encode())


# One row of each task, in the columns of GLUE's own files.
FILES = {
    "cola": (
        "CoLA/train.tsv",
        'gj04\t0\t*\tThe "quoted car drove.\n',
        ('The "quoted car drove.',),
        0,
    ),
    "sst2": ("SST-2/train.tsv", "sentence\tlabel\na gripping film \t1\n", ("a gripping film",), 1),
    "mrpc": (
        "MRPC/train.tsv",
        'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t10\t11\tOne " two\tThree\n',
        ('One " two', "Three"),
        1,
    ),
    "stsb": (
        "STS-B/train.tsv",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tm\tf\ty\t1\tn\tn\tA plane.\tAn air plane.\t3.750\n",
        ("A plane.", "An air plane."),
        3.75,
    ),
    "qqp": (
        "QQP/train.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWhy?\tHow?\t0\n",
        ("Why?", "How?"),
        0,
    ),
    "mnli": (
        "MNLI/train.tsv",
        "index\tpromptID\tpairID\tgenre\ts1b\ts2b\ts1p\ts2p\tsentence1\tsentence2\tlabel1\tgold_label\n"
        "0\t1\t2\tfiction\ta\tb\tc\td\tP.\tH.\tneutral\tcontradiction\n",
        ("P.", "H."),
        2,
    ),
    "qnli": (
        "QNLI/train.tsv",
        "index\tquestion\tsentence\tlabel\n0\tWho?\tHe did.\tnot_entailment\n",
        ("Who?", "He did."),
        1,
    ),
    "rte": (
        "RTE/train.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailment\n",
        ("A.", "B."),
        0,
    ),
    "wnli": (
        "WNLI/train.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\t1\n",
        ("A.", "B."),
        1,
    ),
}


@pytest.mark.parametrize("task", data.GLUE)
def test_every_glue_task_is_read_from_its_own_columns(task, tmp_path):
    """Quotes are ordinary characters, blanks at the ends go, words and digits both name a class,
    STS-B is a number.
    """
    name, text, sentences, label = FILES[task]
    write(tmp_path, name, text)
    rows = data.load_table(data.GLUE[task], "train", tmp_path)
    assert rows.texts == [sentences] and rows.labels.tolist() == [label]
    assert rows.labels.dtype == (np.float32 if task == "stsb" else np.int64)


def test_mnli_has_two_dev_sets_and_digits_name_classes_too(tmp_path):
    header = "index\tsentence1\tsentence2\tgold_label\n"
    for name, text in (
        ("train.tsv", "0\ta\tb\tneutral\n"),
        ("dev_matched.tsv", "0\tm\tb\t2\n"),
        ("dev_mismatched.tsv", "0\tmm\tb\tentailment\n"),
    ):
        write(tmp_path, f"MNLI/{name}", header + text)
    splits = data.load_task(data.TASKS["mnli"], tmp_path)
    assert [splits[s].texts[0][0] for s in ("train", "dev", "dev_mismatched")] == ["a", "m", "mm"]
    assert [int(splits[s].labels[0]) for s in ("train", "dev", "dev_mismatched")] == [1, 2, 0]


def test_digits_that_are_labels_are_not_their_numbers(tmp_path, monkeypatch):
    """Classes 1, 2, 3: a 0 is unknown, and 1 is the first."""
    row = data.Task("stars", "", data.DEV, ("text",), "stars", ("1", "2", "3"), data.ACC)
    monkeypatch.setitem(data.GLUE, "stars", row)
    write(tmp_path, "stars/dev.tsv", "text\tstars\ngood\t3\nbad\t1\n")
    assert data.load_table(data.GLUE["stars"], "dev", tmp_path).labels.tolist() == [2, 0]
    write(tmp_path, "stars/dev.tsv", "text\tstars\nworse\t0\n")
    with pytest.raises(ValueError, match="line 2: unknown label '0'; expected 1, 2, 3"):
        data.load_table(data.GLUE["stars"], "dev", tmp_path)


def test_a_byte_order_mark_windows_lines_and_odd_separators_are_harmless(tmp_path):
    """U+2028 and U+0085 are characters of a sentence, not ends of line; an empty sentence is an
    example.
    """
    write(tmp_path, "SST-2/dev.tsv", "\ufeffsentence\tlabel\r\na\u2028b\u0085c\t1\r\n\t0\r\n\r\n")
    rows = data.load_table(data.GLUE["sst2"], "dev", tmp_path)
    assert rows.texts == [("a\u2028b\u0085c",), ("",)] and rows.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    "text, words",
    [
        ("sentence\tlabel\ngood\t1\nno label here\n", r"dev.tsv, line 3: 1 columns, not 2 as in"),
        (
            "sentence\tlabel\ngood\tmaybe\n",
            r"dev.tsv, line 2: unknown label 'maybe'; expected negative, positive, 0, 1",
        ),
        ("text\tlabel\ngood\t1\n", r"line 1: there is no column 'sentence'"),
        ("sentence\tlabel\n", "has no examples"),
        ("", "has no examples"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, text, words):
    write(tmp_path, "SST-2/dev.tsv", text)
    with pytest.raises(ValueError, match=words):
        data.load_table(data.GLUE["sst2"], "dev", tmp_path)


def test_bad_scores_bad_bytes_missing_files_and_unknown_tasks(tmp_path):
    header = "sentence1\tsentence2\tscore\n"
    for score in ("many", "nan", "inf", "1e39"):  # 1e39 is infinite in float32
        write(tmp_path, "STS-B/dev.tsv", header + f"a\tb\t{score}\n")
        with pytest.raises(ValueError, match="line 2: unknown label .* expected a number"):
            data.load_table(data.GLUE["stsb"], "dev", tmp_path)
    (tmp_path / "STS-B/dev.tsv").write_bytes(b"sentence1\t\xff")
    with pytest.raises(ValueError, match="dev.tsv, line 1: 'utf-8' codec can't decode byte 0xff"):
        data.load_table(data.GLUE["stsb"], "dev", tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no .*RTE/dev.tsv; name the folder that"):
        data.load_table(data.GLUE["rte"], "dev", tmp_path)
    with pytest.raises(ValueError, match="unknown task 'sst3'; choose from cola, sst2"):
        data.find_inputs("sst3", None, tmp_path)


# ------------------------------------------------------------------------------------------ tokens

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "is",
    "this",
    "jack",
    "##son",
    "##ville",
    "?",
    "no",
    "it",
    "not",
    ".",
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return tmp_path


def decode(ids) -> str:
    return " ".join(WORDS[i] for i in ids)


def test_a_pair_is_uncased_word_pieces_with_segments(folder):
    """The picture in data.Examples, from vocab.txt and from tokenizer.json alike."""
    rows = data.Rows([("Is this Jacksonville ?", "No it is not."), ("",)], np.zeros(2, np.int64))
    encoded = data.encode(data.load_tokenizer(folder), rows, 32)
    assert decode(encoded.ids[0]) == "[CLS] is this jack ##son ##ville ? [SEP] no it is not . [SEP]"
    assert encoded.segments[0].tolist() == [0] * 8 + [1] * 6
    assert decode(encoded.ids[1]) == "[CLS] [SEP]"
    BertWordPieceTokenizer(str(folder / "vocab.txt")).save(str(folder / "tokenizer.json"))
    again = data.encode(data.load_tokenizer(folder), rows, 32)
    assert all(
        (a == b).all()
        for a, b in zip(
            encoded.ids + encoded.segments, again.ids + again.segments, strict=True
        )
    )


def test_the_longer_sentence_of_a_pair_is_cut_first(folder):
    long, short = "is this no it not ?", "no ."
    rows = data.Rows([(long, short), (short, long)], np.zeros(2, np.int64))
    encoded = data.encode(data.load_tokenizer(folder), rows, 8)
    assert decode(encoded.ids[0]) == "[CLS] is this no [SEP] no . [SEP]"
    assert decode(encoded.ids[1]) == "[CLS] no . [SEP] is this no [SEP]"


def tokens_of(folder, *texts: str, length: int = 32, rows: int | None = None) -> str:
    """A text, or a pair, as `encode` reads it."""
    tokenizer = data.load_tokenizer(folder, rows)
    encoded = data.encode(tokenizer, data.Rows([texts], np.zeros(1, np.int64)), length)
    return " ".join(tokenizer.id_to_token(i) for i in encoded.ids[0])


NAMED = {"cls_token": "<s>", "sep_token": {"content": "</s>", "lstrip": False}}
NAMED |= {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
NUMBER = {"content": "[NUM]", "special": True, "normalized": False}
NAMED_WORDS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *WORDS[5:]]


@pytest.mark.parametrize(
    "settings, added, words, text, want",
    [
        ({}, {}, [], "This Caf\u00e9", "this cafe"),
        ({"do_lower_case": False}, {}, ["This", "Caf\u00e9"], "This Caf\u00e9", "This Caf\u00e9"),
        ({"strip_accents": False}, {}, ["caf\u00e9"], "This Caf\u00e9", "this caf\u00e9"),
        ({}, {}, [], "\u4e2d\u6587", "\u4e2d \u6587"),
        ({"tokenize_chinese_chars": False}, {}, [], "\u4e2d\u6587", "[UNK]"),
        ({}, {"no it": 18}, [], "This is no it", "this is no it"),
        ({}, {"jack-x": 18}, [], "no Jack-x jack", "no jack-x jack"),
        ({"added_tokens_decoder": {"19": NUMBER}}, {}, [], "no [NUM] num", "no [NUM] [UNK]"),
    ],
)
def test_what_lies_beside_a_vocab_txt_counts(folder, settings, added, words, text, want):
    """The tokens are those of transformers' BertTokenizer on the same files."""
    more = ["cafe", "\u4e2d", "\u6587"]
    (folder / "vocab.txt").write_text("\n".join([*WORDS, *more, *words]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "added_tokens.json").write_text(json.dumps(added))
    assert tokens_of(folder, text) == f"[CLS] {want} [SEP]"


def test_a_vocab_txt_without_berts_special_tokens_and_bad_settings_are_refused(folder):
    (folder / "vocab.txt").write_text("\n".join(NAMED_WORDS))
    with pytest.raises(ValueError, match="vocab.txt is not a tokenizer: sep_token not found in"):
        data.load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[")
    words = "not a tokenizer: .*tokenizer_config.json, line 1: Expecting"
    with pytest.raises(ValueError, match=words):
        data.load_tokenizer(folder)


def word_piece(words: list[str], processor=None) -> Tokenizer:
    unknown = "<unk>" if "<unk>" in words else "[UNK]"
    model = models.WordPiece({word: i for i, word in enumerate(words)}, unk_token=unknown)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if processor:
        tokenizer.post_processor = processor
    return tokenizer


def template(single: str, pair: str) -> processors.TemplateProcessing:
    ids = [("[CLS]", 2), ("[SEP]", 3)]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


@pytest.mark.parametrize(
    "processor",
    [
        None,
        template("$A [SEP]", "$A [SEP] $B:1 [SEP]:1"),
        template("[CLS] $A [SEP]", "[CLS] $A $B:1 [SEP]:1"),
        template("[CLS] $A [SEP]", "$A $B:1"),
        template("$A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    ],
)
def test_an_encoders_text_is_framed_whatever_its_file_says(folder, processor):
    """[CLS] is what the pooler reads, and [SEP] what tells a pair apart."""
    tokenizer = word_piece(WORDS, processor)
    tokenizer.save(str(folder / "tokenizer.json"))
    rows = data.Rows([("no",), ("no it", "is")], np.zeros(2, np.int64))
    encoded = data.encode(data.load_tokenizer(folder), rows, 32)
    assert [decode(ids) for ids in encoded.ids] == ["[CLS] no [SEP]", "[CLS] no it [SEP] is [SEP]"]
    assert encoded.segments[1].tolist() == [0, 0, 0, 0, 1, 1]


def test_a_frame_has_the_tokens_that_there_are_or_is_missed(folder):
    word_piece(NAMED_WORDS).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMED))
    assert tokens_of(folder, "no", "it") == "<s> no </s> it </s>"
    (folder / "tokenizer_config.json").unlink()
    word_piece(["<unk>", "no"]).save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"json has no \[CLS\] and \[SEP\]; name its own as cls"):
        tokens_of(folder, "no")
    (folder / "tokenizer_config.json").write_text('{"cls_token": "no", "sep_token": "<unk>"}')
    assert tokens_of(folder, "no") == "no no <unk>"


@pytest.mark.parametrize("file, settings", [("left", {}), ("right", {"truncation_side": "left"})])
def test_a_text_loses_the_end_that_the_files_name(folder, file, settings):
    tokenizer = data.load_tokenizer(folder)
    tokenizer.enable_truncation(3, direction=file)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert tokens_of(folder, "is this no it", length=5) == "[CLS] this no it [SEP]"
    assert tokens_of(folder, "is this no", "it not", length=6) == "[CLS] this no [SEP] not [SEP]"


def test_threads_that_share_a_tokenizer_get_their_own_lengths(folder):
    tokenizer = data.load_tokenizer(folder)
    rows = data.Rows([("is " * 40,)], np.zeros(1, np.int64))

    def lengths(length: int) -> set[int]:
        return {len(data.encode(tokenizer, rows, length).ids[0]) for _ in range(200)}

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lengths, range(5, 13))) == [{length} for length in range(5, 13)]
    assert len(tokenizer.encode("is " * 40).ids) == 42


def test_ids_beyond_the_embedding_are_refused_where_a_text_has_one(folder):
    """A blank last line of vocab.txt, or a word added after training, is no reason to refuse."""
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n\n")
    (folder / "added_tokens.json").write_text('{"extra": 16}')
    assert tokens_of(folder, "no it", rows=15) == "[CLS] no it [SEP]"
    words = "vocab.txt: a text has the token 'extra', id 16; the embedding has 15 rows"
    with pytest.raises(ValueError, match=words):
        tokens_of(folder, "no extra", rows=15)


def test_a_damaged_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
        data.load_tokenizer(folder)
    with pytest.raises(FileNotFoundError, match="there is neither"):
        data.load_tokenizer(folder / "nowhere")


def test_a_byte_order_mark_and_windows_lines_are_no_part_of_a_token(folder):
    plain, path = data.load_tokenizer(folder), folder / "vocab.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert data.load_tokenizer(folder).get_vocab() == plain.get_vocab()
    text = plain.to_str(pretty=True).replace("\n", "\r\n")
    (folder / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert data.load_tokenizer(folder).get_vocab() == plain.get_vocab()


@pytest.mark.parametrize(
    "part, words",
    [
        (
            {"post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 99], "cls": ["a", 2]}},
            "id 99; the embedding has 15 rows",
        ),
        # the library panics: no Exception
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "is not a tokenizer: chunk size"),
        ({"pre_tokenizer": {"type": "y" * 10_000}}, r"is not a tokenizer: .{1,200}$"),
    ],
)
def test_a_tokenizer_is_tried_before_it_is_trusted(folder, part, words):
    whole = json.loads(data.load_tokenizer(folder).to_str())
    (folder / "tokenizer.json").write_text(json.dumps(whole | part))
    with pytest.raises(ValueError, match=words):
        tokens_of(folder, "no", rows=15)


def test_a_tokenizers_own_padding_is_not_used(folder):
    """To this length it would end the process for lack of memory, with no exception to catch."""
    tokenizer = data.load_tokenizer(folder)
    tokenizer.enable_padding(length=2**45)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert decode(data.load_tokenizer(folder).encode("this").ids) == "[CLS] this [SEP]"


@pytest.mark.parametrize(
    "line", [b"[" * 100_000, b'{"content": [7]}', b"{}", b"7", b'{"content": "\xff"}']
)
def test_a_bad_line_of_code_is_named_by_file_and_line(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"content": "x = 1"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: "):
        data.load_code(tmp_path)


# ----------------------------------------------------------------------------------------- batches


def numbered(n: int = 237) -> data.Examples:
    """Example i holds its own number, repeated a random number of times."""
    rng = np.random.default_rng(0)
    ids = [np.full(rng.integers(1, 30), i + 1, np.int32) for i in range(n)]
    return data.Examples(ids, [np.zeros(len(x), np.int8) for x in ids], np.arange(1, n + 1))


@pytest.mark.parametrize("seed", [None, 0, (1, 2, 3)])
def test_every_example_comes_once_an_epoch_padded_to_the_longest_of_its_batch(seed):
    examples, seen = numbered(), []
    for x, y in data.batches(examples, 16, seed):
        mask = torch.ones_like(x["ids"]) if x["mask"] is None else x["mask"]
        assert (x["ids"] == y[:, None] * mask).all() and mask.sum(1).max() == x["ids"].size(1)
        assert mask.sum(1).tolist() == [len(examples.ids[i - 1]) for i in y.tolist()]
        seen += y.tolist()
    assert sorted(seen) == list(range(1, 238))


def test_the_order_depends_on_the_seed_alone_and_little_is_padded():
    def order(seed) -> list:
        return [y.tolist() for _, y in data.batches(numbered(), 16, seed)]

    assert order((0, 1)) == order((0, 1)) != order((0, 2))
    padded = sum(x["ids"].numel() for x, _ in data.batches(numbered(), 16, 0))
    assert padded < 1.15 * sum(len(x) for x in numbered().ids)


def test_no_epoch_runs_from_short_to_long_or_groups_the_same_examples_again():
    """200 lengths, all different. Four a batch are one stretch of 50 batches, two a batch are two;
    sorted all through, 1 and 2 would always meet.
    """
    ids = [np.zeros(n, np.int32) for n in range(1, 201)]
    examples = data.Examples(ids, None, np.arange(1, 201))

    def lengths(batch_size: int, seed: int) -> list[tuple[int, ...]]:
        return [tuple(y.tolist()) for _, y in data.batches(examples, batch_size, seed)]

    assert lengths(4, 0) != sorted(lengths(4, 0))
    assert len(set(lengths(2, 0)) & set(lengths(2, 1))) < 50


# --------------------------------------------------------------------------------------- downloads


def test_a_download_is_unpacked_whole_or_not_at_all(tmp_path, monkeypatch):
    """The network is replaced by one that delivers, breaks off, or is absent. No partial file is
    ever left, and the error says what is missing, where, why, and what to do.
    """
    monkeypatch.setattr(data, "DOWNLOADS", tmp_path)
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("train.tsv", "dev.tsv", "test.tsv"):
            archive.writestr(f"SST-2/{name}", "sentence\tlabel\ngood\t1\n")

    def deliver(url, path):
        assert url == "https://dl.fbaipublicfiles.com/glue/data/SST-2.zip"
        open(path, "wb").write(whole.read_bytes())

    def break_off(url, path):
        open(path, "wb").write(whole.read_bytes()[:-40])

    def flip(url, path):
        content = bytearray(whole.read_bytes())
        content[45] ^= 0xFF
        open(path, "wb").write(content)

    def absent(url, path):
        raise OSError("no network")

    def lacking(url, path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("SST-2/train.tsv", "sentence\tlabel\ngood\t1\n")

    for fetch, reason in (
        (break_off, "File is not a zip file"),
        (flip, "Bad CRC-32|invalid (block|stored|code)|Error -3"),
        (lacking, "no item named 'SST-2/dev.tsv'"),
        (absent, "no network"),
    ):
        monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
        words = f"sst2 is not in .*glue and could not be downloaded .*({reason}).*; put it"
        with pytest.raises(FileNotFoundError, match=words):
            data.find_data("sst2")
        assert not list((tmp_path / "glue" / "SST-2").iterdir())
    monkeypatch.setattr(torch.hub, "download_url_to_file", deliver)
    assert data.find_data("sst2") == tmp_path / "glue"
    assert sorted(p.name for p in (tmp_path / "glue" / "SST-2").iterdir()) == [
        "dev.tsv",
        "train.tsv",
    ]
    assert data.load_table(data.GLUE["sst2"], "train", tmp_path / "glue").texts == [("good",)]


def test_mrpc_is_split_by_the_list_of_dev_ids(tmp_path, monkeypatch):
    lines = [f"1\t{i}\t{i + 1}\tone {i}\ttwo" for i in range(4076)]
    corpus = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n" + "\r\n".join(lines) + "\r\n"
    ids = "".join(f"{i}\t{i + 1}\r\n" for i in range(0, 816, 2))
    served = {data.GLUE_URL + "mrpc_dev_ids.tsv": ids, data.MRPC_URL: corpus}
    monkeypatch.setattr(
        torch.hub,
        "download_url_to_file",
        lambda url, path: Path(path).write_bytes(served[url].encode()),
    )
    data.download_glue("mrpc", tmp_path)
    dev, train = ((tmp_path / "MRPC" / f"{name}.tsv").read_bytes() for name in ("dev", "train"))
    assert dev.count(b"\n") == 409 and b"one 814\t" in dev and b"one 815\t" in train
    assert data.load_table(data.GLUE["mrpc"], "dev", tmp_path).texts[-1] == ("one 814", "two")
    with pytest.raises(ValueError, match="3667 train"):
        data.split_mrpc(corpus.replace("\r\n" + lines[-1], "").encode(), ids.encode())


# ----------------------------------------------------------------------------------------- the toy


def test_the_toys_splits_are_balanced_and_share_no_text():
    splits = data.load_toy(train=500, dev=200)
    train, dev = splits["train"], splits["dev"]
    assert not set(train.texts) & set(dev.texts) and len(set(train.texts)) == 500
    assert train.labels.mean() == dev.labels.mean() == 0.5
    assert data.load_toy(500, 200)["train"].texts == train.texts


def test_no_word_list_solves_the_toy():
    """The best bag of words (a least-squares fit on 4,000 sentences) stays far from the 95% that
    composing reaches.
    """
    splits = data.load_toy(train=4000, dev=1000)
    words = sorted({w for (text,) in splits["train"].texts for w in text.split()})

    def counts(rows) -> np.ndarray:
        return np.array([[text.split().count(w) for w in words] + [1] for (text,) in rows.texts])

    weights = np.linalg.lstsq(
        counts(splits["train"]), 2.0 * splits["train"].labels - 1, rcond=None
    )[0]
    score = ((counts(splits["dev"]) @ weights > 0) == splits["dev"].labels).mean()
    assert 0.5 < score < 0.75


def test_the_toys_tokenizer_knows_every_word():
    tokenizer = data.load_tokenizer(data.DOWNLOADS / "toy")
    splits = data.load_toy(train=1000, dev=100)
    assert isinstance(tokenizer, Tokenizer)
    assert all(
        tokenizer.token_to_id("[UNK]") not in ids
        for ids in data.encode(tokenizer, splits["train"], 64).ids
    )


def test_a_model_that_arrives_in_part_is_no_model(tmp_path, monkeypatch):
    """The hub's client replaced by one that breaks off, and by one whose error has no text."""
    import huggingface_hub

    def silent(*_, **__):
        raise TimeoutError

    def partial(name, local_dir=None, local_files_only=False, **_):
        if local_files_only:
            raise FileNotFoundError("not in the hub's cache")
        write(local_dir, "config.json", config)

    config = (data.DOWNLOADS / "toy" / "config.json").read_text()
    monkeypatch.setattr(data, "DOWNLOADS", tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", partial)
    with pytest.raises(FileNotFoundError, match="there is no .*santacoder/model.safetensors; "):
        load_pretrained(data.find_model("python"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", silent)
    words = "google-bert/bert-base-uncased is not in .* .TimeoutError.; put it"
    with pytest.raises(FileNotFoundError, match=words):
        data.find_model("sst2")


# The hub's client raises errors of httpx, or of an earlier or later library like it.
NetworkError, TimeoutException, ProxyError = (
    type(name, (Exception,), {}) for name in ("NetworkError", "TimeoutException", "ProxyError")
)


def hub_says(status: int) -> Exception:
    response = types.SimpleNamespace(status_code=status, headers={}, request=None)
    return huggingface_hub.errors.HfHubHTTPError("Gateway Timeout", response=response)


@pytest.mark.parametrize(
    "error, falls_back",
    [
        (NetworkError("[Errno -2] Name or service not known"), True),
        (TimeoutException("timed out"), True),
        (URLError(socket.gaierror(-3, "Temporary failure in name resolution")), True),
        (URLError(OSError(errno.ENETUNREACH, "Network is unreachable")), True),
        (TimeoutError(), True),
        (huggingface_hub.errors.OfflineModeIsEnabled("offline"), True),
        (hub_says(401), False),
        (hub_says(404), False),
        (hub_says(504), False),
        (HTTPError("https://x", 403, "Forbidden", {}, None), False),
        (ProxyError("407 Proxy Authentication Required"), False),
        (NetworkError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate"), False),
        (URLError(ssl.SSLError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] self-signed")), False),
        (OSError(errno.EROFS, "Read-only file system"), False),
        (zipfile.BadZipFile("File is not a zip file"), False),
    ],
)
def test_only_a_missing_network_makes_the_toy_stand_in(
    error, falls_back, tmp_path, monkeypatch, capsys
):
    """An answer such as 401, or a folder that cannot be written, is told instead."""

    def fail(*_):
        raise error

    monkeypatch.setattr(data, "DOWNLOADS", tmp_path)
    monkeypatch.setattr(data, "download_model", fail)
    if falls_back:
        assert data.find_inputs("sst2", None, None)[0] == "toy"
        assert "TOY RUN, not BERT-BASE ON SST2: " in capsys.readouterr().out
        return
    words = "bert-base-uncased is not in .* could not be downloaded"
    with pytest.raises(FileNotFoundError, match=words):
        data.find_inputs("sst2", None, None)
    assert not capsys.readouterr().out


def no_network(*_, **__):
    raise NetworkError("[Errno -2] Name or service not known")


def test_what_is_there_is_used_though_the_folder_cannot_be_written(tmp_path, monkeypatch):
    """`weights` on a read-only medium, with all that the task needs, and no network."""
    monkeypatch.setattr(data, "DOWNLOADS", tmp_path)
    write(tmp_path / "bert-base-uncased", "model.safetensors", "")
    for name in ("train.tsv", "dev.tsv"):
        write(tmp_path / "glue" / "SST-2", name, "")

    def fail(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", fail)
    monkeypatch.setattr(tempfile, "mkdtemp", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    places = (tmp_path / "bert-base-uncased", tmp_path / "glue")
    assert data.find_inputs("sst2", None, None) == ("sst2", *places, "")


@pytest.mark.parametrize("name", ["google-bert--bert-base-uncased", "bert-base-uncased"])
def test_a_checkpoint_in_the_hubs_cache_is_found_without_network(name, tmp_path, monkeypatch):
    """Under either name; but not one that lacks its tokenizer. The layout is the hub's own."""
    monkeypatch.setattr(data, "DOWNLOADS", tmp_path / "weights")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", no_network)
    repository = tmp_path / f"models--{name}"
    snapshot = repository / "snapshots" / ("0" * 40)
    write(repository / "refs", "main", "0" * 40)
    for file in ("config.json", "model.safetensors"):
        write(snapshot, file, "{}")
    with pytest.raises(data.Offline, match="Name or service not known"):
        data.find_model("sst2")
    write(snapshot, "vocab.txt", "[PAD]")
    assert data.find_model("sst2") == snapshot
    assert not (tmp_path / "weights").exists()


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 438000000\n"


@pytest.mark.parametrize(
    "name, read",
    [
        ("model.safetensors", lambda path: evaluate.base_digest(path.parent)),
        ("tokenizer.json", lambda path: data.load_tokenizer(path.parent)),
        ("vocab.txt", lambda path: data.load_tokenizer(path.parent)),
        ("SST-2/train.tsv", lambda path: data.load_task(data.TASKS["sst2"], path.parents[1])),
        ("code.jsonl.gz", lambda path: data.load_code(path.parent)),
        ("HumanEval.jsonl.gz", lambda path: evaluate.read_lines(path, {})),
        ("adapters.safetensors", evaluate.read_tensors),
    ],
)
def test_a_git_lfs_pointer_in_the_place_of_a_file_is_called_so(name, read, tmp_path):
    config = (data.DOWNLOADS / "toy" / "config.json").read_text()
    write(tmp_path, "config.json", config)
    path = tmp_path / name
    write(path.parent, path.name, POINTER)
    with pytest.raises(ValueError, match=f"{path} is a Git LFS pointer; git lfs pull fetches"):
        read(path)


def test_a_pipe_is_read_once(tmp_path):
    """As in `--humaneval <(zcat FILE)`: nothing may look into it before."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=('{"a": "b"}\n',))
    writer.start()
    assert evaluate.read_lines(tmp_path / "pipe", {"a": str}) == [{"a": "b"}]
    writer.join()
