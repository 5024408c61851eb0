"""openai-python against the gateway, in front of a real node: what applications do with it."""

import json
import sys

import openai

base, key, model = sys.argv[1:4]
client = openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0)
question = [{"role": "user", "content": "A Dan has 58 cards. B Dan buys 67 more. How many cards has Dan?"}]

assert model in [card.id for card in client.models.list().data]
assert client.models.retrieve(model).id == model

whole = client.chat.completions.create(model=model, messages=question, temperature=0, max_tokens=200)
message = whole.choices[0].message
assert whole.model == model and whole.choices[0].finish_reason == "stop", whole
assert message.role == "assistant" and "125" in message.content and message.reasoning_content, message
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens > 0
assert isinstance(whole.created, int) and whole.id

text, thinking, finish, usage, roles = "", "", None, None, 0
for chunk in client.chat.completions.create(
    model=model, messages=question, temperature=0, max_tokens=200, stream=True, stream_options={"include_usage": True}
):
    if not chunk.choices:
        usage = chunk.usage
        continue
    delta = chunk.choices[0].delta
    roles += delta.role == "assistant"
    text += delta.content or ""
    thinking += getattr(delta, "reasoning_content", None) or ""
    finish = chunk.choices[0].finish_reason or finish
assert (text, finish) == (message.content, "stop") and thinking == message.reasoning_content, (text, thinking)
assert usage.completion_tokens == whole.usage.completion_tokens and roles >= 1

with client.chat.completions.stream(model=model, messages=question, temperature=0, max_tokens=200) as stream:
    final = stream.get_final_completion()
assert final.choices[0].message.content == message.content

completion = client.completions.create(model=model, prompt="A Dan has", max_tokens=4, temperature=0)
assert completion.choices[0].finish_reason == "length" and completion.object == "text_completion"

response = client.responses.create(model=model, input=question[0]["content"], temperature=0, max_output_tokens=200)
assert response.status == "completed" and response.output_text == message.content, response
assert response.usage.output_tokens == whole.usage.completion_tokens
events = list(client.responses.create(model=model, input=question[0]["content"], temperature=0, stream=True))
assert events[0].type == "response.created" and events[-1].type == "response.completed", events[-1]
assert events[-1].response.output_text == message.content
assert [event.sequence_number for event in events] == list(range(len(events)))

# What the node answers besides text: probabilities, forms, vectors, all through the gateway.
told = client.chat.completions.create(
    model=model, messages=question, temperature=0, max_tokens=200, logprobs=True, top_logprobs=2
)
entries = told.choices[0].logprobs.content
assert len(entries) == told.usage.completion_tokens and all(len(entry.top_logprobs) == 2 for entry in entries)
assert "".join(entry.token for entry in entries).endswith(message.content + "<|end|>")
assert told.usage.prompt_tokens_details.cached_tokens >= 16, told.usage
echoed = client.completions.create(model=model, prompt="A Dan has 58", max_tokens=0, echo=True, logprobs=1)
assert echoed.choices[0].text == "A Dan has 58" and echoed.choices[0].logprobs.token_logprobs[0] is None, echoed
pattern = {"guided_regex": "[1-4]{3}"}
formed = client.chat.completions.create(model=model, messages=question, n=3, max_tokens=20, extra_body=pattern)
assert all(len(choice.message.content) == 3 for choice in formed.choices), formed
numbers = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [1, 22, 333]}}}
formed = client.chat.completions.create(model=model, messages=question, max_tokens=20, response_format=numbers)
assert int(formed.choices[0].message.content) in (1, 22, 333), formed
vectors = client.embeddings.create(model=model, input=["A Dan has 58 cards.", "B Eve gets 2 more."])
assert len(vectors.data) == 2 and abs(sum(x * x for x in vectors.data[0].embedding) - 1) < 1e-4

# Functions: a call that is asked for, whole and in pieces, and its result given back.
cities = {"type": "object", "properties": {"city": {"enum": ["paris", "rome"]}}, "required": ["city"]}
cities["additionalProperties"] = False
weather = {"type": "function", "function": {"name": "get_weather", "parameters": cities}}
asked = {"model": "caller", "tools": [weather], "tool_choice": "required", "temperature": 0}
talk = [{"role": "user", "content": "weather in rome"}]
called = client.chat.completions.create(messages=talk, **asked).choices[0]
assert called.finish_reason == "tool_calls" and len(called.message.tool_calls) == 1, called
call = called.message.tool_calls[0]
assert call.type == "function" and call.id and call.function.name == "get_weather", call
assert json.loads(call.function.arguments)["city"] in ("paris", "rome"), call
with client.chat.completions.stream(messages=talk, **asked) as stream:
    pieces = stream.get_final_completion().choices[0]
assert pieces.finish_reason == "tool_calls", pieces
assert pieces.message.tool_calls[0].function.arguments == call.function.arguments, pieces
talk += [called.message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
after = client.chat.completions.create(messages=talk, **{**asked, "tool_choice": "none", "max_tokens": 5})
assert after.choices[0].finish_reason == "length" and not after.choices[0].message.tool_calls, after

for kind, call in [
    (openai.NotFoundError, lambda: client.chat.completions.create(model="nope", messages=question)),
    (openai.BadRequestError, lambda: client.chat.completions.create(model=model, messages=[])),
    (openai.AuthenticationError, lambda: openai.OpenAI(base_url=f"{base}/v1", api_key="x").models.list()),
]:
    try:
        call()
    except kind as error:
        assert error.body["message"] and error.request_id, error.body
    else:
        raise AssertionError(f"no {kind.__name__}")

raw = client.chat.completions.with_raw_response.create(model=model, messages=question, max_tokens=1)
assert raw.headers["x-ratelimit-limit-requests"] == "6000" and raw.headers["x-request-id"]
print("openai-python", openai.__version__, "ok")
