"""Models that read what an encoder made, in passes of fixed shape.

What a pass reads of a source stands in buffers beside the text's (:class:`specdec_fast.static_cache.StaticSource`),
written once a call by one plain pass. Columns behind a short source are hidden by the mask, so that sources of nearly
equal length share a shape; where a model takes no such mask (a recording's always has the same length) the buffers are
as long as the source. Prompts are a mark or a few tokens, so they are read by passes of fixed shape too.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from specdec_fast.apart import told_apart, twin_apart
from specdec_fast.attention import why_no_twin
from specdec_fast.cache import cache_argument, empty, read_cache, write_cache
from specdec_fast.encoded import EncodedRunner, form_of, found_of, ids_to_try
from specdec_fast.encoding import Encoded, counts_text, layer_count, readable, source_in
from specdec_fast.static_cache import StaticCache, StaticSource, capacity_for
from specdec_fast.static_runner import StaticRunner
from specdec_fast.trial import alike

__all__ = [
    "SourceShape",
    "StaticEncodedRunner",
    "attention_of",
    "empty_cache",
    "first_of_its_length",
    "shape_of",
    "why_not_static",
]

LANES = (1, 4, 16, 64, 256)  # of the passes that read prompts
LEAST_COLUMNS = 64  # of buffers for sources that may be shorter
TELLING = 8  # states of a source from which on hiding half of it would show


class SourceShape(NamedTuple):
    """What buffers for sources hang on: their columns, where a mask goes that hides those behind a shorter source
    (:class:`specdec_fast.static_cache.StaticSource`), and the states' width."""

    columns: int
    masked: str
    width: int


def shape_of(model: PreTrainedModel, encoded: Encoded) -> SourceShape | None:
    """The shape that sources of a call need; None where their mask is one that no pass of fixed shape takes."""
    columns, width = encoded.outputs[0].shape[1:]
    mask, exact = encoded.mask, SourceShape(columns, "", width)
    if _holds_mask(encoded):
        own = encoded.outputs.get("attention_mask")
        if (own is None or own.shape[1:] == (columns,)) and _tried(model, encoded, "inside") is None:
            return SourceShape(_rounded(columns), "inside", width)
        if own is not None:
            return None
    if mask is None:
        # Pictures are all alike, and their attention needs no mask then
        masked = model.main_input_name != "pixel_values" and _tried(model, encoded, "given") is None
    elif mask.ndim == 2 and mask.shape[1] == columns:
        masked = True
    else:
        read = _reading(model, encoded)
        return exact if read.never or (read.hidden and bool(mask.all())) else None
    return SourceShape(_rounded(columns), "given", width) if masked else exact


def _holds_mask(encoded: Encoded) -> bool:
    """Whether what an encoder made has a place for the mask of its states."""
    return "attention_mask" in getattr(type(encoded.outputs), "__dataclass_fields__", {})


def _rounded(columns: int) -> int:
    """Columns to allocate: few different numbers, since each is a shape to capture."""
    size = LEAST_COLUMNS
    while size < columns:
        size *= 2
    return size


_met: weakref.WeakKeyDictionary[PreTrainedModel, set[int]] = weakref.WeakKeyDictionary()


def first_of_its_length(model: PreTrainedModel, encoded: Encoded) -> str | None:
    """Why nothing should be captured for a call's sources: they alone may have their length; None where others will."""
    shape = shape_of(model, encoded)
    if shape is None or shape.masked or model.main_input_name == "pixel_values":
        return None
    if shape.columns == getattr(model.config, "max_source_positions", None):
        return None
    met = _met.setdefault(model, set())
    if shape.columns in met:
        return None
    met.add(shape.columns)
    return (
        f"{type(model).__name__} takes no mask of its source, so each length has passes of its own: they are captured "
        f"where a second source of {shape.columns} states is read"
    )


