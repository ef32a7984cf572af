"""f_Φ(x; W): transformers that slice themselves, with explicit low-rank adapters {A_s, B_s}.

Three ideas carry this file.
1. Φ is an argument. `logits, features = model(ids, mask, phi)` is the paper's z, h = f_Φ(x; Π_Φ(W_Sup)). No module ever
   holds "the active subnet", so switching subnets costs nothing and no state can be stale.
2. Π_Φ takes the LEADING part of every weight (Eq. 2). A layer reads its input width off its input and is told its output
   width. `extract(phi)` does the same slicing once, and returns an ordinary small model.
3. The adapters stay factored: x A B costs r(in + out), and no ΔW (in x out) is ever built while training (Eqs. 7-9).
   Paper's orientation: ΔW = A B with A (in, r) and B (r, out); PyTorch stores W as (out, in), so W + ΔWᵀ.

Dimension letters: B batch, T tokens, H hidden size, N heads, D head size, F intermediate size, r rank, C classes.
"""
import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


# ---------------------------------------------------------------------------------------------------------------- Φ

@dataclass(frozen=True)
class SubnetConfig:
    """Φ, an architectural configuration (Sec. 4). `layers` holds 0-based maxnet indices: g_j(l) is `layers[l]`."""
    hidden_size: int                      # d_j, H
    num_attention_heads: int              # N
    intermediate_size: int                # F
    layers: tuple[int, ...]               # g_j
    name: str = field(default="", compare=False)

    def __post_init__(self):
        if not self.name:
            sizes = f"h{self.hidden_size}-n{self.num_attention_heads}-f{self.intermediate_size}"
            object.__setattr__(self, "name", f"{sizes}-d{len(self.layers)}")


# ------------------------------------------------------------------------------------------------- the elastic parts

class ElasticLinear(nn.Module):
    """y = x W_Φᵀ + b_Φ + Σ_s (x A_s[:i]) B_s[:, :o]    (Eqs. 2, 8 and 9)"""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, trainable: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=trainable)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=trainable) if bias else None
        self.A, self.B = nn.ParameterList(), nn.ParameterList()      # one pair a stage

    def add_stage(self, rank: int, generator: torch.Generator) -> None:
        """Line 2 of Alg. 1. A is random, B is zero: a new stage starts exactly where the last one ended.

        The paper is silent on the start; A ~ U(±1/√in) is that of LoRA's code. No α/r factor: Eq. 7 has none.
        """
        out_features, in_features = self.weight.shape
        for earlier in (*self.A, *self.B):                           # "freeze W_Tch" (Sec. 5), Alg. 1 line 13
            earlier.requires_grad_(False)
        A = (torch.rand(in_features, rank, generator=generator) * 2 - 1) / in_features ** 0.5
        self.A.append(nn.Parameter(A.to(self.weight.device)))
        self.B.append(nn.Parameter(torch.zeros(rank, out_features, device=self.weight.device)))

    def forward(self, x: Tensor, out_features: int) -> Tensor:       # (..., i) -> (..., o)
        i, o = x.size(-1), out_features
        y = F.linear(x, self.weight[:o, :i], self.bias if self.bias is None else self.bias[:o])
        if len(self.A):                                              # Σ_s A_s B_s = [A_0 A_1 A_2] [B_0; B_1; B_2]
            A = torch.cat([A[:i] for A in self.A], dim=1).to(x.dtype)
            B = torch.cat([B[:, :o] for B in self.B], dim=0).to(x.dtype)
            y = y + (x @ A) @ B
        return y

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W_Sup = W_pretrained + Σ_s A_s B_s (Alg. 1, output), as (out, in) in the dtype of W."""
        delta = sum(A.float() @ B.float() for A, B in zip(self.A, self.B))
        return (self.weight.float() + delta.T).to(self.weight.dtype) if len(self.A) else self.weight

    @torch.no_grad()
    def permute(self, inputs: Tensor | None = None, outputs: Tensor | None = None) -> None:
        """Re-order input columns or output rows of W, and of every A_s, B_s with it."""
        if outputs is not None:
            self.weight.data = self.weight[outputs]
            if self.bias is not None:
                self.bias.data = self.bias[outputs]
            for B in self.B:
                B.data = B[:, outputs]
        if inputs is not None:
            self.weight.data = self.weight[:, inputs]
            for A in self.A:
                A.data = A[inputs]


class ElasticLayerNorm(nn.Module):
    """Layer normalisation over the width that arrives, with the leading gains and shifts."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        i = x.size(-1)
        return F.layer_norm(x, (i,), self.weight[:i], self.bias[:i], self.eps)


