"""f_Φ(x; W): transformers that slice themselves, with explicit low-rank adapters {A_s, B_s}.

Three ideas carry this file.
1. Φ is an argument: `logits, features = model(ids, mask, phi)` is z, h = f_Φ(x; Π_Φ(W_Sup)). No
   module holds "the active subnet", so switching costs nothing and no state can be stale.
2. Π_Φ takes the LEADING part of every weight (Eq. 2): a layer reads its input width off its input
   and is told its output width. `extract(phi)` slices the same way, once, into a small model.
3. Adapters stay factored (Eqs. 7-9): x A B costs r(in + out), no ΔW is built while training.
   ΔW = A B, A (in, r), B (r, out), as in the paper; PyTorch stores W as (out, in): W + (A B)ᵀ.

B batch, T tokens, H hidden size, N heads, D head size, F intermediate size, r rank, C classes.
"""
import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")  # of 1024: as fast, 0.4 GB less

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


# ------------------------------------------------------------------------------------------- Φ

@dataclass(frozen=True)
class SubnetConfig:
    """Φ, an architectural configuration (Sec. 4)."""
    hidden_size: int                                 # d_j
    num_attention_heads: int
    intermediate_size: int
    layers: tuple[int, ...]                          # 0-based maxnet layers: g_j(l) is layers[l]
    name: str = field(default="", compare=False)

    def __post_init__(self):
        if not self.name:
            sizes = f"h{self.hidden_size}-n{self.num_attention_heads}-f{self.intermediate_size}"
            object.__setattr__(self, "name", f"{sizes}-d{len(self.layers)}")


# --------------------------------------------------------------------------- the elastic parts

class ElasticLinear(nn.Module):
    """y = x W_Φᵀ + b_Φ + Σ_s (x A_s[:i]) B_s[:, :o]    (Eqs. 2, 8 and 9)"""

    def __init__(self, in_features: int, out_features: int, trainable: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=trainable)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=trainable)
        self.A, self.B = nn.ParameterList(), nn.ParameterList()      # one pair a stage

    def add_stage(self, rank: int, generator: torch.Generator) -> None:
        """Alg. 1 line 2. A is random, B is zero: a stage starts exactly where the last one ended.

        The paper leaves the start open; A ~ U(±1/√in) is LoRA's. No α/r factor: Eq. 7 has none.
        """
        out_features, in_features = self.weight.shape
        for earlier in (*self.A, *self.B):                           # line 13: "freeze W_Tch"
            earlier.requires_grad_(False)
        A = (torch.rand(in_features, rank, generator=generator) * 2 - 1) / in_features ** 0.5
        B = torch.zeros(rank, out_features)
        self.A.append(nn.Parameter(A.to(self.weight.device)))
        self.B.append(nn.Parameter(B.to(self.weight.device)))

    def forward(self, x: Tensor, out_features: int) -> Tensor:       # (..., i) -> (..., o)
        i, o = x.size(-1), out_features
        y = F.linear(x, self.weight[:o, :i], self.bias[:o])
        if len(self.A):                              # Σ_s A_s B_s = [A_0 A_1 A_2] [B_0; B_1; B_2]
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
            self.weight.data, self.bias.data = self.weight[outputs], self.bias[outputs]
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

    The one place that picks a kernel: in bfloat16 on a CPU the textbook's lines beat torch's fused
    kernel up to about 512 tokens, everywhere else the fused one wins.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.size(-2) < 512:
        scores = q @ k.transpose(-1, -2) * q.size(-1) ** -0.5        # (B, N, T, T)
        return (scores if bias is None else scores + bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "gelu_new": tanh_gelu, "gelu_fast": tanh_gelu,
               "gelu_pytorch_tanh": tanh_gelu}


# ------------------------------------------------------------------- what all families share

