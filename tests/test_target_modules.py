"""--target-modules: where A_s, B_s sit is an option; what holds of App. A's places holds of all."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import mlfs
from conftest import (
    FAMILIES,
    RUN_OPTIONS,
    batch,
    load_small_toy,
    random_phi,
    randomise_adapters,
    tiny_bert,
)
from model import SuperTransformer, load_trained_state
from test_mlfs import HP, examples

LINEARS = {"bert": 6, "gpt": 6, "llama": 7}
PLACES = [(family, everywhere) for family in FAMILIES for everywhere in (False, True)]


def adapted(family: str, everywhere: bool, stages: int = 0, depth: int = 4):
    model = FAMILIES[family](num_hidden_layers=depth)
    if everywhere:
        model.adapted = model.linears
    for _ in range(stages):
        model.add_stage(2)
    return randomise_adapters(model)


def inputs(family: str) -> dict:
    x = batch()
    return x if family == "bert" else {"ids": x["ids"], "mask": None}


def any_importance(model) -> dict:
    draw = torch.Generator().manual_seed(1)
    sizes = {"heads": model.maxnet.num_attention_heads, "neurons": model.maxnet.intermediate_size}
    return {
        f"{l}.{kind}": torch.rand(n, generator=draw)
        for l in model.maxnet.layers
        for kind, n in sizes.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_map_of_a_layer_gets_a_pair(family):
    """Two-dimensional weights of a layer, and no norm: each one's merged matrix differs from it."""
    model = adapted(family, True, stages=1)
    for layer in model.layers:
        matrices = [
            name for name, p in layer.named_parameters() if name.endswith("weight") and p.dim() == 2
        ]
        assert len(matrices) == LINEARS[family]
        for name in matrices:
            linear = layer.get_submodule(name.removesuffix(".weight"))
            assert not torch.equal(linear.merged(), linear.weight)


@pytest.mark.parametrize("family, everywhere", PLACES)
@pytest.mark.parametrize("seed", range(4))
def test_a_slice_is_what_extract_returns_also_after_the_permutation(family, everywhere, seed):
    """And the permutation keeps the maxnet: a matrix's adapters move with its rows and columns."""
    model, x = adapted(family, everywhere, stages=2), inputs(family)
    before = model(**x)[0]
    model.reorder(any_importance(model))
    assert torch.allclose(model(**x)[0], before, atol=1e-4)
    phi = random_phi(seed, model.head_group)
    assert torch.allclose(model(**x, phi=phi)[0], model.extract(phi)(**x)[0], atol=1e-4)


@pytest.mark.parametrize("family, everywhere", PLACES)
def test_n_j_counts_the_entries_that_get_a_gradient(family, everywhere):
    """Alg. 1 line 9, whatever is adapted."""
    model = adapted(family, everywhere, stages=1)
    for phi in mlfs.configuration_space(model.maxnet, (1, 0.5), head_group=model.head_group):
        model.zero_grad()
        model(**inputs(family), phi=phi)[0].square().sum().backward()
        touched = sum(
            int((p.grad != 0).sum())
            for name, p in model.named_parameters()
            if name.endswith((".A.0", ".B.0")) and p.grad is not None
        )
        assert model.num_trainable(phi) == touched


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_stored_tells_where_it_sits(family):
    """A new model takes it as it is, logits and all."""
    model = adapted(family, True, stages=3)
    model.reorder(any_importance(model))
    again = FAMILIES[family]()
    load_trained_state(again, model.trained_state())
    assert again.adapted == again.linears and again.num_stages == 3
    assert torch.equal(again(**inputs(family))[0], model(**inputs(family))[0])


def test_importance_is_the_derivative_by_a_gate_of_merged_matrices():
    """Of attention's and the FFN's output W + (A_0 B_0)ᵀ, by finite differences on a copy that has
    them merged."""
    model, data_ = adapted("bert", True, stages=1), examples(16)
    scores = mlfs.importance(model, data_, dataclasses.replace(HP, batch_size=16))
    ((x, y),) = data.batches(data_, 32)
    for key, name, columns, index in (
        ("1.heads", "attention_output", slice(8, 12), 2),
        ("2.neurons", "output", slice(5, 6), 5),
    ):
        losses = []
        for gate in (1 + 1e-2, 1 - 1e-2):
            merged = model.extract(model.maxnet)
            getattr(merged.layers[int(key[0])], name).weight.data[:, columns] *= gate
            losses.append(F.cross_entropy(merged(**x)[0].double(), y).item())
        slope = abs(losses[0] - losses[1]) / 2e-2
        assert scores[key][index].item() == pytest.approx(slope, rel=0.05, abs=1e-4)


def learn(model, hp, state=None):
    return mlfs.mlfs(model, examples(), mlfs.configuration_space(model.maxnet), hp, state)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("epochs", [(1, 0, 1), (0, 1, 1), (0, 0, 1)])
