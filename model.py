"""f_Φ(x; W): transformers that slice themselves, with explicit low-rank adapters {A_s, B_s}.

Three ideas carry this file.
1. Φ is an argument: `logits, features = model(ids, mask, phi)` is z, h = f_Φ(x; Π_Φ(W_Sup)). No
   module holds "the active subnet", so switching costs nothing and no state can be stale.
2. Π_Φ takes the LEADING part of every weight (Eq. 2): a layer reads its input width off its input
   and is told its output width. `extract(phi)` slices the same way, once, into a small model.
3. Adapters stay factored (Eqs. 7-9): x A B costs r(in + out), no ΔW is built while training.
   ΔW = A B, A (in, r), B (r, out), as in the paper; PyTorch stores W as (out, in): W + (A B)ᵀ.

B batch, T tokens, S tokens attended to, H hidden size, N heads, K key/value heads, D head size,
F intermediate size, r rank, C classes, V vocabulary.
"""
import copy
import json
import os
import re
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Collection, Iterator

# oneDNN keeps a kernel for each shape, by default 1,024. With 192 stage 2 takes 0.4 GB less and as
# long, stage 0 6% longer.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "192")

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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

def pack(weight: Tensor) -> Tensor | None:
    """A copy of W in oneDNN's own layout; None where that does not help.

    On a CPU in bfloat16 it makes the product of a few tokens 1.4 to 1.7 times as fast. The two
    operators are those that torch's own compiler uses; they have no public name.
    """
    here = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not here:
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


ASK_ONEDNN = (torch.backends.cpu.get_cpu_capability() == "AVX512"
              and "Intel" not in str(torch.cpu.get_capabilities().get("cpu_name")))