class SuperTransformer(nn.Module):
    """W_Sup of the maxnet, from which every Φ takes its part.

    A family adds its layers, its forward pass and its tensor names. `config` is the checkpoint's
    config.json, with `head_dim` and `num_labels` filled in.
    """
    adapted = ("query", "key", "value", "intermediate")      # App. A: QKV, FFN's intermediate
    head = ()                                        # trained in full, shared by all subnets
    tensor_names: dict[str, str] = {}                # ours -> the checkpoint's; {}: layer number

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.order: dict[str, Tensor] = {}           # what `permute` did; stored with the adapters

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
        """Freeze earlier adapters, add {A_s, B_s} (Alg. 1 line 2). ValueError if rank < 1."""
        if rank < 1:
            raise ValueError(f"the rank r of A and B must be at least 1, not {rank}")
        generator = torch.Generator().manual_seed(seed * 3 + self.num_stages)
        for linear in self.adapted_linears():
            linear.add_stage(rank, generator)

    def subnet_config(self, phi: SubnetConfig) -> dict:
        """config.json of Φ's stand-alone model."""
        sizes = {"hidden_size": phi.hidden_size, "num_attention_heads": phi.num_attention_heads,
                 "intermediate_size": phi.intermediate_size, "num_hidden_layers": len(phi.layers)}
        return self.config | sizes

    def skeleton(self, phi: SubnetConfig) -> "SuperTransformer":
        """Φ's stand-alone model, shapes only: whatever counts Φ's parts counts them here."""
        with torch.device("meta"):
            return type(self)(self.subnet_config(phi))

    def num_trainable(self, phi: SubnetConfig) -> int:
        """n_j: entries of the current {A_s, B_s} that Φ_j uses (Alg. 1 line 9).

        Prop. 2 says "only the LoRA matrices": the head is not counted.
        """
        rank = self.adapted_linears()[0].A[-1].size(1)
        return sum(rank * sum(linear.weight.shape)           # A has in·r entries, B has r·out
                   for linear in self.skeleton(phi).adapted_linears())

    @torch.no_grad()
    def extract(self, phi: SubnetConfig) -> "SuperTransformer":
        """W_Φ = Π_Φ(W_pretrained + Σ_s A_s B_s) (Eqs. 2, 8): merged, cut, copied, stand-alone."""
        small, depth, state = self.skeleton(phi), len(self.layers), {}
        if max(phi.layers) >= depth:
            raise ValueError(f"{phi.name} asks for layer {max(phi.layers)} of a model with layers "
                             f"0 to {depth - 1}")
        for name, part in small.named_parameters():
            owner, _, kind = name.rpartition(".")
            owner = re.sub(r"\d+", lambda l: str(phi.layers[int(l[0])]), owner)          # g_j(l)
            module = self.get_submodule(owner)
            merge = kind == "weight" and isinstance(module, ElasticLinear)
            whole = module.merged() if merge else getattr(module, kind)
            state[name] = whole[tuple(slice(n) for n in part.shape)].clone()             # Π_Φ
        small.load_state_dict(state, assign=True)
        return small

    def reorder(self, importance: dict[str, Tensor]) -> None:
        """Put the most important heads and neurons first, where every slice keeps them.

        The maxnet's function stays (as in DynaBERT, Hou et al., 2020). importance: "l.heads" (N,)
        and "l.neurons" (F,) for each layer l.
        """
        self.permute({key: score.argsort(descending=True, stable=True)
                      for key, score in importance.items()})

    def permute(self, order: dict[str, Tensor]) -> None:
        """New position -> old position, keys as in `reorder`."""
        D = self.config["head_dim"]
        for l, layer in enumerate(self.layers):
            heads, neurons = order[f"{l}.heads"], order[f"{l}.neurons"]
            rows = (heads[:, None] * D + torch.arange(D, device=heads.device)).flatten()
            for linear in (layer.query, layer.key, layer.value):
                linear.permute(outputs=rows)
            layer.attention_output.permute(inputs=rows)
            layer.intermediate.permute(outputs=neurons)
            layer.output.permute(inputs=neurons)
        self.order = {key: self.order[key][index] if key in self.order else index
                      for key, index in order.items()}

    def trained_state(self) -> dict[str, Tensor]:
        """What MLFS learned: {A_s, B_s}, the head, the permutation; a few MB a task (Sec. 3)."""
        state = {name: p.detach() for name, p in self.named_parameters()
                 if re.search(r"\.[AB]\.\d+$", name) or name.split(".")[0] in self.head}
        return state | {f"order.{key}": index for key, index in self.order.items()}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `trained_state`, on a freshly loaded base model.

        Raises ValueError naming the first tensor that does not fit.
        """
        order = {n.removeprefix("order."): t for n, t in state.items() if n.startswith("order.")}
        sizes = {"heads": self.maxnet.num_attention_heads, "neurons": self.maxnet.intermediate_size}
        for key in [f"{l}.{kind}" for l in self.maxnet.layers for kind in sizes] if order else []:
            whole = torch.arange(sizes[key.split(".")[1]])
            if key not in order or not torch.equal(order[key].sort().values, whole):
                raise ValueError(f"the adapters do not fit this base model: 'order.{key}' is no "
                                 f"permutation of its {len(whole)}")
        if order:
            self.permute(order)
        first = f"layers.0.{self.adapted[0]}.A."
        for s in range(sum(name.startswith(first) for name in state)):
            self.add_stage(state[first + str(s)].size(1))
        own = self.trained_state()
        for name in sorted({*own, *state}):
            if name not in state or name not in own or own[name].shape != state[name].shape:
                raise ValueError(f"the adapters do not fit this base model: tensor {name!r} is "
                                 f"missing, extra or misshapen")
            own[name].copy_(state[name])

    @torch.no_grad()
    def initialise(self, seed: int = 0, names: tuple[str, ...] = ("",)) -> "SuperTransformer":
        """BERT's start for parameters whose name starts so: N(0, 0.02²), biases 0, norms 1."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if name.startswith(names):
                if p.dim() == 2:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
                else:
                    p.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        return self


