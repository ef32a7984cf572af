"""GPT and Llama: slicing, the cache, loading and saving, the losses in chunks, Python code as a
task, generation and pass@k; against frozen outputs of an independent implementation and sums by
hand.
"""

import dataclasses
import gzip
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import data
import evaluate
import mlfs
from conftest import FAMILIES, random_phi, randomise_adapters, tiny_bert, tiny_gpt, tiny_llama
from model import (
    GPT,
    Cache,
    Llama,
    SubnetConfig,
    load_pretrained,
    load_trained_state,
    save_pretrained,
)

REFERENCE = Path(__file__).parent / "reference"
LAYOUTS = ["gpt-bigcode", "gpt-bigcode-head", "gpt2-custom", "llama-mha", "llama-gqa", "llama-mqa"]
DECODERS = {
    "gpt": tiny_gpt,
    "llama, a key for two heads": tiny_llama,
    "llama, a key a head, tied": lambda: tiny_llama(
        num_key_value_heads=4, tie_word_embeddings=True
    ),
    "llama, one key": lambda: tiny_llama(num_key_value_heads=1),
}
HP = mlfs.HyperParameters(dtype="float32", batch_size=4, rank=2, max_length=8)


@pytest.fixture(params=DECODERS)
def decoder(request):
    return DECODERS[request.param]()


