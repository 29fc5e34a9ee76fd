"""Modules of a twin (:func:`specdec_fast.attention.twin`) that run as few operations on a GPU.

A pass at a few positions launches some thirty small kernels a layer, each of which takes a microsecond or two to come
and go. :func:`fuse_norms` makes one operation of an RMS norm, :func:`fuse_turns` one of a rotary embedding,
:func:`fuse_layers` six of a whole layer (:mod:`specdec_fast.layer_ops`), in passes of fixed shape at up to
:data:`MOST_ROWS` positions; others run as before.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from specdec_fast import dispatch
from specdec_fast.cache import cache_argument
from specdec_fast.layer_ops import layer_heads, layer_product, layer_product_scaled, layer_scale
from specdec_fast.round_ops import pass_turns
from specdec_fast.static_cache import Place, StaticLayer

__all__ = ["MOST_ROWS", "fuse_layers", "fuse_norms", "fuse_turns", "fused_count", "why_no_kernels", "why_not_fused"]

NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")  # x / rms(x) * weight, each the same code
LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
TURNS = ("LlamaRotaryEmbedding", "MistralRotaryEmbedding", "Qwen2RotaryEmbedding", "Qwen3RotaryEmbedding")
FIXED_TURNS = ("default", "linear", "llama3", "yarn")  # frequencies that do not hang on the text
MOST_ROWS = 16  # positions of all rows together: what one tile of a product holds


def fuse_norms(model: PreTrainedModel) -> int:
    """Lets the RMS norms of a twin run as torch's one operation, in the place of eight; how many there were.

    In half precision alone: the scale is multiplied before rounding there, not behind it, which is one rounding less.
    """
    count = 0
    for module in model.modules():
        kind: Any = type(module)
        if kind.__name__ in NORMS:
            module.__class__ = _one_norm(kind)
            count += 1
    return count


@functools.cache
def _one_norm(kind: Any) -> Any:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        normed: Tensor = nn.functional.rms_norm(
            hidden_states, self.weight.shape, self.weight, float(self.variance_epsilon)
        )
        return normed

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def fuse_turns(model: PreTrainedModel) -> int:
    """Lets the rotary embeddings of a twin run as one operation, in the place of nine; how many there were that can."""
    count = 0
    for module in model.modules():
        kind: Any = type(module)
        known = kind.__name__ in TURNS and kind.__module__.startswith("transformers.models.")
        if known and getattr(module, "rope_type", None) in FIXED_TURNS:
            module.__class__ = _one_turn(kind)
            count += 1
    return count


@functools.cache
def _one_turn(kind: Any) -> Any:
    def forward(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return pass_turns(self.inv_freq.to(x.device), position_ids, float(self.attention_scaling), x.dtype)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


@functools.cache
def why_no_kernels(device: str) -> str | None:
    """Why the operations of a layer do not run on a kind of device; None where they do. Tried once."""
    if reason := dispatch.why_not("layer_product", "triton"):
        return reason
    try:
        for got, right in zip(_trial(device, "triton"), _trial(device, "reference"), strict=True):
            if not (got - right).abs().amax() <= 0.02 * (1 + right.abs().amax()):
                return "the kernels of layers give other values than their reference"
    except Exception as error:  # what a compiler or driver can throw has no common base
        return f"the kernels of layers fail ({type(error).__name__}: {error})"
    return None


def _trial(device: str, backend: str) -> list[Tensor]:
    """Results of a small layer's operations: widths that fill tiles, as models have them, and some that do not."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator).bfloat16()

    found = [layer_product(drawn(5, 256), [drawn(8192, 256) / 16], backend=backend)]
    columns = torch.arange(3, 8, device=device).view(1, 5)
    for inner, dim in ((512, 64), (160, 16)):
        x, norm, epsilon = drawn(5, inner), drawn(inner), 1e-5
        weights = [drawn(n * dim, inner) * inner**-0.5 for n in (3, 1, 1)]
        biases = [drawn(n * dim) for n in (3, 1, 1)]
        scaled, squares = layer_scale(x, norm, backend=backend)
        normed: dict[str, Any] = {"squares": squares, "epsilon": epsilon, "backend": backend}
        fused = layer_product(scaled, weights, biases, **normed)
        keys, values = torch.zeros(2, 1, 1, 9, dim, device=device, dtype=x.dtype)
        found += [scaled, squares, fused, keys, values]
        cosine, sine, query_norm, key_norm = drawn(5, dim), drawn(5, dim), drawn(dim), drawn(dim)
        for norms in ({}, {"query_norm": query_norm, "key_norm": key_norm, "epsilon": epsilon}):
            given: dict[str, Any] = {**norms, "backend": backend}
            found.append(layer_heads(fused, cosine, sine, columns, keys, values, 3, **given))
        out = drawn(inner, 3 * dim) * dim**-0.5
        stream, *normed_next = layer_product_scaled(fused[:, : 3 * dim], out, norm=norm, residual=x, backend=backend)
        normed["squares"] = normed_next[1]
        found += [stream, *normed_next, layer_product(normed_next[0], weights[1:], gated=True, **normed)]
    return found