# ---------------------------------------------------------------------------------------- BERT

class BertLayer(nn.Module):
    """Post-LN: normalisation after each residual sum."""

    def __init__(self, c: dict):
        super().__init__()
        H, A, I = c["hidden_size"], c["num_attention_heads"] * c["head_dim"], c["intermediate_size"]
        self.query, self.key, self.value = (ElasticLinear(H, A) for _ in range(3))
        self.attention_output = ElasticLinear(A, H)
        self.attention_norm = ElasticLayerNorm(H, c["layer_norm_eps"])
        self.intermediate = ElasticLinear(H, I)
        self.output = ElasticLinear(I, H)
        self.output_norm = ElasticLayerNorm(H, c["layer_norm_eps"])
        self.head_dim, self.activation = c["head_dim"], ACTIVATIONS[c["hidden_act"]]

    def forward(self, x: Tensor, bias: Tensor | None, phi: SubnetConfig) -> Tensor:
        N = phi.num_attention_heads                                          # x is (B, T, H)
        q, k, v = (linear(x, N * self.head_dim).unflatten(-1, (N, -1)).transpose(1, 2)
                   for linear in (self.query, self.key, self.value))         # (B, N, T, D)
        context = attention(q, k, v, bias).transpose(1, 2).flatten(2)        # (B, T, N·D)
        x = self.attention_norm(x + self.attention_output(context, phi.hidden_size))
        inner = self.activation(self.intermediate(x, phi.intermediate_size))     # (B, T, F)
        return self.output_norm(x + self.output(inner, phi.hidden_size))


class Bert(SuperTransformer):
    """BERT with a pooler and a classifier; one class (`num_labels` 1) is regression.

    No dropout: teacher and subnets are compared on one and the same function.
    """
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
        """The last hidden state (B, T, H), and h_Φ: the state after each layer, by maxnet layer."""
        H, positions = phi.hidden_size, torch.arange(ids.size(1), device=ids.device)
        segments = torch.zeros_like(ids) if segments is None else segments
        x = self.embedding_norm(
            self.word_embeddings(ids, H) + self.position_embeddings(positions, H)
            + self.token_type_embeddings(segments, H))
        bias, features = None, {}
        if mask is not None:                                         # lowest where padded, else 0
            bias = torch.zeros(mask.shape, dtype=x.dtype, device=x.device)
            bias = bias.masked_fill(mask == 0, torch.finfo(x.dtype).min)[:, None, None]
        for l in phi.layers:                                         # g_j(1), g_j(2), ...
            x = features[l] = self.layers[l](x, bias, phi)
        return x, features

    def forward(self, ids: Tensor, mask: Tensor | None = None, phi: SubnetConfig | None = None,
                segments: Tensor | None = None) -> tuple[Tensor, dict[int, Tensor]]:
        """z (B, C) in float32, and h_Φ; ids, segments, mask (B, T), mask 1 for a real token."""
        phi = phi or self.maxnet
        x, features = self.encode(ids, mask, phi, segments)
        first = x[:, 0].to(self.pooler.weight.dtype)                 # the head stays in float32
        pooled = torch.tanh(self.pooler(first, phi.hidden_size))     # (B, H)
        return self.classifier(pooled, self.config["num_labels"]).float(), features

    @staticmethod
    def canonical(name: str) -> str:
        """One name for a tensor: with or without "bert.", LayerNorm.gamma/beta or weight/bias."""
        name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
        return name.replace("LayerNorm.beta", "LayerNorm.bias")


# ------------------------------------------------------------------------- loading and saving