def tokens(seed: int = 0, size: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(0, 50, (size, length), generator=torch.Generator().manual_seed(seed))


def importance(model) -> dict[str, torch.Tensor]:
    phi = model.maxnet
    sizes = {"heads": phi.num_attention_heads, "neurons": phi.intermediate_size}
    return {f"{l}.{kind}": torch.rand(n) for l in phi.layers for kind, n in sizes.items()}


# ------------------------------------------------------------------------------- the models


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_decoder_layout_gives_the_logits_of_the_transformers_library(layout):
    """Fused and split attention, Conv1D, tied and untied, 1, 2 and all key heads, shards, both
    rotary bases; right padding changes no real token.
    """
    model = load_pretrained(REFERENCE / layout)
    want = load_file(REFERENCE / layout / "expected.safetensors")
    real = want["mask"].bool()
    for mask in (want["mask"], None):
        logits, features = model(want["ids"], mask)
        assert torch.allclose(logits[real], want["logits"][real], atol=2e-6)
        for l, h in features.items():
            state = want[f"hidden.{l}"][real]
            unit = state / state.square().mean(-1, keepdim=True).sqrt()
            assert torch.allclose(h[real], unit, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_token_by_token_with_the_cache_equals_one_pass(decoder, seed):
    phi, ids, cache = random_phi(seed, decoder.head_group), tokens(seed), Cache(9)
    decoder.add_stage(2)
    randomise_adapters(decoder)
    parts = [decoder(ids[:, :4], phi=phi, cache=cache)[0]]
    parts += [decoder(ids[:, t : t + 1], phi=phi, cache=cache)[0] for t in range(4, 9)]
    assert torch.allclose(torch.cat(parts, dim=1), decoder(ids, phi=phi)[0], atol=1e-5)


def test_padding_on_either_side_changes_no_real_token(decoder):
    ids = tokens()
    whole, pad = decoder(ids)[0], torch.zeros(3, 2, dtype=torch.long)
    seen = torch.ones_like(ids)
    right = decoder(torch.cat((ids, pad), 1), torch.cat((seen, pad), 1))[0][:, :9]
    left = decoder(torch.cat((pad, ids), 1), torch.cat((pad, seen), 1))[0][:, 2:]
    assert torch.allclose(right, whole, atol=1e-5) and torch.allclose(left, whole, atol=1e-5)


def test_no_token_sees_a_later_one(decoder):
    ids = tokens()
    other = ids.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 50
    assert torch.equal(decoder(ids)[0][:, :5], decoder(other)[0][:, :5])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(6))
def test_slice_extract_save_and_load_agree_for_random_phi(family, seed, tmp_path):
    """Eqs. 2 and 8, for Bert, GPT and Llama: cut in place, cut once, and read back from disk."""
    model = FAMILIES[family](seed)
    for _ in range(2):
        model.add_stage(2, seed)
    randomise_adapters(model, seed)
    phi, ids = random_phi(seed, model.head_group), tokens(seed)
    sliced, small = model(ids, phi=phi)[0], model.extract(phi)
    assert torch.allclose(small(ids)[0], sliced, atol=1e-5)
    save_pretrained(small, tmp_path / "small")
    again = load_pretrained(tmp_path / "small")
    state = again.state_dict()
    assert all(torch.equal(p, state[name]) for name, p in small.state_dict().items())
    assert torch.allclose(again(ids)[0], sliced, atol=1e-5)


@pytest.mark.parametrize("layout", ["bert-plain", *LAYOUTS])
def test_a_slice_of_a_loaded_checkpoint_is_saved_and_loaded_again(layout, tmp_path):
    """Its config.json must tell the slice's sizes, not those of the checkpoint it was cut from."""
    model = load_pretrained(REFERENCE / layout)
    phi, ids = SubnetConfig(10, 2, 13, (0, 2)), tokens()
    save_pretrained(model.extract(phi), tmp_path / "small")
    again = load_pretrained(tmp_path / "small")
    assert again.maxnet == dataclasses.replace(phi, layers=(0, 1))
    assert torch.allclose(again(ids)[0], model(ids, phi=phi)[0], atol=1e-5)


def test_one_key_is_never_sliced_and_shared_keys_go_in_whole_groups():
    """Santacoder's multi-query attention keeps its key/value head; grouped ones go by the group."""
    gpt, llama = tiny_gpt(), tiny_llama()
    phi = dataclasses.replace(gpt.maxnet, num_attention_heads=2)
    small = gpt.extract(phi).layers[0]
    assert (small.query.weight.shape, small.key.weight.shape) == ((8, 16), (4, 16))
    assert torch.equal(small.value.weight, gpt.layers[0].value.weight)
    small = llama.extract(phi).layers[0]
    assert (small.query.weight.shape, small.key.weight.shape) == ((8, 16), (4, 16))
    assert torch.equal(small.key.weight, llama.layers[0].key.weight[:4])
    with pytest.raises(ValueError, match="3 heads; this model's come in groups of 2"):
        llama.extract(dataclasses.replace(phi, num_attention_heads=3))
    with pytest.raises(ValueError, match="0.75 of 2 groups of 2 heads is 1.5, not"):
        mlfs.configuration_space(llama.maxnet, (1, 0.75), head_group=llama.head_group)


def test_reordering_heads_and_neurons_leaves_the_maxnet_as_it_is(decoder):
    decoder.add_stage(2)
    randomise_adapters(decoder)
    ids, before = tokens(), decoder(tokens())[0]
    scores = importance(decoder)
    decoder.reorder(scores)
    assert torch.allclose(decoder(ids)[0], before, atol=1e-5)
    assert decoder.order["1.neurons"][0] == scores["1.neurons"].argmax()
    groups = scores["1.heads"].view(-1, decoder.head_group).sum(1)
    assert decoder.order["1.heads"][0] // decoder.head_group == groups.argmax()
    state = {name: t.clone() for name, t in decoder.trained_state().items()}
    again = type(decoder)(decoder.config)
    again.load_state_dict({**dict(again.named_parameters()), **base(decoder, state)})
    load_trained_state(again, state)
    assert torch.allclose(again(ids)[0], before, atol=1e-5)


def base(model, state) -> dict[str, torch.Tensor]:
    """The weights of a reordered model as they were before."""
    copy = type(model)(model.config)
    weights = {
        n: p for n, p in model.named_parameters() if not n.rpartition(".")[0].endswith(("A", "B"))
    }
    copy.load_state_dict(weights)
    inverse = {key: index.argsort() for key, index in model.order.items()}
    copy.permute(inverse)
    return dict(copy.named_parameters())


def test_gradient_checkpointing_changes_no_gradient(decoder):
    decoder.add_stage(2)
    randomise_adapters(decoder)
    trained = [p for p in decoder.parameters() if p.requires_grad]
    gradients = []
    for decoder.gradient_checkpointing in (False, True):
        s, h = decoder.encode(tokens(), None, decoder.maxnet, features=(1,))
        gradients.append(torch.autograd.grad(s.square().sum() + h[1].sum(), trained))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_n_j_counts_the_adapter_entries_that_get_a_gradient(decoder):
    """Alg. 1 line 9: a multi-query key adapter counts whole in every Φ, others by their slice."""
    decoder.add_stage(2)
    randomise_adapters(decoder)
    for phi in mlfs.configuration_space(decoder.maxnet, (1, 0.5), (1, 0.5), (1, 0.5)):
        decoder.zero_grad()
        decoder(tokens(), phi=phi)[0].square().sum().backward()
        touched = sum(int((p.grad != 0).sum()) for p in decoder.parameters() if p.grad is not None)
        assert decoder.num_trainable(phi) == touched


def test_without_adapters_all_of_w_is_trained_and_n_j_counts_all_of_phi(decoder):
    """ "Full-rank (non-LoRA) MLFS" (App. B)."""
    decoder.add_stage(None)
    phi = random_phi(1, decoder.head_group)
    assert all(p.requires_grad for p in decoder.parameters())
    assert decoder.num_trainable(phi) == sum(p.numel() for p in decoder.extract(phi).parameters())


NUMBERS = {  # of the checkpoints' own configurations
    "santacoder": (
        GPT,
        dict(
            vocab_size=49280,
            hidden_size=2048,
            num_attention_heads=16,
            num_key_value_heads=1,
            head_dim=128,
            intermediate_size=8192,
            num_hidden_layers=24,
            max_position_embeddings=2048,
            layer_norm_eps=1e-5,
            hidden_act="gelu_fast",
            tie_word_embeddings=True,
        ),
    ),
    "codellama": (
        Llama,
        dict(
            vocab_size=32000,
            hidden_size=4096,
            num_attention_heads=32,
            num_key_value_heads=32,
            head_dim=128,
            intermediate_size=11008,
            num_hidden_layers=32,
            max_position_embeddings=16384,
            layer_norm_eps=1e-5,
            hidden_act="silu",
            rope_theta=1e6,
            tie_word_embeddings=False,
        ),
    ),
}


@pytest.mark.parametrize("depth", [1, 2, 5, 24])
def test_a_shallow_decoder_lacks_a_block_in_the_middle(depth):
    """Every prefix of the order keeps the ends, and what is dropped are neighbours, half way."""
    layers = tuple(range(depth))
    for kept in range(1, depth + 1):
        some = set(mlfs.outside_in(layers)[:kept])
        gone = sorted(set(layers) - some)
        assert len(some) == kept and depth - 1 in some and (kept == 1 or 0 in some)
        assert not gone or gone == list(range(gone[0], gone[-1] + 1))
        assert not gone or abs(gone[0] + gone[-1] - (depth - 1)) <= 1


def by_hand(name: str, heads: int, F: int, L: int) -> int:
    """Parameters of SantaCoder's and CodeLlama's kind, from their shapes."""
    if name == "santacoder":
        H, D, V, P = 2048, 128, 49280, 2048
        attention = (heads * D + 2 * D) * (H + 1) + heads * D * H + H
        return (V + P) * H + L * (attention + F * (H + 1) + F * H + H + 4 * H) + 2 * H
    H, D, V = 4096, 128, 32000
    return 2 * V * H + L * (4 * heads * D * H + 3 * H * F + 2 * H) + H


@pytest.mark.parametrize(
    "name, shapes",
    [
        (
            "santacoder",
            {
                "w1-d24": (16, 8192, 24),
                "0.9B": (12, 6144, 24),
                "0.7B": (12, 6144, 18),
                "0.5B": (8, 4096, 18),
            },
        ),
        (
            "codellama",
            {
                "w1-d32": (32, 11008, 32),
                "6B": (32, 11008, 28),
                "5.3B": (32, 11008, 25),
                "4.5B": (32, 11008, 21),
            },
        ),
    ],
)
def test_the_named_palettes_have_the_papers_sizes(name, shapes):
    """Tables 1 and 2: 0.9B, 0.7B, 0.5B of SantaCoder 1.1B; 6B, 5.3B, 4.5B of CodeLlama 7B."""
    family, config = NUMBERS[name]
    with torch.device("meta"):
        model = family(config)
    space = mlfs.SUBNETS[name]
    assert space[0] == model.maxnet and [phi.name for phi in space] == list(shapes)
    for phi in space:
        size = evaluate.describe(model, phi)["parameters"]
        assert size == by_hand(name, *shapes[phi.name])
        digits = 0 if phi.name == "6B" else 1
        assert phi == space[0] or f"{size / 1e9:.{digits}f}B" == phi.name
        assert set(space[-1].layers) <= set(phi.layers)  # ℓ_FD needs the minnet's layers


# ------------------------------------------------------------------- checkpoints that do not fit


def copied(tmp_path, layout: str, edit=None, **config) -> Path:
    shutil.copytree(REFERENCE / layout, tmp_path, dirs_exist_ok=True)
    if edit:
        tensors = load_file(tmp_path / "model.safetensors")
        edit(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return tmp_path


@pytest.mark.parametrize(
    "layout, edit, config, words",
    [
        ("gpt-bigcode", None, {"n_head": 8}, r"c_attn.* is \(24,\); config.json asks for 20 rows"),
        ("gpt-bigcode", None, {"multi_query": False}, "multi_query False is not supported"),
        ("gpt-bigcode", None, {"n_embd": 0}, "n_embd 0 is not supported, only a whole number"),
        ("gpt-bigcode", None, {"n_embd": None}, "n_embd None is not supported, only a whole"),
        ("gpt-bigcode", None, {"n_inner": 25}, r"c_fc.weight' is \(24, 16\) in .*, not \(25, 16\)"),
        ("gpt2-custom", None, {"attention_head_type": "multihead"}, "attention_head_type"),
        (
            "gpt-bigcode-head",
            lambda t: t["lm_head.weight"].add_(1),
            {},
            "differs from the embedding",
        ),
        (
            "gpt-bigcode-head",
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.complex64)}),
            {},
            "'lm_head.weight' differs from the embedding",
        ),
        (
            "gpt-bigcode-head",
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}),
            {},
            "'lm_head.weight' differs from the embedding",
        ),
        ("llama-mha", lambda t: t.update({"lm_head.bias": torch.ones(50)}), {}, "has no place"),
        ("gpt-bigcode", lambda t: t.pop("transformer.wpe.weight"), {}, "'wpe.weight' is missing"),
        ("llama-mha", lambda t: t.pop("lm_head.weight"), {}, "'lm_head.weight' is missing"),
        ("llama-mha", None, {"attention_bias": True}, "attention_bias True is not supported"),
        ("llama-mha", None, {"num_key_value_heads": 3}, "heads 3 is not supported, only a div"),
        ("llama-mha", None, {"rope_scaling": {"type": "linear", "factor": 2}}, "scaling 'linear'"),
        ("llama-mha", None, {"rms_norm_eps": 0}, "rms_norm_eps 0 is not supported, only a number"),
        ("llama-mha", None, {"rope_theta": 0}, "rope_theta 0 is not supported, only a number"),
        ("llama-mha", None, {"rope_theta": "abc"}, "rope_theta 'abc' is not supported, only a"),
        ("llama-mha", None, {"rope_scaling": "linear"}, "rotary scaling 'linear'"),
        ("llama-mha", None, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama-mha", None, {"model_type": []}, "model_type .* is not supported"),
        ("gpt2-custom", None, {"n_embd": None}, "n_embd None is not supported, only a whole"),
    ],
)
def test_a_decoder_checkpoint_that_does_not_fit_is_named_never_guessed(
    tmp_path, layout, edit, config, words
):
    with pytest.raises(ValueError, match=words):
        load_pretrained(copied(tmp_path, layout, edit, **config))


