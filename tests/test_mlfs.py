"""The algorithm: the configuration space, the losses, Eq. 6 and Alg. 1, each against
torch.distributions, autograd or sums by hand.
"""

import copy
import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import data
import evaluate
import mlfs as m
from conftest import LOAD_TOY, batch, randomise_adapters, tiny_bert, tiny_llama
from mlfs import (
    HyperParameters,
    configuration_space,
    fd_loss,
    feature_projections,
    gradient_scale,
    kd_loss,
    sample_sub_transformers,
)

HP = HyperParameters(
    rank=2,
    epochs=(1, 1, 1),
    batch_size=8,
    learning_rate=1e-2,
    d_low=4,
    dtype="float32",
    reorder=False,
)


def examples(n: int = 24, seed: int = 0) -> data.Examples:
    """Random token sequences of unequal length, three classes."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(50, size=rng.integers(3, 10)).astype(np.int32) for _ in range(n)]
    return data.Examples(ids, [np.zeros(len(x), np.int8) for x in ids], rng.integers(3, size=n))


# --------------------------------------------------------------------------------------- 𝒜 and 𝒜_s


def test_the_space_starts_with_the_maxnet_and_ends_with_the_minnet(tiny):
    """Sec. 4: Φ_1 is the teacher's own configuration; widths x depths (x hidden sizes) follow."""
    space = configuration_space(tiny.maxnet, hidden=(1, 0.5))
    assert space[0] == tiny.maxnet and len(space) == 18 == len(set(space))
    assert (
        space[-1].hidden_size,
        space[-1].num_attention_heads,
        space[-1].intermediate_size,
        space[-1].layers,
    ) == (8, 2, 12, (0, 3))
    assert [phi.name for phi in configuration_space(tiny.maxnet)] == [
        f"w{w}-d{d}" for w in ("1", "0.75", "0.5") for d in (4, 3, 2)
    ]
    assert all(set(space[-1].layers) <= set(phi.layers) for phi in space)


@pytest.mark.parametrize(
    "share",
    [
        dict(widths=[0.3]),
        dict(widths=[0]),
        dict(depths=[0.1]),
        dict(depths=[1.5]),
        dict(hidden=[-1]),
        dict(hidden=[math.nan]),
    ],
)
def test_a_share_that_the_model_cannot_take_is_refused(tiny, share):
    with pytest.raises(ValueError, match=", not a whole number from 1 to"):
        configuration_space(tiny.maxnet, **share)


def test_two_subnets_cannot_have_one_name():
    """Losses and scores go by name: of w0.5 with 1,500 neurons and w0.5 with 1,501 one was lost."""
    maxnet = tiny_bert(intermediate_size=3000).maxnet
    with pytest.raises(ValueError, match="two subnets would be called w0.5-d4"):
        configuration_space(maxnet, widths=[0.5, 0.5004])


