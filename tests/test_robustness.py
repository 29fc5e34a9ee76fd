"""Nothing of the caller's changes, calls do not disturb each other, and odd models give clear errors."""

import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch
from tiny import (
    PAD,
    VOCABULARY,
    build_model,
    drafters,
    make_noisy,
    model,
    noisy,
    prompts,
    same,
    taught,
    taught_prompts,
)
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from specdec_fast import decoding_loop, fast_generate, last_speculation
from specdec_fast.cache import given_cache

METHODS = ("autoregressive", "model", "tli", "slem", "prompt_lookup")


def fingerprint(*things):
    """Everything there is to see of models, tokenizers, configs and tensors."""
    seen = []
    for thing in things:
        if isinstance(thing, torch.nn.Module):
            state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in thing.state_dict().items()}
            modules = {name: (id(module), module.training) for name, module in thing.named_modules()}
            hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in thing.modules()]
            configs = (copy.deepcopy(thing.config.to_dict()), copy.deepcopy(thing.generation_config.__dict__))
            seen.append((state, modules, hooks, configs, sorted(vars(thing))))
        elif isinstance(thing, torch.Tensor):
            seen.append((id(thing), thing.clone(), thing._version))
        elif hasattr(thing, "backend_tokenizer"):
            seen.append((thing.backend_tokenizer.to_str(), copy.deepcopy(thing.init_kwargs), thing.padding_side))
        else:
            seen.append(copy.deepcopy(getattr(thing, "__dict__", thing)))
    return seen


