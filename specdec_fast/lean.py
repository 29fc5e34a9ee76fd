"""A model's forward pass at a few positions as one native call (``csrc/llama.cpp``).

On a CPU a pass at a few positions takes as long as its weights take to be read and its modules to be called. Models
built like Llama (RMSNorm before attention and before a gated MLP, rotary positions), and Gemma 3 with its norms behind
both, are therefore run by one fused operation. Each model is compared with its own forward pass once; where they
differ, or the structure is another, it runs as it is; so do passes longer than what is faster that way here.

A target is run on its own weights, in their precision; sums, and what lies between matrices, are float32. A drafter is
run on weights rounded to 8 bits: a draft token is verified against the very scores it was drawn from, so this changes
the drafter's law a little and the output's law not at all.
"""

from __future__ import annotations

import copy
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from specdec_fast import native
from specdec_fast.cache import RaggedCache, ragged_layers
from specdec_fast.lean_ops import (
    MOST,
    Choices,
    Choosing,
    Drafted,
    Judged,
    Judging,
    KeptModel,
    Laws,
    Session,
    Told,
    joined,
    level,
)
from specdec_fast.lean_weights import (
    embedded,
    equal,
    gates,
    hooked,
    layer_kind,
    linears,
    matrix,
    norms_of,
    packed,
    state,
    text_parts,
    turns,
    unpacked,
)
from specdec_fast.memory import Memory, number_of

__all__ = ["MOST_LANES", "Choosing", "Drafted", "LeanModel", "lean_model", "why_not_lean"]

CAPABILITIES = ("plain", "avx2", "avx512", "dot")
LARGEST = 1 << 30  # parameters of a drafter that is copied, a byte each
NEWEST = "specdec_fast::llama_memory"  # of the operations here
MOST_LANES = 16  # positions; beyond, a matrix product of the model's own is faster
# where the machine multiplies bfloat16 in vectors, and where it has tiles for it besides
MOST_HALVES, MOST_BESIDE_TILES = 256, 64
MOST_BYTES = 512  # of a drafter's row, where the machine multiplies bytes in vectors and has no tiles
# What these compute is known; others may differ where a short trial does not reach (scaling by position, windows)
KNOWN = ("Llama", "Mistral", "Ministral", "Qwen2", "Qwen3", "SmolLM3", "SeedOss", "Gemma3")
# Root mean square of the difference in standard deviations of the logits: another model is above 1
ROUNDED, EXACT = 0.3, {torch.float32: 1e-3, torch.bfloat16: 0.1}