@pytest.mark.parametrize(
    "model, widths",
    [
        (tiny_bert(num_attention_heads=2, head_dim=8), ["1", "0.5"]),
        (tiny_bert(num_attention_heads=3, head_dim=5), ["1"]),
        (tiny_llama(num_attention_heads=15, head_dim=1, num_key_value_heads=5), ["1"]),
        (tiny_llama(), ["1", "0.5"]),
        (tiny_bert(), ["1", "0.75", "0.5"]),
    ],
)
def test_the_default_palette_takes_the_shares_that_exist(model, widths):
    """Of 2 heads there is no 0.75, of 15 heads in 5 groups neither; asked for, that is an error."""
    hp = m.fit_settings(HP, {}, model)
    names = [phi.name for phi in m.choose_space(hp, {}, model)]
    assert names == [f"w{w}-d{d}" for w in widths for d in (4, 3, 2)]
    given = {"widths": (1.0, 0.3)}
    hp = m.fit_settings(dataclasses.replace(HP, **given), given, model)
    with pytest.raises(ValueError, match="0.3 of . .*heads is .*, not a whole number"):
        m.choose_space(hp, given, model)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_phi_1_is_always_the_maxnet_and_stage_1_keeps_the_depth(tiny, stage):
    """Sec. 5: stage 0 trains the teacher alone, stage 1 varies widths at full depth, stage 2 widths
    and depths.
    """
    space = configuration_space(tiny.maxnet)
    drawn = [sample_sub_transformers(space, stage, 4, (0, stage, step)) for step in range(50)]
    assert all(subnets[0] == tiny.maxnet and len(set(subnets)) == len(subnets) for subnets in drawn)
    if stage == 0:
        assert all(subnets == [tiny.maxnet] for subnets in drawn)
    if stage == 1:
        assert all(len(phi.layers) == 4 for subnets in drawn for phi in subnets)
        assert {len(subnets) for subnets in drawn} == {3}
    if stage == 2:
        assert all(
            len(subnets) == 4 and subnets[1] == space[-1] for subnets in drawn
        )  # the sandwich: maxnet, minnet, two more
        assert {phi for subnets in drawn for phi in subnets} == set(space)  # each is drawn at times
    assert drawn[7] == sample_sub_transformers(
        space, stage, 4, (0, stage, 7)
    )  # the draw depends on the seed alone


# ------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("kl", ["reverse", "forward"])
@pytest.mark.parametrize("t", [1.0, 2.5])
def test_kd_is_the_kl_divergence_in_the_order_chosen(kl, t):
    """ℓ_KD[z_j, z_1] = KL[σ(z_j/t), σ(z_1/t)]: student first as printed, teacher first with --kl
    forward.
    """
    torch.manual_seed(0)
    z_j, z_1 = torch.randn(5, 3), torch.randn(5, 3)
    student, teacher = (torch.distributions.Categorical(logits=z / t) for z in (z_j, z_1))
    pair = (student, teacher) if kl == "reverse" else (teacher, student)
    expected = torch.distributions.kl_divergence(*pair)
    assert torch.allclose(kd_loss(z_j, z_1, t, kl), expected, atol=1e-6)


def test_kd_of_two_classes_by_hand():
    """p = (3/4, 1/4), q = (1/2, 1/2): KL[p, q] = 3/4 ln 3/2 + 1/4 ln 1/2."""
    z_j, z_1 = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert kd_loss(z_j, z_1).item() == pytest.approx(
        0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6
    )
    assert kd_loss(z_j, z_1, kl="forward").item() == pytest.approx(
        0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-6
    )


def test_kd_of_a_regression_is_the_squared_error():
    """One output has no distribution (our decision for STS-B)."""
    z_j, z_1 = torch.tensor([[3.0], [1.0]]), torch.tensor([[1.0], [1.0]])
    assert kd_loss(z_j, z_1).tolist() == [4.0, 0.0]


def test_eq11_fd_projects_with_the_leading_columns_of_the_maxnets_U():
    """U_j^l = [U_1^{g_j(l)}]_Φ: a subnet of hidden size 2 uses two columns, at the minnet's layers
    only, padding left out.
    """
    U = {
        1: torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    }  # d_low = 2, d_1 = 3, g_min = {layer 1}
    h_1 = {0: torch.full((1, 2, 3), 9.0), 1: torch.tensor([[[1.0, 1.0, 1.0], [5.0, 5.0, 5.0]]])}
    h_j = {1: torch.tensor([[[1.0, 3.0], [7.0, 7.0]]])}
    mask = torch.tensor([[1, 0]])
    # token 0: U_j h_j = (1, 3), U_1 h_1 = (1 + 2, 1) -> squared distance 4 + 4 = 8
    # token 1: (7, 7) against (15, 5) -> 64 + 4 = 68
    loss = fd_loss(h_j, h_1, U, 0.1, fd_sum=True)
    assert loss.tolist() == [pytest.approx([0.8, 6.8])]
    assert torch.allclose(fd_loss(h_j, h_1, U, 0.1), loss / 2)  # mean over d_low: ours
    batch_of = lambda mask, tokens: m.Batch({"mask": mask}, torch.zeros(1), 1, tokens)
    assert batch_of(mask, 1).token_mean(loss).item() == pytest.approx(0.8)
    assert batch_of(None, 2).token_mean(loss).item() == pytest.approx((0.8 + 6.8) / 2)


