"""LangChain's ChatOpenAI against a server of ours: langchain_test.py URL URL_WITH_KEYS KEY."""
import sys

import openai
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

URL, KEYED_URL, KEY = sys.argv[1:]


def chat(url=URL, key="none", **body):
    return ChatOpenAI(model="tiny", base_url=url + "/v1", api_key=key, temperature=0, max_tokens=24, max_retries=0,
                      stream_usage=True, extra_body={"ignore_eos": True, **body})


def a_stream_is_the_reply_in_pieces():
    ask = [SystemMessage("Be brief."), HumanMessage("Hello there")]
    whole = chat().invoke(ask)
    assert whole.usage_metadata["output_tokens"] == 24
    assert whole.response_metadata["finish_reason"] == "length"
    pieces = list(chat().stream(ask))
    total = pieces[0]
    for piece in pieces[1:]:
        total += piece
    assert total.content == whole.content and len(pieces) > 2
    assert total.usage_metadata["output_tokens"] == 24
    assert total.usage_metadata["input_token_details"]["cache_read"] > 0


def a_chain_answers_a_batch():
    chain = ChatPromptTemplate.from_messages([("user", "number {i}")]) | chat() | StrOutputParser()
    texts = chain.batch([{"i": i % 4} for i in range(12)])
    assert texts[:4] * 3 == texts and all(texts)


def documents_are_reused():
    model = chat(documents=[" ".join(f"word{i} or" for i in range(80))])
    first, second = (model.invoke(f"question {i}").usage_metadata for i in range(2))
    assert second["input_token_details"]["cache_read"] > first["input_token_details"]["cache_read"]


def errors_are_the_packages_own():
    for kind, model in [(openai.BadRequestError, chat(top_p=2)), (openai.AuthenticationError, chat(KEYED_URL))]:
        try:
            model.invoke("Hello there")
        except kind:
            continue
        raise AssertionError(f"no {kind.__name__}")
    assert chat(KEYED_URL, KEY).invoke("Hello there").content


for test in [a_stream_is_the_reply_in_pieces, a_chain_answers_a_batch, documents_are_reused,
             errors_are_the_packages_own]:
    test()
    print(f"{test.__name__}: ok")