def equal(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_the_callers_is_changed(method, do_sample):
    target, tokenizer = taught()
    own = drafters()[method]
    inputs = taught_prompts(2, padded=True)
    config = GenerationConfig(
        max_new_tokens=12, do_sample=do_sample, pad_token_id=tokenizer.pad_token_id, repetition_penalty=1.1
    )
    processors, criteria = LogitsProcessorList(), StoppingCriteriaList()
    kwargs = {**inputs, **own, "generation_config": config, "stop_strings": ["zzz"], "tokenizer": tokenizer}
    kwargs |= {"logits_processor": processors, "stopping_criteria": criteria}
    names = list(kwargs)
    theirs = [target, tokenizer, config, *inputs.values()]
    theirs += [own[name] for name in ("assistant_model", "assistant_tokenizer") if name in own]
    before = fingerprint(*theirs)
    fast_generate(target, **kwargs)
    assert equal(fingerprint(*theirs), before)
    assert list(kwargs) == names
    assert not processors
    assert not criteria


def test_the_result_is_the_callers_own():
    inputs = prompts(2)
    output = fast_generate(model(), **inputs, assistant_model=noisy(), max_new_tokens=4)
    output.fill_(0)
    assert inputs["input_ids"].any()
    assert output.is_contiguous()
    assert output.dtype == torch.long


def test_gradients_and_modes_stay():
    target, drafter = build_model("llama"), make_noisy(model(), 0.1)
    torch.set_grad_enabled(True)
    fast_generate(target, **prompts(2), assistant_model=drafter, max_new_tokens=4)
    assert torch.is_grad_enabled()
    assert all(p.grad is None and p.requires_grad for p in target.parameters())


def test_the_global_generator_is_left_alone_where_a_seed_is_given():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fast_generate(model(), **prompts(2), assistant_model=noisy(), do_sample=True, seed=1, max_new_tokens=8)
    fast_generate(model(), **prompts(2), assistant_model=noisy(), max_new_tokens=8, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_models_are_not_kept_alive():
    target, drafter = build_model("llama"), build_model("llama", seed=1)
    fast_generate(target, **prompts(2), assistant_model=drafter, max_new_tokens=4)
    alive = [weakref.ref(target), weakref.ref(drafter)]
    del target, drafter
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


# At the same time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["model", "tli", "slem", "prompt_lookup"])
def test_two_threads_on_one_pair(method):
    target, _ = taught()
    own = drafters()[method]
    inputs = [taught_prompts(3, padded=True), taught_prompts(2)]
    settings = {"do_sample": True, "max_new_tokens": 14, "verification": "match"}

    def run(which):
        return fast_generate(target, **inputs[which], **own, **settings, seed=which), last_speculation().drafted

    alone = [run(0), run(1)]
    together = [None] * 4
    barrier = threading.Barrier(4)

    def work(place):
        barrier.wait()
        together[place] = run(place % 2)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in range(4):
        assert torch.equal(together[place][0], alone[place % 2][0])
        assert together[place][1] == alone[place % 2][1]


# Interrupted ---------------------------------------------------------------------------------------------------------


class Interrupting(BaseStreamer):
    def __init__(self, after):
        self.left = after

    def put(self, value):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def end(self):
        raise AssertionError("the end of a call that did not end")


@pytest.mark.parametrize("where", ["streamer", "target", "drafter"])
@pytest.mark.parametrize("calls", [0, 1, 3])
def test_an_interrupted_call_leaves_everything_usable(where, calls):
    target, drafter = make_noisy(model(), 0.0), make_noisy(model(), 0.1)
    inputs = prompts(2, padded=True)
    turn = target.generate(**inputs, return_dict_in_generate=True, max_new_tokens=3)
    cache = turn.past_key_values
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    whole = {"input_ids": turn.sequences, "attention_mask": mask}
    settings = {**whole, "assistant_model": drafter, "max_new_tokens": 12, "eos_token_id": 3}
    expected = fast_generate(target, **settings)
    streamer = Interrupting(calls) if where == "streamer" else None
    hooks = []
    if where != "streamer":
        left = [calls]

        def interrupt(*_):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        hooks.append({"target": target, "drafter": drafter}[where].register_forward_hook(interrupt))
    theirs = [target, drafter, *inputs.values(), *(layer.keys for layer in cache.layers)]
    before, statistics = fingerprint(*theirs), last_speculation()
    with pytest.raises(KeyboardInterrupt):
        fast_generate(target, **settings, past_key_values=cache, streamer=streamer)
    assert last_speculation() is statistics
    assert equal(fingerprint(*theirs), before)
    assert int(cache.get_seq_length()) == 11
    for hook in hooks:
        hook.remove()
    assert torch.equal(fast_generate(target, **settings), expected)
    assert torch.equal(fast_generate(target, **settings, past_key_values=cache), expected)


def test_an_error_in_a_callback_comes_through_as_it_is():
    class Mine(Exception):
        pass

    def fail(row, ids):
        raise Mine

    with pytest.raises(Mine):
        fast_generate(model(), **prompts(), assistant_model=noisy(), max_new_tokens=8, prefix_allowed_tokens_fn=fail)


# Numbers that are none -----------------------------------------------------------------------------------------------


def poisoned(after, value=float("nan"), row=0):
    """A copy of the model whose logits turn bad from some column of the text on."""
    copied = make_noisy(model(), 0.0)

    def poison(module, args, kwargs, output):
        _, cache = given_cache(kwargs)
        if cache is not None and cache.get_seq_length() >= after:
            output.logits[row] = value
        return output

    copied.register_forward_hook(poison, with_kwargs=True)
    return copied


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}, {"do_sample": True, "verification": "match"}], ids=str)
@pytest.mark.parametrize("method", ["autoregressive", "model", "prompt_lookup"])
def test_undefined_logits_of_the_target_are_an_error(method, settings):
    own = {
        "autoregressive": {},
        "model": {"assistant_model": noisy()},
        "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    }[method]
    for after in (0, 12):
        with pytest.raises(RuntimeError, match="row 1: the target's scores hold a NaN or forbid every token"):
            fast_generate(poisoned(after, row=1), **prompts(3), **own, **settings, max_new_tokens=12)


def test_a_processor_that_forbids_everything_is_an_error():
    def nothing(ids, scores):
        return torch.full_like(scores, -torch.inf)

    with pytest.raises(RuntimeError, match=r"row 0: .* forbid every token"):
        fast_generate(model(), **prompts(), logits_processor=[nothing], assistant_model=noisy(), max_new_tokens=8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_undefined_logits_of_the_drafter_are_not(penalty, value):
    drafter = poisoned(0, value)
    same(model(), prompts(2), {"assistant_model": drafter}, max_new_tokens=12, repetition_penalty=penalty)
    settings = {"do_sample": True, "seed": 2, "max_new_tokens": 12, "repetition_penalty": penalty}
    for rule in ("match", "token"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = fast_generate(model(), **prompts(2), assistant_model=drafter, verification=rule, **settings)
        if rule == "match":
            assert torch.equal(got, fast_generate(model(), **prompts(2), **settings))


# Padded vocabularies -------------------------------------------------------------------------------------------------


def widened(original, width):
    """The same model with another number of logits; the ones added are real and sometimes win."""
    copied = make_noisy(original, 0.1)
    config = copied.config
    old = config.vocab_size
    config.vocab_size = width
    for name in ("embed_tokens", "lm_head"):
        owner = copied.model if name == "embed_tokens" else copied
        weight = getattr(owner, name).weight
        new = torch.randn(width, weight.shape[1]) * weight.std()
        new[: min(old, width)] = weight[:width]
        if name == "embed_tokens":
            owner.embed_tokens = torch.nn.Embedding.from_pretrained(new)
        else:
            owner.lm_head = torch.nn.Linear(weight.shape[1], width, bias=False)
            owner.lm_head.weight = torch.nn.Parameter(new)
    return copied


@pytest.mark.parametrize(("width", "own_width"), [(40, 0), (40, 37), (40, 64), (0, 3), (0, 200)])
def test_padded_vocabularies_of_one_tokenizer(width, own_width):
    """Drafter logits wider and narrower than the target's; ids that only one side has do come up on either."""
    known, tokenizer = taught()
    target = widened(known, len(tokenizer) + width) if width else known
    drafter = widened(known, len(tokenizer) + own_width)
    inputs = taught_prompts(3, padded=True)
    own = {"assistant_model": drafter, "tokenizer": tokenizer, "assistant_tokenizer": copy.deepcopy(tokenizer)}
    for settings in ({}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 3}):
        same(target, inputs, {**own, "method": "model"}, max_new_tokens=16, **settings)
        assert last_speculation().accepted > 0
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 0, "seed": 3, "max_new_tokens": 24}
    plain = fast_generate(target, **inputs, **settings)
    assert torch.equal(fast_generate(target, **inputs, **own, **settings, verification="match"), plain)
    assert fast_generate(target, **inputs, **own, **settings, verification="token").max() < len(tokenizer) + width
    if width:
        assert plain.max() >= len(tokenizer), "the target should write ids that no text has"


# As a loop of `generate` ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_loop_in_generate(method):
    target, tokenizer = taught()
    inputs = taught_prompts(3, padded=True)
    loop = decoding_loop(**drafters()[method], seed=3)
    for settings in ({}, {"do_sample": True, "temperature": 0.8}):
        got = target.generate(**inputs, custom_generate=loop, max_new_tokens=16, **settings)
        expected = fast_generate(target, **inputs, **drafters()[method], seed=3, max_new_tokens=16, **settings)
        assert torch.equal(got, expected)
        assert last_speculation().method == method
    stops = StoppingCriteriaList([StopStringCriteria(stop_strings=["ever"], tokenizer=tokenizer)])
    got = target.generate(**inputs, custom_generate=loop, max_new_tokens=16, stopping_criteria=stops)
    expected = target.generate(**inputs, max_new_tokens=16, stop_strings=["ever"], tokenizer=tokenizer)
    assert torch.equal(got, expected)


def test_the_loop_reads_generates_own_knobs():
    loop = decoding_loop(assistant_model=model())
    schedule = {"num_assistant_tokens_schedule": "heuristic_transient"}
    model().generate(**prompts(), custom_generate=loop, max_new_tokens=16, **schedule)
    assert len(last_speculation().drafted_per_position) == 7  # 5, and 2 more for the second round
    model().generate(**prompts(), custom_generate=loop, max_new_tokens=16, num_assistant_tokens=3)
    assert len(last_speculation().drafted_per_position) == 3
    cache = DynamicCache()
    output = model().generate(**prompts(), custom_generate=loop, max_new_tokens=16, past_key_values=cache)
    assert cache.get_seq_length() == output.shape[1] - 1


@pytest.mark.parametrize("compiled", ["auto", "off", "static"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_that_transformers_is_about_to_drop_is_used(method, compiled):
    target, own = taught()[0], drafters()[method]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        fast_generate(target, **taught_prompts(2), **own, compile=compiled, max_new_tokens=6)


def test_pads_of_any_id_stand_behind_an_eos():
    inputs = prompts(2)
    eos = int(model().generate(**inputs, max_new_tokens=3)[0, 11])
    for pad in (PAD, 7, VOCABULARY - 1):
        same(model(), inputs, {"assistant_model": noisy()}, max_new_tokens=12, eos_token_id=eos, pad_token_id=pad)


def test_the_cache_is_filled_up_without_logits_of_every_padding_column():
    """Rows that ended early are fed their padding; no scores were asked for, so none are computed."""
    inputs = prompts(2)
    eos = int(model().generate(**inputs, max_new_tokens=3)[0, 11])
    widths = []
    seen = model().register_forward_hook(lambda module, arguments, output: widths.append(output.logits.shape[1]))
    try:
        fast_generate(model(), **inputs, max_new_tokens=40, eos_token_id=eos, return_dict_in_generate=True)
    finally:
        seen.remove()
    assert max(widths) == 1


def test_tokens_behind_the_end_do_not_count_as_accepted():
    inputs = prompts()
    eos = int(model().generate(**inputs, max_new_tokens=3)[0, -1])
    fast_generate(
        model(), **inputs, assistant_model=model(), num_assistant_tokens=10, max_new_tokens=30, eos_token_id=eos
    )
    assert last_speculation().accepted <= last_speculation().committed <= 3


def test_which_rows_share_a_pass_is_found_out_for_each_attention_implementation():
    from specdec_fast.runner import supports_ragged_batches

    own = build_model("llama")
    assert supports_ragged_batches(own)
    own.config._attn_implementation = "flash_attention_2"
    assert not supports_ragged_batches(own)