def test_U_has_orthonormal_rows_one_for_each_layer_of_the_minnet(tiny):
    minnet = configuration_space(tiny.maxnet)[-1]
    U = feature_projections(minnet.layers, 4, 16, seed=0)
    assert set(U) == set(minnet.layers) and all(
        torch.allclose(u @ u.T, torch.eye(4), atol=1e-5) for u in U.values()
    )
    assert feature_projections((0,), 64, 16, seed=0)[0].shape == (
        16,
        16,
    )  # d_low cannot exceed the hidden size


def test_learning_U_freely_collapses_and_ours_does_not():
    """Sec. 5 says that U is learned. Applied to both sides its optimum is U = 0, whatever the
    features; with orthonormal rows not.
    """
    torch.manual_seed(0)
    h_j, h_1 = {0: torch.randn(2, 5, 8)}, {0: torch.randn(2, 5, 8)}
    losses, norms = {}, {}
    for keep in (False, True):
        U = {0: feature_projections((0,), 4, 8, 0)[0].requires_grad_(True)}
        optimizer = torch.optim.Adam(list(U.values()), lr=0.02)
        for _ in range(300):
            loss = fd_loss(h_j, h_1, U, 1.0).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if keep:
                m.orthonormalise(U)
        losses[keep], norms[keep] = loss.item(), U[0].norm().item()
    assert norms[False] < 0.01 and losses[False] < 1e-4
    assert (
        norms[True] == pytest.approx(2.0, abs=1e-4) and losses[True] > 0.1
    )  # four orthonormal rows: norm 2


# ------------------------------------------------------------------------------------- Algorithm 1


@pytest.mark.parametrize("teacher", ["maxnet", "fixed"])
def test_the_accumulated_gradient_is_eq6(tiny, monkeypatch, teacher):
    """∇ = 1/|𝒜_s| Σ_j (n_1/n_j)^γ ∇ loss_j, with loss_1 = CE (α = 0) and loss_j = (1-α) CE + α (KD
    + FD), z_1 and h_1 those of the maxnet, or of W + A_0 B_0: by autograd, term by term.
    """
    hp = dataclasses.replace(HP, gamma=2.0, alpha=0.7, clip=0.0, epochs=(1, 1, 1), batch_size=24)
    hp = dataclasses.replace(hp, teacher=teacher)
    data_, space = examples(), configuration_space(tiny.maxnet)
    run = m.mlfs(tiny, data_, space, hp)
    assert [next(run).stage for _ in range(5)] == [0, 0, 1, 1, 2]  # two had a step, one begins
    randomise_adapters(tiny)
    ((_, (x, y, *_)),) = m.mini_batches(data_, hp, 2, 0, "cpu")
    adapters = {name: p for name, p in tiny.named_parameters() if p.requires_grad}
    subnets = sample_sub_transformers(space, 2, 4, (0, 2, 1))
    source = copy.deepcopy(tiny)
    for linear in source.adapted_linears() if teacher == "fixed" else ():
        linear.B[1].data.zero_(), linear.B[2].data.zero_()
    z_1, h_1 = source(**x)
    expected = {name: torch.zeros_like(p) for name, p in adapters.items()}
    U = feature_projections(space[-1].layers, 4, 16, 0)
    for phi in subnets:
        z, h = tiny(**x, phi=phi)
        loss = F.cross_entropy(z, y)
        if phi != space[0]:
            kd = torch.distributions.kl_divergence(
                torch.distributions.Categorical(logits=z),
                torch.distributions.Categorical(logits=z_1.detach()),
            ).mean()
            fd = sum(
                0.1 * ((h[l] - h_1[l].detach()) @ U[l].T)[x["mask"] == 1].square().mean()
                for l in space[-1].layers
            )
            loss = 0.3 * loss + 0.7 * (kd + fd)
        n_j = sum(
            2 * (16 + o)
            for _ in phi.layers
            for o in (3 * [4 * phi.num_attention_heads] + [phi.intermediate_size])
        )
        n_1 = 4 * 2 * (3 * 32 + 16 + 24)
        gradients = torch.autograd.grad(loss, list(adapters.values()), allow_unused=True)
        for name, g in zip(adapters, gradients, strict=True):
            expected[name] += 0 if g is None else (n_1 / n_j) ** 2 / 4 * g
    seen = {}
    gradients = lambda self: seen.update({name: p.grad.clone() for name, p in adapters.items()})
    monkeypatch.setattr(torch.optim.AdamW, "step", gradients)
    next(run)
    assert seen.keys() == expected.keys()
    assert all(torch.allclose(seen[name], expected[name], rtol=1e-3, atol=1e-5) for name in seen)
    assert gradient_scale(811_008, 276_480, 1) == pytest.approx(2.93, abs=0.01)