SLIDING = ["full_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    "config, fine",
    [
        ({"layer_types": ["full_attention"] * 3}, True),
        ({"layer_types": None}, True),
        ({"layer_types": SLIDING, "sliding_window": 11}, False),
        ({"layer_types": SLIDING, "sliding_window": None}, False),
        ({"layer_types": ["chunked_attention"] * 3, "sliding_window": "x"}, False),
    ],
)
def test_a_llama_with_layers_that_see_a_window_is_refused(tmp_path, config, fine):
    folder = copied(tmp_path, "llama-gqa", **config)
    if fine:
        want = load_pretrained(REFERENCE / "llama-gqa")(tokens())[0]
        assert torch.equal(load_pretrained(folder)(tokens())[0], want)
    else:
        with pytest.raises(ValueError, match="config.json: layer_types with a sliding window are"):
            load_pretrained(folder)


def test_a_decoders_foreign_head_is_left_out(tmp_path):
    """The value head that reinforcement learning leaves behind."""
    head = {"v_head.summary.weight": torch.ones(1, 16)}
    folder = copied(tmp_path, "llama-gqa", lambda t: t.update(head))
    assert "'v_head.summary.weight'" in load_pretrained(folder).notes[0]


@pytest.mark.parametrize("layout", ["gpt-bigcode-head", "llama-gqa"])
def test_a_tied_pair_may_be_stored_under_either_name(layout, tmp_path):
    """Some tools drop the embedding and keep its twin, the output matrix; null is no head_dim."""

    def rename(tensors):
        name = next(n for n in tensors if "wte" in n or "embed_tokens" in n)
        tensors["lm_head.weight"] = tensors.pop(name)

    folder = copied(tmp_path, layout, rename, head_dim=None)
    want = load_pretrained(REFERENCE / layout)(tokens())[0]
    assert torch.equal(load_pretrained(folder)(tokens())[0], want)


