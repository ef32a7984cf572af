"""Loading, saving, stages and counts: model.py against frozen logits of an independent
implementation and sums by hand.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from conftest import batch, random_phi, randomise_adapters, tiny_bert
from mlfs import configuration_space
from model import (
    Bert,
    ElasticLinear,
    LowRankLinear,
    attention,
    load_pretrained,
    load_trained_state,
    save_pretrained,
)

REFERENCE = Path(__file__).parent / "reference"
SIZES = (("heads", 4), ("neurons", 24))


@pytest.mark.parametrize("layout", ["bert-plain", "bert-pretraining", "bert-classifier"])
def test_every_bert_layout_gives_the_logits_of_the_transformers_library(layout):
    """Plain keys; "bert." with LayerNorm.gamma/beta and pre-training heads; a fine-tuned classifier
    with another gelu.
    """
    model, want = load_pretrained(REFERENCE / layout), load_file(
        REFERENCE / layout / "expected.safetensors"
    )
    logits, features = model(want["ids"], want["mask"], segments=want["segments"])
    real = want["mask"].bool()
    for l, h in features.items():
        assert torch.allclose(h[real], want[f"hidden.{l}"][real], atol=1e-5)
    pooled = torch.tanh(model.pooler(features[2][:, 0], 16))
    assert torch.allclose(pooled, want["pooled"], atol=1e-5)
    if "logits" in want:
        assert logits.shape == (3, 3) and torch.allclose(logits, want["logits"], atol=1e-5)


def test_a_checkpoints_classifier_is_used_when_the_label_count_fits():
    """App. A's MNLI warm start: three labels keep the classifier, two start a new one."""
    stored = load_file(REFERENCE / "bert-classifier" / "model.safetensors")["classifier.weight"]
    assert torch.equal(load_pretrained(REFERENCE / "bert-classifier", 3).classifier.weight, stored)
    fresh = load_pretrained(REFERENCE / "bert-classifier", 2).classifier
    assert fresh.weight.shape == (2, 16) and 0 < fresh.weight.std() < 0.1 and not fresh.bias.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_attention_kernels_give_the_textbook_formula(dtype):
    """softmax(q kᵀ/√D + bias) v, whichever kernel is picked; padded keys get no weight."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    bias = torch.zeros(2, 1, 1, 6)
    bias[1, ..., 4:] = torch.finfo(dtype).min
    weights = (torch.einsum("bntd,bnsd->bnts", q, k) / 8**0.5 + bias.float()).softmax(-1)
    expected = torch.einsum("bnts,bnsd->bntd", weights, v)
    got = attention(q.to(dtype), k.to(dtype), v.to(dtype), bias.to(dtype)).float()
    assert torch.allclose(got, expected, atol=1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("tokens, heads", [(6, 4), (1, 1)])
def test_off_the_cpu_attention_has_a_key_head_for_each_head(tokens, heads, monkeypatch):
    """Shapes alone are known on "meta"; a single token, as in generation, needs no copies of keys.
    Values: `tests/by_hand/gpu.py`, part logits."""
    seen = []
    kernel = F.scaled_dot_product_attention
    spy = lambda *args, **more: seen.append([x.size(1) for x in args]) or kernel(*args, **more)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q = torch.empty(2, 4, tokens, 8, device="meta")
    k = torch.empty(2, 1, 6, 8, device="meta")
    assert attention(q, k, k, None).shape == q.shape
    assert seen == [[heads] * 3]


@pytest.mark.parametrize("trained", ["xAB", "AB", "xWAB"])
def test_the_gradient_by_hand_is_that_of_finite_differences(trained):
    """∂y of y = x Wᵀ + b + (x A) B, b frozen, and W mostly, in float64."""
    torch.manual_seed(0)
    sizes = {"x": (2, 3, 4), "W": (5, 4), "b": (5,), "A": (4, 2), "B": (2, 5)}
    inputs = [torch.randn(size).double() for size in sizes.values()]
    for name, t in zip(sizes, inputs):
        t.requires_grad_(name in trained)
    assert torch.autograd.gradcheck(LowRankLinear.apply, inputs)
    x, W, b, A, B = inputs
    expected = torch.einsum("bti,oi->bto", x, W) + b + torch.einsum("bti,ir,ro->bto", x, A, B)
    assert torch.allclose(LowRankLinear.apply(*inputs), expected, atol=1e-12)


@pytest.mark.parametrize("stages", [0, 1, 3])
@pytest.mark.parametrize("gradients", [True, False])
def test_the_fast_product_is_that_of_its_plain_lines(stages, gradients):
    """x Wᵀ + b + Σ_s (x A_s) B_s of any slice, values and gradients, in float64."""
    torch.manual_seed(0)
    linear = ElasticLinear(8, 6, trainable=stages == 0)  # App. B's full-rank MLFS has no stages
    for _ in range(stages):
        linear.add_stage(2, torch.Generator())
    for p in linear.parameters():
        p.data = torch.randn(p.shape).double()
    x = torch.randn(3, 4, 5).double().requires_grad_()
    with torch.set_grad_enabled(gradients):
        fast = linear(x, 3)
        plain = F.linear(x, linear.weight[:3, :5], linear.bias[:3])
        for A_s, B_s in zip(linear.A, linear.B):
            plain = plain + x @ A_s[:5] @ B_s[:, :3]
    assert torch.allclose(fast, plain, rtol=0, atol=1e-12)
    if gradients:
        wanted = [x, *(p for p in linear.parameters() if p.requires_grad)]
        pairs = zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in (fast, plain)))
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in pairs)


@pytest.mark.parametrize("seed", range(6))
def test_what_the_last_layer_leaves_out_no_one_reads(tiny, seed):
    """Without features only the first token's state is computed in it: the same states (B, H), the
    same gradients, no h."""
    randomise_adapters(tiny)
    tiny.add_stage(2)
    randomise_adapters(tiny, seed)
    whole, gradients = [], []
    for features in (random_phi(seed).layers, ()):
        s, h = tiny.encode(**batch(seed), phi=random_phi(seed), features=features)
        assert tuple(h) == features
        s.square().sum().backward()
        whole.append(s.detach())
        gradients.append([p.grad for p in tiny.parameters() if p.grad is not None])
        tiny.zero_grad()
    assert torch.allclose(*whole, atol=1e-5)
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_new_stage_starts_exactly_where_the_last_one_ended(tiny):
    """Alg. 1 line 2: A random, B zero, so A B = 0."""
    x, before = batch(), tiny(**batch())[0]
    for stage in range(3):
        tiny.add_stage(4)
        assert torch.allclose(
            tiny(**x)[0], before, atol=1e-6
        )  # up to the rounding of one longer sum
        randomise_adapters(tiny, stage)
        before = tiny(**x)[0]
    assert tiny.layers[0].query.A[0].shape == (16, 4) and tiny.layers[0].query.B[0].shape == (4, 16)
    assert tiny.layers[0].query.A[0].abs().min() > 0


def test_only_the_current_stage_and_the_head_get_gradients(tiny):
    """Sec. 5: W_Tch is frozen; stage s learns A_s, B_s only (and the head: our decision)."""
    for _ in range(3):
        tiny.add_stage(2)
    randomise_adapters(tiny)
    tiny(**batch())[0].square().sum().backward()
    with_gradient = {name for name, p in tiny.named_parameters() if p.grad is not None}
    assert with_gradient == {
        f"layers.{l}.{linear}.{letter}.2"
        for l in range(4)
        for letter in "AB"
        for linear in ("query", "key", "value", "intermediate")
    } | {f"{part}.{kind}" for part in ("pooler", "classifier") for kind in ("weight", "bias")}


def test_permuting_a_layer_permutes_its_inputs_and_outputs_and_nothing_else():
    """W, b and every A_s, B_s move together: the layer's function stays up to the new order."""
    torch.manual_seed(0)
    linear, x = ElasticLinear(5, 4), torch.randn(3, 5)
    torch.nn.init.normal_(linear.weight), torch.nn.init.normal_(linear.bias)
    linear.add_stage(2, torch.Generator())
    torch.nn.init.normal_(linear.B[0])
    y, inputs, outputs = linear(x, 4), torch.randperm(5), torch.randperm(4)
    linear.permute(inputs, outputs)
    assert torch.allclose(linear(x[:, inputs], 4), y[:, outputs], atol=1e-6)


