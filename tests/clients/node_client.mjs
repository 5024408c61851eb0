// openai-node against the gateway, in front of a real node: what applications do with it.
import assert from "node:assert/strict";
import OpenAI, { APIError } from "openai";
import { VERSION } from "openai/version";

const [base, apiKey, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${base}/v1`, apiKey, maxRetries: 0 });
const question = "A Dan has 58 cards. B Dan buys 67 more. How many cards has Dan?";
const messages = [{ role: "user", content: question }];
const asked = { model, messages, temperature: 0, max_tokens: 200 };

const models = await client.models.list();
assert.ok(models.data.some((card) => card.id === model));

const whole = await client.chat.completions.create(asked);
const message = whole.choices[0].message;
assert.equal(whole.choices[0].finish_reason, "stop");
assert.match(message.content, /125/);
assert.ok(message.reasoning_content);

let text = "";
let usage;
for await (const chunk of await client.chat.completions.create({
  ...asked,
  stream: true,
  stream_options: { include_usage: true },
})) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, message.content);
assert.equal(usage.total_tokens, whole.usage.total_tokens);

const final = await client.chat.completions.stream(asked).finalChatCompletion();
assert.equal(final.choices[0].message.content, message.content);

const response = await client.responses.create({ model, input: question, temperature: 0 });
assert.equal(response.output_text, message.content);
const seen = [];
for await (const event of await client.responses.create({ model, input: question, temperature: 0, stream: true })) {
  seen.push(event.type);
}
assert.equal(seen.at(0), "response.created");
assert.equal(seen.at(-1), "response.completed");

for (const [status, call] of [
  [404, () => client.chat.completions.create({ ...asked, model: "nope" })],
  [400, () => client.chat.completions.create({ ...asked, messages: [] })],
  [401, () => new OpenAI({ baseURL: `${base}/v1`, apiKey: "x" }).models.list()],
]) {
  await assert.rejects(call, (error) => error instanceof APIError && error.status === status && Boolean(error.requestID));
}

// Functions: a call that is asked for, whole and in pieces.
const tools = [{ type: "function", function: { name: "get_weather", parameters: {
  type: "object", properties: { city: { enum: ["paris", "rome"] } }, required: ["city"], additionalProperties: false } } }];
const calling = { model: "caller", messages: [{ role: "user", content: "weather in rome" }], tools, tool_choice: "required", temperature: 0 };
const called = (await client.chat.completions.create(calling)).choices[0];
assert.equal(called.finish_reason, "tool_calls");
assert.equal(called.message.tool_calls[0].function.name, "get_weather");
assert.ok(["paris", "rome"].includes(JSON.parse(called.message.tool_calls[0].function.arguments).city));
const pieces = await client.chat.completions.stream(calling).finalChatCompletion();
assert.equal(pieces.choices[0].message.tool_calls[0].function.arguments, called.message.tool_calls[0].function.arguments);

// A client that leaves: the stream is aborted and nothing hangs.
const stream = await client.chat.completions.create({ ...asked, stream: true });
for await (const _chunk of stream) {
  stream.controller.abort();
  break;
}
console.log("openai-node", VERSION, "ok");