class ElasticEmbedding(nn.Module):
    """The leading columns of an embedding table."""

    def __init__(self, rows: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size), requires_grad=False)

    def forward(self, ids: Tensor, size: int) -> Tensor:             # (B, T) -> (B, T, H)
        return F.embedding(ids, self.weight[:, :size])


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q kᵀ/√D + bias) v; q, k, v (B, N, T, D), bias broadcastable to (B, N, T, T) or None.

    The one place that picks a kernel: on a CPU in bfloat16 the three textbook lines beat torch's fused one up to about
    512 tokens (2.2 against 19.4 ms at B=64, N=12, T=16, forward and backward); everywhere else the fused one wins.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.size(-2) < 512:
        scores = q @ k.transpose(-1, -2) * q.size(-1) ** -0.5        # (B, N, T, T)
        return (scores if bias is None else scores + bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu,
               **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), lambda x: F.gelu(x, approximate="tanh"))}


# ---------------------------------------------------------------------------------------- what all families share

class SuperTransformer(nn.Module):
    """Weights W_Sup of the maxnet, from which every Φ takes its part. A family adds its layers, forward and tensor names.

    `config` is the checkpoint's config.json as a dict, with `head_dim` added.
    """
    adapted = ("query", "key", "value", "intermediate")              # App. A: QKV and the FFN's intermediate projection
    head = ()                                                        # trained in full, shared by all subnets
    tensor_names: dict[str, str] = {}                                # ours -> the checkpoint's; {} is a layer number

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.order: dict[str, Tensor] = {}                           # what `permute` did, to be stored with the adapters

    @property
    def maxnet(self) -> SubnetConfig:
        """Φ_1: the teacher's own configuration (Sec. 4)."""
        c, depth = self.config, self.config["num_hidden_layers"]
        return SubnetConfig(c["hidden_size"], c["num_attention_heads"], c["intermediate_size"],
                            tuple(range(depth)), name=f"w1-d{depth}")

    def adapted_linears(self) -> list[ElasticLinear]:
        return [getattr(layer, name) for layer in self.layers for name in self.adapted]

    @property
    def num_stages(self) -> int:
        return len(self.adapted_linears()[0].A)

    def add_stage(self, rank: int, seed: int = 0) -> None:
        """Freeze the earlier adapters and add {A_s, B_s} (Alg. 1 line 2). Raises ValueError if rank < 1."""
        if rank < 1:
            raise ValueError(f"the rank r of A and B must be at least 1, not {rank}")
        generator = torch.Generator().manual_seed(seed * 3 + self.num_stages)
        for linear in self.adapted_linears():
            linear.add_stage(rank, generator)

    def subnet_config(self, phi: SubnetConfig) -> dict:
        """config.json of the stand-alone model of Φ."""
        return {**self.config, "hidden_size": phi.hidden_size, "num_attention_heads": phi.num_attention_heads,
                "intermediate_size": phi.intermediate_size, "num_hidden_layers": len(phi.layers)}

    def skeleton(self, phi: SubnetConfig) -> "SuperTransformer":
        """The stand-alone model of Φ without memory: shapes only. Everything that counts Φ's parts counts here."""
        with torch.device("meta"):
            return type(self)(self.subnet_config(phi))

    def num_trainable(self, phi: SubnetConfig) -> int:
        """n_j: entries of the current stage's {A_s, B_s} that Φ_j uses (Alg. 1 line 9; Prop. 2: "only the LoRA matrices")."""
        rank = self.adapted_linears()[0].A[-1].size(1)
        return sum(rank * sum(linear.weight.shape) for linear in self.skeleton(phi).adapted_linears())

    @torch.no_grad()
    def extract(self, phi: SubnetConfig) -> "SuperTransformer":
        """W_Φ = Π_Φ(W_pretrained + Σ_s A_s B_s) (Eqs. 2, 8), merged, sliced and copied into a stand-alone model."""
        small, maxnet = self.skeleton(phi), self.maxnet
        if max(phi.layers) >= len(maxnet.layers):
            raise ValueError(f"{phi.name} asks for layer {max(phi.layers)}; this model has layers 0..{len(maxnet.layers) - 1}")
        state = {}
        for name, part in small.named_parameters():
            source = re.sub(r"^layers\.(\d+)", lambda m: f"layers.{phi.layers[int(m[1])]}", name)   # g_j(l)
            module, kind = self.get_submodule(source.rpartition(".")[0]), source.rpartition(".")[2]
            whole = module.merged() if kind == "weight" and isinstance(module, ElasticLinear) else getattr(module, kind)
            state[name] = whole[tuple(slice(n) for n in part.shape)].clone()                     # Π_Φ: the leading part
        small.load_state_dict(state, assign=True)
        return small.train(self.training)

    def reorder(self, importance: dict[str, Tensor]) -> None:
        """Put the most important heads and neurons first, where every slice keeps them; the maxnet's function stays.

        importance: "layer.heads" (N,) and "layer.neurons" (F,) for each layer number. As in DynaBERT (Hou et al., 2020).
        """
        self.permute({key: score.argsort(descending=True, stable=True) for key, score in importance.items()})

    def permute(self, order: dict[str, Tensor]) -> None:
        for l, layer in enumerate(self.layers):
            heads, neurons = order[f"{l}.heads"], order[f"{l}.neurons"]
            D = self.config["head_dim"]
            rows = (heads[:, None] * D + torch.arange(D, device=heads.device)).flatten()
            for linear in (layer.query, layer.key, layer.value):
                linear.permute(outputs=rows)
            layer.attention_output.permute(inputs=rows)
            layer.intermediate.permute(outputs=neurons)
            layer.output.permute(inputs=neurons)
        self.order = {key: index if key not in self.order else self.order[key][index] for key, index in order.items()}

    def trained_state(self) -> dict[str, Tensor]:
        """What MLFS learned: {A_s, B_s}, the head and the permutation. A few MB a task beside one base model (Sec. 3)."""
        state = {name: p.detach() for name, p in self.named_parameters()
                 if re.search(r"\.[AB]\.\d+$", name) or name.split(".")[0] in self.head}
        return state | {f"order.{key}": index for key, index in self.order.items()}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `trained_state`, on a freshly loaded base model. Raises ValueError naming what does not fit."""
        order = {name.removeprefix("order."): t for name, t in state.items() if name.startswith("order.")}
        if order:
            self.permute(order)
        first = f"layers.0.{self.adapted[0]}.A."
        for s in range(sum(name.startswith(first) for name in state)):
            self.add_stage(state[first + str(s)].size(1))
        own = self.trained_state()
        for name in sorted({*own, *state}):
            if name not in state or name not in own or own[name].shape != state[name].shape:
                raise ValueError(f"the adapters do not fit this base model: tensor {name!r} is missing, extra or misshapen")
            own[name].copy_(state[name])

    @torch.no_grad()
    def initialise(self, seed: int = 0, names: tuple[str, ...] = ("",)) -> "SuperTransformer":
        """BERT's start, N(0, 0.02²), norms 1, biases 0, for the parameters whose name starts with one of `names`."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if name.startswith(names):
                if p.dim() == 2:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
                else:
                    p.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        return self