def test_n_j_counts_the_adapter_entries_that_get_a_gradient(tiny):
    """Alg. 1 line 9 and Prop. 2: n_j is the number of entries of {A_s, B_s} in Φ_j."""
    tiny.add_stage(2)
    randomise_adapters(tiny)
    for phi in configuration_space(tiny.maxnet, hidden=(1, 0.5)):
        tiny.zero_grad()
        tiny(**batch(), phi=phi)[0].square().sum().backward()
        touched = sum(
            int((p.grad != 0).sum())
            for name, p in tiny.named_parameters()
            if name.endswith((".A.0", ".B.0")) and p.grad is not None
        )
        assert tiny.num_trainable(phi) == touched


def test_bert_base_has_the_papers_sizes():
    """n_1 = 811,008 and the minnet's 276,480 at r = 8; 45.7M parameters, a quarter of the encoder
    (Sec. 6.1).
    """
    with torch.device("meta"):
        bert = Bert(
            {
                "vocab_size": 30522,
                "hidden_size": 768,
                "num_attention_heads": 12,
                "head_dim": 64,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "max_position_embeddings": 512,
                "type_vocab_size": 2,
                "layer_norm_eps": 1e-12,
                "hidden_act": "gelu",
                "num_labels": 2,
            }
        )
    space = configuration_space(bert.maxnet)
    bert.add_stage(8)
    assert (space[0].name, space[-1].name, len(space)) == ("w1-d12", "w0.5-d6", 9)
    assert (bert.num_trainable(space[0]), bert.num_trainable(space[-1])) == (811_008, 276_480)

    def count(module) -> int:
        return sum(p.numel() for p in module.parameters())

    small = bert.skeleton(space[-1])
    assert round(count(small) / 1e6, 1) == 45.7
    assert round(count(small.layers) / count(bert.skeleton(space[0]).layers), 2) == 0.25


