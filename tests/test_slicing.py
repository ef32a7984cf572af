"""Π_Φ by examples. Read from the top: each test is one sentence of the paper about slicing.

    W_Φ = Π_Φ(W_Sup)                (Eq. 2)   a subnet's weights are a part of the supernet's
    W_Sup = W_Tch + Σ_s A_s B_s     (Eq. 8)   which is a frozen matrix plus low-rank ones
    ΔW_Φ = Π_Φ(Σ_s A_s B_s)         (Eq. 9)   so its fine-tuning is a slice of a shared sum
"""
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from conftest import batch, random_phi, randomise_adapters, tiny_bert
from mlfs import configuration_space
from model import ElasticLayerNorm, ElasticLinear, SubnetConfig


def test_eq2_a_slice_is_the_top_left_block_of_the_weight():
    """The input's width picks the columns, the wanted width picks the rows."""
    linear = ElasticLinear(3, 2)
    linear.weight.data = torch.tensor([[1., 2., 3.],
                                       [4., 5., 6.]])
    linear.bias.data = torch.tensor([10., 20.])
    assert linear(torch.tensor([1., 1., 1.]), 2).tolist() == [16., 35.]      # all of W
    assert linear(torch.tensor([1., 1.]), 2).tolist() == [13., 29.]          # two columns of it
    assert linear(torch.tensor([1., 1.]), 1).tolist() == [13.]               # and one row


def test_a_slice_equals_a_plain_layer_built_from_it():
    """torch.nn.Linear, given the sliced weight, is the independent witness; so is the formula of
    layer normalisation over the sliced width."""
    torch.manual_seed(0)
    linear, norm, x = ElasticLinear(8, 6), ElasticLayerNorm(8, 1e-12), torch.randn(5, 4)
    for p in (*linear.parameters(), *norm.parameters()):
        torch.nn.init.normal_(p)
    plain = torch.nn.Linear(4, 3)
    plain.weight.data, plain.bias.data = linear.weight[:3, :4], linear.bias[:3]
    assert torch.allclose(linear(x, 3), plain(x), atol=1e-6)
    standard = (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True)
    assert torch.allclose(norm(x), standard * norm.weight[:4] + norm.bias[:4], atol=1e-5)


def test_eq9_slicing_commutes_with_the_low_rank_product():
    """Π(A B) = (rows of A)(columns of B): slicing two thin matrices is slicing their product."""
    torch.manual_seed(0)
    A, B = torch.randn(8, 2), torch.randn(2, 6)
    assert torch.allclose((A @ B)[:4, :3], A[:4] @ B[:, :3], atol=1e-6)
    linear = ElasticLinear(8, 6)
    torch.nn.init.zeros_(linear.weight), torch.nn.init.zeros_(linear.bias)
    linear.add_stage(2, torch.Generator())
    linear.A[0].data, linear.B[0].data = A, B
    x = torch.eye(4)                                                 # I A B shows the matrix itself
    assert torch.allclose(linear(x, 3), (A @ B)[:4, :3], atol=1e-6)


def test_eq8_three_stages_add_up():
    """y = x (W_pretrained + A_0 B_0 + A_1 B_1 + A_2 B_2)."""
    torch.manual_seed(0)
    linear = ElasticLinear(8, 6)
    torch.nn.init.normal_(linear.weight), torch.nn.init.zeros_(linear.bias)
    for _ in range(3):
        linear.add_stage(2, torch.Generator())
    for B in linear.B:
        torch.nn.init.normal_(B)
    W = linear.weight.T + sum(A @ B for A, B in zip(linear.A, linear.B, strict=True))
    assert torch.allclose(linear(torch.eye(8), 6), W, atol=1e-5)
    assert torch.allclose(linear.merged(), W.T, atol=1e-5)


def test_a_smaller_width_keeps_the_leading_heads():
    """Half of four heads are heads 0 and 1: silencing 2 and 3 in the maxnet changes no bit of the
    subnet, and makes the maxnet equal to it."""
    model, x = tiny_bert(num_hidden_layers=1), batch()
    half = SubnetConfig(hidden_size=16, num_attention_heads=2, intermediate_size=24, layers=(0,))
    expected, _ = model(**x, phi=half)
    heads_2_and_3 = slice(2 * 4, 4 * 4)                              # four columns a head
    model.layers[0].attention_output.weight.data[:, heads_2_and_3] = 0
    assert torch.equal(model(**x, phi=half)[0], expected)
    assert torch.allclose(model(**x)[0], expected, atol=1e-6)


def test_a_smaller_depth_runs_the_listed_layers():
    """g_j(1), g_j(2), ... are phi.layers; features come under the maxnet's layer numbers."""
    model, shallow, x = tiny_bert(), tiny_bert(), batch()
    logits, features = model(**x, phi=SubnetConfig(16, 4, 24, layers=(1, 3)))
    assert list(features) == [1, 3]
    shallow.layers = torch.nn.ModuleList([model.layers[1], model.layers[3]])
    assert torch.equal(logits, shallow(**x, phi=SubnetConfig(16, 4, 24, layers=(0, 1)))[0])