# -------------------------------------------------------------------------------------------------------------- BERT

class BertLayer(nn.Module):
    """Post-LN: normalisation after each residual sum."""

    def __init__(self, c: dict):
        super().__init__()
        H, A, F_, eps = c["hidden_size"], c["num_attention_heads"] * c["head_dim"], c["intermediate_size"], c["layer_norm_eps"]
        self.head_dim = c["head_dim"]
        self.query, self.key, self.value = ElasticLinear(H, A), ElasticLinear(H, A), ElasticLinear(H, A)
        self.attention_output, self.attention_norm = ElasticLinear(A, H), ElasticLayerNorm(H, eps)
        self.intermediate, self.output, self.output_norm = ElasticLinear(H, F_), ElasticLinear(F_, H), ElasticLayerNorm(H, eps)
        self.activation = ACTIVATIONS[c["hidden_act"]]

    def forward(self, x: Tensor, bias: Tensor | None, phi: SubnetConfig) -> Tensor:      # (B, T, H) -> (B, T, H)
        heads = phi.num_attention_heads
        q, k, v = (linear(x, heads * self.head_dim).unflatten(-1, (heads, -1)).transpose(1, 2)
                   for linear in (self.query, self.key, self.value))                     # (B, N, T, D)
        context = attention(q, k, v, bias).transpose(1, 2).flatten(2)                    # (B, T, N·D)
        x = self.attention_norm(x + self.attention_output(context, phi.hidden_size))
        hidden = self.activation(self.intermediate(x, phi.intermediate_size))            # (B, T, F)
        return self.output_norm(x + self.output(hidden, phi.hidden_size))


