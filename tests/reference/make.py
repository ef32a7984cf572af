"""Reproduces the frozen outputs in this folder: tiny random models run by the transformers library.

    pip install torch==2.13.0 transformers==5.23.0 && python tests/reference/make.py

Each folder is one layout that real checkpoints have; `expected.safetensors` holds the inputs, the
logits and every layer's output. The library is an independent implementation, and is not needed to
run the tests.
"""
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

HERE = Path(__file__).parent
SHAPE = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24,
         "num_hidden_layers": 3, "max_position_embeddings": 12}
KEPT = (*SHAPE, "model_type", "hidden_act", "layer_norm_eps", "type_vocab_size",
        "position_embedding_type")
# the decoders' config.json: the fields as real checkpoints spell them, not as the library rewrites
# them (it would move rope_theta into rope_parameters and add head_dim)
GPT2 = {"vocab_size": 50, "n_positions": 12, "n_embd": 16, "n_layer": 3, "n_head": 4,
        "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "use_cache": True,
        "bos_token_id": 0, "eos_token_id": 0}
STARCODER = {"architectures": ["GPTBigCodeForCausalLM"], "model_type": "gpt_bigcode", **GPT2,
             "n_inner": 24, "activation_function": "gelu_pytorch_tanh", "multi_query": True,
             "attention_softmax_in_fp32": True, "scale_attention_softmax_in_fp32": True,
             "tie_word_embeddings": True}
SANTACODER = {"architectures": ["GPT2LMHeadCustomModel"], "model_type": "gpt2", **GPT2,
              "n_inner": None, "activation_function": "gelu_fast",
              "attention_head_type": "multiquery", "reorder_and_upcast_attn": False,
              "scale_attn_by_inverse_layer_idx": False}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SHAPE,
         "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-5,
         "initializer_range": 0.02, "use_cache": True, "bos_token_id": 1, "eos_token_id": 2}


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


def santacoder(state: dict) -> dict:
    """GPTBigCode's tensors as SantaCoder's own code names and lays them out.

    Projections are transposed (GPT-2's Conv1D), queries apart from the shared key and value, and
    two buffers a layer that are no weights.
    """
    out = {}
    for key, t in state.items():
        if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            t = t.T
        if ".c_attn." in key:
            q, kv = t.split([16, 8], dim=-1)
            out |= {key.replace("c_attn", "q_attn"): q, key.replace("c_attn", "kv_attn"): kv}
        else:
            out[key] = t
    for l in range(3):
        out[f"transformer.h.{l}.attn.bias"] = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
        out[f"transformer.h.{l}.attn.masked_bias"] = torch.tensor(-1e4)
    return out


