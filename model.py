"""f_Φ(x; W): transformers that slice themselves, with explicit low-rank adapters {A_s, B_s}.

Three ideas carry this file.
1. Φ is an argument: `logits, features = model(ids, mask, phi)` is z, h = f_Φ(x; Π_Φ(W_Sup)). No
   module holds "the active subnet", so switching costs nothing and no state can be stale.
2. Π_Φ takes the LEADING part of every weight (Eq. 2): a layer reads its input width off its input
   and is told its output width. `extract(phi)` slices the same way, once, into a small model.
3. Adapters stay factored (Eqs. 7-9): x A B costs r(in + out), no ΔW is built while training.
   ΔW = A B, A (in, r), B (r, out), as in the paper; PyTorch stores W as (out, in): W + (A B)ᵀ.

Read to the end of BERT: all ideas are there. Decoders, files and, last, speed come after it.

B batch, T tokens, S tokens attended to, H hidden size, N heads, G key/value heads, D head size,
I intermediate size, r rank, C classes, V vocabulary.
"""
import copy
import errno
import json
import os
import re
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------- Φ

@dataclass(frozen=True)
class SubnetConfig:
    """Φ, an architectural configuration (Sec. 4)."""
    hidden_size: int                                 # d_j
    num_attention_heads: int
    intermediate_size: int
    layers: tuple[int, ...]                          # 0-based maxnet layers: g_j(l) is layers[l]
    name: str = field(default="", compare=False)     # by default its sizes

    def __post_init__(self):
        object.__setattr__(self, "name", self.name or str(astuple(self)[:4]))


# --------------------------------------------------------------------------- the elastic parts

ALL = slice(None)                                    # as an index: each row in its place


def parameter(*shape, trainable=False):
    return nn.Parameter(torch.empty(shape), requires_grad=trainable)


class ElasticLinear(nn.Module):
    """y = x W_Φᵀ + b_Φ + Σ_s (x A_s) B_s, all of it sliced by Φ    (Eqs. 2, 8 and 9)"""

    def __init__(self, in_features, out_features, bias=True, trainable=False):
        super().__init__()
        self.weight = parameter(out_features, in_features, trainable=trainable)
        self.bias = parameter(out_features, trainable=trainable) if bias else None
        self.A = nn.ParameterList()                  # A_0, A_1, A_2: one a stage that trains
        self.B = nn.ParameterList()

    def add_stage(self, rank, generator):
        """Alg. 1 line 2: new A_s and B_s, with A_s B_s = 0."""
        # Lines 13 and 15 train A_s and B_s of this stage alone.
        self.A.requires_grad_(False)
        self.B.requires_grad_(False)
        # B is zero, so a stage starts exactly where the last one ended. A must not be: with
        # g = ∂ℓ/∂y A's gradient is xᵀ (g Bᵀ), B's is (x A)ᵀ g: two zeros would stay zeros.
        # The paper leaves the start open. A ~ U(±1/√in) is LoRA's; no α/r factor: Eq. 7 has none.
        out_features, in_features = self.weight.shape
        A = (torch.rand(in_features, rank, generator=generator) * 2 - 1) / in_features ** 0.5
        B = torch.zeros(rank, out_features)
        self.A.append(nn.Parameter(A.to(self.weight.device)))
        self.B.append(nn.Parameter(B.to(self.weight.device)))

    def forward(self, x, out_features):                              # (..., i) -> (..., o)
        i = x.size(-1)                               # what came before was sliced to this width
        o = out_features
        W = self.weight[:o, :i]                      # Π_Φ(W): the leading block, a view    (Eq. 2)
        b = None if self.bias is None else self.bias[:o]
        # Entry (m, n) of A_s B_s is row m of A_s times column n of B_s. So the leading block of the
        # product needs the leading rows of A_s and the leading columns of B_s, no more    (Eq. 9).
        A = [A_s[:i] for A_s in self.A]
        B = [B_s[:, :o] for B_s in self.B]
        return low_rank_linear(x, W, b, A, B)        # x Wᵀ + b + Σ_s (x A_s) B_s

    @torch.no_grad()
    def merged(self):
        """W_Sup = W_pretrained + Σ_s A_s B_s (Alg. 1, output), as (out, in) in the dtype of W."""
        if not self.A:
            return self.weight
        delta = sum(A_s.float() @ B_s.float() for A_s, B_s in zip(self.A, self.B))
        return (self.weight.float() + delta.T).to(self.weight.dtype)

    @torch.no_grad()
    def permute(self, inputs=ALL, outputs=ALL):
        """Re-order input columns or output rows of W, and of every A_s, B_s with it."""
        self.weight.data = self.weight[outputs][:, inputs]
        if self.bias is not None:
            self.bias.data = self.bias[outputs]
        for A_s, B_s in zip(self.A, self.B):
            A_s.data = A_s[inputs]
            B_s.data = B_s[:, outputs]