def test_what_was_trained_is_stored_and_gives_back_the_logits(tiny):
    """Sec. 3: one base model plus small matrices; permutation and head travel with them (forgetting
    the head is the classic bug).
    """
    base = {name: p.clone() for name, p in tiny.named_parameters()}
    for _ in range(3):
        tiny.add_stage(2)
    randomise_adapters(tiny)
    tiny.classifier.weight.data += 1
    tiny.reorder(
        {
            f"{l}.{kind}": torch.rand(n)
            for l in range(4)
            for kind, n in (("heads", 4), ("neurons", 24))
        }
    )
    state = {name: t.clone() for name, t in tiny.trained_state().items()}
    again = tiny_bert()
    assert all(torch.equal(p, base[name]) for name, p in again.named_parameters())
    load_trained_state(again, state)
    for phi in configuration_space(tiny.maxnet):
        assert torch.equal(tiny(**batch(), phi=phi)[0], again(**batch(), phi=phi)[0])
    del state["classifier.bias"]
    with pytest.raises(ValueError, match="classifier.bias"):
        load_trained_state(tiny_bert(), state)
    state["classifier.bias"] = torch.tensor([0, float("nan"), 0])
    with pytest.raises(ValueError, match="fit this base model: tensor 'classifier.bias' has a NaN"):
        load_trained_state(tiny_bert(), state)


@pytest.mark.parametrize(
    "other, words",
    [
        (dict(intermediate_size=32), "'order.0.neurons' is no permutation of its 32"),
        (dict(num_attention_heads=8, head_dim=2), "'order.0.heads' is no permutation of its 8"),
        (dict(num_hidden_layers=5), "'order.4.heads' is no permutation"),
        (
            dict(num_hidden_layers=3),
            "base model: tensor 'layers.3.intermediate.A.0' is missing or extra",
        ),
        (dict(num_labels=2), r"'classifier.weight' is \(3, 16\) in torch.float32, not \(2, 16\)"),
    ],
)
def test_adapters_of_another_base_model_are_refused(tiny, other, words):
    tiny.add_stage(2)
    tiny.reorder(
        {
            f"{l}.{kind}": torch.rand(n)
            for l in range(4)
            for kind, n in (("heads", 4), ("neurons", 24))
        }
    )
    with pytest.raises(ValueError, match=words):
        load_trained_state(tiny_bert(**other), tiny.trained_state())