def product(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, x (..., i) and W (o, i).

    In float32 on an AMD with AVX-512 oneDNN is asked, not MKL, which takes twice as long there; on
    an Intel MKL takes 0.86 of oneDNN's time. oneDNN wants dense operands: the reference kernel that
    it has for others takes minutes. And it makes a kernel for every shape, which small matrices do
    not repay.
    """
    small = W.numel() < 2 ** 14
    if small or x.dtype != torch.float32 or x.device.type != "cpu" or \
            torch.compiler.is_exporting() or not ASK_ONEDNN:
        return F.linear(x, W, b)
    if not W.is_contiguous() and not W.t().is_contiguous():
        W = W.contiguous() if W.stride(1) == 1 else W.t().contiguous().t()
    return packed_linear(x.contiguous(), W, b)


class LowRankLinear(torch.autograd.Function):
    """y = x Wᵀ + b + (x A) B (Eqs. 8 and 9) of x (..., i), W (o, i), A (i, r), B (r, o).

    Its gradient is by hand: sums go in place and nothing is kept that no gradient reads; training
    takes a tenth less time.
    """

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor | None,
                B: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.size(-1))                                         # (M, i)
        y, xA = product(rows, W, b), None                                        # (M, o)
        if A is not None:
            xA = product(rows, A.t())                                            # (M, r)
            y.addmm_(xA, B)
        read = A is not None or W.requires_grad
        ctx.save_for_backward(rows if read else None, W, A, B, xA)
        return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.size(1)])

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple:
        """dx = g W + (g Bᵀ) Aᵀ, dW = gᵀ x, db = Σ g, dA = xᵀ (g Bᵀ), dB = (x A)ᵀ g."""
        x, W, A, B, xA = ctx.saved_tensors
        need_x, need_W, need_b, *_ = ctx.needs_input_grad
        rows, dx, dA, dB = g.reshape(-1, g.size(-1)), None, None, None           # (M, o)
        if A is not None:
            gB = product(rows, B)                                                # (M, r)
            dA, dB = x.t() @ gB, xA.t() @ rows
        if need_x:
            dx = product(rows, W.t())                                            # (M, i)
            dx = (dx if A is None else dx.addmm_(gB, A.t())).view(*g.shape[:-1], -1)
        return dx, rows.t() @ x if need_W else None, rows.sum(0) if need_b else None, dA, dB


class ElasticLinear(nn.Module):
    """y = x W_Φᵀ + b_Φ + Σ_s (x A_s[:i]) B_s[:, :o]    (Eqs. 2, 8 and 9)"""

    def __init__(self, in_features: int, out_features: int, bias: bool = True,
                 trainable: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=trainable)
        shift = nn.Parameter(torch.empty(out_features), requires_grad=trainable) if bias else None
        self.register_parameter("bias", shift)
        self.packed = None                                           # see `pack`
        self.A, self.B = nn.ParameterList(), nn.ParameterList()      # one pair a stage

    def add_stage(self, rank: int, generator: torch.Generator) -> None:
        """Alg. 1 line 2. A is random, B is zero: a stage starts exactly where the last one ended.

        The paper leaves the start open; A ~ U(±1/√in) is LoRA's. No α/r factor: Eq. 7 has none.
        """
        out_features, in_features = self.weight.shape
        for earlier in (*self.A, *self.B):                           # lines 13 and 15: A_s, B_s
            earlier.requires_grad_(False)
        A = (torch.rand(in_features, rank, generator=generator) * 2 - 1) / in_features ** 0.5
        B = torch.zeros(rank, out_features)
        self.A.append(nn.Parameter(A.to(self.weight.device)))
        self.B.append(nn.Parameter(B.to(self.weight.device)))

    def forward(self, x: Tensor, out_features: int) -> Tensor:       # (..., i) -> (..., o)
        i, o = x.size(-1), out_features
        if self.packed is not None and self.weight.shape == (o, i):
            return packed_linear(x, self.packed, self.bias)
        b, A, B = None if self.bias is None else self.bias[:o], None, None
        if len(self.A):                              # Σ_s A_s B_s = [A_0 A_1 A_2] [B_0; B_1; B_2]
            A = torch.cat([A[:i] for A in self.A], dim=1).to(x.dtype)
            B = torch.cat([B[:, :o] for B in self.B], dim=0).to(x.dtype)
        elif not torch.is_grad_enabled():            # a plain product of one token needs no more
            return product(x, self.weight[:o, :i], b)
        return LowRankLinear.apply(x, self.weight[:o, :i], b, A, B)

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


class ElasticRMSNorm(nn.Module):
    """Root-mean-square normalisation over the width that arrives, with the leading gains."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        i = x.size(-1)
        return F.rms_norm(x, (i,), self.weight[:i], self.eps)


class ElasticEmbedding(nn.Module):
    """The leading columns of an embedding table."""

    def __init__(self, rows: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size), requires_grad=False)

    def forward(self, ids: Tensor, size: int) -> Tensor:             # (B, T) -> (B, T, H)
        return F.embedding(ids, self.weight[:, :size])


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q kᵀ/√D + bias) v; q (B, N, T, D), k and v (B, K, S, D): N/K heads share a key head.

    bias broadcasts to (B, K, T, S), or is None. The one place that picks its kernel: in bfloat16 on
    a CPU the textbook's lines beat torch's fused kernel from 2 to 512 tokens (measured no further);
    it keeps no (T, S) scores for the backward pass, and serves everywhere else.
    """
    (_, N, T, D), K = q.shape, k.size(1)
    textbook = q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < T < 512
    if K < N:                            # heads that share a key are just more queries: no k copied
        q = q.reshape(-1, K, N // K * T, D)                              # (B, K, N/K·T, D)
        bias = bias.repeat(1, 1, N // K, 1) if T > 1 and bias is not None else bias
    if textbook:
        scores = q * D ** -0.5 @ k.transpose(-1, -2)                     # (B, K, N/K·T, S)
        context = (scores if bias is None else scores.add_(bias)).softmax(-1) @ v
    else:
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return context.reshape(-1, N, T, D) if K < N else context


def hide(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """An attention bias: the lowest number where `hidden`, else 0."""
    zeros = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return zeros.masked_fill(hidden, torch.finfo(dtype).min)


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "gelu_new": tanh_gelu,
               "gelu_fast": tanh_gelu, "gelu_pytorch_tanh": tanh_gelu}


# ------------------------------------------------------------------- what all families share

class SuperTransformer(nn.Module):
    """W_Sup of the maxnet, from which every Φ takes its part.

    A family adds its layers, its forward pass and its tensor names. `config` is the checkpoint's
    config.json, with `head_dim` and `num_labels` filled in.
    """
    adapted = ("query", "key", "value", "intermediate")      # App. A: QKV, FFN's intermediate
    head = ()                                        # trained in full, shared by all subnets
    head_group = 1                                   # heads are kept or dropped by so many
    has_head_dim = False                             # whether other libraries' config.json has one
    model_type = architecture = ""                   # the checkpoint world's names of the class
    tensor_names: dict[str, str] = {}                # ours -> the checkpoint's; {}: layer number
    config_names: dict[str, str] = {}                # the same for config.json
    defaults: dict = {}                              # of fields that config.json may leave out
    required: dict = {}                              # fields with the one value that we implement

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.num_stages = 0
        self.gradient_checkpointing = False          # keep no activations inside layers; recompute
        self.order: dict[str, Tensor] = {}           # what `permute` did; stored with the adapters

    def forward(self, ids: Tensor, mask: Tensor | None = None, phi: SubnetConfig | None = None,
                **more) -> tuple[Tensor, dict[int, Tensor]]:
        """z, h = f_Φ(x; Π_Φ(W_Sup)); ids and mask (B, T), mask 1 for a real token (Sec. 4).

        h is keyed by maxnet layer: those of `features`, by default all of Φ's. Where no loss will
        compare them, () saves a BERT of 6 layers a seventh of its work. ValueError if Φ is no part
        of the maxnet.
        """
        phi = phi or self.maxnet
        self.subnet_config(phi)
        s, h = self.encode(ids, mask, phi, **{"features": phi.layers} | more)
        return self.logits(s), h

    def run(self, l: int, *inputs) -> Tensor:
        """Maxnet layer l."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.layers[l], *inputs, use_reentrant=False)
        return self.layers[l](*inputs)

    @property
    def maxnet(self) -> SubnetConfig:
        """Φ_1: the teacher's own configuration (Sec. 4)."""
        c, depth = self.config, self.config["num_hidden_layers"]
        return SubnetConfig(c["hidden_size"], c["num_attention_heads"], c["intermediate_size"],
                            tuple(range(depth)), name=f"w1-d{depth}")

    def adapted_linears(self) -> list[ElasticLinear]:
        return [getattr(layer, name) for layer in self.layers for name in self.adapted]

    def add_stage(self, rank: int | None, seed: int = 0) -> None:
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

    def fix_teacher(self) -> "SuperTransformer":
        """f(·; W_Tch), the network as stage 0 left it (Sec. 4): all weights are this model's, A_0
        and B_0 are its only adapters. The head, which they share, is trained no more."""
        teacher = copy.deepcopy(self, {id(p): p for p in self.parameters()})     # no tensor is new
        for linear in teacher.adapted_linears():
            linear.A, linear.B = linear.A[:1], linear.B[:1]
        for name in self.head:
            getattr(self, name).requires_grad_(False)
        return teacher

    def subnet_config(self, phi: SubnetConfig) -> dict:
        """config.json of Φ's stand-alone model; ValueError if Φ is no part of the maxnet."""
        sizes = {"hidden_size": phi.hidden_size, "num_attention_heads": phi.num_attention_heads,
                 "intermediate_size": phi.intermediate_size, "num_hidden_layers": len(phi.layers)}
        layers = tuple(l for l in self.maxnet.layers if l in phi.layers)
        if phi.layers != layers or not all(0 < n <= self.config[key] for key, n in sizes.items()):
            raise ValueError(f"{phi} is no part of the maxnet, {self.maxnet}")
        return self.config | sizes

    def skeleton(self, phi: SubnetConfig) -> "SuperTransformer":
        """Φ's stand-alone model, shapes only: whatever counts Φ's parts counts them here."""
        with torch.device("meta"):
            return type(self)(self.subnet_config(phi))

    def num_trainable(self, phi: SubnetConfig) -> int:
        """n_j: entries of the current {A_s, B_s} that Φ_j uses (Alg. 1 line 9).

        Prop. 2 says "only the LoRA matrices": the head is not counted. No adapters: all of Φ_j.
        """
        small, adapters = self.skeleton(phi), self.adapted_linears()[0].A
        if not len(adapters):
            return sum(p.numel() for p in small.parameters())
        rank = adapters[-1].size(1)                          # A has in·r entries, B has r·out
        return sum(rank * sum(linear.weight.shape) for linear in small.adapted_linears())

    @torch.no_grad()
    def extract(self, phi: SubnetConfig) -> "SuperTransformer":
        """W_Φ = Π_Φ(W_pretrained + Σ_s A_s B_s) (Eqs. 2, 8): merged, cut, copied, stand-alone."""
        small, state = self.skeleton(phi), {}
        for name, part in small.named_parameters():
            owner, _, kind = name.rpartition(".")
            owner = re.sub(r"\d+", lambda l: str(phi.layers[int(l[0])]), owner)          # g_j(l)
            module = self.get_submodule(owner)
            merge = kind == "weight" and isinstance(module, ElasticLinear)
            whole = module.merged() if merge else getattr(module, kind)
            state[name] = whole[tuple(slice(n) for n in part.shape)].clone()             # Π_Φ
        small.load_state_dict(state, assign=True)
        return small

    def common_heads(self) -> int | None:
        """The fewest heads, from ours on, with which other libraries can express this shape.

        Without a head_dim in their config.json they take the head size to be hidden_size / heads;
        with one (Llama) they still want heads to divide hidden_size. None if no number will do.
        """
        H, N, D = (self.config[k] for k in ("hidden_size", "num_attention_heads", "head_dim"))
        return next((n for n in range(N, H + 1, self.head_group)
                     if H % n == 0 and (self.has_head_dim or H // n == D)), None)

    @torch.no_grad()
    def pad_heads(self, heads: int) -> "SuperTransformer":
        """The same function with so many heads: the new ones are zeros, which no output reads.

        ValueError if adapters are not merged.
        """
        if self.num_stages:
            raise ValueError("merge the adapters first: model.extract(phi).pad_heads(heads)")
        config = self.config | {"num_attention_heads": heads}
        if config.get("num_key_value_heads", 1) > 1:
            config["num_key_value_heads"] = heads // self.head_group
        padded = type(self)(config)
        for new, old in zip(padded.parameters(), self.parameters(), strict=True):
            new.data = torch.zeros(new.shape, dtype=old.dtype, device=old.device)
            new[tuple(map(slice, old.shape))] = old
        return padded

    def reorder(self, importance: dict[str, Tensor]) -> None:
        """Put the most important heads and neurons first, where every slice keeps them.

        The maxnet's function stays (as in DynaBERT, Hou et al., 2020). importance: "l.heads" (N,)
        and "l.neurons" (F,) for each layer l; heads that share a key move together, by their sum.
        """
        order = {}
        for key, score in importance.items():
            group = self.head_group if key.endswith("heads") else 1
            first = score.view(-1, group).sum(1).argsort(descending=True, stable=True)
            order[key] = blocks(first, group)
        self.permute(order)

    def permute(self, order: dict[str, Tensor]) -> None:
        """New position -> old position, keys as in `reorder`."""
        D, G = self.config["head_dim"], self.head_group
        for l, layer in enumerate(self.layers):
            heads, neurons = order[f"{l}.heads"], order[f"{l}.neurons"]
            rows, shared = blocks(heads, D), blocks(heads[::G] // G, D)
            for name in self.adapted:
                linear = getattr(layer, name)
                if name not in ("query", "key", "value"):
                    linear.permute(outputs=neurons)
                elif name == "query" or len(linear.weight) > D:          # one key is never sliced
                    linear.permute(outputs=rows if name == "query" else shared)
            layer.attention_output.permute(inputs=rows)
            layer.output.permute(inputs=neurons)
        self.order = {key: self.order[key][index] if key in self.order else index
                      for key, index in order.items()}

    def trained_state(self) -> dict[str, Tensor]:
        """What MLFS learned: {A_s, B_s}, the head, the permutation; a few MB a task (Sec. 3)."""
        state = {name: p.detach() for name, p in self.named_parameters()
                 if p.requires_grad or name.split(".")[0] in self.head
                 or re.search(r"\.[AB]\.\d+$", name)}
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
        first = f"layers.0.{self.adapted[0]}."
        if first + "weight" in state:
            self.add_stage(None)
        for s in range(sum(name.startswith(first + "A.") for name in state)):
            self.add_stage(state[f"{first}A.{s}"].size(1))
        own = self.trained_state()
        for name in sorted({*own, *state}):
            if name not in state or name not in own or own[name].shape != state[name].shape:
                raise ValueError(f"the adapters do not fit this base model: tensor {short(name)} "
                                 f"is missing, extra or misshapen")
            if not own[name].copy_(state[name]).isfinite().all():
                raise ValueError(f"the adapters are not finite: tensor {name!r} has a NaN or "
                                 f"infinite value")

    @torch.no_grad()
    def initialise(self, seed: int = 0, names: tuple[str, ...] = ("",)) -> "SuperTransformer":
        """The usual start for parameters whose name starts so: N(0, 0.02²), biases 0, norms 1."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if name.startswith(names):
                if p.dim() == 2:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
                else:
                    p.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        return self


def blocks(index: Tensor, size: int) -> Tensor:
    """Rows of whole blocks: (2, 0) of size 3 is 6 7 8 0 1 2."""
    return (index[:, None] * size + torch.arange(size, device=index.device)).flatten()


# ---------------------------------------------------------------------------------------- BERT

class BertLayer(nn.Module):
    """Post-LN: normalisation after each residual sum x + f(x), which is written over f(x)."""

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

    def forward(self, x: Tensor, bias: Tensor | None, phi: SubnetConfig,
                tokens: int | None) -> Tensor:
        """(B, T, H) -> (B, tokens, H), the states of the leading `tokens`; None: of all."""
        N, H, I = phi.num_attention_heads, phi.hidden_size, phi.intermediate_size
        inputs = (self.query, x[:, :tokens]), (self.key, x), (self.value, x)
        qkv = (linear(s, N * self.head_dim).unflatten(-1, (N, -1)).transpose(1, 2)
               for linear, s in inputs)                              # (B, T, H) -> (B, N, T, D)
        context = attention(*qkv, bias).transpose(1, 2).flatten(2)           # (B, T, N·D)
        x = x[:, :tokens]
        x = self.attention_norm(self.attention_output(context, H).add_(x))   # in place: 3 to 6%
        return self.output_norm(self.output(self.activation(self.intermediate(x, I)), H).add_(x))


class Bert(SuperTransformer):
    """BERT with a pooler and a classifier; one class (`num_labels` 1) is regression.

    No dropout: teacher and subnets are compared on one and the same function.
    """
    head = ("pooler", "classifier")
    model_type, architecture = "bert", "BertForSequenceClassification"
    defaults = {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    required = {"position_embedding_type": "absolute"}
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
               segments: Tensor | None = None,
               features: Collection[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """The first token's last state (B, H), and h_Φ: the states (B, T, H) after `features`.

        A last layer that is none of these computes only what is read: the first token's state.
        """
        H, positions = phi.hidden_size, torch.arange(ids.size(1), device=ids.device)
        segments = torch.zeros_like(ids) if segments is None else segments
        x = self.embedding_norm(
            self.word_embeddings(ids, H) + self.position_embeddings(positions, H)
            + self.token_type_embeddings(segments, H))
        bias = None if mask is None else hide(mask == 0, x.dtype)[:, None, None]     # (B, 1, 1, T)
        h = {}
        for l in phi.layers:                                         # g_j(1), g_j(2), ...
            x = self.run(l, x, bias, phi, None if l in features or l != phi.layers[-1] else 1)
            if l in features:
                h[l] = x
        return x[:, 0], h

    def logits(self, s: Tensor) -> Tensor:                           # (B, H) -> (B, C)
        s = s.to(self.pooler.weight.dtype)                           # the head stays in float32
        pooled = torch.tanh(self.pooler(s, s.size(-1)))              # (B, H)
        return self.classifier(pooled, self.config["num_labels"]).float()

    def readout(self) -> list[Tensor]:
        """The weights that `logits` reads; the last has a row a class."""
        return [self.pooler.weight, self.pooler.bias, self.classifier.bias, self.classifier.weight]

    @classmethod
    def read(cls, name: str, tensor: Tensor, config: dict) -> dict[str, Tensor]:
        """A stored tensor under its one name: without "bert.", LayerNorm.weight, not gamma."""
        name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        return {} if cls.ignored.fullmatch(name) else {name: tensor}

    @staticmethod
    def write(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `read`."""
        return {n if n.startswith("classifier.") else "bert." + n: t for n, t in tensors.items()}


# ------------------------------------------------------------------------------------ decoders

class Cache:
    """Keys and values of the tokens so far, by maxnet layer: generation reads each token once."""

    def __init__(self, size: int):
        self.size, self.length, self.parts = size, 0, {}

    def extend(self, l: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends (B, K, T, D), returns all there is (B, K, S, D). `encode` counts the length."""
        S = self.length + k.size(2)
        if l not in self.parts:
            self.parts[l] = [x.new_empty(*x.shape[:2], self.size, x.size(3)) for x in (k, v)]
        for part, new in zip(self.parts[l], (k, v)):
            part[:, :, self.length:S] = new
        return tuple(part[:, :, :S] for part in self.parts[l])


class DecoderLayer(nn.Module):
    """Pre-LN: normalisation before attention and FFN; groups of heads share a key/value head."""

    def __init__(self, l: int, c: dict, norm: type, bias: bool):
        super().__init__()
        H, D, I = c["hidden_size"], c["head_dim"], c["intermediate_size"]
        N, K = c["num_attention_heads"], c["num_key_value_heads"]
        self.attention_norm, self.ffn_norm = (norm(H, c["layer_norm_eps"]) for _ in range(2))
        self.query = ElasticLinear(H, N * D, bias)
        self.key, self.value = ElasticLinear(H, K * D, bias), ElasticLinear(H, K * D, bias)
        self.attention_output = ElasticLinear(N * D, H, bias)
        self.intermediate = ElasticLinear(H, I, bias)
        self.output = ElasticLinear(I, H, bias)
        self.number, self.head_dim, self.activation = l, D, ACTIVATIONS[c["hidden_act"]]
        self.share = K / N

    def forward(self, x: Tensor, bias: Tensor | None, phi: SubnetConfig,
                rotation: tuple[Tensor, Tensor] | None, cache: Cache | None) -> Tensor:
        N, D = phi.num_attention_heads, self.head_dim
        K, a = max(1, round(N * self.share)), self.attention_norm(x)             # x is (B, T, H)
        q, k, v = (linear(a, n * D).unflatten(-1, (n, D)).transpose(1, 2) for linear, n in
                   ((self.query, N), (self.key, K), (self.value, K)))            # (B, n, T, D)
        q, k = self.rotate(q, rotation), self.rotate(k, rotation)
        if cache is not None:
            k, v = cache.extend(self.number, k, v)                               # (B, K, S, D)
        context = attention(q, k, v, bias).transpose(1, 2).flatten(2)            # (B, T, N·D)
        x = self.attention_output(context, phi.hidden_size).add_(x)              # x + ..., in place
        inner = self.inner(self.ffn_norm(x), phi.intermediate_size)              # (B, T, F)
        return self.output(inner, phi.hidden_size).add_(x)


class Decoder(SuperTransformer):
    """A causal language model: logits of the next token. No head: all but A_s, B_s is frozen."""

    def __init__(self, config: dict, norm: type):
        super().__init__(config)
        c, tied = config, config["tie_word_embeddings"]
        self.word_embeddings = ElasticEmbedding(c["vocab_size"], c["hidden_size"])
        self.final_norm = norm(c["hidden_size"], c["layer_norm_eps"])
        self.lm_head = None if tied else ElasticEmbedding(c["vocab_size"], c["hidden_size"])
        self.packed = None                                           # see `pack`

    @property
    def head_group(self) -> int:
        """Heads that share a key/value head stay together; a single one (multi-query) stays."""
        K = self.config["num_key_value_heads"]
        return self.config["num_attention_heads"] // K if K > 1 else 1

    def subnet_config(self, phi: SubnetConfig) -> dict:
        N, K = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        if phi.num_attention_heads % self.head_group:
            raise ValueError(f"{phi.name} has {phi.num_attention_heads} heads; this model's come "
                             f"in groups of {self.head_group} that share a key")
        kept = max(1, phi.num_attention_heads * K // N)
        return super().subnet_config(phi) | {"num_key_value_heads": kept}

    def encode(self, ids: Tensor, mask: Tensor | None, phi: SubnetConfig,
               cache: Cache | None = None,
               features: Collection[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Each token's last state (B, T, H), and h_Φ: those after layers `features`, normalised.

        With a cache, ids continue the tokens in it, and mask covers both. Pad on either side. The
        residual stream of a pre-LN model grows without bound (ours): its root mean square is set to
        1 in h_Φ, as the norms inside a post-LN BERT do, for ℓ_FD to compare.
        """
        start = cache.length if cache else 0
        T, S = ids.size(1), start + ids.size(1)
        if S > self.config["max_position_embeddings"]:
            raise ValueError(f"{S} tokens exceed the model's "
                             f"{self.config['max_position_embeddings']} positions")
        positions = torch.arange(start, S, device=ids.device)[None]                  # (1, T)
        hidden = positions.mT < torch.arange(S, device=ids.device)                   # (T, S)
        if mask is not None:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:]                # (B, T)
            hidden = hidden | (mask == 0)[:, None, None]                             # (B, 1, T, S)
        x, rotation = self.embed(ids, positions, phi.hidden_size)
        bias = hide(hidden, x.dtype).view(-1, 1, T, S) if T > 1 or mask is not None else None
        h = {}
        for l in phi.layers:                                         # g_j(1), g_j(2), ...
            x = self.run(l, x, bias, phi, rotation, cache)
            if l in features:
                h[l] = F.rms_norm(x, x.shape[-1:], eps=1e-6)
        if cache is not None:
            cache.length = S
        return self.final_norm(x), h

    def pack(self) -> "Decoder":
        """Ready to generate fast with Φ = the maxnet, for a second copy of the weights' memory.

        ValueError if adapters are not merged.
        """
        if self.num_stages:
            raise ValueError("merge the adapters first: model.extract(phi).pack()")
        for linear in self.modules():
            if isinstance(linear, ElasticLinear):
                linear.packed = pack(linear.weight)
        self.packed = pack(self.readout()[0])
        return self

    def logits(self, s: Tensor) -> Tensor:                           # (..., H) -> (..., V)
        if self.packed is not None and s.size(-1) == self.config["hidden_size"]:
            return packed_linear(s, self.packed, None).float()
        return F.linear(s, self.readout()[0][:, :s.size(-1)]).float()

    def readout(self) -> list[Tensor]:
        """The weights that `logits` reads: a row a token, the embedding's own where tied."""
        return [(self.lm_head or self.word_embeddings).weight]


class GPTLayer(DecoderLayer):
    """FFN(x) = gelu(x W_1) W_2, biases everywhere, no rotation."""

    def __init__(self, l: int, c: dict):
        super().__init__(l, c, ElasticLayerNorm, bias=True)

    def rotate(self, x: Tensor, rotation: None) -> Tensor:
        return x

    def inner(self, x: Tensor, intermediate_size: int) -> Tensor:
        return self.activation(self.intermediate(x, intermediate_size))


class GPT(Decoder):
    """SantaCoder: learned positions, one key/value head for all heads (multi-query attention)."""
    model_type, architecture = "gpt_bigcode", "GPTBigCodeForCausalLM"
    config_names = {
        "hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
        "intermediate_size": "n_inner", "max_position_embeddings": "n_positions",
        "layer_norm_eps": "layer_norm_epsilon", "hidden_act": "activation_function",
    }
    defaults = {"layer_norm_eps": 1e-5, "hidden_act": "gelu_pytorch_tanh",
                "intermediate_size": None, "tie_word_embeddings": True, "num_key_value_heads": 1}
    required = {"multi_query": True, "attention_head_type": "multiquery",
                "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
                "tie_word_embeddings": True}
    tensor_names = {
        "word_embeddings": "wte", "position_embeddings": "wpe", "final_norm": "ln_f",
        "layers.{}.attention_norm": "h.{}.ln_1",
        "layers.{}.query": "h.{}.attn.query",
        "layers.{}.key": "h.{}.attn.key",
        "layers.{}.value": "h.{}.attn.value",
        "layers.{}.attention_output": "h.{}.attn.c_proj",
        "layers.{}.ffn_norm": "h.{}.ln_2",
        "layers.{}.intermediate": "h.{}.mlp.c_fc",
        "layers.{}.output": "h.{}.mlp.c_proj",
    }

    def __init__(self, config: dict):
        super().__init__(config, ElasticLayerNorm)
        c = config
        self.position_embeddings = ElasticEmbedding(c["max_position_embeddings"], c["hidden_size"])
        self.layers = nn.ModuleList(GPTLayer(l, c) for l in range(c["num_hidden_layers"]))

    def embed(self, ids: Tensor, positions: Tensor, H: int) -> tuple[Tensor, None]:
        return self.word_embeddings(ids, H) + self.position_embeddings(positions, H), None

    @classmethod
    def read(cls, name: str, tensor: Tensor, config: dict) -> dict[str, Tensor]:
        """A stored tensor as ours: Conv1D transposed, fused query, key and value taken apart."""
        name = name.removeprefix("transformer.")
        if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):        # buffers: the causal mask
            return {}
        conv1d = config["model_type"] == "gpt2" and re.search(r"(attn|c_proj|c_fc)\.weight$", name)
        tensor = tensor.T if conv1d and tensor.dim() == 2 else tensor    # Conv1D keeps (in, out)
        for fused, parts in {"c_attn": ("query", "key", "value"), "kv_attn": ("key", "value"),
                             "q_attn": ("query",)}.items():
            if f".attn.{fused}." in name:
                D, N = config["head_dim"], config["num_attention_heads"]
                rows = [N * D if part == "query" else D for part in parts]
                if tensor.shape[:1] != (sum(rows),):
                    raise ValueError(f"tensor {short(name)} has {(*tensor.shape, 0)[0]} rows; "
                                     f"config.json asks for {sum(rows)}")
                return {name.replace(fused, part): t for part, t in zip(parts, tensor.split(rows))}
        return {name: tensor}

    @staticmethod
    def write(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `read`, in the gpt_bigcode layout."""
        stored = {}
        for name, t in tensors.items():
            fused = "transformer." + re.sub(r"attn\.(query|key|value)", "attn.c_attn", name)
            stored[fused] = torch.cat((stored[fused], t)) if fused in stored else t
        return stored


class LlamaLayer(DecoderLayer):
    """SwiGLU: FFN(x) = (silu(x W_gate) ⊙ x W_up) W_down; no biases; rotary positions."""

    def __init__(self, l: int, c: dict):
        super().__init__(l, c, ElasticRMSNorm, bias=False)
        self.gate = ElasticLinear(c["hidden_size"], c["intermediate_size"], bias=False)

    def rotate(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:      # (B, n, T, D)
        """Turns the plane of dimensions i and i + D/2 by the angle position · base^(-2i/D)."""
        cos, sin = rotation                                  # the first half of sin is negative
        left, right = x.chunk(2, dim=-1)
        return torch.addcmul(x * cos, torch.cat((right, left), dim=-1), sin)

    def inner(self, x: Tensor, intermediate_size: int) -> Tensor:
        gate, up = self.gate(x, intermediate_size), self.intermediate(x, intermediate_size)
        return self.activation(gate) * up


class Llama(Decoder):
    """CodeLlama, SmolLM2: RMSNorm, rotary positions, SwiGLU, grouped key/value heads."""
    adapted = ("query", "key", "value", "gate", "intermediate")
    model_type, architecture, has_head_dim = "llama", "LlamaForCausalLM", True
    config_names = {"layer_norm_eps": "rms_norm_eps"}
    defaults = {"layer_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}
    required = {"attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0}
    tensor_names = {
        "word_embeddings": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head",
        "layers.{}.attention_norm": "model.layers.{}.input_layernorm",
        "layers.{}.query": "model.layers.{}.self_attn.q_proj",
        "layers.{}.key": "model.layers.{}.self_attn.k_proj",
        "layers.{}.value": "model.layers.{}.self_attn.v_proj",
        "layers.{}.attention_output": "model.layers.{}.self_attn.o_proj",
        "layers.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
        "layers.{}.gate": "model.layers.{}.mlp.gate_proj",
        "layers.{}.intermediate": "model.layers.{}.mlp.up_proj",
        "layers.{}.output": "model.layers.{}.mlp.down_proj",
    }

    def __init__(self, config: dict):
        super().__init__(config, ElasticRMSNorm)
        depth = config["num_hidden_layers"]
        self.layers = nn.ModuleList(LlamaLayer(l, config) for l in range(depth))

    def embed(self, ids: Tensor, positions: Tensor,
              H: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The embeddings, and cos and sin (B, 1, T, D) of the rotary angles, taken in float32."""
        x, D = self.word_embeddings(ids, H), self.config["head_dim"]
        rates = self.config["rope_theta"] ** -(torch.arange(0, D, 2, device=ids.device) / D)
        angles = positions[:, None, :, None] * rates                             # (B, 1, T, D/2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        return x, (torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))

    @classmethod
    def read(cls, name: str, tensor: Tensor, config: dict) -> dict[str, Tensor]:
        return {} if name.endswith("rotary_emb.inv_freq") else {name: tensor}        # old buffers

    @staticmethod
    def write(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors


# ------------------------------------------------------------------------- loading and saving

FAMILIES = {"bert": Bert, "gpt_bigcode": GPT, "gpt2": GPT, "llama": Llama}
SIZES = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size",
         "num_hidden_layers", "max_position_embeddings", "head_dim")


def short(value) -> str:
    """For an error message: as Python writes it, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_json(path: Path) -> dict:
    """A JSON object; FileNotFoundError or ValueError with the path and what is wrong."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {path}") from None
    except (ValueError, RecursionError) as error:        # bad JSON, bad UTF-8, too deeply nested
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def read_config(folder: Path) -> dict:
    """config.json in our words, with defaults filled in.

    ValueError names a field that this code cannot serve.
    """
    path = folder / "config.json"
    given = read_json(path)
    for key in ("head_dim", "num_key_value_heads", "rope_theta"):    # null is as good as nothing
        if given.get(key, 0) is None:
            del given[key]
    if given.get("model_type") not in list(FAMILIES):
        raise ValueError(f"{path}: model_type {short(given.get('model_type'))} is not supported; "
                         f"choose from {', '.join(FAMILIES)}")
    family = FAMILIES[given["model_type"]]
    config = family.defaults | given
    config |= {ours: config.pop(theirs) for ours, theirs in family.config_names.items()
               if theirs in given}
    if family is GPT:                                # null, or absent, means four times the width
        if config["intermediate_size"] is None and type(config.get("hidden_size")) is int:
            config["intermediate_size"] = 4 * config["hidden_size"]
        if given["model_type"] == "gpt2":            # which has one key a head unless it says so
            config.setdefault("attention_head_type", "multihead")
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if "head_dim" not in config and type(heads) is type(hidden) is int and heads > 0:
        if hidden % heads:
            raise ValueError(f"{path}: hidden_size {short(hidden)} is not a multiple of "
                             f"num_attention_heads {short(heads)}, and there is no head_dim")
        config["head_dim"] = hidden // heads
    if family is Llama:
        config.setdefault("num_key_value_heads", heads)
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope = rope if isinstance(rope, dict) else {"type": rope}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"{path}: rotary scaling {short(kind)} is not supported")
        theta = rope.get("rope_theta", config.get("rope_theta", 1e4))
        if type(theta) not in (int, float) or not 1 <= theta <= 1e30:
            raise ValueError(f"{path}: rope_theta must be a positive number, at least 1, not "
                             f"{short(theta)}")
        config["rope_theta"] = float(theta)
    for key in (*SIZES, "type_vocab_size" if family is Bert else "num_key_value_heads"):
        most = 2 ** (24 if key == "max_position_embeddings" else 20)
        if type(config.get(key)) is not int or not 1 <= config[key] <= most:
            name = family.config_names.get(key, key)
            raise ValueError(f"{path}: {name} must be a positive whole number, at most {most}, not "
                             f"{short(config.get(key))}")
    if family is not Bert and heads % config["num_key_value_heads"]:
        raise ValueError(f"{path}: num_attention_heads {heads} is not a multiple of "
                         f"num_key_value_heads {config['num_key_value_heads']}")
    if type(config["layer_norm_eps"]) is not float or not 0 < config["layer_norm_eps"] < 1:
        name = family.config_names.get("layer_norm_eps", "layer_norm_eps")
        raise ValueError(f"{path}: {name} must be a positive number below 1, not "
                         f"{short(config['layer_norm_eps'])}")
    choices = {"hidden_act": list(ACTIVATIONS), "tie_word_embeddings": [True, False],
               **{key: [value] for key, value in family.required.items()}}
    for key, known in choices.items():
        if config.get(key, known[0]) not in known:
            raise ValueError(f"{path}: {family.config_names.get(key, key)} {short(config[key])} is "
                             f"not supported; choose from {', '.join(map(str, known))}")
    return config


def checkpoint_files(folder: str | Path) -> list[Path]:
    """model.safetensors, or the shards that model.safetensors.index.json names."""
    whole, index = Path(folder) / "model.safetensors", Path(folder) / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if index.exists():
        places = read_json(index).get("weight_map")
        names = list(places.values()) if isinstance(places, dict) else [None]
        if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]{1,200}\.safetensors", name)
                   for name in names):
            raise ValueError(f"{index}: weight_map must map tensors to .safetensors files beside "
                             f"it")
        return [whole.with_name(name) for name in sorted(set(names))]
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt*") for p in Path(folder).glob(pattern))
    if pickles:
        raise ValueError(f"{folder} holds only a pickle ({pickles[0]}), which can run code when "
                         f"read; weights/README.md tells how to convert it to safetensors")
    raise FileNotFoundError(f"there is no {whole}; weights/README.md tells how to get one")