class Bert(SuperTransformer):
    """BERT with a pooler and a classifier; one class (`num_labels` 1) is regression. No dropout: teacher and subnets are
    compared on the same function."""
    head = ("pooler", "classifier")
    ignored = re.compile(r"cls\.(predictions|seq_relationship)\..*|embeddings\.position_ids")
    tensor_names = {
        "word_embeddings": "embeddings.word_embeddings",
        "position_embeddings": "embeddings.position_embeddings",
        "token_type_embeddings": "embeddings.token_type_embeddings",
        "embedding_norm": "embeddings.LayerNorm",
        "layers.{}.query": "encoder.layer.{}.attention.self.query",
        "layers.{}.key": "encoder.layer.{}.attention.self.key",
        "layers.{}.value": "encoder.layer.{}.attention.self.value",
        "layers.{}.attention_output": "encoder.layer.{}.attention.output.dense",
        "layers.{}.attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
        "layers.{}.intermediate": "encoder.layer.{}.intermediate.dense",
        "layers.{}.output": "encoder.layer.{}.output.dense",
        "layers.{}.output_norm": "encoder.layer.{}.output.LayerNorm",
        "pooler": "pooler.dense",
        "classifier": "classifier",
    }

    def __init__(self, config: dict):
        super().__init__(config)
        c, H = config, config["hidden_size"]
        self.word_embeddings = ElasticEmbedding(c["vocab_size"], H)
        self.position_embeddings = ElasticEmbedding(c["max_position_embeddings"], H)
        self.token_type_embeddings = ElasticEmbedding(c["type_vocab_size"], H)
        self.embedding_norm = ElasticLayerNorm(H, c["layer_norm_eps"])
        self.layers = nn.ModuleList(BertLayer(c) for _ in range(c["num_hidden_layers"]))
        self.pooler = ElasticLinear(H, H, trainable=True)
        self.classifier = ElasticLinear(H, c["num_labels"], trainable=True)

    def encode(self, ids: Tensor, mask: Tensor | None, phi: SubnetConfig,
               segments: Tensor | None) -> tuple[Tensor, dict[int, Tensor]]:
        """The last hidden state (B, T, H) and the hidden state after each layer, keyed by maxnet layer: h_Φ."""
        H = phi.hidden_size
        positions = torch.arange(ids.size(1), device=ids.device)
        segments = torch.zeros_like(ids) if segments is None else segments
        x = self.embedding_norm(self.word_embeddings(ids, H) + self.position_embeddings(positions, H)
                                + self.token_type_embeddings(segments, H))               # (B, T, H)
        bias = None
        if mask is not None:                                                             # 0 where real, -inf-like where padded
            bias = torch.zeros(mask.shape, dtype=x.dtype, device=x.device)
            bias = bias.masked_fill(mask == 0, torch.finfo(x.dtype).min)[:, None, None]  # (B, 1, 1, T)
        features = {}
        for l in phi.layers:                                                             # l = g_j(1), g_j(2), ...
            x = features[l] = self.layers[l](x, bias, phi)
        return x, features

    def forward(self, ids: Tensor, mask: Tensor | None = None, phi: SubnetConfig | None = None,
                segments: Tensor | None = None) -> tuple[Tensor, dict[int, Tensor]]:
        """z (B, C) in float32 and h_Φ; ids, segments (B, T) integers, mask (B, T) 1 where a token is real."""
        phi = phi or self.maxnet
        x, features = self.encode(ids, mask, phi, segments)
        first = x[:, 0].to(self.pooler.weight.dtype)                                     # the head stays in float32
        pooled = torch.tanh(self.pooler(first, phi.hidden_size))                         # (B, H)
        return self.classifier(pooled, self.config["num_labels"]).float(), features

    @staticmethod
    def canonical(name: str) -> str:
        """One name for a tensor whichever BERT wrote it: with or without "bert.", LayerNorm.gamma or LayerNorm.weight."""
        name = name.removeprefix("bert.")
        return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