class StaticEncodedRunner(StaticRunner):
    """A :class:`StaticRunner` of a model that reads what an encoder made; other arguments are that one's.

    Args:
        model: that :func:`why_not_static` has nothing against.
        cache: of :func:`empty_cache`.
        encoded: of as many rows.
    """

    def __init__(self, model: PreTrainedModel, cache: StaticCache, rows: int, *, encoded: Encoded, **settings: Any):
        settings["prefill_chunk"] = min(settings.get("prefill_chunk") or LANES[-1], LANES[-1])
        super().__init__(_twin(model) or model, cache, rows, **settings)
        self.vocabulary = readable(model)
        self._ids = self.vocabulary or 1 << 60
        assert cache.source is not None
        layers = _read(model, encoded)
        self._source_columns = layers[0][0].shape[2]
        shown = encoded.outputs.get("attention_mask") if cache.source.masked == "inside" else encoded.mask
        cache.source.write(layers, shown)

    def _read_once(self, rows: Any, tokens: Tensor, count: list[int], tail: int) -> tuple[Tensor, list[int]]:
        """Prompts that are alike have sources that are not."""
        return tokens, count

    def _lanes(self, start: list[int], tokens: int) -> int:
        lanes = 0 if self._room is None else self._room(max(start) + tokens, tokens)
        return lanes or next(lanes for lanes in LANES if lanes >= tokens)

    def load(self, cache: Any, past: int) -> None:
        """Goes on behind a caller's cache of ``past`` columns, found readable by ``check_cache``."""
        (_, own), source = self.caches[0], self.cache.source
        read_cache(cache.self_attention_cache, own)
        self.length = [past] * self.rows
        if (held := source_in(cache)) and source is not None:
            shown = None if source.shown is None else source.shown[: self.rows, : self._source_columns].clone()
            source.write(held, shown)

    def store(self, cache: Any, columns: int) -> None:
        """Writes the columns of the result, and the source's keys and values, into a Transformers cache."""
        write_cache(self.caches[0][1], cache.self_attention_cache, columns)
        empty(cache.cross_attention_cache)
        assert self.cache.source is not None
        for index, layer in enumerate(self.cache.source.layers):
            assert layer.keys is not None and layer.values is not None
            parts = (part[: self.rows, :, : self._source_columns].clone() for part in (layer.keys, layer.values))
            cache.cross_attention_cache.update(*parts, index)
            cache.is_updated[index] = True


def _twin(model: PreTrainedModel) -> PreTrainedModel | None:
    """The form of a model that runs passes of fixed shape; None where there is none."""
    return twin_apart(model, "sdpa" if attention_of(model) else "")


def attention_of(model: PreTrainedModel) -> str | None:
    """What there is to say of a model's attention in passes of fixed shape: one that takes no mask a row is left."""
    decoder: Any = model.get_decoder() if model.config.is_encoder_decoder else model
    own = str(decoder.config._attn_implementation)
    return None if own in ("sdpa", "eager") else f"sdpa attention in the place of {own}"


@torch.no_grad()
def _first_pass(model: PreTrainedModel, encoded: Encoded, rows: list[int]) -> Any:
    """What a model keeps of the first token of some rows, by its own forward."""
    prefix = "decoder_" if model.config.is_encoder_decoder else ""
    outputs, mask = encoded.of(rows)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    arguments: dict[str, Any] = {
        f"{prefix}input_ids": torch.zeros((len(rows), 1), dtype=torch.long, device=model.device),
        "encoder_outputs": outputs,
        cache_argument(type(model)): cache,
        "use_cache": True,
    }
    if mask is not None:
        arguments["attention_mask"] = mask
    model(**arguments)
    return cache


def _read(model: PreTrainedModel, encoded: Encoded) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every row's source, layer by layer."""
    made = _first_pass(model, encoded, list(range(encoded.rows)))
    return [(layer.keys, layer.values) for layer in made.cross_attention_cache.layers]


def empty_cache(model: PreTrainedModel, rows: int, capacity: int, encoded: Encoded, shape: SourceShape) -> StaticCache:
    """A static cache for a model that :func:`why_not_static` has nothing against, its buffers allocated, for sources of
    this shape."""
    config = model.config.get_text_config(decoder=True)
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    windows += [None] * (layer_count(model) - len(windows))
    made = _first_pass(model, encoded, [0])
    own = made.self_attention_cache.layers
    source = StaticSource(
        [(layer.keys, layer.values) for layer in made.cross_attention_cache.layers],
        rows,
        shape.columns,
        masked=shape.masked,
        outputs=type(encoded.outputs),
        width=shape.width,
        counted=counts_text(model),
        pad=found_of(model, encoded).stumbles,
    )
    cache = StaticCache(
        rows,
        len(own),
        argument=cache_argument(type(model)),
        capacity=capacity,
        device=model.device,
        windows=tuple(windows[: len(own)]),
        source=source,
    )
    for mine, layer in zip(cache.ragged, own, strict=True):
        mine.lazy_initialization(layer.keys, layer.values)
    return cache


class _Reading(NamedTuple):
    """What a model does with a mask that is not of the encoder's states: ``never`` looks at it, or not where it
    ``hidden`` nothing."""

    never: bool
    hidden: bool


_probed: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, str | None]] = weakref.WeakKeyDictionary()
_readings: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, _Reading]] = weakref.WeakKeyDictionary()
_probing = threading.RLock()