def test_a_missing_shard_and_an_index_that_leaves_its_folder_are_refused(tmp_path):
    folder = copied(tmp_path, "llama-mqa")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="names 'model-00002-of-00002.safetensors', which is not"):
        load_pretrained(folder)
    index = folder / "model.safetensors.index.json"
    whole = REFERENCE / "llama-mha" / "model.safetensors"
    (tmp_path.parent / "x.safetensors").write_bytes(whole.read_bytes())
    for place in ("../x.safetensors", str(whole), "1"):
        index.write_text(json.dumps({"weight_map": {"a": place}}))
        with pytest.raises(ValueError, match="json names .*, which is not beside it"):
            load_pretrained(folder)
    for weight_map in ([], None):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match="weight_map must name files"):
            load_pretrained(folder)


# ------------------------------------------------------------------------------------ the losses


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("alpha, kl", [(0.0, "reverse"), (0.9, "reverse"), (0.9, "forward")])
def test_losses_in_chunks_equal_the_whole_in_value_and_gradient(tied, full, alpha, kl):
    """(1-α) ℓ_task + α ℓ_KD over all next tokens at once, written out with shifted labels."""
    decoder = tiny_llama(tie_word_embeddings=tied)
    hp = dataclasses.replace(HP, alpha=alpha, kl=kl, temperature=2.0)
    decoder.add_stage(None if full else 2)
    randomise_adapters(decoder)
    phi, ids = random_phi(3, decoder.head_group), tokens(size=2, length=6)
    trained = [p for p in decoder.parameters() if p.requires_grad]
    s_1 = decoder.encode(ids, None, decoder.maxnet)[0].detach()
    z, z_1 = decoder(ids, phi=phi)[0][:, :-1], decoder(ids)[0][:, :-1].detach()
    task = F.cross_entropy(z.reshape(-1, 50), ids[:, 1:].reshape(-1))
    p, q = (z / 2).softmax(-1), (z_1 / 2).softmax(-1)
    p, q = (q, p) if kl == "forward" else (p, q)
    whole = (1 - alpha) * task + alpha * (p * (p / q).log()).sum(-1).mean()
    want = torch.autograd.grad(whole, trained, allow_unused=True)
    y = torch.full_like(ids, data.IGNORED)
    y[:, :-1] = ids[:, 1:]
    for logits in (50, 350, 10**6):  # one row, seven, all at a time
        s, _ = decoder.encode(ids, None, phi)
        batch = mlfs.Batch({}, y, int((y != data.IGNORED).sum()), y.numel())
        value = mlfs.output_loss(decoder, s, s_1, batch, alpha, hp, logits)
        got = torch.autograd.grad(3 * value, trained, allow_unused=True)
        assert torch.allclose(value, whole, atol=1e-5)
        for a, b in zip(want, got, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(3 * a, b, atol=1e-5)


def test_prop_2s_factor_is_not_rounded_to_bfloat16():
    """Chunks hand their gradient on times (n_1/n_j)^γ / K: a third of it is a third, not 0.334."""
    decoder = tiny_llama().bfloat16()
    s = torch.randn(3, 9, 16, dtype=torch.bfloat16, requires_grad=True)
    batch = mlfs.Batch({}, tokens(), 27, 27)
    value = mlfs.output_loss(decoder, s, s.detach(), batch, 0.0, HP)
    (whole,) = torch.autograd.grad(value, s, retain_graph=True)
    (third,) = torch.autograd.grad(value / 3, s)
    assert torch.equal(third, (whole.float() / 3).bfloat16())


def test_no_more_logits_than_allowed_are_made_at_a_time(monkeypatch):
    """KD over 49k words must not build (B, T, V) even once, and each logit is made once."""
    model, rows, logits = tiny_llama(), [], Llama.logits
    monkeypatch.setattr(
        Llama, "logits", lambda self, s: rows.append(s.numel() // 16) or logits(self, s)
    )
    ids = tokens()
    y = ids.clone()
    y[:, -1] = data.IGNORED
    model.add_stage(2)
    s, _ = model.encode(ids, None, model.maxnet)
    batch = mlfs.Batch({}, y, 27, 27)
    mlfs.output_loss(model, s, s.detach(), batch, 0.9, HP, max_logits=5 * 50).backward()
    assert max(rows) == 5 and sum(rows) == 2 * 24  # student and teacher, 3 x 8 next tokens


# --------------------------------------------------------------------------------- Python code


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("latin-1"))


def test_code_is_split_by_file_and_what_is_no_example_is_skipped_and_counted(tmp_path):
    for i in range(40):
        write(tmp_path / f"p{i % 3}" / f"f{i}.py", f"x{i} = {i}\n")
    write(tmp_path / "bad.py", "caf\xe9 = 1\n")  # Latin-1
    write(tmp_path / "__init__.py", "\n")
    write(tmp_path / "table.py", "t = [" + "1, " * 500 + "]\n")
    write(tmp_path / "pb2.py", "# Auto-generated by a tool. DO NOT EDIT\nx = 1\n")
    write(tmp_path / "site-packages" / "other.py", "x = 1\n")
    write(tmp_path / "notes.txt", "no code")
    splits = data.load_code(tmp_path)
    assert splits["train"].skipped == {"not UTF-8": 1, "empty": 1, "generated": 2}
    train, dev = (set(splits[name].texts) for name in ("train", "dev"))
    assert (len(train), len(dev)) == (38, 2) and not train & dev
    assert data.load_code(tmp_path)["dev"].texts == splits["dev"].texts  # one split for all seeds


def test_code_is_read_from_json_lines_plain_and_packed(tmp_path):
    lines = "".join(json.dumps({"content": f"y = {i}\n", "size": 6}) + "\n" for i in range(4))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.replace("y", "z").encode()))
    splits = data.load_code(tmp_path)
    texts = {text for rows in splits.values() for text, in rows.texts}
    assert texts == {f"{name} = {i}\n" for name in "yz" for i in range(4)}


