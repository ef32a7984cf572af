"""tests/by_hand/graphs.py: its passes, which a GPU can record, are Algorithm 1."""

import dataclasses

import pytest
import torch

import graphs
import mlfs
from conftest import tiny_bert
from test_mlfs import HP, examples


@pytest.mark.parametrize("changes", [
    {},
    {"teacher": "fixed", "kl": "forward", "gamma": 0.0, "epochs": (1, 0, 2)},
    {"adapters": "full", "learning_rate": 1e-3},
])
def test_padded_passes_learn_what_algorithm_1_learns(changes):
    """In float64 padding changes the order of sums alone, and 9 iterations end alike."""
    hp = dataclasses.replace(HP, **changes)
    found = []
    for loop in mlfs.mlfs, lambda *args: graphs.algorithm(*args, graphs=False):
        model = tiny_bert().double()
        space = mlfs.configuration_space(model.maxnet)
        losses = [[*event.losses.values()] for event in loop(model, examples(), space, hp)
                  if isinstance(event, mlfs.Updated)]
        found.append((losses, model.trained_state()))
    (losses, learned), (losses_padded, learned_padded) = found
    assert len(losses) == 9 and losses[-1] != losses[0]
    for own, padded in zip(losses, losses_padded, strict=True):
        assert own == pytest.approx(padded, rel=1e-6)          # logits are float32
    for name, tensor in learned.items():
        torch.testing.assert_close(learned_padded[name], tensor, rtol=1e-7, atol=1e-9)