def fuse_layers(model: PreTrainedModel, backend: str = "triton") -> int:
    """Lets the decoder layers of a twin run as six operations each; how many there were that can.

    Rounding is that of :mod:`specdec_fast.layer_ops`, less often than the layer's own. Not for float16: what a norm
    divides by is only known behind the product, and its range ends before that.

    Args:
        backend: of those operations.
    """
    before: Any = None
    count = 0
    for module in model.modules():
        kind: Any = type(module)
        known = kind.__name__ in LAYERS and kind.__module__.startswith("transformers.models.")
        if known and why_not_fused(module) is None:
            module.__class__ = _few_operations(kind, backend)
            if before is not None:  # in a tuple: a module of another's would be one of its own
                before.__dict__["_next_norm"] = (module.input_layernorm,)
            before = module
            count += 1
    return count


def fused_count(model: PreTrainedModel) -> int:
    """How many layers of a twin :func:`fuse_layers` has changed."""
    return sum(getattr(type(module), "fused", False) for module in model.modules())


def why_not_fused(layer: nn.Module) -> str | None:
    """Why a decoder layer of a known kind must run as it is; None where it need not."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules()):
        return "it has hooks"
    kind: Any = type(layer)
    family = kind.__name__.removesuffix("DecoderLayer")
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    for part, name in ((attention, f"{family}Attention"), (mlp, f"{family}MLP")):
        if (type(part).__module__, type(part).__name__) != (kind.__module__, name):
            return f"its {name} is {type(part).__name__}"
    if attention.config._attn_implementation not in ALL_ATTENTION_FUNCTIONS:
        return f"its attention is {attention.config._attn_implementation}"
    linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if not all(map(_plain, linears)):
        return "its weights are no plain matrices"
    if any(len({linear.bias is None for linear in some}) > 1 for some in (linears[:3], linears[4:6])):
        return "some of its weights have a bias and some have none"
    if type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return f"its gate is {type(mlp.act_fn).__name__}"
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [norm for norm in (getattr(attention, name, None) for name in ("q_norm", "k_norm")) if norm is not None]
    if any(type(norm).__name__ not in NORMS or type(norm).__module__ != kind.__module__ for norm in norms):
        return "its norms are of another kind"
    return None


def _plain(linear: nn.Module) -> bool:
    """Whether it is a product with numbers as they lie in memory: quantized and spread ones may hide in the weight."""
    if type(linear) is not nn.Linear:
        return False
    return type(linear.weight.data) is Tensor and linear.weight.is_contiguous()


@functools.cache
def _few_operations(kind: Any, backend: str) -> Any:
    argument = cache_argument(kind)

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **others: Any,
    ) -> Tensor:
        stored = _stored(self, hidden_states, others.get(argument))
        turns = position_embeddings
        if stored is None or turns is None or turns[0].shape[-1] != self.self_attn.head_dim:
            plain: Tensor = kind.forward(
                self,
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **others,
            )
            return plain
        others.pop(argument)
        return _layer(self, hidden_states, attention_mask, turns, stored, backend, others)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "fused": True})


def _stored(layer: Any, hidden: Tensor, cache: Any) -> StaticLayer | None:
    """Where a pass of fixed shape writes; None for any other pass, and for one at too many positions."""
    if cache is None or hidden.shape[0] * hidden.shape[1] > MOST_ROWS:
        return None
    if layer.self_attn.layer_idx >= len(cache.layers):
        return None
    stored = cache.layers[layer.self_attn.layer_idx]
    if not isinstance(stored, StaticLayer) or not stored.place.fixed or not stored.is_initialized:
        return None
    return stored


def _layer(
    layer: Any,
    hidden: Tensor,
    mask: Tensor | None,
    turns: tuple[Tensor, Tensor],
    stored: StaticLayer,
    backend: str,
    others: dict[str, Any],
) -> Tensor:
    attention, mlp = layer.self_attn, layer.mlp
    rows, lanes, width = hidden.shape
    count, dim, place = rows * lanes, int(attention.head_dim), stored.place
    heads = attention.q_proj.out_features // dim
    assert stored.keys is not None and stored.values is not None
    stream, (scaled, squares) = hidden.reshape(count, width), _scaled(hidden, layer.input_layernorm, place, backend)
    own = _matrices(attention.q_proj, attention.k_proj, attention.v_proj)
    epsilon = _epsilon(layer.input_layernorm)
    fused = layer_product(scaled, *own, squares=squares, epsilon=epsilon, backend=backend)
    cosine, sine = (turn.expand(rows, lanes, dim).reshape(count, dim) for turn in turns)
    query = layer_heads(
        fused,
        cosine,
        sine,
        place.columns(lanes) if place.lanes is None else place.lanes,
        stored.keys,
        stored.values,
        heads,
        **_head_norms(attention),
        backend=backend,
    )
    attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    seen, _ = attend(
        attention, query, stored.keys, stored.values, mask, dropout=0.0, scaling=attention.scaling, **others
    )
    norm, out = layer.post_attention_layernorm, attention.o_proj
    stream, scaled, squares = layer_product_scaled(
        seen.reshape(count, heads * dim), out.weight, out.bias, norm=norm.weight, residual=stream, backend=backend
    )
    own, epsilon = _matrices(mlp.gate_proj, mlp.up_proj), _epsilon(norm)
    gated = layer_product(scaled, *own, squares=squares, epsilon=epsilon, gated=True, backend=backend)
    return _written(layer, gated, stream, place, (rows, lanes, width), backend)


def _scaled(hidden: Tensor, norm: Any, place: Place, backend: str) -> tuple[Tensor, Tensor]:
    """What a layer's first product reads: as the layer before left it, if it wrote these states for this norm."""
    if place.scaled is not None and place.scaled[0] is hidden and place.scaled[1] is norm:
        return place.scaled[2:]
    return layer_scale(hidden.reshape(-1, hidden.shape[2]), norm.weight, backend=backend)


def _written(
    layer: Any, gated: Tensor, stream: Tensor, place: Place, shape: tuple[int, int, int], backend: str
) -> Tensor:
    """A layer's last product, and beside it what the next layer reads, where that one is of the same kind."""
    down, norm = layer.mlp.down_proj, layer.__dict__.get("_next_norm", (None,))[0]
    if norm is None or torch.compiler.is_compiling():  # a compiler keeps no notes between layers
        return layer_product(gated, *_matrices(down), residual=stream, backend=backend).view(shape)
    result, *scaled = layer_product_scaled(
        gated, down.weight, down.bias, norm=norm.weight, residual=stream, backend=backend
    )
    result = result.view(shape)
    place.scaled = (result, norm, *scaled)
    return result


def _matrices(*linears: nn.Linear) -> tuple[list[Tensor], list[Tensor | None]]:
    return [linear.weight for linear in linears], [linear.bias for linear in linears]


def _epsilon(norm: Any) -> float:
    return float(norm.variance_epsilon)


def _head_norms(attention: Any) -> dict[str, Any]:
    query = getattr(attention, "q_norm", None)
    if query is None:
        return {}
    return {"query_norm": query.weight, "key_norm": attention.k_norm.weight, "epsilon": _epsilon(query)}