CODE = b'{"content": "x = 1"}\n'


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", b'{"content": "x"}\n{"text": "y"}\n', "a.jsonl, line 2: .*no column 'content'"),
        ("a.jsonl", b'{"content": [3]}\n', "line 1: column"),
        ("a.jsonl", b"[1]\n", "line 1: this is no JSON object"),
        ("a.jsonl", b"\xff\n", "line 1: 'utf-8' codec"),
        ("a.jsonl.gz", gzip.compress(CODE * 99, mtime=0)[:-9], "Compressed file ended"),
        ("a.py", b"x = 1\n", "has 1 different texts; at least 2 are needed"),
    ],
)
def test_code_that_cannot_be_read_is_refused_in_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        data.load_code(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        data.load_code(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_tokenizer("<|endoftext|>")


def byte_tokenizer(*special: str) -> Tokenizer:
    """A token a byte, 256 of them, and the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


@pytest.mark.parametrize(
    "ends, named, want",
    [
        (None, None, [256]),
        (None, "</s>", [257]),
        (None, {"content": "<|eot_id|>", "lstrip": False}, [258]),
        (257, "<|eot_id|>", [257]),
        ([258, 257], "<|endoftext|>", [258, 257]),
        (50256, "</s>", [257]),  # GPT-2's, in a config.json that outlived its vocabulary
        (None, "<|none|>", [256]),
    ],
)
def test_the_end_of_text_is_what_the_checkpoint_says(tmp_path, ends, named, want):
    """config.json decides, then tokenizer_config.json, then the usual names; a list's first ends a
    file, and any of it ends a generated text.
    """
    byte_tokenizer("<|endoftext|>", "</s>", "<|eot_id|>").save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "config.json", json.dumps({"eos_token_id": ends}))
    write(tmp_path / "tokenizer_config.json", json.dumps({"eos_token": named}))
    tokenizer = data.load_tokenizer(tmp_path)
    assert data.end_of_text(tokenizer) == want
    (ids,) = data.encode(tokenizer, data.Rows([("a",)], None), 9).ids
    assert ids[1:].tolist() == want[:1]


@pytest.mark.parametrize("name", ["<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "<eos>"])
def test_the_usual_ends_of_text_need_no_settings(name):
    assert data.end_of_text(byte_tokenizer("<unk>", name)) == [257]


def test_windows_hold_every_token_and_labels_are_the_next_ones(tokenizer):
    """Files joined by the end-of-text token, cut into windows; the last may be shorter."""
    rows = data.Rows([("ab = 1",), ("c",), ("de",)], None)
    examples = data.encode(tokenizer, rows, 5)
    assert [len(ids) for ids in examples.ids] == [5, 5, 2]
    text = tokenizer.decode(np.concatenate(examples.ids).tolist(), skip_special_tokens=False)
    assert text == "ab = 1<|endoftext|>c<|endoftext|>de<|endoftext|>"
    ((x, y),) = data.batches(examples, 3)
    assert set(x) == {"ids", "mask"} and x["mask"].sum(1).tolist() == [2, 5, 5]
    assert y[0].tolist() == [256, *[data.IGNORED] * 4]
    assert y[1].tolist() == [*x["ids"][1, 1:].tolist(), data.IGNORED]
    with pytest.raises(ValueError, match="no end-of-text token"):
        data.end_of_text(Tokenizer(models.BPE()))


def test_held_out_and_train_are_disjoint_and_as_many_as_asked_for():
    examples = data.Examples([np.array([i]) for i in range(1000)], None, None)
    for most, sizes in ((0, (950, 50)), (190, (190, 10)), (5000, (950, 50))):
        train, held_out = data.hold_out(examples, 1, most)
        assert (len(train.ids), len(held_out.ids)) == sizes
        assert not {int(i[0]) for i in train.ids} & {int(i[0]) for i in held_out.ids}
    many = data.Examples([np.array([0])] * 30_000, None, None)
    for most, sizes in ((0, (29_488, 512)), (20_000, (20_000, 512))):  # no more than 512 held out
        assert tuple(len(part.ids) for part in data.hold_out(many, 1, most)) == sizes


# ------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def run(tmp_path, tokenizer, monkeypatch):
    """The function `python_task` in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return python_task(tokenizer)


def python_task(tokenizer):
    """`mlfs.py --task python` here, on a tiny Llama and 20 tiny files; returns the run folder."""
    model, rng = tiny_llama(vocab_size=257, num_hidden_layers=2), np.random.default_rng(0)
    for p in model.parameters():
        p.data *= 0.3
    save_pretrained(model, "tiny")
    tokenizer.save("tiny/tokenizer.json")
    for i in range(20):
        words = rng.choice(["for i in range(3):\n", "    print(i)\n", "x = 1\n"], 4)
        write(Path("code", f"{i}.py"), "".join(words))

    def command(*options: str) -> Path:
        fixed = ["--task", "python", "--model", "tiny", "--data-dir", "code", "--widths", "1,1/2"]
        fixed += ["--depths", "1,1/2", "--max-length", "16", "--rank", "2", "--dtype", "float32"]
        assert mlfs.main([*fixed, "--batch-size", "8", *options]) == 0
        return Path("runs", "python-tiny").resolve()

    return command


@pytest.mark.parametrize(
    "options", [[], ["--adapters", "full", "--init", "random"]]
)
def test_a_decoders_palette_learns_and_is_read_back(run, options, capsys):
    """Every subnet's validation loss falls; what is stored gives the same palette again."""
    folder = run("--epochs", "1,1,1", "--validate-every", "2", "--learning-rate", "3e-2", *options)
    rows = json.loads((folder / "palette.json").read_text())["subnets"]
    for row in rows:
        assert row["history"]["stage 2"] < row["history"]["sliced teacher"]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    curves = [line["validation"] for line in log if "validation" in line]
    assert len(curves) > 10 and all(set(c) == {row["name"] for row in rows} for c in curves)
    assert curves[-1]["w1-d2"] < curves[0]["w1-d2"]
    before = capsys.readouterr().out
    assert "nats per token, lower is better" in before
    full = 3 if options else 0  # stages that train all of W
    assert before.count("weights, 100.0% of the model") == full
    assert evaluate.main([str(folder)]) == 0
    again = capsys.readouterr().out
    for row in rows:
        assert f"{row['score']:.3f}" in again


def test_a_decoder_is_chosen_exported_and_completes_a_text(run, capsys):
    """The lowest loss within the budget; the exported slice and --predict write the same text."""
    folder = run("--epochs", "1,1,1", "--learning-rate", "1e-2")
    capsys.readouterr()
    assert evaluate.main([str(folder), "--max-params", "1e9", "--max-latency-ms", "1e9"]) == 0
    rows = evaluate.read_palette(folder)["subnets"]
    best = evaluate.choose(rows, {}, "loss")[0]
    lowest = min(rows, key=lambda row: row["score"])
    assert best["score"] <= lowest["score"] + lowest["stderr"]
    out = capsys.readouterr().out
    assert "Within 1,000,000,000 parameters, 1,000,000,000 ms, best first:" in out
    assert f"\n{best['name']} ({best['score']:.3f} ± " in out and " ms\n" in out
    assert evaluate.main([str(folder), "--export", "w0.5-d1", "out"]) == 0
    assert "The transformers library can load it." in capsys.readouterr().out
    small, tokenizer = load_pretrained("out"), data.load_tokenizer("out")
    text = "for i in"
    command = [str(folder), "--subnet", "w0.5-d1", "--max-new-tokens", "5", "--predict", text]
    assert evaluate.main(command) == 0
    said = capsys.readouterr().out
    assert said == text + evaluate.generate(small, tokenizer, [text], 5)[0] + "\n"
    assert len(said) > len(text) + 1


def test_a_random_start_knows_nothing_and_is_read_back(run, capsys):
    """Figs. 5 and 6: the checkpoint's weights are not used; adapters sit on the same draw."""
    folder = run("--init", "random", "--epochs", "1,0,0", "--validate-every", "100")
    first = json.loads((folder / "log.jsonl").read_text().splitlines()[0])["validation"]["w1-d2"]
    assert first == pytest.approx(np.log(257), abs=0.02)
    rows = json.loads((folder / "palette.json").read_text())["subnets"]
    capsys.readouterr()
    assert evaluate.main([str(folder)]) == 0
    again = capsys.readouterr().out
    assert all(f"{row['score']:.3f}" in again for row in rows)


@pytest.fixture(scope="module", params=["low-rank", "full"])
def killed(request, tokenizer, tmp_path_factory):
    """A command, the folder of its run, and beside it what a kill as stage S began left: "S"."""
    place, algorithm = tmp_path_factory.mktemp("killed"), mlfs.mlfs

    def copying(*args):
        for at in algorithm(*args):
            yield at
            if isinstance(at, mlfs.StageBegins):
                shutil.copytree(place / "runs" / "python-tiny", place / "runs" / str(at.stage))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run = python_task(tokenizer)
        options = ["--epochs", "1,1,1", "--adapters", request.param, "--train-examples", "24"]
        with patch.context() as copies:
            copies.setattr(mlfs, "mlfs", copying)
            folder = run(*options)
        yield lambda *more: run(*options, *more), folder


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_resumed_decoder_run_ends_with_the_same_bits(killed, stage):
    run, folder = killed
    whole = load_file(folder / "adapters.safetensors")
    folder = folder.parent / str(stage)
    run("--resume", "--out", str(folder))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    places = [(line["stage"], line["step"]) for line in log if "validation" in line]
    assert len(places) == len(set(places)) and len(places) >= 3  # none is measured twice
    again = load_file(folder / "adapters.safetensors")
    assert set(whole) == set(again) and all(torch.equal(whole[n], again[n]) for n in whole)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--task", "sst2", "--model", "tiny"], "this task needs an encoder; tiny is a Llama"),
        (["--task", "python", "--model", "bert"], "this task needs a decoder; bert is a Bert"),
        (
            ["--task", "python", "--model", "tiny", "--subnets", "santacoder"],
            "santacoder is not for this model",
        ),
        (
            ["--task", "python", "--model", "tiny", "--adapters", "full", "--dtype", "bfloat16"],
            "dtype must be auto or float32 with --adapters full",
        ),
        (
            ["--task", "python", "--model", "tiny", "--adapters", "full", "--teacher", "fixed"],
            "teacher must be maxnet with --adapters full, not fixed",
        ),
    ],
)
def test_a_model_that_cannot_do_the_task_is_refused(
    tmp_path, tokenizer, monkeypatch, options, words
):
    monkeypatch.chdir(tmp_path)
    save_pretrained(tiny_llama(vocab_size=257), "tiny")
    tokenizer.save("tiny/tokenizer.json")
    save_pretrained(tiny_bert(), "bert")
    write(tmp_path / "SST-2" / "train.tsv", "sentence\tlabel\na\t1\n")
    write(tmp_path / "SST-2" / "dev.tsv", "sentence\tlabel\na\t1\n")
    with pytest.raises(ValueError, match=words):
        mlfs.main([*options, "--data-dir", "."])
    assert not (tmp_path / "runs").exists()


