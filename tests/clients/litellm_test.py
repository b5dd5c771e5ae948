"""litellm against a server of ours, as OpenAI's and as Anthropic's: litellm_test.py URL URL_WITH_KEYS KEY."""
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # the package's own copy; it asks the net otherwise
import litellm

URL, KEYED_URL, KEY = sys.argv[1:]
ASK = [{"role": "user", "content": "Hello there"}]
OPENAI = {"model": "openai/tiny", "api_base": URL + "/v1", "api_key": "none", "messages": ASK, "temperature": 0,
          "max_tokens": 24, "max_retries": 0, "extra_body": {"ignore_eos": True}}


def a_stream_is_the_reply_in_pieces():
    whole = litellm.completion(**OPENAI)
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 24
    chunks = list(litellm.completion(**OPENAI, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 24
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0


def documents_are_reused():
    document = " ".join(f"word{i} and" for i in range(80))
    body = {"ignore_eos": True, "documents": [document]}
    first, second = (litellm.completion(**{**OPENAI, "extra_body": body}) for _ in range(2))
    assert second.choices[0].message.content == first.choices[0].message.content
    assert second.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens_details.cached_tokens


def messages_are_answered():
    reply = litellm.completion(**{**OPENAI, "model": "anthropic/tiny", "api_base": URL, "extra_body": {}})
    assert reply.usage.completion_tokens > 0
    stream = litellm.completion(**{**OPENAI, "model": "anthropic/tiny", "api_base": URL, "extra_body": {}}, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == (reply.choices[0].message.content or "")


def errors_are_the_packages_own():
    def expect(kind, **changes):
        try:
            litellm.completion(**{**OPENAI, **changes})
        except kind:
            return
        raise AssertionError(f"no {kind.__name__}")

    expect(litellm.BadRequestError, extra_body={"top_p": 2})
    expect(litellm.NotFoundError, model="openai/none")
    expect(litellm.AuthenticationError, api_base=KEYED_URL + "/v1")
    litellm.completion(**{**OPENAI, "api_base": KEYED_URL + "/v1", "api_key": KEY})


for test in [a_stream_is_the_reply_in_pieces, documents_are_reused, messages_are_answered,
             errors_are_the_packages_own]:
    test()
    print(f"{test.__name__}: ok")
