import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model import Bert, SubnetConfig  # noqa: E402

torch.set_num_threads(1)  # tiny models; more threads only wait for each other


@pytest.fixture
def tiny():
    """A tiny random BERT, every parameter drawn, so that a forgotten bias or norm shows."""
    return tiny_bert()


def tiny_bert(seed: int = 0, **changes) -> Bert:
    config = {
        "model_type": "bert",
        "vocab_size": 50,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "head_dim": 4,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "max_position_embeddings": 32,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "num_labels": 3,
    } | changes
    model, generator = Bert(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def randomise_adapters(model: Bert, seed: int = 0) -> Bert:
    """Give every B_s a value, as training would: a fresh B is zero and would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".B." in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def batch(seed: int = 0, size: int = 5, length: int = 9) -> dict[str, torch.Tensor]:
    """Token ids, a mask with padding on the right, and segments."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:], mask[2, 3:] = 0, 0
    segments = torch.zeros_like(ids)
    segments[:, 4:] = 1
    return {"ids": ids, "mask": mask, "segments": segments}


def random_phi(seed: int) -> SubnetConfig:
    """Any Φ of `tiny_bert`: width, depth and hidden size all vary."""
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))
    generator = torch.Generator().manual_seed(seed)
    layers = tuple(sorted(torch.randperm(4, generator=generator)[: draw(1, 4)].tolist()))
    return SubnetConfig(draw(4, 16), draw(1, 4), draw(1, 24), layers)