class LeanModel:
    """The forward pass of a Llama-like model over a :class:`RaggedCache`.

    Args:
        model: of a structure that :func:`lean_model` has found to be right.
        rounded: run on copies of the weights in 8 bits.

    Raises:
        AttributeError, TypeError, ValueError: the model is built differently.
    """

    def __init__(self, model: PreTrainedModel, *, rounded: bool):
        body: Any = text_parts(model)[0]
        layers = list(body.layers)
        attention = layers[0].self_attn
        rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
        if rope.get("rope_type") in ("dynamic", "longrope"):
            raise ValueError("frequencies that change with the length")
        self.capability = -1
        """Place in :data:`CAPABILITIES` of the instruction set to run on, -1 for the best there is."""
        self._held: KeptModel | None = None
        self._dtype = model.dtype
        self._rounded = rounded
        self._most = MOST_LANES
        dot = CAPABILITIES[torch.ops.specdec_fast.llama_capability()] == "dot"
        if dot and rounded and not torch.cpu._is_amx_tile_supported():
            self._most = MOST_BYTES
        elif dot and not rounded and model.dtype == torch.bfloat16:
            self._most = MOST_BESIDE_TILES if torch.cpu._is_amx_tile_supported() else MOST_HALVES
        self._dim = int(attention.head_dim)
        self._heads = attention.q_proj.out_features // self._dim
        self._kv_heads = attention.k_proj.out_features // self._dim
        self._scaling = float(attention.scaling)
        self._rotary = weakref.ref(body.rotary_emb)
        self._rotations = torch.empty((1, 0, 2, self._dim))
        self._restrictions: dict[bytes, LeanModel] = {}
        self._embedding, self._scale = embedded(body.embed_tokens)
        self._curved = gates(layers)
        types = [layer_kind(body.rotary_emb, layer) for layer in layers]
        self._types = list(dict.fromkeys(types))
        self._tables = [self._types.index(kind) for kind in types]
        cache = DynamicCache(config=model.config)
        self._windows = [int(getattr(layer, "sliding_window", None) or 0) for layer in cache.layers]
        for layer in layers:
            if type(layer.self_attn).__name__.removesuffix("Attention") not in KNOWN:
                raise TypeError(f"{type(layer.self_attn).__name__} is not known")
            if getattr(layer.self_attn, "attn_logit_softcapping", None) or not layer.self_attn.is_causal:
                raise ValueError("attention is capped, or sees what follows")
        if any(self._windows) and type(attention).__name__ == "LlamaAttention":
            raise ValueError("a window that the model itself knows nothing of")
        names = ["input_layernorm", "post_attention_layernorm"]
        if hasattr(layers[0], "pre_feedforward_layernorm"):  # that name means another norm then
            names = ["input_layernorm", "pre_feedforward_layernorm", *names[1:], "post_feedforward_layernorm"]
        norms = [getattr(layer, name) for layer in layers for name in names]
        self._norms, self._epsilon = norms_of([*norms, body.norm])
        self._head_norms = torch.empty(0)
        if getattr(attention, "q_norm", None) is not None:
            pairs = [norm for layer in layers for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm)]
            self._head_norms, epsilon = norms_of(pairs)
            if epsilon != self._epsilon:
                raise ValueError("the norms differ")
        maps = [linear for layer in layers for linear in linears(layer)]
        matrices = [matrix(linear, rounded) for linear in [*maps, model.get_output_embeddings()]]
        self._weights, self._scales, self._offsets = (list(part) for part in zip(*matrices, strict=True))
        self.width = model.get_output_embeddings().weight.shape[0]

    def memory(self, rows: int, index: Tensor | None) -> Memory:
        """A memory for drafts of so many rows.

        Args:
            index: ``[K]`` the target's id of each logit; None: its place.
        """
        return Memory(rows, self._embedding.shape[1], self.width, index)

    @property
    def bytes(self) -> int:
        """Memory taken beside the model's own."""
        copies = [*self._scales, *self._offsets, self._norms, self._head_norms]
        return sum(t.nbytes for t in copies + (self._weights if self._rounded else []))

    def restricted(self, ids: Tensor) -> LeanModel:
        """The same with logits of ``ids [K]`` alone, in their order."""
        place = ids.cpu()
        key = place.numpy().tobytes()
        other = self._restrictions.get(key)
        if other is None:
            other = copy.copy(self)
            other._held, other.width = None, place.numel()
            for name in ("_weights", "_scales", "_offsets"):
                parts = list(getattr(self, name))
                if len(parts[-1]):
                    bytes_ = name == "_weights" and self._rounded
                    parts[-1] = packed(unpacked(parts[-1])[place]) if bytes_ else parts[-1][place]
                setattr(other, name, parts)
            self._restrictions = {key: other}
        return other

    def takes(self, count: list[int]) -> list[bool]:
        """Which rows of a pass to run here, given their numbers of lanes.

        A drafter's scores must not hang on what shares a row's pass, so each row is judged by itself; a target's differ
        by its own precision's rounding alone, as they do between any two shapes, and the whole pass is judged by what
        is faster.
        """
        if self._rounded:
            return [lanes <= self._most for lanes in count]
        return [len(count) * max(count) <= self._most] * len(count)

    def piece(self, rows: int) -> int:
        """How many columns of a long text to read at once; 0 where it is better read in one pass of the model's own.

        A drafter's text is not cut: whether a row's were would hang on the others.
        """
        return self._most // rows if self._most >= MOST_HALVES and not self._rounded else 0

    def __call__(
        self, tokens: Tensor, columns: Tensor, hidden: list[int], cache: RaggedCache, lanes: list[int]
    ) -> Tensor:
        """Runs tokens through the model and writes their keys and values into the cache.

        Args:
            tokens: ``[R, n]`` int64.
            columns: ``[R, n]`` int64, where each stands.
            hidden: ``[R]`` how many columns at the start of each row are padding; positions count from there.
            cache: the rows of its window take part.
            lanes: those whose logits are wanted.

        Returns:
            ``[R, len(lanes), V]`` float32.
        """
        rows = tokens.shape[0]
        window = cache.window
        places = list(range(rows)) if window.rows is None else window.rows.tolist()
        logits: Tensor = torch.ops.specdec_fast.llama_forward(
            self.session(cache, window.end).number,
            tokens.contiguous(),
            columns.contiguous(),
            places,
            hidden,
            lanes,
        )
        return logits

    def read(
        self,
        texts: list[list[int]],
        places: list[int],
        start: list[int],
        hidden: list[int],
        cache: RaggedCache,
        tail: list[int],
    ) -> Tensor:
        """The same from lists, one a row.

        Args:
            texts: ids of each of the ``R`` rows, at least one; of any lengths.
            places: their rows in the cache.
            start: column of each text's first token.
            hidden: ``[R]`` as above.
            tail: how many last lanes of each row to have logits of, at least one.

        Returns:
            ``[R, max(tail), V]`` float32, each row's own lanes first.
        """
        lengths = [len(text) for text in texts]
        end = max(first + n for first, n in zip(start, lengths, strict=True))
        logits: Tensor = torch.ops.specdec_fast.llama_read(
            self.session(cache, end).number, joined(texts), lengths, places, start, hidden, tail
        )
        return logits

    def judge(
        self,
        first: list[int],
        told: Told,
        count: list[int],
        places: list[int],
        start: list[int],
        hidden: list[int],
        cache: RaggedCache,
        judging: Judging,
        seed: list[int],
        position: list[int],
    ) -> Judged:
        """Feeds each row a token and its draft, and judges the drafts, all in one operation.

        What is said is what :meth:`read` and the operation ``verify`` behind it would say, bit for bit.

        Args:
            first: the token of each of the ``R`` rows that stands before its draft.
            told: the drafts, and by what law they were drawn.
            count: how many tokens of each are judged.
            places, start, hidden: as for :meth:`read`.
            judging: by what law and rule.
            seed, position: ``[R]``, of the numbers' keys.
        """
        rows, longest, laws = len(count), max(count), told.laws
        session = self.session(cache, max(start) + longest + 1)
        drafts = level(told.tokens, longest)
        drawn = [] if laws is None else drafts if told.drawn is None else level(told.drawn, longest)
        temperature, top_k, top_p, min_p, rule = judging
        said = None
        if laws is None or laws.room is not None:
            scores, sums, room, entries = 0, 0, 0, 0
            if laws is not None and laws.room is not None:
                (scores, sums), (_, room, entries) = laws.room.at, laws.shape
            index = 0 if told.table is None else told.table.at
            board = [session.number, rows, longest, rule, top_k, scores, sums, index, room, entries]
            board.append(number_of(told.memory))
            for line in (first, count, places, start, hidden, seed, position, drafts, drawn):
                board += line
            said = session.judge(board, [temperature, top_p, min_p], 2 * rows + 2)
        if said is None:
            law = (None, None) if laws is None else (laws.scores.contiguous(), laws.logsumexp)
            narrow = None if told.table is None else told.table.narrow
            keys, kept = (narrow, seed, position), number_of(told.memory)
            said = torch.ops.specdec_fast.llama_judge(
                session.number, first, drafts, count, places, start, hidden, drawn, *law, *keys, *judging, kept
            )
        return Judged(said[:rows], said[rows : 2 * rows], 1e-9 * said[-1])

    def steps(
        self, places: list[int], start: list[int], hidden: list[int], cache: RaggedCache, most: int
    ) -> Callable[[Tensor], Tensor]:
        """A function that feeds one token a row, ``[R]`` int64, and gives the logits behind it, ``[R, V]`` float32.

        Each call stands one column behind the call before, the first at ``start``; at most ``most`` calls.
        """
        columns = torch.tensor(start).unsqueeze(1)
        number, op = self.session(cache, max(start) + most).number, torch.ops.specdec_fast.llama_forward

        def step(tokens: Tensor) -> Tensor:
            nonlocal columns
            logits: Tensor = op(number, tokens.unsqueeze(1), columns, places, hidden, [0])
            columns = columns + 1
            return logits[:, 0]

        return step

    def draft(
        self,
        texts: list[list[int]],
        places: list[int],
        start: list[int],
        hidden: list[int],
        cache: RaggedCache,
        steps: list[int],
        choosing: Choosing,
        choices: Choices | None,
        seed: list[int],
        position: list[int],
        stops: list[tuple[list[float], list[float]]] | None = None,
        memory: Memory | None = None,
    ) -> Drafted:
        """Feeds each row its text, then draws and feeds tokens without coming back in between.

        The tokens are those that :func:`specdec_fast.fused.drafted_token` draws from the logits of single passes, or
        their argmax. The last token of a draft is not fed.

        Args:
            texts: ids of each of the ``R`` rows, at least one; of any lengths.
            places, start, hidden: as for :meth:`read`.
            steps: tokens of each row's draft at most, at least 1.
            choosing: how they are drawn.
            choices: the id of each of the ``K`` logits; None: they are ids.
            seed, position: ``[R]``, of the numbers' keys.
            stops: where each row's draft ends early, as :meth:`specdec_fast.lookahead.Adaptive.stops` tells it: by
                level of confidence, the acceptance of a token; and for a draft of 1, 2, .. tokens, what the product of
                those of its tokens must exceed for it to go on. None: nowhere.
            memory: mends the logits, by the rows' ``places``.
        """
        lengths = [len(text) for text in texts]
        end = max(first + n + most for first, n, most in zip(start, lengths, steps, strict=True))
        numbers: list[float] = []
        for (sure, bounds), most in zip(stops or (), steps, strict=bool(stops)):
            numbers += sure
            numbers += bounds[:most] + [math.inf] * (most - len(bounds))
        session, tokens, levels = self.session(cache, end), joined(texts), len(stops[0][0]) if stops else 0
        rows, most = len(texts), max(steps)
        size = rows * (1 + most + (most if levels else 0)) + 1
        temperature, top_k, top_p, min_p, least = choosing
        laws, at, report = None, (0, 0), None
        if max(7 * rows + len(tokens) + 9, size) <= MOST:
            if temperature:
                room = session.room(rows * most, self.width)
                laws, at = room.laws((rows, most, self.width)), room.at
            ids = 0 if choices is None else choices.at
            board = [session.number, rows, len(tokens), levels, top_k, ids, *at, number_of(memory)]
            for line in (lengths, places, start, hidden, steps, seed, position, tokens):
                board += line
            report = session.draft(board, [temperature, top_p, min_p, least, *numbers], size)
        if report is None:
            own = None if choices is None else choices.ids
            written, report = torch.ops.specdec_fast.llama_draft(
                session.number,
                tokens,
                lengths,
                places,
                start,
                hidden,
                steps,
                own,
                seed,
                position,
                *choosing,
                levels,
                numbers,
                number_of(memory),
            )
            laws = Laws(*written) if written else None
        lines = [report[first : first + most] for first in range(rows, size - 1, most)]
        return Drafted(lines[:rows], laws, report[:rows], lines[rows:] if stops else None)

    def session(self, cache: RaggedCache, end: int) -> Session:
        """What the operations read and write, with room for the columns below ``end``."""
        session: Session | None = cache.session
        if session is not None and session.owner is self and end <= session.end:
            # Another pass may have put other buffers in place
            kept = session.grown == cache.window.grown and session.capability == self.capability
            if kept:
                return session
        for layer in cache.ragged:
            layer.reserve(end, self._kv_heads, self._dim, self._dtype, self._embedding.device)
        rotations, room = self._rotations, cache.ragged[0].room
        if rotations.shape[1] < room:
            rotary = self._rotary()
            assert rotary is not None, "the model is gone"
            rotations = self._rotations = turns(rotary, self._types, 2 * room, self._dim)
        cache.session = session = Session(self, self._model(), cache, rotations, self.capability)
        return session

    def _model(self) -> KeptModel:
        """The weights as the native code holds them."""
        if self._held is None:
            self._held = KeptModel(
                self._embedding,
                self._weights,
                self._scales,
                self._offsets,
                self._norms,
                self._head_norms,
                self._windows,
                self._tables,
                self._heads,
                self._kv_heads,
                self._dim,
                self._scaling,
                self._epsilon,
                self._scale,
                self._curved,
            )
        return self._held


