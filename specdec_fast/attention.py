"""Attention over static caches inside Transformers models, through their public hooks.

``attn_implementation="specdec_fast"`` names two functions. Where a pass comes with :func:`places` instead of a mask,
the attention is :func:`specdec_fast.attention_ops.decode_attention`: its kernel reads what a row has written of a
static cache and nothing else, and no mask is made. All other passes are those of ``"sdpa"``.

A model is never switched over: :func:`twin` gives one that shares its weights and has a configuration of its own.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from specdec_fast import dispatch, fused_layers
from specdec_fast.attention_ops import MOST_DIM, decode_attention, seen_columns

__all__ = ["NAME", "attend", "for_static_cache", "is_twin", "mask", "places", "twin", "why_no_kernel", "why_no_twin"]

NAME = "specdec_fast"
HALVES = (torch.bfloat16, torch.float16)
PLAIN = (bool, int, float, str, types.FunctionType, types.BuiltinFunctionType)
MOST_QUERIES = 64  # of a pass that counts as decoding


def places(start: Tensor, hidden: Tensor | None = None, window: int | None = None) -> Tensor:
    """What stands for a mask: where each row's queries stand and what they see, for all layers of one kind.

    It has four dimensions because Transformers hands a mask of four dimensions on to the attention as it is.

    Args:
        start: ``[B]`` int64, column of each row's first query.
        hidden: ``[B]`` int64, padding columns at the start of each row.
        window: columns that a query sees, its own included.

    Returns:
        ``[B, 1, 1, 3]`` int64: start, hidden, window (0: all).
    """
    hidden = torch.zeros_like(start) if hidden is None else hidden
    return torch.stack([start, hidden, torch.full_like(start, window or 0)], 1)[:, None, None]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function: Transformers' signature, ``query [B, H, n, d]`` in, ``[B, n, H, d]`` out.

    Raises:
        ValueError: attention sinks or a position bias, which the kernel does not know.
    """
    for name in ("s_aux", "position_bias"):
        if others.get(name) is not None:
            raise ValueError(
                f"{NAME} attention does not support {name}: load the model with attn_implementation='eager'"
            )
    if attention_mask is None or attention_mask.dtype != torch.int64 or attention_mask.shape[1:] != (1, 1, 3):
        if not softcap:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
            )
        return _capped(query, key, value, attention_mask, scaling, softcap), None
    start, hidden, window = attention_mask[:, 0, 0].unbind(1)
    if key.shape == value.shape and why_no_kernel(query.device.type, key.shape[3]) is None:
        seen = {"start": start, "hidden": hidden, "window": window}
        return decode_attention(query, key, value, **seen, scale=scaling, softcap=softcap, backend="triton"), None
    dense = seen_columns(start, query.shape[2], key.shape[2], hidden, window).unsqueeze(1)
    if softcap:
        return _capped(query, key, value, dense, scaling, softcap), None
    shared = query.shape[1] != key.shape[1]
    out = scaled_dot_product_attention(query, key, value, attn_mask=dense, scale=scaling, enable_gqa=shared)
    return out.transpose(1, 2).contiguous(), None


def _capped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, softcap: float
) -> Tensor:
    """Attention with capped scores, which torch's own has not: as Transformers' eager one."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    scores = softcap * (scores / softcap).tanh()
    if mask is None:
        lanes = torch.arange(query.shape[2], device=query.device)
        mask = torch.arange(key.shape[2], device=query.device) <= lanes.unsqueeze(1)
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value).transpose(1, 2).contiguous()


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> Tensor | None:
    """The mask function: :func:`places` for short causal passes over Transformers' static caches, else ``sdpa``'s mask.

    A static cache says its length as a tensor. Padding and patterns that are known by a function alone (windows,
    images) are left to the mask.
    """
    causal = mask_function is causal_mask_function and attention_mask is None and kv_offset == 0
    if causal and isinstance(q_offset, Tensor) and q_offset.ndim == 0 and q_length <= MOST_QUERIES:
        return places(q_offset.to(torch.int64).expand(batch_size))
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **others,
    )


@torch.compiler.assume_constant_result
def why_no_kernel(device: str, dim: int) -> str | None:
    """Why passes with :func:`places` run on torch's attention and a mask; None where the kernel runs."""
    if device != "cuda":
        return f"the attention kernel needs a GPU, not a {device} device"
    if dim > MOST_DIM:
        return f"the attention kernel knows heads of up to {MOST_DIM} entries, not {dim}"
    return _tried(dim)


