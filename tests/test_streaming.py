"""Streamers get the calls that ``generate`` makes: the prompt, then one ``[B]`` tensor a column, then the end."""

import asyncio
import threading

import pytest
import torch
from tiny import PAD, model, noisy, prompts, taught, taught_prompts
from transformers import AsyncTextIteratorStreamer, StoppingCriteria, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from specdec_fast import fast_generate

PERFECT = {"assistant_model": model(), "num_assistant_tokens": 4}
OWN = {
    "plain": {},
    "perfect": PERFECT,
    "noisy": {"assistant_model": noisy()},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


class Notes(BaseStreamer):
    def __init__(self):
        self.calls = []
        self.puts = []

    def put(self, value):
        self.puts.append(value)
        self.calls.append((value.dtype, value.device.type, value.tolist()))

    def end(self):
        self.calls.append("end")


def notes_of(run, **settings):
    streamer = Notes()
    output = run(streamer=streamer, **settings)
    # What was handed over may be kept
    assert [put.tolist() for put in streamer.puts] == [call[2] for call in streamer.calls[:-1]]
    return streamer.calls, output


def both(inputs, own, **settings):
    target = model()
    expected, _ = notes_of(lambda **more: target.generate(**inputs, **settings, **more))
    got, output = notes_of(lambda **more: fast_generate(target, **inputs, **settings, **own, **more))
    assert got == expected
    return got, output


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("own", OWN)
def test_a_custom_streamer_gets_the_same_calls(own, rows):
    inputs = prompts(rows, padded=rows > 1)
    text = model().generate(**inputs, max_new_tokens=20)[:, 9:]
    both(inputs, OWN[own], max_new_tokens=20)
    eos = [int(text[0, 4])] + ([int(text[1, 9]), int(text[2, 9])] if rows > 1 else [])
    calls, output = both(inputs, OWN[own], max_new_tokens=20, eos_token_id=eos)
    assert len(calls) == 1 + output.shape[1] - 9 + 1
    assert torch.stack([torch.tensor(call[2]) for call in calls[1:-1]], 1).equal(output[:, 9:])


class LastRowIs(StoppingCriteria):
    def __init__(self, *ends):
        self.ends = torch.tensor(ends)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.ends


@pytest.mark.parametrize("eos", [None, 60])
def test_rows_that_a_criterion_ends_at_different_columns(eos):
    both(prompts(3), OWN["noisy"], max_new_tokens=20, eos_token_id=eos, stopping_criteria=[LastRowIs(13, 20, 16)])


def test_sampling_with_several_sequences():
    inputs = prompts(2)
    streamer = Notes()
    output = fast_generate(
        model(),
        **inputs,
        assistant_model=noisy(),
        streamer=streamer,
        do_sample=True,
        num_return_sequences=2,
        seed=3,
        max_new_tokens=12,
    )
    prompt, *columns = [torch.tensor(call[2]) for call in streamer.calls[:-1]]
    assert torch.cat([prompt, torch.stack(columns, 1)], 1).equal(output)


def test_a_streamer_may_do_what_it_likes_with_what_it_gets():
    class Careless(BaseStreamer):
        def put(self, value):
            value.fill_(1)

        def end(self):
            pass

    inputs = prompts(2)
    got = fast_generate(model(), **inputs, assistant_model=noisy(), streamer=Careless(), max_new_tokens=8)
    assert torch.equal(got, model().generate(**prompts(2), max_new_tokens=8))


def test_tokens_come_as_soon_as_they_are_committed():
    """Not at the end of the call: what was handed over after the n-th forward pass grows with n."""
    target = model()
    seen = []
    streamer = Notes()
    hook = target.register_forward_hook(lambda *_: seen.append(len(streamer.calls)))
    try:
        fast_generate(target, **prompts(), assistant_model=noisy(), streamer=streamer, max_new_tokens=20)
    finally:
        hook.remove()
    assert seen == sorted(set(seen))
    assert seen[0] == 1


@pytest.mark.parametrize("skip", [False, True])
def test_text_streamer(skip, capsys):
    target, tokenizer = taught()
    inputs = taught_prompts(1)
    target.generate(**inputs, max_new_tokens=24, streamer=TextStreamer(tokenizer, skip_prompt=skip))
    expected = capsys.readouterr().out
    for own in ({"assistant_model": target}, {"prompt_lookup_num_tokens": 3}):
        fast_generate(target, **inputs, max_new_tokens=24, streamer=TextStreamer(tokenizer, skip_prompt=skip), **own)
        assert capsys.readouterr().out == expected
    assert "every evening" in expected
    assert ("lighthouse" in expected) is not skip


def test_text_streamers_take_one_row():
    _, tokenizer = taught()
    with pytest.raises(ValueError, match="batch size 1"):
        fast_generate(taught()[0], **taught_prompts(2), max_new_tokens=4, streamer=TextStreamer(tokenizer))


def test_text_iterator_streamer():
    target, tokenizer = taught()
    inputs = taught_prompts(1)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    settings = {"max_new_tokens": 24, "streamer": streamer, "assistant_model": target}
    thread = threading.Thread(target=lambda: fast_generate(target, **inputs, **settings))
    thread.start()
    text = "".join(streamer)
    thread.join()
    expected = target.generate(**inputs, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
    assert text == tokenizer.decode(expected)


def test_async_text_iterator_streamer():
    target, tokenizer = taught()
    inputs = taught_prompts(1)

    async def listen():
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        settings = {"max_new_tokens": 24, "streamer": streamer, "assistant_model": target}
        thread = threading.Thread(target=lambda: fast_generate(target, **inputs, **settings))
        thread.start()
        pieces = [piece async for piece in streamer]
        thread.join()
        return "".join(pieces)

    expected = target.generate(**inputs, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
    assert asyncio.run(listen()) == tokenizer.decode(expected)


def test_finished_rows_stream_padding():
    inputs = prompts(2)
    eos = int(model().generate(**inputs, max_new_tokens=3)[0, 11])
    calls, _ = both(inputs, PERFECT, max_new_tokens=12, eos_token_id=eos)
    assert calls[-2][2][0] == PAD