# -------------------------------------------------------------------------------------------------- loading and saving

FAMILIES = {"bert": Bert}
REQUIRED = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers",
            "max_position_embeddings", "type_vocab_size")


def read_json(path: Path) -> dict:
    """A JSON object; FileNotFoundError or ValueError with the path and what is wrong."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {path}") from None
    except ValueError as error:                                      # bad JSON and bad UTF-8 both
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def read_config(folder: Path) -> dict:
    """config.json, checked, with `head_dim` added. ValueError names the field that this code cannot serve."""
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") not in FAMILIES:
        raise ValueError(f"{path}: model_type {config.get('model_type')!r} is not supported; choose from {', '.join(FAMILIES)}")
    config.setdefault("type_vocab_size", 2)
    for key in REQUIRED:
        if not isinstance(config.get(key), int) or isinstance(config[key], bool) or config[key] < 1:
            raise ValueError(f"{path}: {key} must be a positive whole number, not {config.get(key)!r}")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if "head_dim" not in config and hidden % heads:
        raise ValueError(f"{path}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and head_dim is not given")
    config.setdefault("head_dim", hidden // heads)
    config.setdefault("layer_norm_eps", 1e-12)
    config.setdefault("hidden_act", "gelu")
    if config["hidden_act"] not in ACTIVATIONS:
        raise ValueError(f"{path}: hidden_act {config['hidden_act']!r} is not supported; choose from {', '.join(ACTIVATIONS)}")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"{path}: position_embedding_type {config['position_embedding_type']!r} is not supported, only 'absolute'")
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of model.safetensors, memory-mapped: nothing is read before it is used, and nothing is ever unpickled."""
    path = folder / "model.safetensors"
    if not path.exists():
        pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        if pickles:
            raise ValueError(f"{folder} holds only a pickle ({pickles[0]}), which can run code when read; convert it once with "
                             f"safetensors.torch.save_file(torch.load({pickles[0]!r}, weights_only=True), 'model.safetensors')")
        raise FileNotFoundError(f"there is no {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None


def load_pretrained(folder: str | Path, num_labels: int | None = None, dtype: torch.dtype | None = None) -> SuperTransformer:
    """The checkpoint in `folder` as one of our models, frozen but for its head.

    num_labels: classes wanted; a classifier in the checkpoint is used when it has that many (or when None), else a new one
    starts from torch's global seed. dtype: of the frozen weights (None keeps the file's); the head is float32 always.
    Raises FileNotFoundError or ValueError with one sentence: a missing, extra or misshapen tensor is named, never guessed.
    """
    folder = Path(folder)
    config, tensors = read_config(folder), read_tensors(folder)
    family, found = FAMILIES[config["model_type"]], {}
    for name, tensor in tensors.items():
        key = family.canonical(name)
        if family.ignored.fullmatch(key):
            continue
        if key in found:
            raise ValueError(f"{folder}: tensor {key!r} is there twice, under two spellings")
        found[key] = tensor
    classifier = found.get("classifier.weight")
    if classifier is not None and num_labels not in (None, len(classifier)):
        found = {key: t for key, t in found.items() if not key.startswith("classifier.")}
        classifier = None
    config["num_labels"] = num_labels or (2 if classifier is None else len(classifier))
    with torch.device("meta"):
        model = family(config)
    state = {}
    for name, parameter in model.named_parameters():
        key = checkpoint_name(family, name)
        if key not in found and name.startswith("classifier."):      # a pretrained model has none: a new one
            state[name] = torch.empty(parameter.shape)
            continue
        if key not in found:
            raise ValueError(f"{folder}: tensor {key!r} is missing from the checkpoint")
        tensor = found.pop(key)
        if tensor.shape != parameter.shape:
            raise ValueError(f"{folder}: tensor {key!r} is {tuple(tensor.shape)}; config.json asks for {tuple(parameter.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{folder}: tensor {key!r} is {tensor.dtype}, not floating point")
        state[name] = tensor.to(torch.float32 if parameter.requires_grad else dtype or tensor.dtype)
    if found:
        raise ValueError(f"{folder}: tensor {min(found)!r} has no place in a {config['model_type']} model")
    model.load_state_dict(state, assign=True)
    return model if classifier is not None else model.initialise(torch.randint(2 ** 31, ()).item(), ("classifier.",))


def checkpoint_name(family: type[SuperTransformer], name: str) -> str:
    """The checkpoint world's name of one of our parameters: layers.3.query.bias -> encoder.layer.3.attention.self.query.bias."""
    module, _, kind = name.rpartition(".")
    layer = re.search(r"\d+", module)
    return family.tensor_names[re.sub(r"\d+", "{}", module)].format(layer and layer[0]) + "." + kind


@contextmanager
def replacing(path: str | Path):
    """Yields a path beside `path` to write to; it takes the place of `path` only once the block has ended well."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save_pretrained(model: SuperTransformer, folder: str | Path) -> None:
    """An ordinary checkpoint (config.json, model.safetensors) of a model without adapters: see `extract`.

    Raises FileExistsError if the folder already holds one, ValueError if adapters are still apart from the weights.
    """
    folder = Path(folder)
    if model.num_stages:
        raise ValueError("merge the adapters first: save_pretrained(model.extract(phi), folder)")
    for name in ("config.json", "model.safetensors"):
        if (folder / name).exists():
            raise FileExistsError(f"{folder / name} exists already; choose another folder or delete it first")
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, p in model.named_parameters():
        key = checkpoint_name(type(model), name)
        state[key if key.startswith("classifier.") else "bert." + key] = p.detach().contiguous()
    with replacing(folder / "model.safetensors") as path:
        save_file(state, path, metadata={"format": "pt"})
    labels = {"id2label": {str(i): f"LABEL_{i}" for i in range(model.config["num_labels"])},
              "label2id": {f"LABEL_{i}": i for i in range(model.config["num_labels"])}}
    with replacing(folder / "config.json") as path:
        path.write_text(json.dumps(labels | model.config | {"architectures": ["BertForSequenceClassification"]}, indent=2) + "\n")