_Kept = dict[bool, tuple[list[Any], LeanModel | str]]
_kept: weakref.WeakKeyDictionary[PreTrainedModel, _Kept] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def lean_model(model: PreTrainedModel, *, rounded: bool = True) -> LeanModel | None:
    """The model's lean form, made once; made again where the model has changed since.

    Args:
        rounded: weights of 8 bits, for a drafter.

    Returns:
        None where :func:`why_not_lean` says why there is none.
    """
    found = _form(model, rounded)
    return None if isinstance(found, str) else found


def why_not_lean(model: PreTrainedModel, *, rounded: bool = True) -> str | None:
    """Why a model has no lean form; None where it has one: the native code is missing, the model is elsewhere than on
    the CPU, something hooks into its modules, or it is built so that the lean form does not give its logits."""
    found = _form(model, rounded)
    return found if isinstance(found, str) else None


def _form(model: PreTrainedModel, rounded: bool) -> LeanModel | str:
    # Hooks and devices may come and go between calls
    with _lock:
        if (found := hooked(model)) or model.device.type != "cpu" or not _native():
            _kept.pop(model, None)
            if found:
                return f"something hooks into the modules of {type(model).__name__}"
            return "the model is not on a CPU" if model.device.type != "cpu" else "the native pass is not built"
        now = state(model, rounded)
        forms = _kept.setdefault(model, {})
        if rounded not in forms or not equal(forms[rounded][0], now):
            forms[rounded] = (now, _made(model, rounded))
        return forms[rounded][1]