def test_a_stage_without_epochs_adds_no_pair_and_takes_no_step(family, epochs, monkeypatch):
    """As many pairs as stages that train; a fixed teacher has stage 0's alone, if there is one."""
    teachers, fix = [], SuperTransformer.fix_teacher
    monkeypatch.setattr(
        SuperTransformer, "fix_teacher", lambda *args: teachers.append(fix(*args)) or teachers[-1]
    )
    model = adapted(family, True, depth=2)
    base = model.extract(model.maxnet)
    rows = examples() if family == "bert" else data.Examples(examples().ids, None, None)
    hp = dataclasses.replace(HP, epochs=epochs, teacher="fixed", batch_size=8)
    space = mlfs.configuration_space(model.maxnet, (1, 0.5), head_group=model.head_group)
    steps = dict.fromkeys(range(3), 0)
    for at in mlfs.mlfs(model, rows, space, hp):
        steps[at.stage] += isinstance(at, mlfs.Updated)
    assert [steps[stage] > 0 for stage in range(3)] == [epoch > 0 for epoch in epochs]
    pairs = sum(epoch > 0 for epoch in epochs)
    for linear in model.adapted_linears():
        assert len(linear.A) == len(linear.B) == pairs and all(B_s.any() for B_s in linear.B)
    for teacher in teachers:
        assert {len(linear.A) for linear in teacher.adapted_linears()} == {epochs[0]}
    assert len(teachers) == 2
    if not epochs[0] and family == "llama":  # which has no head that is trained
        x = inputs(family)
        assert torch.allclose(teachers[-1](**x)[0], base(**x)[0], atol=1e-4)


@pytest.mark.parametrize("stop", [(0, 2), (2, 1), (2, 4)])
def test_a_run_resumed_after_a_stage_without_epochs_ends_with_the_same_bits(tmp_path, stop):
    """Nothing but the state tells that stage 1 is over: of pairs there are two."""
    hp = dataclasses.replace(HP, epochs=(1, 0, 2), teacher="fixed", reorder=True)
    whole, stopped, again = (adapted("bert", True, depth=2) for _ in range(3))
    for _ in learn(whole, hp):
        pass
    state = mlfs.State()
    for at in learn(stopped, hp, state):
        if isinstance(at, mlfs.Updated) and (at.stage, at.step) == stop:
            break
    evaluate.save_state(tmp_path, stopped, state)
    state = mlfs.State(**evaluate.load_state(tmp_path, again))
    for _ in learn(again, hp, state):
        pass
    assert all(
        torch.equal(t, again.trained_state()[name]) for name, t in whole.trained_state().items()
    )


def test_the_command_line_trains_measures_and_exports_it(tmp_path, monkeypatch, capsys):
    """The scores that training saw are those of the stored run; no pair of stage 1 is stored."""
    monkeypatch.setattr(data, "load_toy", load_small_toy)
    folder = tmp_path / "run"
    options = [*RUN_OPTIONS, "--epochs", "1,0,1", "--target-modules", "all-linear"]
    assert mlfs.main(["--out", str(folder), *options, "--teacher", "fixed"]) == 0
    said = capsys.readouterr().out
    assert "Stage 2" in said and "Stage 1" not in said and "stage 1" not in said
    tensors, _ = evaluate.read_tensors(folder / "adapters.safetensors")
    assert "layers.3.output.B.1" in tensors and "layers.3.output.B.2" not in tensors
    before = [row["score"] for row in evaluate.read_palette(folder)["subnets"]]
    export = ["--export", "w0.5-d2", str(tmp_path / "small")]
    assert evaluate.main([str(folder)]) == evaluate.main([str(folder), *export]) == 0
    after = [row["score"] for row in evaluate.read_palette(folder)["subnets"]]
    assert after == before and not any(map(math.isnan, after))


def test_a_decoder_of_which_no_stage_trains_anything_is_left_as_it_was():
    """Not even AdamW is made: it refuses to optimise nothing."""
    model = FAMILIES["gpt"]()
    before = {name: p.clone() for name, p in model.named_parameters()}
    rows = data.Examples(examples().ids, None, None)
    hp = dataclasses.replace(HP, epochs=(0, 0, 0), reorder=False)
    events = list(mlfs.mlfs(model, rows, mlfs.configuration_space(model.maxnet), hp))
    assert [at.stage for at in events] == [0, 1, 2] and not model.trained_state()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_app_as_places_are_the_default():
    """Query, key, value, the FFN's first projection; of Llama's FFN both."""
    assert mlfs.HyperParameters().target_modules == "app-a"
    assert len(tiny_bert().adapted) == len(FAMILIES["gpt"]().adapted) == 4
    assert "gate" in FAMILIES["llama"]().adapted and "output" not in FAMILIES["llama"]().adapted