def test_a_smaller_hidden_size_narrows_the_whole_residual_stream():
    """Embeddings, norms, every layer and the head take the leading 8 of 16 dimensions."""
    model, x = tiny_bert(), batch()
    _, features = model(**x, phi=SubnetConfig(8, 4, 24, (0, 1, 2, 3)))
    assert {h.shape for h in features.values()} == {(5, 9, 8)}
    whole = F.embedding(x["ids"], model.word_embeddings.weight)
    assert torch.equal(model.word_embeddings(x["ids"], 8), whole[..., :8])


@pytest.mark.parametrize("seed", range(12))
def test_a_subnet_is_the_stand_alone_model_that_extract_returns(seed):
    """f_Φ(x; Π_Φ(W_Sup)), sliced in place, is a small model holding W_Φ: for any width, depth and
    hidden size, in its logits and after every layer."""
    model, x, phi = tiny_bert(), batch(), random_phi(seed)
    for _ in range(3):
        model.add_stage(2, seed)
    randomise_adapters(model)
    small = model.extract(phi)
    logits, features = model(**x, phi=phi)
    alone, own = small(**x)                                          # nothing is sliced here
    assert torch.allclose(logits, alone, atol=1e-5)
    for l, h in zip(phi.layers, own.values(), strict=True):
        assert torch.allclose(features[l], h, atol=1e-5)


@pytest.mark.parametrize("sizes", [(16, 8, 24, (0, 1)), (16, 4, 25, (0, 1)), (17, 4, 24, (0, 1)),
                                   (16, 0, 24, (0, 1)), (16, 4, 24, (3, 4)), (16, 4, 24, (2, 1)),
                                   (16, 4, 24, (1, 1)), (16, 4, 24, ())])
def test_what_is_no_part_of_the_maxnet_is_no_subnet(sizes):
    """Eight heads of four, a fifth layer, layers turned round: refused, never cut to fit."""
    model, phi = tiny_bert(), SubnetConfig(*sizes)
    for use in (lambda: model(**batch(), phi=phi), lambda: model.extract(phi)):
        with pytest.raises(ValueError, match="is no part of the maxnet"):
            use()


def test_extract_copies_the_very_numbers_of_the_slice():
    """Without adapters W_Φ is bit for bit a block of W; changing the copy leaves W alone."""
    model, phi = tiny_bert(), SubnetConfig(8, 2, 10, layers=(1, 3))
    small = model.extract(phi)
    assert torch.equal(small.layers[0].query.weight, model.layers[1].query.weight[:8, :8])
    assert torch.equal(small.layers[1].output.weight, model.layers[3].output.weight[:8, :10])
    assert torch.equal(small.position_embeddings.weight, model.position_embeddings.weight[:, :8])
    small.layers[0].query.weight.data.zero_()
    assert model.layers[1].query.weight.abs().min() > 0


def test_depths_are_nested_and_spread_and_keep_both_ends():
    """Every Φ contains the minnet's layers: ℓ_FD compares there. Of 12 layers (0 to 11), depth 4
    keeps {0, 3, 6, 11}; two or more keep the first and the last, five or more lack no three in a
    row.
    """
    model = tiny_bert(num_hidden_layers=12)
    space = configuration_space(model.maxnet, widths=[1], depths=[d / 12 for d in range(1, 13)])
    layers = {len(phi.layers): phi.layers for phi in space}
    assert layers[1] == (11,) and layers[4] == (0, 3, 6, 11)
    assert all(set(layers[d]) < set(layers[d + 1]) for d in range(1, 12))
    assert all(layers[d][0] == 0 and layers[d][-1] == 11 for d in range(2, 13))
    assert all(b - a <= 3 for d in range(5, 13) for a, b in pairwise(layers[d]))


def test_the_permutation_keeps_the_maxnet_and_changes_the_slices():
    """Heads and neurons have no order of their own: moving the important ones to the front, where
    every slice keeps them, changes no output of the maxnet."""
    model, x = tiny_bert(), batch()
    model.add_stage(2)
    randomise_adapters(model)
    half = SubnetConfig(16, 2, 12, (0, 1, 2, 3))
    whole, sliced = model(**x)[0], model(**x, phi=half)[0]
    generator = torch.Generator().manual_seed(1)
    importance = {f"{l}.{kind}": torch.rand(n, generator=generator)
                  for l in range(4) for kind, n in (("heads", 4), ("neurons", 24))}
    before = model.layers[2].query.weight.clone()
    model.reorder(importance)
    best = int(importance["2.heads"].argmax())                       # it comes first now
    assert torch.equal(model.layers[2].query.weight[:4], before[4 * best:4 * best + 4])
    assert torch.allclose(model(**x)[0], whole, atol=1e-5)
    assert not torch.allclose(model(**x, phi=half)[0], sliced, atol=1e-2)