def write_decoder(name: str, config: dict, state: dict, model: PreTrainedModel,
                  shards: int = 1) -> None:
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    state, where = {key: t.clone().contiguous() for key, t in state.items()}, {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        keys = list(state)[i * len(state) // shards:(i + 1) * len(state) // shards]
        save_file({key: state[key] for key in keys}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(keys, file)
    if shards > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())},
                 "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    ids = torch.randint(0, 50, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:], mask[2, 4:] = 0, 0
    expected, backbone = {"ids": ids, "mask": mask}, model.base_model
    with torch.no_grad():
        alone = model(input_ids=ids[2:, :4]).logits
        # by hooks: the library's own last hidden state is the one after the final norm
        hooks = [layer.register_forward_hook(
                     lambda _, __, x, l=l: expected.update({f"hidden.{l}": x.clone()}))
                 for l, layer in enumerate(getattr(backbone, "h", None) or backbone.layers)]
        expected["logits"] = model(input_ids=ids, attention_mask=mask).logits
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(expected["logits"][2:, :4], alone)    # padding changes nothing
    save_file(expected, folder / "expected.safetensors")


def decoders() -> None:
    def gpt(**given) -> GPTBigCodeForCausalLM:
        return randomise(GPTBigCodeForCausalLM(GPTBigCodeConfig(**given,
                                                                attn_implementation="eager")))

    def llama(name: str, shards: int = 1, **given) -> None:
        m = randomise(LlamaForCausalLM(LlamaConfig(**LLAMA | given,
                                                   attn_implementation="eager")))
        state = m.state_dict()
        if given["tie_word_embeddings"]:
            del state["lm_head.weight"]
        write_decoder(name, LLAMA | given, state, m, shards)

    torch.manual_seed(1)
    # StarCoder: one key/value head, the output layer is the word embeddings and is not stored
    m = gpt(**STARCODER)
    state = m.state_dict()
    head = {"lm_head.weight": state.pop("lm_head.weight")}
    write_decoder("gpt-bigcode", STARCODER, state, m)
    # the same model with that layer stored all the same
    write_decoder("gpt-bigcode-head", STARCODER, state | head, m)
    # bigcode/santacoder: the model's own code, older than the library's
    m = gpt(**STARCODER | {"n_inner": None, "activation_function": "gelu_fast"})
    write_decoder("gpt2-custom", SANTACODER, santacoder(m.state_dict()), m)
    # Llama 2: a key/value head for every head
    llama("llama-mha", num_key_value_heads=4, rope_theta=1e4, rope_scaling=None,
          tie_word_embeddings=False)
    # two heads share one, tied; rope_theta as a whole number, which JSON may well hold
    llama("llama-gqa", num_key_value_heads=2, rope_theta=1000000, rope_scaling=None,
          tie_word_embeddings=True)
    # all share one, heads wider than hidden_size / heads; sharded; rope as version 5 writes it
    llama("llama-mqa", 2, num_key_value_heads=1, head_dim=6, tie_word_embeddings=False,
          rope_parameters={"rope_type": "default", "rope_theta": 1e6})


def roberta() -> None:
    """Positions from 2 on, one token type; id 1 is padding, and has no position of its own."""
    torch.manual_seed(2)
    config = RobertaConfig(**SHAPE | {"max_position_embeddings": 14}, type_vocab_size=1,
                           layer_norm_eps=1e-5, num_labels=3, pad_token_id=1)
    m = randomise(RobertaForSequenceClassification(config))
    folder = HERE / "roberta-classifier"
    folder.mkdir(exist_ok=True)
    kept = {key: value for key, value in config.to_dict().items() if key in KEPT}
    (folder / "config.json").write_text(json.dumps(kept, indent=1) + "\n")
    save_file({key: t.clone() for key, t in m.state_dict().items()},
              folder / "model.safetensors", {"format": "pt"})
    ids = torch.randint(2, 50, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:], mask[2, 4:] = 0, 0
    ids[mask == 0] = 1
    with torch.no_grad():
        out = m(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    expected = {"ids": ids, "mask": mask, "logits": out.logits}
    expected |= {f"hidden.{l}": h.clone() for l, h in enumerate(out.hidden_states[1:])}
    save_file(expected, folder / "expected.safetensors")


def main() -> None:
    torch.manual_seed(0)
    # BertModel.save_pretrained (MiniLM): no prefix; older versions left a stray integer buffer
    config = BertConfig(**SHAPE)
    m = randomise(BertModel(config))
    positions = {"embeddings.position_ids": torch.arange(12)[None]}
    write("bert-plain", config, m.state_dict() | positions, m)
    # bert-base-uncased: "bert." in front, LayerNorm.gamma/beta, pre-training heads beside it
    m = randomise(BertForPreTraining(config))
    old = {key.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t
           for key, t in m.state_dict().items()}
    write("bert-pretraining", config, old, m.bert)
    # a fine-tuned classifier with three classes, another activation and epsilon
    config = BertConfig(**SHAPE, hidden_act="gelu_new", layer_norm_eps=1e-5, num_labels=3)
    m = randomise(BertForSequenceClassification(config))
    write("bert-classifier", config, m.state_dict(), m.bert, m.classifier)
    decoders()
    roberta()


if __name__ == "__main__":
    main()
