"""The openai package against a server of ours: openai_test.py URL URL_WITH_KEYS KEY."""
import asyncio
import sys

import openai

URL, KEYED_URL, KEY = sys.argv[1:]
ASK = [{"role": "user", "content": "Hello there"}]
EXACT = {"temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}
DOCUMENT = " ".join(f"word{i} and" for i in range(80))


def client(url=URL, key="none"):
    return openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0)


def expect_error(kind, code, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except kind as error:
        assert error.code == code, (error.code, code)
        return error
    raise AssertionError(f"no {kind.__name__}")


def models_are_listed():
    models = client().models.list().data
    assert [m.id for m in models] == ["tiny"] and models[0].owned_by == "mepic"


def a_model_is_retrieved():
    model = client().models.retrieve("tiny")
    assert model.id == "tiny" and model.object == "model" and model.owned_by == "mepic"
    expect_error(openai.NotFoundError, "model_not_found", client().models.retrieve, "org/gpt-x")


def a_stream_is_the_reply_in_pieces():
    whole = client().chat.completions.create(model="tiny", messages=ASK, **EXACT)
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.completion_tokens == 24
    stream = client().chat.completions.create(model="tiny", messages=ASK, stream=True,
                                              stream_options={"include_usage": True}, **EXACT)
    text, roles, finish, usage = "", [], None, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
            finish = choice.finish_reason or finish
    assert text == whole.choices[0].message.content
    assert roles == ["assistant"] and finish == "length"
    assert usage.completion_tokens == 24 and usage.prompt_tokens == whole.usage.prompt_tokens
    assert usage.prompt_tokens_details.cached_tokens > 0  # the first request computed it


def replies_are_several():
    reply = client().chat.completions.create(model="tiny", messages=ASK, n=3, seed=1, max_tokens=12,
                                             extra_body={"ignore_eos": True})
    assert [c.index for c in reply.choices] == [0, 1, 2]
    assert len({c.message.content for c in reply.choices}) == 3
    assert reply.usage.completion_tokens == 36


def logprobs_are_typed():
    reply = client().chat.completions.create(model="tiny", messages=ASK, logprobs=True, top_logprobs=4, **EXACT)
    tokens = reply.choices[0].logprobs.content
    assert len(tokens) == 24
    for token in tokens:
        assert len(token.top_logprobs) == 4 and token.logprob == token.top_logprobs[0].logprob
        assert bytes(token.bytes).decode("utf-8", "replace") == token.token


def completions_take_several_prompts():
    reply = client().completions.create(model="tiny", prompt=["one", "two"], logprobs=2, **EXACT)
    assert [c.index for c in reply.choices] == [0, 1]
    assert len(reply.choices[0].logprobs.tokens) == 24
    alone = client().completions.create(model="tiny", prompt="two", **EXACT)
    assert alone.choices[0].text == reply.choices[1].text
    stream = client().completions.create(model="tiny", prompt="two", stream=True, **EXACT)
    assert "".join(chunk.choices[0].text for chunk in stream) == alone.choices[0].text


def documents_are_reused():
    details = []
    for documents in ([DOCUMENT], [DOCUMENT], ["another " + DOCUMENT, DOCUMENT]):
        reply = client().chat.completions.create(model="tiny", messages=ASK, temperature=0, max_tokens=4,
                                                 extra_body={"documents": documents})
        details.append(reply.usage.prompt_tokens_details)
    assert details[0].chunk_tokens == 0 and details[0].compiled_tokens > 0
    assert details[1].chunk_tokens > 0 and details[1].compiled_tokens == 0
    assert details[2].chunk_tokens > 0 and details[2].compiled_tokens > 0  # one was there, at another place


def a_part_is_a_chunk():
    messages = [{"role": "user", "content": [
        {"type": "text", "text": DOCUMENT, "mepic": {"chunk": True}}, {"type": "text", "text": "What is it?"}]}]
    reply = client().chat.completions.create(model="tiny", messages=messages, max_tokens=2)
    assert reply.usage.prompt_tokens_details.chunk_tokens > 0  # the same pages as a document's


def errors_are_the_packages_own():
    create = client().chat.completions.create
    expect_error(openai.NotFoundError, "model_not_found", create, model="gpt-x", messages=ASK)
    error = expect_error(openai.BadRequestError, "unsupported", create, model="tiny", messages=ASK,
                         response_format={"type": "json_object"})
    assert error.param == "response_format" and error.type == "invalid_request_error"
    expect_error(openai.BadRequestError, "context_length_exceeded", create, model="tiny",
                 messages=[{"role": "user", "content": "x " * 6000}])
    expect_error(openai.BadRequestError, "invalid_value", create, model="tiny", messages=ASK, temperature=-1)


def keys_are_asked_for():
    expect_error(openai.AuthenticationError, "invalid_api_key", client(KEYED_URL, "wrong-key").models.list)
    assert client(KEYED_URL, KEY).models.list().data[0].id == "tiny"
    reply = client(KEYED_URL, KEY).chat.completions.create(model="tiny", messages=ASK, **EXACT)
    assert reply.usage.completion_tokens == 24


def a_stream_can_be_left():
    stream = client().chat.completions.create(model="tiny", messages=ASK, stream=True, max_tokens=3000,
                                              extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()


def number(i):
    return {"model": "tiny", "messages": [{"role": "user", "content": f"number {i}"}], **EXACT}


def many_at_once_are_each_as_alone():
    async def ask_all():
        async with openai.AsyncOpenAI(base_url=URL + "/v1", api_key="none", max_retries=0) as many:
            calls = [many.chat.completions.create(**number(i % 8)) for i in range(32)]
            return [reply.choices[0].message.content for reply in await asyncio.gather(*calls)]

    texts = asyncio.run(ask_all())
    for i in range(8):
        alone = client().chat.completions.create(**number(i))
        assert set(texts[i::8]) == {alone.choices[0].message.content}


TESTS = [models_are_listed, a_model_is_retrieved, a_stream_is_the_reply_in_pieces, replies_are_several,
         logprobs_are_typed, completions_take_several_prompts, documents_are_reused, a_part_is_a_chunk,
         errors_are_the_packages_own, keys_are_asked_for, a_stream_can_be_left, many_at_once_are_each_as_alone]
for test in TESTS:
    test()
    print(f"{test.__name__}: ok")
