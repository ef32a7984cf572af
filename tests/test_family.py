"""A new family of models is one class: here RoBERTa, from its checkpoint to a slice of it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import evaluate
import mlfs
import model
from conftest import RUN_OPTIONS, load_small_toy
from model import Bert, load_pretrained

REFERENCE = Path(__file__).parent / "reference" / "roberta-classifier"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Roberta(Bert):
    """BERT with positions from 2 on, one token type, and a classifier with a layer of its own."""

    model_type = "roberta"  # in config.json, and the prefix of its tensors
    architecture = "RobertaForSequenceClassification"
    first_position = 2  # rows 0 and 1 of the table are padding's
    defaults = Bert.defaults | {"type_vocab_size": 1, "layer_norm_eps": 1e-5}
    ignored = r"lm_head\..*|embeddings\.position_ids"
    tensor_names = Bert.tensor_names | {
        "pooler": "classifier.dense",
        "classifier": "classifier.out_proj",
    }

    def embed(self, ids, segments, H):
        return super().embed(ids, None, H)  # one token type, also for the second of a pair


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(model.FAMILIES, "roberta", Roberta)


def test_it_loads_a_checkpoint_and_gives_the_logits_of_the_transformers_library():
    """Every tensor finds its place by the names above, and every layer's output is the same."""
    want = load_file(REFERENCE / "expected.safetensors")
    roberta = load_pretrained(REFERENCE)
    logits, features = roberta(want["ids"], want["mask"], segments=want["mask"])
    real = want["mask"].bool()
    assert torch.allclose(logits, want["logits"], atol=1e-4)
    for l, h in features.items():
        assert torch.allclose(h[real], want[f"hidden.{l}"][real], atol=1e-4)
    assert roberta.max_tokens == 12  # 14 rows, less two


def test_a_pretrained_checkpoint_has_no_classifier_and_gets_one(tmp_path):
    """As roberta-base: a language model's head instead, which is left out."""
    stored = load_file(REFERENCE / "model.safetensors")
    stored = {name: t for name, t in stored.items() if not name.startswith("classifier.")}
    save_file(stored | {"lm_head.bias": torch.zeros(50)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((REFERENCE / "config.json").read_bytes())
    roberta = load_pretrained(tmp_path, 5)
    assert roberta.pooler.weight.shape == (16, 16) and 0 < roberta.pooler.weight.std() < 0.1
    assert roberta(torch.randint(2, 50, (2, 9)))[0].shape == (2, 5)


def test_it_trains_three_stages_is_sliced_and_exported(tmp_path, monkeypatch):
    """The command lines know nothing of it; its slice is an ordinary RoBERTa checkpoint."""
    monkeypatch.setattr(data, "load_toy", load_small_toy)
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors"):
        (base / name).write_bytes((REFERENCE / name).read_bytes())
    words = [*SPECIAL, *data.NOUNS, *list(data.ADJECTIVES)[:20], "the", "is", "not", "."]
    (base / "vocab.txt").write_text("\n".join(words) + "\n")
    command = ["--model", str(base), "--out", str(tmp_path / "run"), "--rank", "2"]
    assert mlfs.main([*command, *RUN_OPTIONS]) == 0
    _, supernet, space = evaluate.load_run(tmp_path / "run")
    assert all(B_s.any() for linear in supernet.adapted_linears() for B_s in linear.B)

    folder = tmp_path / "slice"
    export = ["--export", space[-1].name, str(folder)]
    assert evaluate.main([str(tmp_path / "run"), *export]) == 0
    names = load_file(folder / "model.safetensors").keys()
    assert "roberta.encoder.layer.0.attention.self.query.weight" in names
    assert "classifier.out_proj.weight" in names and len(space[-1].layers) == 1
    ids = torch.randint(2, 40, (2, 9))
    sliced = supernet(ids, phi=space[-1])[0]
    assert torch.allclose(load_pretrained(folder)(ids)[0], sliced, atol=1e-5)