@pytest.mark.parametrize(
    "name, wrong, words",
    [
        ("layers.0.query.A.0", torch.tensor(1.0), r"is \(\) in torch.float32, not \(16, 1\)"),
        ("layers.0.query.A.0", torch.ones(2), r"'layers.0.query.A.0' is \(2,\) in"),
        ("order.1.heads", torch.arange(4.0), "'order.1.heads' is no permutation of its 4"),
        ("order.1.heads", torch.ones(4).to(torch.float8_e5m2), "'order.1.heads' is no permutation"),
        ("order.9.heads", torch.ones(4).to(torch.float8_e4m3fn), "'order.9.heads' is missing or"),
        ("order.9.heads", torch.arange(4), "'order.9.heads' is missing or extra"),
        ("classifier.bias", torch.ones(3).to(torch.float8_e4m3fn), "in torch.float8_e4m3fn, not"),
        ("classifier.bias", torch.ones(3).to(torch.complex64), "in torch.complex64, not"),
    ],
)
def test_adapters_that_are_no_matrices_or_no_permutation_are_refused(tiny, name, wrong, words):
    """Their checksum may be right: a sentence, not a traceback."""
    tiny.add_stage(2)
    tiny.reorder({f"{l}.{k}": torch.rand(n) for l in range(4) for k, n in SIZES})
    with pytest.raises(ValueError, match=words):
        load_trained_state(tiny_bert(), tiny.trained_state() | {name: wrong})