@functools.cache
def _tried(dim: int) -> str | None:
    """Whether the kernel compiles and computes what it should for heads of a size; tried once."""
    if reason := dispatch.why_not("decode_attention", "triton"):
        return reason
    try:
        states = torch.randn(2, 4, 64, dim, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        start = torch.tensor([5, 21], device="cuda")
        for dtype, close in ((torch.bfloat16, 2e-2), (torch.float32, 1e-5)):
            for queries in (3, 40):  # a tile of 16 rows, and tiles of 64
                given = (states[:, :, :queries].to(dtype), states[:, :2].to(dtype), states[:, 2:].to(dtype), start)
                got, right = (decode_attention(*given, backend=backend) for backend in ("triton", "reference"))
                if not (got - right).abs().amax() <= close * (1 + right.abs().amax()):
                    return "the attention kernel gives other values than its reference"
    except Exception as error:  # what a compiler or driver can throw has no common base
        return f"the attention kernel fails ({type(error).__name__}: {error})"
    return None


def for_static_cache(model: PreTrainedModel) -> tuple[PreTrainedModel, str | None]:
    """The model to run passes over a static cache with, and what there is to say of it.

    Models set to ``sdpa`` or to an attention that takes no mask a row (FlashAttention, flex attention) get the kernel
    where it runs; without it the latter get ``sdpa``. ``eager`` stays: it may stand for what others do not know.

    Returns:
        the model or a :func:`twin` of it, and which attention takes the place of which.
    """
    own = str(model.config._attn_implementation)
    if own in ("eager", NAME):
        return model, None
    wanted = NAME if not any(why_no_kernel(model.device.type, dim) for dim in _head_dims(model)) else "sdpa"
    if wanted == own or why_no_twin(model):
        return model, None
    try:
        return twin(model, wanted), f"{wanted} attention in the place of {own}"
    except (ValueError, ImportError):  # an attention that this model does not have
        return model, None


def _head_dims(model: PreTrainedModel) -> set[int]:
    """Entries of a head; layers may differ (Gemma 4)."""
    said = (getattr(module, "head_dim", None) for module in model.get_decoder().modules())
    found = {dim for dim in said if isinstance(dim, int)}
    config = model.config.get_text_config(decoder=True)
    return found or {config.hidden_size // config.num_attention_heads}


def why_no_twin(model: PreTrainedModel) -> str | None:
    """Why a model cannot be given another attention; None where it can."""
    name = type(model).__name__
    if any("forward" in vars(module) for module in model.modules()):
        return f"{name} has a forward that was replaced (by accelerate, or by hand)"
    if not model._can_set_attn_implementation():
        return f"{name} has an attention of its own"
    return None


_twins: weakref.WeakKeyDictionary[PreTrainedModel, dict[tuple[str, bool], tuple[Any, PreTrainedModel]]] = (
    weakref.WeakKeyDictionary()
)

_made: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


def twin(model: PreTrainedModel, implementation: str, *, fused: bool = False) -> PreTrainedModel:
    """The same model with another attention, the model itself left as it is.

    Its modules are new objects around the same parameters, buffers and hooks, and its configuration is a copy: what is
    later done to the weights of one shows in the other. It costs no memory to speak of and lives as long as the model.

    Args:
        model: that :func:`why_no_twin` has nothing against.
        implementation: what ``attn_implementation`` takes.
        fused: whether its decoder layers run as few operations, those that can (:mod:`specdec_fast.fused_layers`).

    Raises:
        ValueError: the model cannot be given another attention, or not this one.
    """
    if reason := why_no_twin(model):
        raise ValueError(f"attn_implementation={implementation!r} is not possible for this model: {reason}")
    kept = _twins.setdefault(model, {})
    state, key = parts_of(model), (implementation, fused)
    if key not in kept or kept[key][0] != state:
        memo: dict[int, Any] = {}
        made: PreTrainedModel = around(model, memo)
        made.set_attn_implementation(implementation)
        if model.device.type == "cuda" and model.dtype in HALVES:
            fused_layers.fuse_norms(made)
            fused_layers.fuse_turns(made)
        if fused:
            fused_layers.fuse_layers(made)
        kept[key] = state, made
        _made.add(made)
    return kept[key][1]


def is_twin(model: PreTrainedModel) -> bool:
    """Whether a model came from :func:`twin`: where the one that it was made of has changed, another one is made."""
    return model in _made


def parts_of(model: PreTrainedModel) -> Any:
    """What a twin is made of: where this has changed, a twin is no longer one.

    Modules are referred to weakly: an address may be another module's when the first one is gone.
    """
    modules = [
        (weakref.ref(m), len(m._forward_hooks) + len(m._forward_pre_hooks), _settings(m)) for m in model.modules()
    ]
    return id(model.config), modules, model.dtype, model.device.type


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    """Plain numbers, words and functions that a module holds, which a twin copies."""
    return [(name, value) for name, value in vars(module).items() if type(value) in PLAIN]


def around(module: Any, memo: dict[int, Any]) -> Any:
    """A module of the same type around the same tensors; configurations are copied, each once."""
    if id(module) not in memo:
        made = object.__new__(type(module))
        memo[id(module)] = made
        for name, value in vars(module).items():
            if name == "_modules":
                value = {child: None if m is None else around(m, memo) for child, m in value.items()}
            elif isinstance(value, PretrainedConfig):
                value = copy.deepcopy(value, memo)
            elif isinstance(value, nn.Module):  # one that is not among its own, like a parent
                value = around(value, memo)
            made.__dict__[name] = value
    return memo[id(module)]


def register() -> None:
    """Makes ``attn_implementation="specdec_fast"`` known to Transformers."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


register()
