"""The OpenAI SDK against Galerne's plain HTTP: streams and completes, prints what it saw as JSON.

Usage: openai_chat.py BASE_URL MODEL
"""
import json
import sys

from openai import BadRequestError, NotFoundError, OpenAI

base, model = sys.argv[1:]
client = OpenAI(base_url=f"{base}/v1", api_key="none", timeout=120, max_retries=0)
question = [{"role": "user", "content": "What is the capital of France?"}]

assert model in [entry.id for entry in client.models.list().data]

text, finish, usage, chunks = "", None, None, 0
for chunk in client.chat.completions.create(
    model=model, messages=question, temperature=0, stream=True, stream_options={"include_usage": True}
):
    chunks += 1
    if chunk.usage:
        usage = chunk.usage
    for choice in chunk.choices:
        text += choice.delta.content or ""
        finish = choice.finish_reason or finish

whole = client.chat.completions.create(model=model, messages=question, temperature=0, logprobs=True, top_logprobs=3)
assert whole.choices[0].message.content == text, (whole.choices[0].message.content, text)
assert whole.usage.completion_tokens == usage.completion_tokens
assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 3

completion = client.completions.create(
    model=model, prompt="One, two, three,", max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
)
assert completion.usage.completion_tokens == 8

try:
    client.chat.completions.create(model="nothing", messages=question)
    raise SystemExit("an unknown model was accepted")
except NotFoundError as error:
    assert error.code == "model_not_found", error
try:
    client.chat.completions.create(model=model, messages=question, temperature=-1)
    raise SystemExit("a negative temperature was accepted")
except BadRequestError as error:
    assert error.param == "temperature", error

print(json.dumps({"text": text, "finish": finish, "chunks": chunks, "completion_tokens": usage.completion_tokens}))