class ElasticLayerNorm(nn.Module):
    """Layer normalisation over the width that arrives, with the leading gains and shifts."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = parameter(size)
        self.bias = parameter(size)
        self.eps = eps

    def forward(self, x):
        i = x.size(-1)
        return F.layer_norm(x, (i,), self.weight[:i], self.bias[:i], self.eps)


class ElasticEmbedding(nn.Module):
    """The leading columns of an embedding table."""

    def __init__(self, rows, size):
        super().__init__()
        self.weight = parameter(rows, size)

    def forward(self, ids, size):                                    # (B, T) -> (B, T, H)
        return F.embedding(ids, self.weight[:, :size])


def attention(q, k, v, bias):
    """softmax(q kᵀ/√D + bias) v; q (B, N, T, D), k and v (B, G, S, D): N/G heads share a key head.

    bias is (B or 1, 1, T, S), of one row where all T have the same, or None. Returns (B, N, T, D).
    """
    _, N, T, D = q.shape
    G = k.size(1)
    if G < N and T > 1 and q.device.type != "cpu":
        # A GPU works on all heads of a gradient at once: with one for all it is mostly idle.
        k = k.repeat_interleave(N // G, dim=1)
        v = v.repeat_interleave(N // G, dim=1)
    elif G < N:
        # Heads that share a key are just more queries of it: no key is copied.
        q = q.reshape(-1, G, N // G * T, D)
        if bias is not None and T > 1:
            bias = bias.repeat(1, 1, N // G, 1)
    # In bfloat16 on a CPU these lines beat torch's kernel; measured from 2 to 511 tokens.
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < T < 512:
        scores = q * D ** -0.5 @ k.transpose(-1, -2)                 # (B, G, N/G·T, S)
        if bias is not None:
            scores.add_(bias)
        context = scores.softmax(-1) @ v
    else:
        # The same function; it keeps no (T, S) scores for the backward pass.
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return context.reshape(-1, N, T, D)


def split_heads(x, D):                                               # (B, T, n·D) -> (B, n, T, D)
    return x.unflatten(-1, (-1, D)).transpose(1, 2)


def mask_bias(unseen, dtype):
    """What attention adds to its scores: the lowest number where `unseen`, 0 elsewhere."""
    return unseen.to(dtype) * torch.finfo(dtype).min


tanh_gelu = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "gelu_new": tanh_gelu,
               "gelu_fast": tanh_gelu, "gelu_pytorch_tanh": tanh_gelu}


# ------------------------------------------------------------------- what all families share

class SuperTransformer(nn.Module):
    """W_Sup of the maxnet, from which every Φ takes its part.

    A family is a subclass: its layers, its forward pass (`encode`, `logits`), and the rules of its
    checkpoints (the names below, `complete`, `read`, `write`, `adopt`). `config` is config.json in
    our words, with `head_dim` filled in.
    """
    adapted = ("query", "key", "value", "intermediate")      # App. A: QKV, FFN's intermediate
    trained_whole = ()                               # without adapters; shared by all subnets
    head_group = 1                                   # heads are kept or dropped by so many
    first_position = 0                               # row of the first token in a position table
    has_head_dim = False                             # whether other libraries' config.json has one
    model_type = architecture = ""                   # the checkpoint world's names of the class
    tensor_names = {}                                # ours -> the checkpoint's, part by part
    ignored = ""                                     # pattern of stored names without a meaning
    config_names = {}                                # the same for config.json
    defaults = {}                                    # of fields that config.json may leave out
    required = {}                                    # fields of which we implement one value
    sizes = ("intermediate_size", "head_dim")        # fields to be whole numbers, after `complete`

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.num_stages = 0
        self.gradient_checkpointing = False          # keep no activations inside layers; recompute
        self.order = {}                              # what `permute` did; stored with the adapters
        self.drawn = []                              # parts of the head that no checkpoint had
        self.notes = []                              # what loading left out or took for granted

    def forward(self, ids, mask=None, phi=None, **more):
        """z, h = f_Φ(x; Π_Φ(W_Sup)); ids and mask (B, T), mask 1 for a real token (Sec. 4).

        h: hidden states keyed by maxnet layer, all of Φ's, or those of `features`. (Sec. 4 names
        attention values, too; Sec. 5's loss reads none.) ValueError if Φ is no part of the maxnet.
        """
        phi = phi or self.maxnet
        self.subnet_config(phi)                      # ValueError if it cannot be
        more.setdefault("features", phi.layers)
        last, h = self.encode(ids, mask, phi, **more)
        return self.logits(last), h

    def layer(self, l, *inputs):
        """The output of maxnet layer l."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.layers[l], *inputs, use_reentrant=False)
        return self.layers[l](*inputs)

    @property
    def maxnet(self):
        """Φ_1: the teacher's own configuration (Sec. 4)."""
        c = self.config
        depth = c["num_hidden_layers"]
        return SubnetConfig(c["hidden_size"], c["num_attention_heads"], c["intermediate_size"],
                            tuple(range(depth)), name=f"w1-d{depth}")

    @property
    def max_tokens(self):
        """The longest input, in tokens."""
        return self.config["max_position_embeddings"] - self.first_position

    @property
    def device(self):
        return next(self.parameters()).device

    @property
    def linears(self):
        """The names of a layer's linear maps: six, of a Llama seven."""
        return tuple(name for name, module in self.layers[0].named_children()
                     if isinstance(module, ElasticLinear))

    def adapted_linears(self):
        return [getattr(layer, name) for layer in self.layers for name in self.adapted]

    def add_stage(self, rank, seed=0):
        """Freeze earlier adapters, add {A_s, B_s} (Alg. 1 line 2). ValueError if rank < 1.

        rank None: no adapters, all of W is trained ("full-rank (non-LoRA) MLFS", App. B).
        """
        if rank is None:
            self.requires_grad_()
        elif rank < 1:
            raise ValueError(f"the rank r of A and B must be at least 1, not {rank}")
        else:
            generator = torch.Generator().manual_seed(seed * 3 + self.num_stages)
            for linear in self.adapted_linears():
                linear.add_stage(rank, generator)
        self.num_stages += 1

    def fix_teacher(self, pairs=1):
        """f(·; W_Tch), with stage 0's `pairs`: 1, or none (Sec. 4). Freezes this model's head."""
        # A second set of modules that hold the same tensors: for deepcopy they are copied already.
        teacher = copy.deepcopy(self, {id(p): p for p in self.parameters()})
        for linear in teacher.adapted_linears():
            linear.A = linear.A[:pairs]
            linear.B = linear.B[:pairs]
        # Both read one head. Trained on, it would change the teacher that is to be fixed.
        for name in self.trained_whole:
            getattr(self, name).requires_grad_(False)
        return teacher

    def num_trainable(self, phi):
        """n_j: entries of the current {A_s, B_s} that Φ_j uses (Alg. 1 line 9).

        Prop. 2 says "only the LoRA matrices": the head is not counted. No adapters: all of Φ_j.
        """
        small = self.skeleton(phi)
        adapters = self.adapted_linears()[0].A
        if not adapters:
            return sum(p.numel() for p in small.parameters())
        rank = adapters[-1].size(1)
        # A has in·r entries, B has r·out.
        return sum(rank * sum(getattr(layer, name).weight.shape)
                   for layer in small.layers for name in self.adapted)

    def subnet_config(self, phi):
        """config.json of Φ's stand-alone model; ValueError if Φ is no part of the maxnet."""
        sizes = {"hidden_size": phi.hidden_size, "num_attention_heads": phi.num_attention_heads,
                 "intermediate_size": phi.intermediate_size, "num_hidden_layers": len(phi.layers)}
        layers = tuple(l for l in self.maxnet.layers if l in phi.layers)
        if phi.layers != layers or not all(0 < n <= self.config[key] for key, n in sizes.items()):
            raise ValueError(f"{phi} is no part of the maxnet, {self.maxnet}")
        return self.config | sizes

    def skeleton(self, phi):
        """Φ's stand-alone model, shapes only: whatever counts Φ's parts counts them here."""
        with torch.device("meta"):
            return type(self)(self.subnet_config(phi))

    @torch.no_grad()
    def extract(self, phi):
        """W_Φ = Π_Φ(W_pretrained + Σ_s A_s B_s) (Eqs. 2, 8): merged, cut, copied, stand-alone."""
        small = self.skeleton(phi)
        state = {}
        for name, part in small.named_parameters():
            *path, kind = name.split(".")
            if path[0] == "layers":
                path[1] = str(phi.layers[int(path[1])])              # its layer l is our g_j(l)
            module = self.get_submodule(".".join(path))
            merge = kind == "weight" and isinstance(module, ElasticLinear)
            whole = module.merged() if merge else getattr(module, kind)
            corner = tuple(map(slice, part.shape))                   # Π_Φ: the leading block
            state[name] = whole[corner].clone()
        small.load_state_dict(state, assign=True)
        return small

    @classmethod
    def complete(cls, config):
        """Fills in what a family's config.json leaves unsaid; ValueError for what we cannot do."""

    def reorder(self, importance):
        """Put the most important heads and neurons first, where every slice keeps them.

        As in DynaBERT (Hou et al., 2020). importance: "l.heads" (N,) and "l.neurons" (I,) for each
        layer l. Heads that share a key move together, by their sum.
        """
        order = {}
        for key, score in importance.items():
            group = self.head_group if key.endswith("heads") else 1
            first = score.view(-1, group).sum(1).argsort(descending=True, stable=True)
            order[key] = blocks(first, group)
        self.permute(order)

    def permute(self, order):
        """New position -> old position, keys as in `reorder`; the maxnet's function stays.

        A head is D rows of query, key and value, and the D columns of attention_output that read
        them. A neuron is a row of intermediate (and gate), and the column of output that reads it.
        Moved together, they are the same terms of the same sum in another order.
        """
        D = self.config["head_dim"]
        group = self.head_group
        for l, layer in enumerate(self.layers):
            neurons = order[f"{l}.neurons"]
            heads = order[f"{l}.heads"]
            of_heads = blocks(heads, D)
            # Heads of a group share a key, and moved together: each group's first one tells where.
            of_keys = blocks(heads[::group] // group, D)
            if len(layer.key.weight) == D:           # the only key of a multi-query model stays
                of_keys = ALL
            rows = {"query": of_heads, "key": of_keys, "value": of_keys,
                    "intermediate": neurons, "gate": neurons}
            columns = {"attention_output": of_heads, "output": neurons}
            for name in self.linears:
                getattr(layer, name).permute(columns.get(name, ALL), rows.get(name, ALL))
        self.order = {key: self.order[key][index] if key in self.order else index
                      for key, index in order.items()}

    def trained_state(self):
        """What MLFS learned: {A_s, B_s}, the head, the permutation; a few MB a task (Sec. 3)."""
        state = {}
        for name, p in self.named_parameters():
            part, *path = name.split(".")
            if p.requires_grad or part in self.trained_whole or {"A", "B"} & {*path}:
                state[name] = p.detach()
        return state | {f"order.{key}": index for key, index in self.order.items()}


def blocks(index, size):
    """Rows of whole blocks: (2, 0) of size 3 is 6 7 8 0 1 2."""
    return (index[:, None] * size + torch.arange(size, device=index.device)).flatten()


# ---------------------------------------------------------------------------------------- BERT

class BertLayer(nn.Module):
    """Post-LN: normalisation after each residual sum x + f(x)."""

    def __init__(self, c):
        super().__init__()
        H = c["hidden_size"]
        I = c["intermediate_size"]
        all_heads = c["num_attention_heads"] * c["head_dim"]
        self.query = ElasticLinear(H, all_heads)
        self.key = ElasticLinear(H, all_heads)
        self.value = ElasticLinear(H, all_heads)
        self.attention_output = ElasticLinear(all_heads, H)
        self.attention_norm = ElasticLayerNorm(H, c["layer_norm_eps"])
        self.intermediate = ElasticLinear(H, I)
        self.output = ElasticLinear(I, H)
        self.output_norm = ElasticLayerNorm(H, c["layer_norm_eps"])
        self.head_dim = c["head_dim"]
        self.activation = ACTIVATIONS[c["hidden_act"]]

    def forward(self, x, bias, phi, tokens):
        """(B, S, H) -> (B, T, H): the states of the first T = `tokens`; None: of all."""
        H = phi.hidden_size
        N = phi.num_attention_heads
        D = self.head_dim
        # Only the first `tokens` states are read afterwards, so only they get a query.
        q = split_heads(self.query(x[:, :tokens], N * D), D)                     # (B, N, T, D)
        k = split_heads(self.key(x, N * D), D)                                   # (B, N, S, D)
        v = split_heads(self.value(x, N * D), D)                                 # (B, N, S, D)
        context = attention(q, k, v, bias).transpose(1, 2).flatten(2)            # (B, T, N·D)
        # f(x).add_(x) is x + f(x), written over f(x): a layer takes 3 to 6% less time.
        x = self.attention_norm(self.attention_output(context, H).add_(x[:, :tokens]))
        inner = self.activation(self.intermediate(x, phi.intermediate_size))     # (B, T, I)
        return self.output_norm(self.output(inner, H).add_(x))


class Bert(SuperTransformer):
    """BERT with a pooler and a classifier; one class (`num_labels` 1) is regression.

    No dropout: teacher and subnets are compared on one and the same function.
    """
    trained_whole = ("pooler", "classifier")
    model_type = "bert"
    architecture = "BertForSequenceClassification"
    defaults = {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    required = {"position_embedding_type": "absolute"}
    sizes = (*SuperTransformer.sizes, "type_vocab_size")
    ignored = r"cls\.(predictions|seq_relationship)\..*|embeddings\.position_ids"
    tensor_names = {
        "word_embeddings": "embeddings.word_embeddings",
        "position_embeddings": "embeddings.position_embeddings",
        "token_type_embeddings": "embeddings.token_type_embeddings",
        "embedding_norm": "embeddings.LayerNorm",
        "layers": "encoder.layer",
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attention_output": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
        "output_norm": "output.LayerNorm",
        "pooler": "pooler.dense",
    }

    def __init__(self, c):
        super().__init__(c)
        H = c["hidden_size"]
        self.word_embeddings = ElasticEmbedding(c["vocab_size"], H)
        self.position_embeddings = ElasticEmbedding(c["max_position_embeddings"], H)
        self.token_type_embeddings = ElasticEmbedding(c["type_vocab_size"], H)
        self.embedding_norm = ElasticLayerNorm(H, c["layer_norm_eps"])
        self.layers = nn.ModuleList(BertLayer(c) for _ in range(c["num_hidden_layers"]))
        # The head is trained whole from stage 0 on, one for all subnets (ours: Algorithm 1 names
        # A_s, B_s alone). A new task's classifier starts from nothing; the pooler goes with it.
        self.pooler = ElasticLinear(H, H, trainable=True)
        self.classifier = ElasticLinear(H, c["num_labels"], trainable=True)

    def embed(self, ids, segments, H):                               # (B, T, H)
        positions = torch.arange(ids.size(1), device=ids.device) + self.first_position
        # With one row there is one segment (RoBERTa): a pair's second sentence has it, too.
        if segments is None or self.config["type_vocab_size"] == 1:
            segments = torch.zeros_like(ids)
        return self.embedding_norm(
            self.word_embeddings(ids, H) + self.position_embeddings(positions, H)
            + self.token_type_embeddings(segments, H))

    def encode(self, ids, mask, phi, segments=None, features=()):
        """The first token's last state (B, H), and h_Φ: the states (B, T, H) after `features`."""
        x = self.embed(ids, segments, phi.hidden_size)
        bias = None if mask is None else mask_bias(mask == 0, x.dtype)[:, None, None]
        h = {}
        for l in phi.layers:                                         # g_j(1), g_j(2), ...
            # Of the last layer the head reads one token. Unless a loss compares the others, to
            # compute it alone saves a seventh of the work of 6 layers.
            only_first = l == phi.layers[-1] and l not in features
            x = self.layer(l, x, bias, phi, 1 if only_first else None)
            if l in features:
                h[l] = x
        return x[:, 0], h

    def logits(self, last):                                          # (B, H) -> (B, C)
        last = last.to(self.pooler.weight.dtype)                     # the head stays in float32
        pooled = torch.tanh(self.pooler(last, last.size(-1)))        # (B, H)
        return self.classifier(pooled, self.config["num_labels"]).float()

    @classmethod
    def read(cls, name, tensor, config):
        """A stored tensor under its one name: without "bert.", LayerNorm.weight, not gamma."""
        name = name.removeprefix(f"{cls.model_type}.")
        name = name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")
        return {name: tensor}

    @classmethod
    def write(cls, tensors):
        """The inverse of `read`."""
        return {name if name.startswith("classifier.") else f"{cls.model_type}.{name}": t
                for name, t in tensors.items()}

    @classmethod
    def adopt(cls, stored, config, num_labels):
        """The checkpoint's classifier stays where it has the classes wanted."""
        name = checkpoint_name(cls, "classifier")
        classes = stored.get(f"{name}.weight", torch.empty(0)).shape[:1].numel()
        config["num_labels"] = num_labels or classes or 2
        if classes != config["num_labels"]:          # `draw_head` makes a new one
            for kind in ("weight", "bias"):
                stored.pop(f"{name}.{kind}", None)


# ------------------------------------------------------------------------------------ decoders

class ElasticRMSNorm(nn.Module):
    """Root-mean-square normalisation over the width that arrives, with the leading gains."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = parameter(size)
        self.eps = eps

    def forward(self, x):
        i = x.size(-1)
        return F.rms_norm(x, (i,), self.weight[:i], self.eps)


def key_heads(config, heads):
    """How many key/value heads so many of the model's heads read.

    Llama has one for each group of heads, and whole groups are kept or dropped. SantaCoder has one
    for all heads (multi-query): no slice can do without it, so it is never cut.
    """
    G = config["num_key_value_heads"]
    return heads * G // config["num_attention_heads"] if G > 1 else 1


class Cache:
    """Keys and values of the tokens so far, by maxnet layer: generation reads each token once."""

    def __init__(self, size):
        self.size = size                             # most tokens it will hold
        self.length = 0
        self.parts = {}

    def extend(self, l, k, v):
        """Appends (B, G, T, D), returns all there is (B, G, S, D). `encode` counts the length."""
        S = self.length + k.size(2)
        if l not in self.parts:
            self.parts[l] = [x.new_empty(*x.shape[:2], self.size, x.size(3)) for x in (k, v)]
        keys, values = self.parts[l]
        keys[:, :, self.length:S] = k
        values[:, :, self.length:S] = v
        return keys[:, :, :S], values[:, :, :S]


class DecoderLayer(nn.Module):
    """Pre-LN: normalisation before attention and FFN; groups of heads share a key/value head.

    As it stands, SantaCoder's: FFN(x) = gelu(x W_1) W_2, biases everywhere, no rotation.
    """

    def __init__(self, l, c, norm=ElasticLayerNorm, bias=True):
        super().__init__()
        H = c["hidden_size"]
        D = c["head_dim"]
        I = c["intermediate_size"]
        N = c["num_attention_heads"]
        G = c["num_key_value_heads"]
        self.attention_norm = norm(H, c["layer_norm_eps"])
        self.ffn_norm = norm(H, c["layer_norm_eps"])
        self.query = ElasticLinear(H, N * D, bias)
        self.key = ElasticLinear(H, G * D, bias)
        self.value = ElasticLinear(H, G * D, bias)
        self.attention_output = ElasticLinear(N * D, H, bias)
        self.intermediate = ElasticLinear(H, I, bias)
        self.output = ElasticLinear(I, H, bias)
        self.number = l
        self.config = c
        self.activation = ACTIVATIONS[c["hidden_act"]]

    def forward(self, x, bias, phi, rotation, cache):
        H = phi.hidden_size
        D = self.config["head_dim"]
        N = phi.num_attention_heads
        G = key_heads(self.config, N)                # multi-query: 1, for however many heads
        a = self.attention_norm(x)                                               # (B, T, H)
        q = split_heads(self.query(a, N * D), D)                                 # (B, N, T, D)
        k = split_heads(self.key(a, G * D), D)                                   # (B, G, T, D)
        v = split_heads(self.value(a, G * D), D)                                 # (B, G, T, D)
        q = self.rotate(q, rotation)
        k = self.rotate(k, rotation)
        if cache is not None:
            k, v = cache.extend(self.number, k, v)                               # (B, G, S, D)
        context = attention(q, k, v, bias).transpose(1, 2).flatten(2)            # (B, T, N·D)
        # As in BERT, each sum x + f(x) is written over f(x).
        x = self.attention_output(context, H).add_(x)
        inner = self.inner(self.ffn_norm(x), phi.intermediate_size)              # (B, T, I)
        return self.output(inner, H).add_(x)

    def rotate(self, x, rotation):
        return x

    def inner(self, x, intermediate_size):
        return self.activation(self.intermediate(x, intermediate_size))


class Decoder(SuperTransformer):
    """A causal language model: logits of the next token. Nothing is trained but A_s, B_s."""

    def __init__(self, c, norm):
        super().__init__(c)
        H = c["hidden_size"]
        V = c["vocab_size"]
        self.word_embeddings = ElasticEmbedding(V, H)
        self.final_norm = norm(H, c["layer_norm_eps"])
        self.lm_head = None if c["tie_word_embeddings"] else ElasticEmbedding(V, H)

    @property
    def head_group(self):
        """Heads that share a key/value head stay together, unless all share the only one."""
        N = self.config["num_attention_heads"]
        G = self.config["num_key_value_heads"]
        return N // G if G > 1 else 1

    def subnet_config(self, phi):
        heads = phi.num_attention_heads
        if heads % self.head_group:
            raise ValueError(f"{phi.name} has {heads} heads; this model's come in groups of "
                             f"{self.head_group} that share a key")
        kept = {"num_key_value_heads": key_heads(self.config, heads)}
        return super().subnet_config(phi) | kept

    def encode(self, ids, mask, phi, cache=None, features=()):
        """Each token's last state (B, T, H), and h_Φ: those after layers `features`, normalised.

        With a cache, ids continue the tokens in it, and mask covers both. Pad on either side.
        ValueError for more tokens than the model has positions.
        """
        start = cache.length if cache else 0
        T = ids.size(1)
        S = start + T
        if S > self.max_tokens:
            raise ValueError(f"{S} tokens exceed the model's {self.max_tokens} positions")
        positions = torch.arange(start, S, device=ids.device)[None]                  # (1, T)
        unseen = positions.mT < torch.arange(S, device=ids.device)                   # (T, S)
        if mask is not None:
            # Positions count real tokens only: padding on the left moves none of them.
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:]                # (B, T)
            unseen = unseen | (mask == 0)[:, None, None]                             # (B, 1, T, S)
        x, rotation = self.embed(ids, positions, phi.hidden_size)
        # One token alone may see all that came before it.
        all_seen = T == 1 and mask is None
        bias = None if all_seen else mask_bias(unseen, x.dtype).view(-1, 1, T, S)
        h = {}
        for l in phi.layers:                                         # g_j(1), g_j(2), ...
            x = self.layer(l, x, bias, phi, rotation, cache)
            if l in features:
                # The residual stream of a pre-LN model grows without bound. With a root mean square
                # of 1, as inside a post-LN BERT, ℓ_FD can compare it (ours).
                h[l] = F.rms_norm(x, x.shape[-1:], eps=1e-6)
        if cache is not None:
            cache.length = S
        return self.final_norm(x), h

    def logits(self, last):                                          # (..., H) -> (..., V)
        W = (self.lm_head or self.word_embeddings).weight            # the embedding's where tied
        return F.linear(last, W[:, :last.size(-1)]).float()

    @classmethod
    def complete(cls, config):
        heads = config["num_attention_heads"]
        config.setdefault("num_key_value_heads", heads)
        check_size(config, "num_key_value_heads")
        check(config, "num_key_value_heads", heads % config["num_key_value_heads"] == 0,
              f"a divisor of num_attention_heads, {heads}")

    @classmethod
    def adopt(cls, stored, config, num_labels):
        """A tied output matrix may be stored as well, or as the only one of the two."""
        if config["tie_word_embeddings"] and "lm_head.weight" in stored:
            twin = stored.pop("lm_head.weight")
            embedding = stored.setdefault(checkpoint_name(cls, "word_embeddings.weight"), twin)
            if twin.dtype != embedding.dtype or not torch.equal(twin, embedding):
                raise ValueError("tensor 'lm_head.weight' differs from the embedding, though "
                                 "tie_word_embeddings is true")


class GPT(Decoder):
    """SantaCoder: learned positions, one key/value head for all heads (multi-query attention)."""
    model_type = "gpt_bigcode"
    architecture = "GPTBigCodeForCausalLM"
    config_names = {
        "hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
        "intermediate_size": "n_inner", "max_position_embeddings": "n_positions",
        "layer_norm_eps": "layer_norm_epsilon", "hidden_act": "activation_function",
    }
    defaults = {"layer_norm_eps": 1e-5, "hidden_act": "gelu_pytorch_tanh",
                "tie_word_embeddings": True, "num_key_value_heads": 1}
    required = {"multi_query": True, "attention_head_type": "multiquery",
                "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
                "tie_word_embeddings": True}
    tensor_names = {
        "word_embeddings": "wte", "position_embeddings": "wpe", "final_norm": "ln_f",
        "layers": "h", "attention_norm": "ln_1", "ffn_norm": "ln_2",
        "query": "attn.query", "key": "attn.key", "value": "attn.value",
        "attention_output": "attn.c_proj", "intermediate": "mlp.c_fc", "output": "mlp.c_proj",
    }
    ignored = r"h\.\d+\.attn\.(masked_)?bias"        # buffers: the causal mask
    # gpt_bigcode fuses all three into c_attn; SantaCoder's own code (gpt2) has q_attn and kv_attn.
    fused = {"c_attn": ("query", "key", "value"), "q_attn": ("query",), "kv_attn": ("key", "value")}

    def __init__(self, c):
        super().__init__(c, ElasticLayerNorm)
        self.position_embeddings = ElasticEmbedding(c["max_position_embeddings"], c["hidden_size"])
        self.layers = nn.ModuleList(DecoderLayer(l, c) for l in range(c["num_hidden_layers"]))

    def embed(self, ids, positions, H):
        return self.word_embeddings(ids, H) + self.position_embeddings(positions, H), None

    @classmethod
    def complete(cls, config):
        config.setdefault("intermediate_size", 4 * config["hidden_size"])
        if config["model_type"] == "gpt2":           # one key a head, unless it says otherwise
            config.setdefault("attention_head_type", "multihead")
        super().complete(config)

    @classmethod
    def read(cls, name, tensor, config):
        """A stored tensor as ours: Conv1D transposed, fused query, key and value taken apart."""
        name = name.removeprefix("transformer.")
        if config["model_type"] == "gpt2" and name.startswith("h.") and tensor.dim() == 2:
            tensor = tensor.T                                        # Conv1D keeps (in, out)
        for module, parts in cls.fused.items():
            if f".attn.{module}." in name:
                # First the rows of query, N heads of D; then D of the one key, D of its value.
                # Taken apart here, they are sliced like any other matrix.
                D = config["head_dim"]
                N = config["num_attention_heads"]
                rows = [N * D if part == "query" else D for part in parts]
                if tensor.shape[:1] != (sum(rows),):
                    raise ValueError(f"tensor {short(name)} is {tuple(tensor.shape)}; config.json "
                                     f"asks for {sum(rows)} rows")
                names = [name.replace(module, part) for part in parts]
                return dict(zip(names, tensor.split(rows)))
        return {name: tensor}

    @staticmethod
    def write(tensors):
        """The inverse of `read`, in the gpt_bigcode layout."""
        stored = {}
        for name, t in tensors.items():
            fused = "transformer." + re.sub(r"attn\.(query|key|value)", "attn.c_attn", name)
            stored[fused] = torch.cat((stored[fused], t)) if fused in stored else t
        return stored


class LlamaLayer(DecoderLayer):
    """SwiGLU: FFN(x) = (silu(x W_gate) ⊙ x W_up) W_down; no biases; rotary positions."""

    def __init__(self, l, c):
        super().__init__(l, c, ElasticRMSNorm, bias=False)
        self.gate = ElasticLinear(c["hidden_size"], c["intermediate_size"], bias=False)

    def rotate(self, x, rotation):                                   # (B, n, T, D)
        """Turns the plane of dimensions i and i + D/2 by the angle position · base^(-2i/D)."""
        cos, sin = rotation                          # the first half of sin is negative
        left, right = x.chunk(2, dim=-1)
        return torch.addcmul(x * cos, torch.cat((right, left), dim=-1), sin)

    def inner(self, x, intermediate_size):
        gate = self.gate(x, intermediate_size)
        up = self.intermediate(x, intermediate_size)
        return self.activation(gate) * up


class Llama(Decoder):
    """CodeLlama, SmolLM2: RMSNorm, rotary positions, SwiGLU, grouped key/value heads."""
    adapted = ("query", "key", "value", "gate", "intermediate")
    model_type = "llama"
    architecture = "LlamaForCausalLM"
    has_head_dim = True
    config_names = {"layer_norm_eps": "rms_norm_eps"}
    defaults = {"layer_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
                "rope_theta": 1e4}
    required = {"attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0}
    ignored = r".*rotary_emb\.inv_freq"              # old buffers
    tensor_names = {
        "word_embeddings": "model.embed_tokens", "final_norm": "model.norm",
        "layers": "model.layers", "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "query": "self_attn.q_proj",
        "key": "self_attn.k_proj", "value": "self_attn.v_proj",
        "attention_output": "self_attn.o_proj", "gate": "mlp.gate_proj",
        "intermediate": "mlp.up_proj", "output": "mlp.down_proj",
    }

    def __init__(self, c):
        super().__init__(c, ElasticRMSNorm)
        self.layers = nn.ModuleList(LlamaLayer(l, c) for l in range(c["num_hidden_layers"]))

    def embed(self, ids, positions, H):
        """The embeddings, and cos and sin (B, 1, T, D) of the rotary angles, taken in float32."""
        x = self.word_embeddings(ids, H)
        D = self.config["head_dim"]
        rates = self.config["rope_theta"] ** -(torch.arange(0, D, 2, device=ids.device) / D)
        angles = positions[:, None, :, None] * rates                             # (B, 1, T, D/2)
        cos = angles.cos().to(x.dtype)
        sin = angles.sin().to(x.dtype)
        return x, (torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))

    @classmethod
    def complete(cls, config):
        super().complete(config)
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope = rope if isinstance(rope, dict) else {"type": rope}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"rotary scaling {short(kind)} is not supported")
        theta = config["rope_theta"] = rope.get("rope_theta", config["rope_theta"])
        fits = type(theta) in (int, float) and 1 <= theta <= 1e30
        check(config, "rope_theta", fits, "a number from 1 to 1e30")
        config["rope_theta"] = float(theta)
        if re.search("sliding|chunked", str(config.pop("layer_types", ""))):
            raise ValueError("layer_types with a sliding window are not supported")

    @classmethod
    def read(cls, name, tensor, config):
        return {name: tensor}

    @staticmethod
    def write(tensors):
        return tensors


# ------------------------------------------------------------------------------------- loading

FAMILIES = {"bert": Bert, "gpt_bigcode": GPT, "gpt2": GPT, "llama": Llama}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NEEDED = ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers",
          "max_position_embeddings")


def short(value):
    """For an error message: as Python writes it, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@contextmanager
def naming(where):
    """Adds to a ValueError where the wrong content stands."""
    try:
        yield
    except ValueError as error:
        what = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error
        raise ValueError(f"{where}: {what}") from None


def read_json(path):
    """A JSON object; FileNotFoundError or ValueError with the path and what is wrong."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {path}") from None
    except (ValueError, RecursionError) as error:    # bad JSON, bad UTF-8, too deeply nested
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


def read_config(folder):
    """config.json in our words, complete; ValueError names a field that this code cannot serve."""
    path = folder / "config.json"
    given = {key: value for key, value in read_json(path).items() if value is not None}
    kind = given.get("model_type")
    if kind not in list(FAMILIES):                   # a list: what is stored may have no hash
        raise ValueError(f"{path}: model_type {short(kind)} is not supported; set it to one of "
                         f"{', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    ours = {theirs: name for name, theirs in family.config_names.items()}
    config = family.defaults | {ours.get(key, key): value for key, value in given.items()}
    with naming(path):
        # First the numbers to compute with, then those that may have been filled in.
        for key in NEEDED:
            check_size(config, key)
        hidden = config["hidden_size"]
        heads = config["num_attention_heads"]
        check(config, "hidden_size", "head_dim" in config or hidden % heads == 0,
              f"a multiple of num_attention_heads, {heads}, where there is no head_dim")
        config.setdefault("head_dim", hidden // heads)
        family.complete(config)
        for key in family.sizes:
            check_size(config, key)
        check_choices(config)
    return config


def check(config, key, fits, rule):
    """ValueError unless the field's value fits; by the field's name in config.json."""
    if not fits:
        name = FAMILIES[config["model_type"]].config_names.get(key, key)
        raise ValueError(f"{name} {short(config.get(key))} is not supported, only {rule}")


def check_size(config, key):
    # No more layers than can be built in a moment.
    most = 2 ** {"max_position_embeddings": 24, "num_hidden_layers": 9}.get(key, 20)
    size = config.get(key)
    fits = type(size) is int and 1 <= size <= most
    check(config, key, fits, f"a whole number from 1 to {most}")


def check_choices(config):
    """The fields that are no sizes: what we have one or a few values for."""
    eps = config["layer_norm_eps"]
    fits = type(eps) is float and 0 < eps < 1
    check(config, "layer_norm_eps", fits, "a number between 0 and 1")
    choices = {"hidden_act": list(ACTIVATIONS), "tie_word_embeddings": [True, False]}
    required = FAMILIES[config["model_type"]].required
    choices |= {key: [value] for key, value in required.items()}
    for key, known in choices.items():
        fits = config.get(key, known[0]) in known
        check(config, key, fits, ", ".join(map(str, known)))
    for key in ("id2label", "label2id"):
        check(config, key, isinstance(config.get(key, {}), dict), "an object")


def checkpoint_files(folder):
    """model.safetensors, or the shards that model.safetensors.index.json names."""
    whole = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise ValueError(f"{index}: weight_map must name files")
        # Beside the index, whatever it says: no file elsewhere on this machine is read.
        names = set(map(str, places.values()))
        if odd := names - {path.name for path in folder.iterdir()}:
            raise ValueError(f"{index} names {short(min(odd))}, which is not beside it")
        return [folder / name for name in sorted(names)]
    # A pickle (pytorch_model.bin) is never read, for that can run code.
    raise FileNotFoundError(f"there is no {whole}; weights/README.md tells how to get one, or to "
                            f"convert a pickle (.bin, .pt)")


def read_checkpoint(folder):
    """All tensors of a checkpoint, memory-mapped: none is read before it is used."""
    for path in checkpoint_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                yield from [(name, file.get_tensor(name)) for name in file.keys()]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or cut short: {str(error)[:200]}") from None


def load_pretrained(folder, num_labels=None, dtype=None, labels=()):
    """The checkpoint in `folder`, frozen but for its head.

    Every parameter finds its tensor, and every tensor but a foreign head's its parameter.
    num_labels: classes wanted; a stored classifier is used when it has that many (or when None),
    otherwise a new one starts, from torch's global seed. labels: their names, see `order_classes`.
    dtype: of the frozen weights (None: as in the file); the head is float32. The model's `notes`
    say what was drawn or left out. FileNotFoundError or ValueError names a missing, extra,
    misshapen or not finite tensor.
    """
    folder = Path(folder)
    config = read_config(folder)
    family = FAMILIES[config["model_type"]]
    tensors = list(read_checkpoint(folder))
    with naming(folder):
        stored, foreign = tensors_by_name(tensors, family, config)
        family.adopt(stored, config, num_labels)
        with torch.device("meta"):                   # shapes only: tensors are assigned, not copied
            model = family(config)
        draw_head(model, stored)
        weights = {}
        for name, p in model.named_parameters():
            key = checkpoint_name(family, name)
            if key not in stored:
                raise ValueError(f"tensor {key!r} is missing from the checkpoint")
            weights[name] = fitted(key, stored.pop(key), p, dtype)
        if unknown := stored.keys() - foreign:
            raise ValueError(f"tensor {short(min(unknown))} has no place in a "
                             f"{config['model_type']} model")
        if stored:
            model.notes.append(f"left out, a foreign head: {sorted(stored)}")
    model.load_state_dict(weights, assign=True)
    if labels and "classifier" not in model.drawn:
        order_classes(model, labels)
    return model


def tensors_by_name(tensors, family, config):
    """All of them under the names of `tensor_names`; the names of what may be foreign."""
    network = {name.split(".")[0] for name in (*family.tensor_names.values(), "lm_head")}
    stored = {}
    foreign = set()
    for name, tensor in tensors:
        for key, part in family.read(name, tensor, config).items():
            if re.fullmatch(family.ignored, key):
                continue
            if key == name and key.split(".")[0] not in network:
                foreign.add(key)                     # neither "bert.", say, nor "encoder."
            if key in stored:
                raise ValueError(f"tensor {short(key)} is there twice, under two spellings")
            stored[key] = part
    return stored, foreign


def draw_head(model, stored):
    """Adds to `stored` what it lacks of the head: a masked LM, say, has no pooler."""
    for part in model.trained_whole:
        name = checkpoint_name(model, part)
        if not {f"{name}.weight", f"{name}.bias"} & stored.keys():
            seed = torch.randint(2 ** 31, ()).item()
            drawn = initialise(getattr(model, part).to_empty(device="cpu"), seed).state_dict()
            stored |= {f"{name}.{kind}": tensor for kind, tensor in drawn.items()}
            model.drawn.append(part)
            model.notes.append(f"no {part} that fits is stored: a new one is drawn")


def order_classes(model, labels):
    """Puts a stored classifier's rows where config.json's names of them say, in any case.

    GLUE's numbers are names, too. Where other names, or none, are there, the rows stay.
    """
    names = {str(name): row for row, name in model.config.get("id2label", {}).items()}
    names = model.config.get("label2id", {}) | names
    rows = {name.casefold(): str(row) for name, row in names.items()}
    order = [rows.get(label.casefold(), rows.get(str(i))) for i, label in enumerate(labels)]
    if set(order) == {str(i) for i in range(len(labels))}:
        model.classifier.permute(outputs=[int(row) for row in order])
    elif rows and "label_0" not in rows:
        model.notes.append(f"its classes {short(list(names))} are taken for {short(labels)}")


def fitted(key, tensor, p, dtype):
    """A stored tensor as p wants it; ValueError for another shape or kind, or what is not finite.
    """
    if tensor.shape != p.shape or tensor.dtype not in (*FLOATS, p.dtype):
        raise ValueError(f"tensor {key!r} is {tuple(tensor.shape)} in {tensor.dtype}, not "
                         f"{tuple(p.shape)} in floating point of 16 to 64 bits")
    if p.requires_grad:
        tensor = tensor.to(torch.float32).clone()    # a copy: a view would keep the file in memory
    else:
        tensor = tensor.to(dtype or tensor.dtype)
    if not torch.stack(tensor.aminmax()).isfinite().all():           # reads each value once
        raise ValueError(f"tensor {key!r} has a NaN or infinite value in {tensor.dtype}")
    return tensor


def checkpoint_name(family, name):
    """layers.3.query.bias -> encoder.layer.3.attention.self.query.bias"""
    return ".".join(family.tensor_names.get(part, part) for part in name.split("."))


def load_trained_state(model, state):
    """The inverse of `trained_state`, on a freshly loaded base model.

    ValueError names the first tensor that does not fit.
    """
    with naming("the adapters do not fit this base model"):
        if "order.0.heads" in state:
            model.permute(stored_order(model, state))
        first = f"layers.0.{model.adapted[0]}."
        if first + "weight" in state:                # full-rank MLFS: all of W is in there
            model.add_stage(None)
        if "layers.0.output.A.0" in state:           # an option; App. A has no pair there
            model.adapted = model.linears
        while (A_s := state.get(f"{first}A.{model.num_stages}")) is not None:
            model.add_stage(A_s.shape[-1:].numel())
        own = model.trained_state()
        if odd := own.keys() ^ state.keys():
            raise ValueError(f"tensor {short(min(odd))} is missing or extra")
        for name, tensor in own.items():
            tensor.copy_(fitted(name, state[name], tensor, None))


def stored_order(model, state):
    """`permute`'s argument; ValueError unless it permutes every layer's heads and neurons."""
    sizes = {"heads": model.maxnet.num_attention_heads, "neurons": model.maxnet.intermediate_size}
    order = {}
    for l in model.maxnet.layers:
        for kind, size in sizes.items():
            key = f"{l}.{kind}"
            index = order[key] = state.get(f"order.{key}", torch.empty(0))
            if (index.dtype != torch.int64
                    or not torch.equal(index.sort().values, torch.arange(size))):
                raise ValueError(f"'order.{key}' is no permutation of its {size}")
    return order


@torch.no_grad()
def initialise(model, seed=0):
    """The usual random start of all parameters: N(0, 0.02²), biases 0, gains 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
        else:
            p.fill_(1.0 if name.endswith("norm.weight") else 0.0)
    return model


# -------------------------------------------------------------------------------------- saving


@contextmanager
def replacing(path):
    """Yields a path beside `path` to write to; it replaces `path` only once the block ends well."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        mask = os.umask(0)
        os.umask(mask)
        try:
            with open(beside, "rb") as file:
                os.fsync(file.fileno())
            # The rights that the user's other new files get; safetensors' are private.
            beside.chmod(0o666 & ~mask)
        except OSError as error:
            # Some network mounts refuse both, and nothing is lost by that.
            if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
                raise
        os.replace(beside, path)
    except SafetensorError as error:                 # its words for an OSError
        raise OSError(f"{path} could not be written: {error}") from None
    finally:
        with suppress(OSError):                      # the folder itself may be gone
            beside.unlink()


def save_pretrained(model, folder, labels=()):
    """A checkpoint (config.json, model.safetensors) of a merged model: see `extract`.

    Where heads x head size is not the hidden size (a narrower BERT or SantaCoder), other libraries
    cannot express it (`common_heads`); `load_pretrained` reads it by its head_dim. labels: names of
    the classes. Raises FileExistsError if the folder holds one already.
    """
    assert not model.num_stages                      # merge adapters first, by `extract`
    folder = Path(folder)
    for path in (folder / "config.json", folder / "model.safetensors"):
        if path.exists():
            raise FileExistsError(f"{path} exists already; choose another folder, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {checkpoint_name(model, name): p.detach().contiguous()
               for name, p in model.named_parameters()}
    with replacing(folder / "model.safetensors") as path:
        save_file(model.write(tensors), path, {"format": "pt"})
    with replacing(folder / "config.json") as path:
        path.write_text(json.dumps(stored_config(model, labels), indent=2) + "\n")


# What config.json says of the original's weights, task and code.
STALE = ("_name_or_path", "auto_map", "dtype", "finetuning_task", "problem_type",
         "quantization_config", "task_specific_params", "torch_dtype")


def stored_config(model, labels):
    """config.json in the checkpoint world's words."""
    config = model.config | {"model_type": model.model_type, "architectures": [model.architecture]}
    for key in STALE:
        config.pop(key, None)
    if "num_labels" in config:
        labels = labels or [f"LABEL_{i}" for i in range(config["num_labels"])]
        if config["num_labels"] == 1:                # otherwise a pipeline takes a score's sigmoid
            config["problem_type"] = "regression"
        config["id2label"] = dict(enumerate(labels))
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    return {model.config_names.get(key, key): value for key, value in config.items()}


def common_heads(model):
    """The fewest heads, from ours on, with which other libraries can express this shape.

    Without a head_dim in their config.json they take the head size to be hidden_size / heads. With
    one (Llama) they still want heads to divide hidden_size. None if no number will do.
    """
    H = model.config["hidden_size"]
    for heads in range(model.config["num_attention_heads"], H + 1, model.head_group):
        if H % heads == 0 and (model.has_head_dim or H // heads == model.config["head_dim"]):
            return heads
    return None


@torch.no_grad()
def pad_heads(model, heads):
    """The same function with so many heads: the new ones are zeros, which no output reads."""
    config = model.config | {"num_attention_heads": heads}
    if "num_key_value_heads" in config:
        config["num_key_value_heads"] = key_heads(model.config, heads)
    padded = type(model)(config)
    # Strict: adapters, which have no place here, are to be merged first (`extract`).
    for new, old in zip(padded.parameters(), model.parameters(), strict=True):
        new.data = old.new_zeros(new.shape)
        corner = tuple(map(slice, old.shape))
        new[corner] = old
    return padded


# --------------------------------------------------------------------------------------- speed
# Nothing below changes a result by more than rounding. Each part says what it saves, and where.

def low_rank_linear(x, W, b, A, B):
    """x Wᵀ + b + Σ_s (x A_s) B_s. These lines say the same; stage 2 takes 1.12 times as long by
    them, stage 0 as long (MiniLM, float32, one thread, AMD EPYC):

        y = F.linear(x, W, b)
        for A_s, B_s in zip(A, B):
            y = y + x @ A_s.to(x.dtype) @ B_s.to(x.dtype)
    """
    if not A:
        return F.linear(x, W, b)
    A = torch.cat(A, dim=1).to(x.dtype)              # Σ_s A_s B_s = [A_0 A_1 A_2] [B_0; B_1; B_2]
    B = torch.cat(B, dim=0).to(x.dtype)
    return LowRankLinear.apply(x, W, b, A, B)


class LowRankLinear(torch.autograd.Function):
    """y = x Wᵀ + b + (x A) B (Eqs. 8 and 9): x (..., i), A (i, r), B (r, o), W (o, i), b frozen.

    Its gradient is by hand: sums go in place and nothing is kept that no gradient reads.
    """

    @staticmethod
    def forward(ctx, x, W, b, A, B):
        rows = x.reshape(-1, x.size(-1))                                         # (M, i)
        y = F.linear(rows, W, b)                                                 # (M, o)
        xA = rows @ A                                                            # (M, r)
        y.addmm_(xA, B)
        ctx.save_for_backward(rows, W, A, B, xA)
        # A plain view may not be written over, as BertLayer does with its sums.
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.size(1)])

    @staticmethod
    def backward(ctx, g):
        """dx = g W + (g Bᵀ) Aᵀ, dA = xᵀ (g Bᵀ), dB = (x A)ᵀ g; dW = gᵀ x if it is asked for."""
        rows, W, A, B, xA = ctx.saved_tensors
        g_rows = g.reshape(-1, g.size(-1))                                       # (M, o)
        gB = F.linear(g_rows, B)                                                 # (M, r)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (g_rows @ W).addmm_(gB, A.t()).view(*g.shape[:-1], W.size(1))
        dW = g_rows.t() @ rows if ctx.needs_input_grad[1] else None  # `mlfs.importance` asks for it
        return dx, dW, None, rows.t() @ gB, xA.t() @ g_rows