def _native() -> bool:
    """Whether the native pass is there: a library built from older sources may lack it."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return native.load_ops() and has("specdec_fast::llama_hold", "CPU") and has(NEWEST, "CompositeExplicitAutograd")


@torch.no_grad()
def _made(model: PreTrainedModel, rounded: bool) -> LeanModel | str:
    config, name = model.config.get_text_config(decoder=True), type(model).__name__
    if {p.dtype for part in text_parts(model) for p in part.parameters()} not in ({torch.float32}, {torch.bfloat16}):
        return f"the weights of {name} are neither float32 nor bfloat16"
    if rounded and model.num_parameters() > LARGEST:
        return f"{name} has more than {LARGEST} parameters to be copied"
    try:
        lean = LeanModel(model, rounded=rounded)
        tokens = (torch.arange(1, 13) * 997).remainder(config.vocab_size).unsqueeze(0)
        columns = torch.arange(12).unsqueeze(0)
        cache = RaggedCache(1, ragged_layers(model.config) or 0)
        parts = []
        for first, end in ((0, 8), (8, 12)):
            cache.window.start, cache.window.end = first, end
            parts.append(lean(tokens[:, first:end], columns[:, first:end], [0], cache, list(range(end - first))))
        own = torch.cat(parts, 1)
        whole = model(input_ids=tokens, use_cache=False).logits.float()
    except (AttributeError, TypeError, RuntimeError, ValueError):
        return f"{name} is not built like Llama"
    tolerance = ROUNDED if rounded else EXACT[model.dtype]
    if not (own - whole).square().mean().sqrt() <= tolerance * whole.std():
        return f"the native pass gives other logits than {name}"
    return lean