@torch.no_grad()
def _reading(model: PreTrainedModel, encoded: Encoded) -> _Reading:
    """Tried once a model: passes with such a mask, hiding something and nothing, against passes without."""
    with _probing:
        found, form = _readings.setdefault(model, {}), form_of(model, encoded)
        if form not in found:
            outputs, mask = encoded.of([0])
            assert mask is not None
            shown = torch.ones_like(mask)
            half = shown.clone()
            half[:, shown.shape[1] // 2 :] = 0
            ids = ids_to_try(model)[:, :7]

            def logits(given: Tensor | None) -> Tensor:
                runner = EncodedRunner(model, 1, encoded=Encoded(outputs, given), twin=False)
                return runner.feed([0], ids, [7], [7])[0]

            if encoded.outputs[0].shape[1] < TELLING or not bool(outputs[0].isfinite().all()):
                return _Reading(False, False)  # says nothing of the model
            try:
                plain = logits(None)
                hides = alike(model, plain, logits(half))
                found[form] = _Reading(hides, hides or alike(model, plain, logits(shown)))
            except Exception:  # what a forward of its own kind can throw
                found[form] = _Reading(False, False)
        return found[form]


def why_not_static(model: PreTrainedModel, encoded: Encoded, prompt: Tensor | None = None) -> str | None:
    """Why a model cannot read what an encoder made in passes of fixed shape; None where it can.

    Args:
        encoded: what the model would read.
        prompt: ``[B, P]`` ids that texts begin with.
    """
    name = type(model).__name__
    if (why := why_no_twin(model)) is not None:
        return why
    if not told_apart(model):
        return f"{name} has positions that it cannot be told"
    shape = shape_of(model, encoded)
    if shape is None:
        return f"{name} is given a mask that is not of what its encoder made"
    tensors = {key for key, part in encoded.outputs.items() if isinstance(part, Tensor)}
    known = {"last_hidden_state", "pooler_output", *(["attention_mask"] if shape.masked == "inside" else [])}
    if more := sorted(tensors - known):
        return f"the encoder of {name} makes more than states: {', '.join(more)}"
    stumbles = found_of(model, encoded).stumbles
    if prompt is not None and stumbles is not None and bool((prompt == stumbles).any()):
        return f"{name} counts positions by what it reads, and the text begins with padding"
    return _tried(model, encoded, shape.masked)


def _tried(model: PreTrainedModel, encoded: Encoded, masked: str) -> str | None:
    """Why a model cannot read sources so; None where it can. Tried once a model."""
    with _probing:
        found, form = _probed.setdefault(model, {}), f"{form_of(model, encoded)} {masked}"
        if form not in found:
            if not bool(encoded.outputs[0].isfinite().all()):
                return f"what the encoder of {type(model).__name__} made holds no numbers to try it with"
            found[form] = _probe(model, encoded, masked)
        return found[form]


@torch.no_grad()
def _probe(model: PreTrainedModel, encoded: Encoded, masked: str) -> str | None:
    name, known = type(model).__name__, found_of(model, encoded)
    ids = ids_to_try(model).view(2, 7)
    both = encoded.part([0, encoded.rows - 1])
    columns, width = both.outputs[0].shape[1:]
    if masked:
        hidden = torch.ones((2, columns), dtype=torch.long, device=model.device)
        hidden[1, -(-2 * columns // 3) :] = 0
        hidden[:, 0] = 1
        if masked == "given":
            both = Encoded(both.outputs, hidden)
        else:
            outputs = type(both.outputs)(last_hidden_state=both.outputs[0], attention_mask=hidden)
            both = Encoded(outputs, both.mask)
    shape = SourceShape(_rounded(columns) if masked else columns, masked, width)
    visible = torch.tensor([[True, True, True], [False, True, True]]) if known.masks else None
    try:
        cache = empty_cache(model, 2, capacity_for(8), both, shape)
        runner = StaticEncodedRunner(model, cache, 2, encoded=both, visible=visible)
        runner.feed([0, 1], ids[:, :5], [3, 5], [1, 1])
        start, last = (torch.tensor(numbers, device=model.device) for numbers in ([3, 5], [1, 1]))
        if known.stumbles is not None:
            ids[1, 5] = known.stumbles
        some = torch.stack([ids[0, 3:5], ids[1, 5:]])
        runner.score(some.flip(1), start)  # what is written over
        got = runner.score(some, start)
        picked = runner.score(some, start, last)
        for row, n in enumerate((5, 7)):
            seen = None if visible is None else visible[row : row + 1]
            alone = EncodedRunner(model, 1, encoded=both.part([row]), twin=False, visible=seen)
            text = ids[row : row + 1]
            alone.feed([0], text[:, : n - 2], [n - 2], [1])
            plain = torch.cat([alone.feed([0], text[:, i : i + 1], [1], [1]) for i in (n - 2, n - 1)], 1)[0]
            if not (alike(model, plain, got[row]) and alike(model, plain[1:], picked[row : row + 1])):
                return f"{name} gives other logits with a static cache"
    except torch.OutOfMemoryError:
        raise  # says nothing of the model
    except Exception as error:  # what a forward of its own kind, or one that has no such attention, can throw
        return f"{name} fails with a static cache ({type(error).__name__})"
    return None