# -------------------------------------------------------------------- generation and HumanEval


def by_one_pass(model, tokenizer, prompt: str, steps: int) -> str:
    """Greedy decoding without a cache, alone."""
    ids = tokenizer.encode(prompt).ids
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return tokenizer.decode(ids[len(tokenizer.encode(prompt).ids) :])


@pytest.mark.parametrize("family", [tiny_gpt, tiny_llama])
def test_greedy_text_in_a_batch_is_that_of_each_prompt_alone(family, tokenizer):
    model, prompts = family(vocab_size=257), ["x", "def f(a):", "for"]
    want = [by_one_pass(model, tokenizer, prompt, 8) for prompt in prompts]
    assert evaluate.generate(model, tokenizer, prompts, 8) == want
    assert evaluate.generate(model, tokenizer, prompts, 8, temperature=1.0, top_p=1e-9) == want
    phi = random_phi(2, model.head_group)
    alone = evaluate.generate(model.extract(phi), tokenizer, prompts, 8)
    assert evaluate.generate(model, tokenizer, prompts, 8, phi=phi) == alone


def test_drawn_text_depends_on_its_own_seed_alone(tokenizer):
    model, prompts = tiny_gpt(vocab_size=257), ["x = ", "def f"]

    def draw(prompts, seeds) -> list[str]:
        return evaluate.generate(
            model, tokenizer, prompts, 8, temperature=1.0, top_p=0.9, seeds=seeds
        )

    one, two = draw(prompts, [3, 4])
    assert draw(prompts[1:], [4]) == [two] and draw(prompts[:1], [5]) != [one]