def test_stage_0_is_plain_low_rank_fine_tuning_step_for_step():
    """With 𝒜_0 = {maxnet} the same loop is LoRA: a loop of its own over W + (A B)ᵀ, on a model that
    knows no adapters, gives the same losses, A_0, B_0 and head."""
    hp = dataclasses.replace(HP, epochs=(2, 0, 0), warmup=0.5)
    ours, plain, data_ = tiny_bert(), tiny_bert(), examples()
    run = m.mlfs(ours, data_, configuration_space(ours.maxnet), hp)
    next(run)
    start = {name: t.clone().requires_grad_(True) for name, t in ours.trained_state().items()}
    steps = [at for at in run if at.stage == 0 and isinstance(at, m.Updated)]
    optimizer = torch.optim.AdamW(list(start.values()), weight_decay=0)
    batches = [b for epoch in (0, 1) for b in data.batches(data_, 8, (0, 0, epoch))]
    assert len(steps) == len(batches) == 6
    for number, (x, y) in enumerate(batches, 1):
        weights = {name: p for name, p in start.items() if not name.endswith((".A.0", ".B.0"))}
        for name in (n.removesuffix(".A.0") for n in start if n.endswith(".A.0")):
            W = plain.get_parameter(name + ".weight")
            weights[name + ".weight"] = W + (start[name + ".A.0"] @ start[name + ".B.0"]).T
        loss = F.cross_entropy(torch.func.functional_call(plain, weights, (), x)[0], y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(start.values()), 1.0)
        rate = (1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4)[
            number - 1
        ]  # up over half the steps, then down
        optimizer.param_groups[0]["lr"] = 1e-2 * rate
        optimizer.step()
        assert loss.item() == pytest.approx(steps[number - 1].losses["w1-d4"], abs=1e-5)
    for name, t in start.items():
        assert torch.allclose(ours.trained_state()[name], t, atol=5e-4), name  # steps of 1e-2


def test_three_stages_leave_the_pretrained_weights_alone_and_add_rank_3r(tiny):
    """Alg. 1, output: W_Sup = W_pretrained + Σ_{s=0..2} A_s B_s, so rank(W_Sup - W_pretrained) ≤
    3r; every stage learned something.
    """
    before = {
        name: p.clone()
        for name, p in tiny.named_parameters()
        if name.split(".")[0] not in tiny.trained_whole
    }
    for _ in m.mlfs(tiny, examples(), configuration_space(tiny.maxnet), HP):
        pass
    after = dict(tiny.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())
    for linear in tiny.adapted_linears():
        assert (
            torch.linalg.matrix_rank(linear.merged() - linear.weight, rtol=1e-4) == 6
        )  # 3r = 6 < 16
        assert all(B.abs().max() > 0 for B in linear.B)


