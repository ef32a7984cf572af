import os
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS / "by_hand")]

import data  # noqa: E402
import evaluate  # noqa: E402
import mlfs  # noqa: E402
from model import GPT, Bert, Llama, SubnetConfig, SuperTransformer  # noqa: E402

torch.set_num_threads(1)  # tiny models; more threads only wait for each other
# The commands' own choice is 25 passes a subnet. No test reads how long they took.
evaluate.latency = partial(evaluate.latency, rounds=2, runs=1)
mlfs.settings_help = cache(mlfs.settings_help)  # made of the source, for each of many commands


def pytest_configure():
    """The tests are for a CPU. CUDA_VISIBLE_DEVICES=0 runs those of the command line on a GPU."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


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
    return randomise(Bert(config), seed)


DECODER = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "head_dim": 4,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "max_position_embeddings": 32,
    "layer_norm_eps": 1e-5,
}


def tiny_gpt(seed: int = 0, **changes) -> GPT:
    """SantaCoder's kind: one key/value head for four heads, learned positions, tied output."""
    config = DECODER | {
        "model_type": "gpt_bigcode",
        "num_key_value_heads": 1,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    }
    return randomise(GPT(config | changes), seed)


def tiny_llama(seed: int = 0, **changes) -> Llama:
    """CodeLlama's kind: two key/value heads for four heads, rotary positions, untied output."""
    config = DECODER | {
        "model_type": "llama",
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_theta": 1e4,
    }
    return randomise(Llama(config | changes), seed)


FAMILIES = {"bert": tiny_bert, "gpt": tiny_gpt, "llama": tiny_llama}


def randomise(model: SuperTransformer, seed: int) -> SuperTransformer:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def randomise_adapters(model: SuperTransformer, seed: int = 0) -> SuperTransformer:
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


def random_phi(seed: int, group: int = 1) -> SubnetConfig:
    """Any Φ of the tiny models: width, depth and hidden size all vary; heads in whole groups."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    layers = tuple(sorted(torch.randperm(4, generator=generator)[: draw(1, 4)].tolist()))
    return SubnetConfig(draw(4, 16), draw(1, 4 // group) * group, draw(1, 24), layers)


LOAD_TOY = data.load_toy
# Two iterations a stage: 38 sentences are trained on, 2 are held out.
RUN_OPTIONS = ("--epochs", "1,1,1", "--batch-size", "19", "--widths", "1,.5", "--depths", "1,.5")


def load_small_toy():
    return LOAD_TOY(train=40, dev=20)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """One real run of the command line on a small part of the toy, in seconds. Tests copy it before
    they change it, and patch data.load_toy with `load_small_toy` where they measure again.
    """
    folder = tmp_path_factory.mktemp("run") / "toy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_toy", load_small_toy)
        assert mlfs.main(["--out", str(folder), *RUN_OPTIONS]) == 0
    return folder