def test_save_and_load_give_the_same_bits_and_never_overwrite(tiny, tmp_path):
    """The extracted minnet is an ordinary checkpoint; a folder that holds one is refused."""
    tiny.add_stage(2)
    small = randomise_adapters(tiny).extract(configuration_space(tiny.maxnet, hidden=(1, 0.5))[-1])
    save_pretrained(small, tmp_path / "small")
    again = load_pretrained(tmp_path / "small")
    pairs = zip(small.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert torch.equal(small(**batch())[0], again(**batch())[0])
    with pytest.raises(FileExistsError, match="exists already"):
        save_pretrained(small, tmp_path / "small")
    with pytest.raises(AssertionError):  # of which adapters are to be merged first
        save_pretrained(tiny, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_copies_nothing_that_the_file_can_back(tmp_path):
    """The frozen weights are views of the memory-mapped file: a 25 MB checkpoint takes no 25 MB
    of the process's own memory.
    """

    def own() -> int:
        """The process's own memory in kB."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    save_pretrained(tiny_bert(vocab_size=100_000, hidden_size=64, head_dim=16), tmp_path)
    before = own()
    model = load_pretrained(tmp_path)
    assert own() - before < 5_000
    assert model.word_embeddings.weight[7, 3].isfinite()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's /proc")
def test_a_file_loaded_in_another_dtype_is_let_go(tmp_path):
    """In bfloat16 nothing needs the float32 file any more, not even the head."""
    save_pretrained(tiny_bert(), tmp_path)
    model = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.pooler.weight.dtype == torch.float32
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def damaged(tmp_path, edit=None, config=None):
    """A copy of the classifier checkpoint with its tensors or its config.json changed."""
    shutil.copytree(REFERENCE / "bert-classifier", tmp_path, dirs_exist_ok=True)
    if edit:
        tensors = load_file(tmp_path / "model.safetensors")
        edit(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
    if config:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return tmp_path


KEY = "bert.encoder.layer.1.attention.self.key.weight"
MNLI = ("entailment", "neutral", "contradiction")


@pytest.mark.parametrize(
    "config, order",
    [
        ({"id2label": {"0": "CONTRADICTION", "1": "Neutral", "2": "entailment"}}, [2, 1, 0]),
        ({"label2id": {"neutral": 0, "Contradiction": 1, "ENTAILMENT": 2}}, [2, 0, 1]),
        ({"id2label": {"0": "2", "1": "0", "2": "1"}}, [1, 2, 0]),
        ({"id2label": {"0": 1, "1": 2, "2": 0}}, [2, 0, 1]),
        (
            {
                "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
                "label2id": {"neutral": 0, "entailment": 1, "contradiction": 2},
            },
            [1, 0, 2],
        ),
        ({"label2id": {"LABEL_0": 2, "LABEL_1": 1, "LABEL_2": 0}}, [0, 1, 2]),
        ({}, [0, 1, 2]),
    ],
)
def test_a_stored_classifiers_rows_go_where_their_names_say(tmp_path, config, order):
    """Any case, GLUE's numbers, id2label or label2id; LABEL_0, LABEL_1, ... tell nothing."""
    stored = load_file(REFERENCE / "bert-classifier" / "model.safetensors")
    folder = damaged(tmp_path, config=config)
    for labels in (MNLI, [label.upper() for label in MNLI]):
        model = load_pretrained(folder, 3, labels=labels)
        assert torch.equal(model.classifier.weight, stored["classifier.weight"][order])
        assert torch.equal(model.classifier.bias, stored["classifier.bias"][order])
        assert not model.notes


@pytest.mark.parametrize(
    "names", [["bad", "so-so", "good"], ["entailment", "neutral", "other"], ["neutral"] * 3]
)
def test_rows_of_other_classes_stay_and_a_note_tells(tmp_path, names):
    stored = load_file(REFERENCE / "bert-classifier" / "model.safetensors")
    folder = damaged(tmp_path, config={"id2label": dict(enumerate(names))})
    model = load_pretrained(folder, 3, labels=MNLI)
    assert torch.equal(model.classifier.weight, stored["classifier.weight"])
    (note,) = model.notes
    assert f"'{names[0]}'" in note and "are taken for ('entailment', 'neutral'" in note


@pytest.mark.parametrize("field", ["id2label", "label2id"])
def test_classes_that_are_no_object_are_refused(tmp_path, field):
    with pytest.raises(ValueError, match=f"{field} 'x' is not supported, only an object"):
        load_pretrained(damaged(tmp_path, config={field: "x"}), 3, labels=MNLI)


def test_a_missing_pooler_is_drawn_and_half_of_one_is_an_error(tmp_path):
    """Masked language models and question answering have none."""

    def without(*kinds):
        return lambda t: [t.pop(f"bert.pooler.dense.{kind}") for kind in kinds]

    model = load_pretrained(damaged(tmp_path / "both", without("weight", "bias")))
    assert 0 < model.pooler.weight.std() < 0.1 and model.pooler.weight.requires_grad
    assert model.drawn == ["pooler"] and "no pooler that fits is stored" in model.notes[0]
    with pytest.raises(ValueError, match="'pooler.dense.weight' is missing"):
        load_pretrained(damaged(tmp_path / "half", without("weight")))


def test_a_foreign_head_is_left_out_by_name_with_the_same_logits(tmp_path):
    """TinyBERT's, ColBERT's, SimCSE's, one of two layers; a head may count its batches."""
    heads = ("fit_denses.0.weight", "linear.weight", "mlp.dense.bias", "classifier.dense.weight")
    more = {name: torch.ones(2) for name in heads} | {"norm.batches": torch.tensor(7)}
    model = load_pretrained(damaged(tmp_path, lambda t: t.update(more)))
    plain = load_pretrained(REFERENCE / "bert-classifier")
    assert torch.equal(model(**batch())[0], plain(**batch())[0])
    assert not plain.notes and all(f"'{name}'" in model.notes[0] for name in more)


def test_an_unknown_name_in_the_network_of_plain_keys_is_an_error(tmp_path):
    tensors = load_file(REFERENCE / "bert-plain" / "model.safetensors")
    shutil.copy(REFERENCE / "bert-plain" / "config.json", tmp_path)
    for name in ("encoder.extra.weight", "embeddings.extra", "pooler.extra"):
        save_file(tensors | {name: torch.ones(2)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"'{name}' has no place in a bert model"):
            load_pretrained(tmp_path)


def test_without_a_model_type_the_sentence_says_what_to_add(tmp_path):
    with pytest.raises(ValueError, match="model_type None is not supported; set it to one of bert"):
        load_pretrained(damaged(tmp_path, config={"model_type": None}))


def test_where_there_is_one_segment_both_sentences_have_it():
    """type_vocab_size 1: a pair is read as RoBERTa reads it."""
    model, x = tiny_bert(type_vocab_size=1), batch()
    expected = model(**(x | {"segments": None}))[0]
    assert x["segments"].any() and torch.equal(model(**x)[0], expected)


@pytest.mark.parametrize(
    "edit, config, words",
    [
        (lambda t: t.pop(KEY), None, "encoder.layer.1.attention.self.key.weight' is missing"),
        (
            lambda t: t.update({"bert.extra.weight": torch.zeros(2)}),
            None,
            "'extra.weight' has no place",
        ),
        (lambda t: t.update({KEY: torch.zeros(16, 15)}), None, r"key.weight' is \(16, 15\)"),
        (
            lambda t: t.update({KEY: torch.zeros(16, 16, dtype=torch.int64)}),
            None,
            r"key.weight' is \(16, 16\) in torch.int64, not \(16, 16\) in floating point",
        ),
        (lambda t: t.update({KEY.removeprefix("bert."): torch.zeros(16, 16)}), None, "there twice"),
        (None, {"model_type": "t5"}, "model_type 't5' is not supported"),
        (None, {"num_hidden_layers": 0}, "num_hidden_layers 0 is not supported"),
        (None, {"hidden_act": "mish"}, "hidden_act 'mish'"),
        (None, {"num_attention_heads": 5}, "only a multiple of num_attention_heads, 5"),
        (None, {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named_never_guessed(tmp_path, edit, config, words):
    with pytest.raises(ValueError, match=words):
        load_pretrained(damaged(tmp_path, edit, config))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e5])
def test_one_weight_that_is_not_finite_is_named(tmp_path, value):
    """A NaN makes every logit NaN, and accuracy looks like chance. 1e5 is infinite in float16."""
    folder = damaged(tmp_path, lambda t: t[KEY].view(-1)[7:8].fill_(value))
    with pytest.raises(
        ValueError, match="key.weight' has a NaN or infinite value in torch.float16"
    ):
        load_pretrained(folder, dtype=torch.float16)


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_hidden_layers", 10**6),
        ("hidden_size", 10**30),
        ("intermediate_size", "y" * 10_000),
        ("layer_norm_eps", float("inf")),
        ("hidden_act", ["gelu"] * 10_000),
    ],
)
def test_an_absurd_config_is_told_in_one_sentence_at_once(tmp_path, field, value):
    """Before a million layers are built, and without ten thousand characters of a wrong value."""
    with pytest.raises(ValueError, match="config.json") as told:
        load_pretrained(damaged(tmp_path, config={field: value}))
    assert len(str(told.value).removeprefix(str(tmp_path))) < 200


def test_json_may_begin_with_a_byte_order_mark_but_not_nest_without_end(tmp_path):
    path = damaged(tmp_path) / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    load_pretrained(tmp_path)
    path.write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(ValueError, match="config.json is not valid JSON: maximum recursion depth"):
        load_pretrained(tmp_path)


def test_truncated_pickled_and_missing_checkpoints_are_refused(tmp_path):
    whole = (REFERENCE / "bert-plain" / "model.safetensors").read_bytes()
    shutil.copy(REFERENCE / "bert-plain" / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no .*model.safetensors"):
        load_pretrained(tmp_path)
    for size in (0, 5, 300, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged or cut short"):
            load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(FileNotFoundError, match="there is no .*convert a pickle"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_pretrained(tmp_path)