def test_importance_is_the_derivative_of_the_loss_by_a_gate(tiny):
    """Closing a gate ξ a little on one head or neuron changes the loss by |∂ℓ/∂ξ|: finite
    differences agree.
    """
    data_ = examples(16)
    scores = m.importance(tiny, data_, dataclasses.replace(HP, batch_size=16))
    ((x, y),) = data.batches(data_, 32)

    def loss_with_gate(linear, columns, gate):
        whole = linear.weight.data.clone()
        linear.weight.data[:, columns] *= gate
        with torch.no_grad():
            value = F.cross_entropy(tiny(**x)[0].double(), y).item()
        linear.weight.data = whole
        return value

    for key, linear, columns, index in (
        ("1.heads", tiny.layers[1].attention_output, slice(8, 12), 2),
        ("2.neurons", tiny.layers[2].output, slice(5, 6), 5),
    ):
        slope = (
            loss_with_gate(linear, columns, 1 + 1e-2) - loss_with_gate(linear, columns, 1 - 1e-2)
        ) / 2e-2
        assert scores[key][index].item() == pytest.approx(abs(slope), rel=0.05, abs=1e-4)
    assert not any(p.requires_grad for p in tiny.layers.parameters())


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_any_weight_changes(tiny, poison):
    """Stage, step and subnet are named."""
    hp = dataclasses.replace(HP, epochs=(0, 0, 1))
    run = m.mlfs(tiny, examples(), configuration_space(tiny.maxnet), hp)
    at = [next(run) for _ in range(4)][-1]
    assert at.stage == 2 and at.step == 1
    before = {name: t.clone() for name, t in tiny.trained_state().items()}
    if poison == "loss":
        tiny.embedding_norm.weight.data[0] = math.nan
    else:
        tiny.classifier.weight.register_hook(lambda g: g * math.inf)
    with pytest.raises(
        ValueError,
        match=(
            "stage 2, step 2: the losses are {'w1-d4': nan"
            if poison == "loss"
            else "the norm of Eq. 6's gradient is (inf|nan)"
        ),
    ):
        next(run)
    assert all(torch.equal(t, before[name]) for name, t in tiny.trained_state().items())


STOPS = [(0, 2), (1, 1), (1, 3), (2, 2)]


def resumable_run(model, teacher, state=None):
    hp = dataclasses.replace(HP, reorder=True, learn_u=True, teacher=teacher)
    return m.mlfs(model, examples(), configuration_space(model.maxnet), hp, state)


@pytest.fixture(scope="module", params=["maxnet", "fixed"])
def stored(request, tmp_path_factory):
    """The teacher, what a run learns in the end, and a folder with its state at each of STOPS."""
    whole, stopped = tiny_bert(num_hidden_layers=2), tiny_bert(num_hidden_layers=2)
    state = m.State()
    for _ in resumable_run(whole, request.param):
        pass
    folder = tmp_path_factory.mktemp("states")
    for at in resumable_run(stopped, request.param, state):
        if isinstance(at, m.Updated) and (at.stage, at.step) in STOPS:
            assert (state.stage, state.step) == (at.stage, at.step)
            (folder / f"{at.stage}-{at.step}").mkdir()
            evaluate.save_state(folder / f"{at.stage}-{at.step}", stopped, state)
    return request.param, whole.trained_state(), folder


@pytest.mark.parametrize("stop", STOPS)
def test_a_resumed_run_ends_with_the_same_adapters(stored, stop):
    """Data, subnets and A_s depend on (seed, stage, step) alone; with AdamW's moments and U stored,
    the bits are the same. A fixed teacher is what A_0, B_0 and the head make.
    """
    teacher, whole, folder = stored
    model = tiny_bert(num_hidden_layers=2)
    state = m.State(**evaluate.load_state(folder / "{}-{}".format(*stop), model))
    assert (state.stage, state.step) == stop
    for _ in resumable_run(model, teacher, state):
        pass
    assert all(torch.equal(t, model.trained_state()[name]) for name, t in whole.items())