def test_only_the_likeliest_tokens_that_hold_top_p_are_drawn():
    z = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, kept in (
        (0.4, {0}),
        (0.5, {0}),
        (0.7, {0, 1}),
        (0.9, {0, 1, 2}),
        (1.0, {0, 1, 2, 3}),
    ):
        draw = torch.Generator().manual_seed(0)
        seen = [int(evaluate.sample(z, top_p, [draw])) for _ in range(300)]
        assert set(seen) == kept
    assert abs(seen.count(0) / 300 - 0.5) < 0.1


def test_text_ends_at_a_stop_string_at_the_end_of_text_or_with_the_positions(
    tokenizer, monkeypatch
):
    model = tiny_gpt(vocab_size=257)

    def say(text: str) -> None:
        ids = iter(tokenizer.encode(text).ids)
        monkeypatch.setattr(
            GPT, "logits", lambda self, s: F.one_hot(torch.tensor([next(ids)]), 257).float()
        )

    for reply, want in (("ab\ndef c", "ab"), ("xy<|endoftext|>zz", "xy"), ("q\nclass", "q\nclass")):
        say(reply)
        assert evaluate.generate(model, tokenizer, ["p"], len(reply), stop=("\ndef",))[0] in (want,)
    monkeypatch.undo()
    assert len(tokenizer.encode(evaluate.generate(model, tokenizer, ["x" * 30], 99)[0]).ids) <= 6
    with pytest.raises(ValueError, match="32 tokens leaves no room"):
        evaluate.generate(model, tokenizer, ["x" * 32])


def test_generation_stops_at_any_end_of_text_and_refuses_ids_without_a_row(tmp_path, monkeypatch):
    byte_tokenizer("<|endoftext|>", "</s>", "<|eot_id|>").save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "config.json", json.dumps({"eos_token_id": [257, 258]}))
    tokenizer, model = data.load_tokenizer(tmp_path, 257), tiny_gpt(vocab_size=259)
    for end, want in (("</s>", "ab"), ("<|eot_id|>", "ab"), ("<|endoftext|>", "abcd")):
        ids = iter(tokenizer.encode(f"ab{end}cd").ids)
        monkeypatch.setattr(
            GPT, "logits", lambda self, s: F.one_hot(torch.tensor([next(ids)]), 259).float()
        )
        assert evaluate.generate(model, tokenizer, ["p"], 5) == [want]
    with pytest.raises(ValueError, match="token '</s>', id 257; the embedding has 257"):
        evaluate.generate(model, tokenizer, ["p</s>"], 5)


def test_a_completion_keeps_the_space_that_it_begins_with(monkeypatch):
    """Llama's decoder strips a text's first space: after a prompt that is an indentation."""
    words = {"</s>": 0, "\u2581": 1, "p": 2, "return": 3}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    ids, model = iter([1, 1, 3, 0]), tiny_llama(vocab_size=4)

    def one_hot(self, s) -> torch.Tensor:
        return F.one_hot(torch.tensor([next(ids)]), 4).float()

    monkeypatch.setattr(Llama, "logits", one_hot)
    assert evaluate.generate(model, tokenizer, ["p"], 9) == ["  return"]


@pytest.mark.parametrize("n, c, k", list(itertools.product([1, 3, 5], [0, 1, 3], [1, 2, 3])))
def test_pass_at_k_is_the_share_of_draws_with_a_pass(n, c, k):
    """Chen et al.'s estimator, against all draws of k among n samples."""
    if c <= n and k <= n:
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert evaluate.estimate_pass_at_k(n, c, k) == pytest.approx(
            sum(map(any, draws)) / len(draws)
        )


PROBLEMS = [
    {
        "task_id": f"T/{i}",
        "prompt": f"def f{i}(x):\n",
        "entry_point": f"f{i}",
        "test": f"def check(f):\n    assert f(1) == {i}\n",
    }
    for i in range(3)
]


