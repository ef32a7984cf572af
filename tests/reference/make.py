"""Reproduces the frozen outputs in this folder: tiny random BERTs run by the transformers library.

    pip install torch==2.13.0 transformers==5.23.0 && python tests/reference/make.py

Each folder is one layout that real checkpoints have; `expected.safetensors` holds the inputs, the
logits and every hidden state. The library is an independent implementation, and is not needed to
run the tests.
"""
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForPreTraining, BertForSequenceClassification, BertModel

HERE = Path(__file__).parent
SHAPE = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24,
         "num_hidden_layers": 3, "max_position_embeddings": 12}
KEPT = (*SHAPE, "model_type", "hidden_act", "layer_norm_eps", "type_vocab_size",
        "position_embedding_type")


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, biases and norms too, so that none can be forgotten."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0.0, 0.3)
    return module.eval()


def write(name: str, config: BertConfig, state: dict, backbone: BertModel,
          classifier: torch.nn.Linear | None = None) -> None:
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    kept = {key: value for key, value in config.to_dict().items() if key in KEPT}
    (folder / "config.json").write_text(json.dumps(kept, indent=1) + "\n")
    save_file({key: t.clone().contiguous() for key, t in state.items()},
              folder / "model.safetensors", {"format": "pt"})
    ids = torch.randint(0, 50, (3, 9))
    mask, segments = torch.ones_like(ids), torch.zeros_like(ids)
    mask[1, 6:], mask[2, 4:], segments[:, 3:] = 0, 0, 1
    with torch.no_grad():
        out = backbone(input_ids=ids, attention_mask=mask, token_type_ids=segments,
                       output_hidden_states=True)
    expected = {"ids": ids, "mask": mask, "segments": segments, "pooled": out.pooler_output}
    expected |= {f"hidden.{l}": h.clone() for l, h in enumerate(out.hidden_states[1:])}
    if classifier is not None:
        expected["logits"] = classifier(out.pooler_output).detach()
    save_file(expected, folder / "expected.safetensors")


def main() -> None:
    torch.manual_seed(0)
    # BertModel.save_pretrained (MiniLM): no prefix; older versions left a stray integer buffer
    config = BertConfig(**SHAPE)
    m = randomise(BertModel(config))
    write("bert-plain", config, m.state_dict() | {"embeddings.position_ids": torch.arange(12)[None]}, m)
    # bert-base-uncased: "bert." in front, LayerNorm.gamma/beta, pre-training heads beside it
    m = randomise(BertForPreTraining(config))
    old = {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for key, t in m.state_dict().items()}
    write("bert-pretraining", config, old, m.bert)
    # a fine-tuned classifier with three classes, another activation and epsilon
    config = BertConfig(**SHAPE, hidden_act="gelu_new", layer_norm_eps=1e-5, num_labels=3)
    m = randomise(BertForSequenceClassification(config))
    write("bert-classifier", config, m.state_dict(), m.bert, m.classifier)


if __name__ == "__main__":
    main()