def test_a_fixed_teacher_stays_as_stage_0_left_it(tiny):
    """To the end its answers are those of stage 0's network, merged and apart; the subnets read
    them with the same head; and none of its tensors is a second copy.
    """
    hp = dataclasses.replace(HP, reorder=True, teacher="fixed")
    for at in m.mlfs(tiny, examples(), configuration_space(tiny.maxnet), hp):
        if at == m.StageBegins(1, 0, at.steps):
            apart = tiny.extract(tiny.maxnet)
    teacher = tiny.fix_teacher()
    assert torch.allclose(teacher(**batch())[0], apart(**batch())[0], atol=1e-5)
    assert not torch.allclose(tiny(**batch())[0], apart(**batch())[0], atol=1e-3)
    assert teacher.classifier.weight is tiny.classifier.weight
    assert {p.data_ptr() for p in teacher.parameters()} < {p.data_ptr() for p in tiny.parameters()}


@pytest.mark.parametrize(
    "field, value",
    [
        ("teacher", "someone"),
        ("rank", 0),
        ("alpha", 1.5),
        ("alpha", -0.1),
        ("alpha", math.nan),
        ("temperature", 0.5),
        ("epochs", (1, 1)),
        ("kl", "sideways"),
        ("batch_size", 0),
        ("learning_rate", 0.0),
    ],
)
def test_a_hyper_parameter_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} must "):
        HyperParameters(**{field: value})


def test_app_a_settings():
    """App. A: batch 128 for QQP, MNLI, QNLI, else 64; 3 epochs for SST-2, else 8; 5e-4 for QNLI,
    MNLI, else 1e-3; γ 1 for SST-2, else 2.
    """
    for task in data.GLUE:
        hp = HyperParameters(**m.TASK_SETTINGS.get(task, {}))
        assert hp.batch_size == (128 if task in ("qqp", "mnli", "qnli") else 64)
        assert hp.epochs == ((3, 3, 3) if task == "sst2" else (8, 8, 8))
        assert hp.learning_rate == (5e-4 if task in ("mnli", "qnli") else 1e-3)
        assert hp.gamma == (1 if task == "sst2" else 2)
        assert (hp.rank, hp.alpha, hp.beta, hp.max_length) == (8, 0.9, 0.1, 128)


def strangers_base(folder, *gone, **more) -> str:
    """BERT's reference checkpoint of three classes without some tensors, with others."""
    reference = Path(__file__).parent / "reference" / "bert-classifier"
    tensors = load_file(reference / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not name.startswith(gone)}
    save_file(kept | more, folder / "model.safetensors")
    (folder / "config.json").write_bytes((reference / "config.json").read_bytes())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "is", "good", "bad"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return str(folder)


def prepare(tmp_path, monkeypatch, *options):
    monkeypatch.setattr(data, "load_toy", lambda: LOAD_TOY(train=40, dev=10))
    command = ["--model", str(tmp_path), "--out", str(tmp_path / "run"), *options]
    return m.prepare(*m.parse_arguments(command))[0]


def test_the_opening_says_what_of_the_head_is_new_or_left_out(tmp_path, monkeypatch):
    """Three classes are stored, the toy has two."""
    strangers_base(tmp_path, "bert.pooler.", **{"linear.weight": torch.ones(2)})
    told = m.opening(prepare(tmp_path, monkeypatch))
    for words in ("no pooler that fits", "no classifier that fits", "head: ['linear.weight'"):
        assert f"\n{tmp_path.name}: " in told and words in told