def read_checkpoint(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a checkpoint, memory-mapped: none is read before it is used."""
    for path in checkpoint_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                yield from [(name, file.get_tensor(name)) for name in file.keys()]
        except (SafetensorError, OSError) as error:
            missing = "" if path.exists() else "; its index names it, and it is not there"
            reason = str(error)[:200] + missing
            raise ValueError(f"{path} is damaged or cut short: {reason}") from None


def load_pretrained(folder: str | Path, num_labels: int | None = None,
                    dtype: torch.dtype | None = None) -> SuperTransformer:
    """The checkpoint in `folder`, frozen but for its head.

    num_labels: classes wanted. A classifier in the checkpoint is used when it has that many (or
    when None); else a new one starts, from torch's global seed. dtype: of the frozen weights (None:
    as in the file); the head is float32. Raises FileNotFoundError or ValueError: a missing, extra
    or misshapen tensor, or one with a NaN or infinite value, is named, never guessed.
    """
    folder, found, fresh = Path(folder), {}, False
    config = read_config(folder)
    family, depth = FAMILIES[config["model_type"]], config["num_hidden_layers"]
    for name, tensor in read_checkpoint(folder):
        try:
            parts = family.read(name, tensor, config)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        for key, part in parts.items():
            if key in found:
                raise ValueError(f"{folder}: tensor {short(key)} is there twice, under two "
                                 f"spellings")
            found[key] = part
    if depth > len(found):                           # told before so many layers are built
        raise ValueError(f"{folder}: config.json asks for {depth} layers; the checkpoint has "
                         f"{len(found)} tensors")
    if family is Bert:
        stored = [key for key in found if key.startswith("classifier.")]
        classes = (*found.get("classifier.weight", torch.empty(0)).shape, 0)[0]
        fresh = not stored or num_labels not in (None, classes)
        found = {key: t for key, t in found.items() if not (fresh and key in stored)}
        config["num_labels"] = num_labels or classes or 2
    with torch.device("meta"):
        model = family(config)
    if getattr(model, "lm_head", 0) is None and "lm_head.weight" in found:       # a tied copy
        copy = found.pop("lm_head.weight")           # some tools store the tied pair as this alone
        if not torch.equal(copy, found.setdefault(
                checkpoint_name(family, "word_embeddings.weight"), copy)):
            raise ValueError(f"{folder}: tensor 'lm_head.weight' differs from the embedding, "
                             f"though config.json ties them (tie_word_embeddings)")
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
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{folder}: tensor {key!r} is {tensor.dtype}, not floating point of "
                             f"16 to 64 bits")
        t = tensor.to(torch.float32 if p.requires_grad else dtype or tensor.dtype)
        state[name] = t.clone() if p.requires_grad else t    # a view keeps the file in memory
        if not torch.stack(t.aminmax()).isfinite().all():            # reads each value once
            raise ValueError(f"{folder}: tensor {key!r} has a NaN or infinite value in {t.dtype}")
    if found:
        raise ValueError(f"{folder}: tensor {short(min(found))} has no place in a "
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
        os.umask(mask := os.umask(0))
        beside.chmod(0o666 & ~mask)                                  # safetensors' are private
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except SafetensorError as error:                                 # its words for an OSError
        raise OSError(f"{path} could not be written: {error}") from None
    finally:
        with suppress(OSError):                      # the folder itself may be gone
            beside.unlink(missing_ok=True)


def save_pretrained(model: SuperTransformer, folder: str | Path,
                    labels: tuple[str, ...] = ()) -> None:
    """A checkpoint (config.json, model.safetensors) of a merged model: see `extract`.

    Where heads x head size is not the hidden size (a narrower BERT or SantaCoder), other libraries
    cannot express it (`common_heads`); `load_pretrained` reads it by its head_dim. labels: names of
    the classes. Raises FileExistsError if the folder holds one already, ValueError if adapters are
    not merged.
    """
    folder = Path(folder)
    if model.num_stages:
        raise ValueError("merge the adapters first: save_pretrained(model.extract(phi), folder)")
    for path in (folder / "config.json", folder / "model.safetensors"):
        if path.exists():
            raise FileExistsError(f"{path} exists already; choose another folder, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {checkpoint_name(type(model), name): p.detach().contiguous()
               for name, p in model.named_parameters()}
    with replacing(folder / "model.safetensors") as path:
        save_file(model.write(tensors), path, {"format": "pt"})
    config = model.config | {"model_type": model.model_type,
                             "architectures": [model.architecture]}
    if "num_labels" in config:
        labels = labels or [f"LABEL_{i}" for i in range(config["num_labels"])]
        config |= {"label2id": {label: i for i, label in enumerate(labels)},
                   "id2label": {str(i): label for i, label in enumerate(labels)}}
    config = {model.config_names.get(key, key): value for key, value in config.items()
              if key not in ("torch_dtype", "dtype", "auto_map")}    # of the original
    with replacing(folder / "config.json") as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