FAMILIES = {"bert": Bert}
SIZES = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size",
         "num_hidden_layers", "max_position_embeddings", "type_vocab_size")


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
    """config.json with defaults filled in; ValueError names a field that this code cannot serve."""
    path = folder / "config.json"
    given = read_json(path)
    config = {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"} | given
    for key in SIZES:
        if type(config.get(key)) is not int or config[key] < 1:
            raise ValueError(f"{path}: {key} must be a positive whole number, not "
                             f"{config.get(key)!r}")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if "head_dim" not in config and hidden % heads:
        raise ValueError(f"{path}: hidden_size {hidden} is not a multiple of num_attention_heads "
                         f"{heads}, and there is no head_dim")
    config.setdefault("head_dim", hidden // heads)
    for key, kind in (("head_dim", int), ("layer_norm_eps", float)):
        if type(config[key]) is not kind or not config[key] > 0:
            raise ValueError(f"{path}: {key} must be a positive number, not {config[key]!r}")
    for key, known in (("model_type", FAMILIES), ("hidden_act", ACTIVATIONS),
                       ("position_embedding_type", ["absolute"])):
        if config.get(key, "absolute") not in list(known):
            raise ValueError(f"{path}: {key} {config.get(key)!r} is not supported; choose from "
                             f"{', '.join(known)}")
    return config


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, memory-mapped: none is read before it is used."""
    path = folder / "model.safetensors"
    if not path.exists():
        pickles = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt*")))
        if pickles:
            raise ValueError(f"{folder} holds only a pickle ({pickles[0]}), which can run code "
                             f"when read; weights/README.md tells how to convert it to safetensors")
        raise FileNotFoundError(f"there is no {path}; weights/README.md tells how to get one")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from None


def load_pretrained(folder: str | Path, num_labels: int | None = None,
                    dtype: torch.dtype | None = None) -> SuperTransformer:
    """The checkpoint in `folder`, frozen but for its head.

    num_labels: classes wanted. A classifier in the checkpoint is used when it has that many (or
    when None); else a new one starts, from torch's global seed. dtype: of the frozen weights (None:
    as in the file); the head is float32. Raises FileNotFoundError or ValueError: a missing, extra
    or misshapen tensor is named, never guessed.
    """
    folder, found = Path(folder), {}
    config = read_config(folder)
    family = FAMILIES[config["model_type"]]
    for name, tensor in read_checkpoint(folder).items():
        key = family.canonical(name)
        if key in found:
            raise ValueError(f"{folder}: tensor {key!r} is there twice, under two spellings")
        if not family.ignored.fullmatch(key):
            found[key] = tensor
    classes = len(found.get("classifier.weight", ()))
    fresh = not classes or num_labels not in (None, classes)
    if fresh:
        found = {key: t for key, t in found.items() if not key.startswith("classifier.")}
    config["num_labels"] = num_labels or classes or 2
    with torch.device("meta"):
        model = family(config)
    state = {}
    for name, p in model.named_parameters():
        key = checkpoint_name(family, name)
        if fresh and name.startswith("classifier."):
            state[name] = torch.empty(p.shape)
            continue
        if key not in found:
            raise ValueError(f"{folder}: tensor {key!r} is missing from the checkpoint")
        tensor = found.pop(key)
        if tensor.shape != p.shape:
            raise ValueError(f"{folder}: tensor {key!r} is {tuple(tensor.shape)}; config.json asks "
                             f"for {tuple(p.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{folder}: tensor {key!r} is {tensor.dtype}, not floating point")
        state[name] = tensor.to(torch.float32 if p.requires_grad else dtype or tensor.dtype)
    if found:
        raise ValueError(f"{folder}: tensor {min(found)!r} has no place in a "
                         f"{config['model_type']} model")
    model.load_state_dict(state, assign=True)
    if fresh:
        model.initialise(torch.randint(2 ** 31, ()).item(), ("classifier.",))
    return model


def checkpoint_name(family: type[SuperTransformer], name: str) -> str:
    """layers.3.query.bias -> encoder.layer.3.attention.self.query.bias"""
    module, _, kind = name.rpartition(".")
    layer = re.search(r"\d+", module)
    return family.tensor_names[re.sub(r"\d+", "{}", module)].format(layer and layer[0]) + "." + kind


@contextmanager
def replacing(path: str | Path):
    """Yields a path beside `path` to write to; it replaces `path` only once the block ends well."""
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
    """An ordinary checkpoint (config.json, model.safetensors) of a merged model: see `extract`.

    Raises FileExistsError if the folder holds one already, ValueError if adapters are not merged.
    """
    folder, state = Path(folder), {}
    if model.num_stages:
        raise ValueError("merge the adapters first: save_pretrained(model.extract(phi), folder)")
    for path in (folder / "config.json", folder / "model.safetensors"):
        if path.exists():
            raise FileExistsError(f"{path} exists already; choose another folder, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    for name, p in model.named_parameters():
        key = checkpoint_name(type(model), name)
        state[key if key.startswith("classifier.") else "bert." + key] = p.detach().contiguous()
    with replacing(folder / "model.safetensors") as path:
        save_file(state, path, {"format": "pt"})
    labels = {f"LABEL_{i}": i for i in range(model.config["num_labels"])}
    config = model.config | {"architectures": ["BertForSequenceClassification"], "label2id": labels,
                             "id2label": {str(i): label for label, i in labels.items()}}
    with replacing(folder / "config.json") as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