def test_a_recipe_is_a_row_of_settings_between_the_tasks_and_those_that_are_given(
    tmp_path, monkeypatch
):
    """The paper's is the default and empty; all that departs from HyperParameters is printed."""
    strangers_base(tmp_path)
    toy = m.TASK_SETTINGS["toy"]
    recipe = m.RECIPES["edge"]
    for options, rows in (
        ([], {}),
        (["--recipe", "paper", "--overwrite"], {}),
        (["--recipe", "edge", "--overwrite"], recipe),
        (["--recipe", "edge", "--rank", "2", "--overwrite"], recipe | {"rank": 2}),
    ):
        run = prepare(tmp_path, monkeypatch, *options)
        fitted = {"max_length": run.model.max_tokens, "widths": run.hp.widths}
        assert run.hp == HyperParameters(**(toy | rows | fitted))
        (said,) = re.findall("^settings: (.*)$", m.opening(run), re.M)
        for name, value in vars(run.hp).items():
            assert (f"{name} {value}" in said) == (value != getattr(HyperParameters, name))
    assert not m.RECIPES["paper"] and recipe["target_modules"] == "all-linear"
    with pytest.raises(ValueError, match="argument --recipe: invalid choice: 'best'"):
        m.parse_arguments(["--recipe", "best"])
    monkeypatch.setattr(m, "shared_inputs", None)  # told before anything is looked for
    with pytest.raises(ValueError, match="teacher must be maxnet with --adapters full"):
        prepare(tmp_path, monkeypatch, "--recipe", "edge", "--adapters", "full")


@pytest.mark.parametrize(("processor", "dtype"), [
    ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, "bfloat16"),
    ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, "float32"),
    ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, "bfloat16"),
    ({"cpu_name": "AMD EPYC", "avx512_bf16": False, "amx_bf16": False}, "float32"),
    ({"architecture": "arm64", "bf16": True}, "float32"),
])
def test_frozen_weights_are_bfloat16_where_products_are_faster_in_it(
    processor, dtype, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    auto = HyperParameters()
    assert m.pick_dtype(auto, "cpu") == dtype
    assert m.pick_dtype(dataclasses.replace(auto, adapters="full"), "cpu") == "float32"
    for given in ("float32", "bfloat16"):
        assert m.pick_dtype(dataclasses.replace(auto, dtype=given), "cpu") == given


def test_a_run_goes_on_in_the_dtype_that_auto_became_where_it_began(tmp_path, monkeypatch):
    strangers_base(tmp_path)
    has = {"amx_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert prepare(tmp_path, monkeypatch, "--dtype", "auto").settings["dtype"] == "bfloat16"
    has["amx_bf16"] = False  # another processor
    with pytest.raises(ValueError, match="another dtype; --resume needs the settings in run.json"):
        prepare(tmp_path, monkeypatch, "--dtype", "auto", "--resume")
    run = prepare(tmp_path, monkeypatch, "--dtype", "bfloat16", "--resume")
    assert torch.bfloat16 in {p.dtype for p in run.model.parameters()}


def test_stage_0_cannot_be_left_out_where_the_classifier_is_new(tmp_path, monkeypatch):
    """The students' teacher would be drawn at random; a stored classifier may do without."""
    strangers_base(tmp_path)
    words = "--epochs 0,... would leave the model's new classifier untrained"
    with pytest.raises(ValueError, match=words):
        prepare(tmp_path, monkeypatch, "--epochs", "0,1,1")
    assert not (tmp_path / "run").exists()
    three = data.TASKS["toy"]._replace(labels=("a", "b", "c"))
    monkeypatch.setitem(data.TASKS, "toy", three)
    assert m.opening(prepare(tmp_path, monkeypatch, "--epochs", "0,1,1")).endswith("run/")


def test_the_rows_of_a_checkpoints_classifier_are_those_of_the_task(tmp_path, monkeypatch):
    """A sliced teacher scored 4.0 instead of 96.0: its row 0 was "positive", the task's class 1."""
    two = {"classifier.weight": torch.ones(2, 16), "classifier.bias": torch.tensor([7.0, -7.0])}
    strangers_base(tmp_path, "classifier.", **two)
    config = json.loads((tmp_path / "config.json").read_text())
    names = {"id2label": {"0": "POSITIVE", "1": "NEGATIVE"}}
    (tmp_path / "config.json").write_text(json.dumps(config | names))
    run = prepare(tmp_path, monkeypatch, "--epochs", "0,1,1")
    assert run.task.labels == ("negative", "positive")
    assert run.model.classifier.bias.tolist() == [-7.0, 7.0] and not run.model.notes
