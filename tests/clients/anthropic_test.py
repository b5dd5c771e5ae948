"""The anthropic package against a server of ours: anthropic_test.py URL URL_WITH_KEYS KEY."""
import asyncio
import sys

import anthropic

URL, KEYED_URL, KEY = sys.argv[1:]
ASK = [{"role": "user", "content": "Hello there"}]
EXACT = {"model": "tiny", "max_tokens": 24, "extra_body": {"ignore_eos": True, "temperature": 0}}
DOCUMENT = " ".join(f"word{i} and" for i in range(80))
BREAKPOINT = {"type": "ephemeral"}


def client(url=URL, key="none"):
    return anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)


def text_of(message):
    return "".join(block.text for block in message.content)


def document(text=DOCUMENT, **more):
    return {"type": "document", "title": "Words",
            "source": {"type": "text", "media_type": "text/plain", "data": text}, **more}


def about(*blocks):
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": "What is it?"}]}]


def expect_error(kind, word, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except kind as error:
        assert word in str(error), error
        return error
    raise AssertionError(f"no {kind.__name__}")


def a_stream_builds_the_message_up():
    whole = client().messages.create(messages=ASK, **EXACT)
    assert whole.stop_reason == "max_tokens" and whole.role == "assistant" and whole.type == "message"
    assert whole.usage.output_tokens == 24
    with client().messages.stream(messages=ASK, **EXACT) as stream:
        pieces = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert pieces == text_of(final) == text_of(whole)
    assert final.stop_reason == "max_tokens" and final.usage.output_tokens == 24
    assert final.usage.cache_read_input_tokens > 0  # the first request computed it
    total = final.usage.input_tokens + final.usage.cache_read_input_tokens + final.usage.cache_creation_input_tokens
    assert total == whole.usage.input_tokens


def events_come_in_order():
    events = list(client().messages.create(messages=ASK, stream=True, **EXACT))
    names = [event.type for event in events]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[2:-3]) == {"content_block_delta"}


def a_stream_says_at_once_what_it_read():
    ask = {"messages": about(document("Stream " + DOCUMENT)), "stream": True, **EXACT}
    for first in (True, False):
        events = list(client().messages.create(**ask))
        start = next(e for e in events if e.type == "message_start").message.usage
        end = next(e for e in events if e.type == "message_delta").usage
        assert start.output_tokens == 1 and end.output_tokens == 24
        assert (start.cache_creation_input_tokens > 200) == first and (start.cache_read_input_tokens > 200) != first
        for field in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"):
            assert getattr(start, field) == getattr(end, field), field


def tokens_are_counted():
    count = client().messages.count_tokens(model="tiny", messages=ASK, system="Be brief.").input_tokens
    usage = client().messages.create(messages=ASK, system="Be brief.", **EXACT).usage
    assert count == usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens


def documents_are_reused_wherever_they_stand():
    results = {"type": "search_result", "source": "here", "title": "Found",
               "content": [{"type": "text", "text": DOCUMENT}]}
    usages = [client().messages.create(messages=about(*blocks), **EXACT).usage for blocks in (
        [document()], [document(cache_control=BREAKPOINT)], [results, document(citations={"enabled": False})],
        [document("Other " + DOCUMENT), results])]
    assert usages[0].cache_read_input_tokens < 200 and usages[0].cache_creation_input_tokens > 200  # a system turn
    assert usages[1].cache_read_input_tokens > 200 and usages[1].cache_creation_input_tokens == 0
    for usage in usages[2:]:  # one of the two is new, the other stands at another place
        assert usage.cache_read_input_tokens > 200 and usage.cache_creation_input_tokens > 200


def a_moving_breakpoint_computes_nothing_again():
    messages, before = [], 0
    for turn in range(5):
        question = {"type": "text", "text": f"Question {turn} about words?", "cache_control": BREAKPOINT}
        messages.append({"role": "user", "content": [question]})
        usage = client().messages.create(messages=messages, system=[{"type": "text", "text": "Answer, please."}],
                                         **EXACT).usage
        read = usage.cache_read_input_tokens
        assert before - read < 16  # the last page was not full
        before = usage.input_tokens + read + usage.cache_creation_input_tokens
        del question["cache_control"]
        messages.append({"role": "assistant", "content": f"Answer {turn}."})


def errors_are_the_packages_own():
    create = client().messages.create
    ask = {"messages": ASK, "max_tokens": 4}
    error = expect_error(anthropic.NotFoundError, "no model 'claude-x'", create, model="claude-x", **ask)
    assert error.body["error"]["type"] == "not_found_error"
    expect_error(anthropic.BadRequestError, "auto or none", create, model="tiny", tool_choice={"type": "any"}, **ask)
    expect_error(anthropic.BadRequestError, "has no tools", create, model="tiny",
                 tools=[{"name": "f", "input_schema": {"type": "object"}}], **ask)
    expect_error(anthropic.BadRequestError, "the type 'image'", create, model="tiny", max_tokens=4, messages=about(
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}))


def keys_are_asked_for():
    expect_error(anthropic.AuthenticationError, "not known", client(KEYED_URL, "wrong-key").messages.create,
                 messages=ASK, **EXACT)
    assert client(KEYED_URL, KEY).messages.create(messages=ASK, **EXACT).usage.output_tokens == 24


def many_at_once_are_each_as_alone():
    def ask(i):
        return {"messages": [{"role": "user", "content": f"number {i}"}], **EXACT}

    async def ask_all():
        async with anthropic.AsyncAnthropic(base_url=URL, api_key="none", max_retries=0) as many:
            replies = await asyncio.gather(*[many.messages.create(**ask(i % 8)) for i in range(32)])
            return [text_of(reply) for reply in replies]

    texts = asyncio.run(ask_all())
    for i in range(8):
        assert set(texts[i::8]) == {text_of(client().messages.create(**ask(i)))}


TESTS = [a_stream_builds_the_message_up, events_come_in_order, tokens_are_counted,
         documents_are_reused_wherever_they_stand, a_stream_says_at_once_what_it_read,
         a_moving_breakpoint_computes_nothing_again, errors_are_the_packages_own, keys_are_asked_for,
         many_at_once_are_each_as_alone]
for test in TESTS:
    test()
    print(f"{test.__name__}: ok")