def test_only_the_samples_asked_for_count():
    rows = [{"task_id": "a", "sample": n, "passed": n > 0} for n in range(3)]
    assert evaluate.pass_at_k(rows, ["a"], 1)["pass@1"] == 0
    assert evaluate.pass_at_k(rows, ["a"], 2)["pass@1"] == 0.5


def test_humaneval_judges_resumes_and_refuses_other_settings(tmp_path, monkeypatch):
    """Completions that are judged already are not made again."""
    asked = []

    def fake(model, tokenizer, prompts, seeds, **settings):
        asked.extend(prompts)
        return [f"    return {1 if seed < 3 else 2}\n" for seed in seeds]

    monkeypatch.setattr(evaluate, "generate", fake)
    path, settings = tmp_path / "out.jsonl", {"temperature": 0.5}
    assert evaluate.humaneval(None, None, PROBLEMS, path, {"dtype": "float32"}, **settings)[
        "pass@1"
    ] == pytest.approx(1 / 3)
    assert asked == [f"def f{i}(x):" for i in range(3)]  # a line break would end a token
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:9])  # killed while it wrote the third
    found = evaluate.humaneval(
        None, None, PROBLEMS, path, {"dtype": "float32"}, samples=2, batch_size=2, **settings
    )
    assert len(asked) == 3 + 1 + 3 and found["pass@1"] == pytest.approx((0.5 + 0.5) / 3)
    assert found["stderr"] == pytest.approx(np.std([0, 0.5, 0.5]) / 3**0.5)
    assert {json.loads(line)["passed"] for line in path.read_text().splitlines()} == {True, False}
    for dtype, temperature, odd in (("bfloat16", 0.5, "dtype"), ("float32", 0.0, "temperature")):
        with pytest.raises(ValueError, match=f"made with another {odd}; move it away"):
            evaluate.humaneval(
                None, None, PROBLEMS, path, {"dtype": dtype}, temperature=temperature
            )


def test_no_generated_code_runs_without_leave(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "check_correctness", lambda *a: pytest.fail("it ran"))
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PROBLEMS))
    with pytest.raises(ValueError, match="nothing was run: add --allow-code-execution"):
        evaluate.main(["runs/python-tiny", "--humaneval", "problems.jsonl"])
    folder = run("--epochs", "1,0,0")
    allowed = [str(folder), "--humaneval", "problems.jsonl", "--allow-code-execution"]
    with pytest.raises(ValueError, match="there is no subnet 'w9', only w1-d2,"):
        evaluate.main([*allowed, "--subnets", "w9"])
    with pytest.raises(ValueError, match="greedy text is always the same"):
        evaluate.main([*allowed, "--samples", "2"])
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match="none.jsonl has no problems"):
        evaluate.main([str(folder), "--humaneval", "none.jsonl", "--allow-code-execution"])
    (tmp_path / "odd.jsonl").write_text('{"task_id": 1}\n')
    with pytest.raises(ValueError, match="odd.jsonl, line 1: there is no 'task_id', or it is"):
        evaluate.main([str(folder), "--humaneval", "odd.jsonl", "--allow-code-execution"])
    monkeypatch.setattr(evaluate, "check_sandbox", lambda problems: None)
    monkeypatch.setattr(
        evaluate, "check_correctness", lambda *a: {"passed": True, "result": "passed"}
    )
    assert evaluate.main([*allowed, "--subnets", "w0.5-d1", "--max-new-tokens", "4"]) == 0
    assert "w0.5-d1: pass@1 100.0, stderr 0.0; 3 problems" in capsys.readouterr().out
    assert len((folder / "humaneval-w0.5-d1.jsonl").read_text().splitlines()) == 3


def test_odd_problem_files_are_judged_or_told(run, tmp_path, monkeypatch, capsys):
    """Blank lines are no problems, a long prompt is one that fails, and no task is there twice."""
    folder = run("--epochs", "1,0,0")
    monkeypatch.setattr(evaluate, "check_sandbox", lambda problems: None)
    results = iter(["passed", "failed: PicklingError"])
    monkeypatch.setattr(
        evaluate, "check_correctness", lambda *a: {"passed": True, "result": next(results)}
    )
    long = PROBLEMS[2] | {"prompt": "x = 1\n" * 99}
    lines = [json.dumps(problem) for problem in (*PROBLEMS[:2], long)]
    path = tmp_path / "problems.jsonl"
    path.write_text("\n" + "\n  \n".join(lines) + "\n\n")
    options = [str(folder), "--humaneval", str(path), "--allow-code-execution"]
    options += ["--subnets", "w0.5-d1", "--max-new-tokens", "4"]
    assert evaluate.main(options) == 0
    out = capsys.readouterr().out
    assert "pass@1 66.7" in out
    assert "not judged: 1 values of other kinds, 1 long prompts" in out
    path.write_text("\n\n" + lines[0] + "\n\n{}\n")
    with pytest.raises(ValueError, match="problems.jsonl, line 5: there is no 'task_id'"):
        evaluate.main(options)
    path.write_text("\n".join(lines[:1] * 2))
    with pytest.raises(ValueError, match="two problems have the task_id 'T/0'"):
        evaluate.main(options)


def test_nothing_is_stored_where_programs_cannot_be_judged(tmp_path, monkeypatch):
    """A sandbox that does not work is told before a text is generated."""
    monkeypatch.setattr(evaluate, "generate", lambda *a, **b: pytest.fail("it generated"))
    monkeypatch.setattr(evaluate, "check_correctness", lambda *a: {"result": "failed: EOFError"})
    with pytest.raises(ValueError, match="cannot be judged here.*'failed: EOFError'"):
        evaluate.humaneval(None, None, PROBLEMS, tmp_path / "out.jsonl", {})
    assert not list(tmp_path.iterdir())
