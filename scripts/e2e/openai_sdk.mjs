// The real Node openai SDK: shapes, streams, errors, cancelling. Checks are about what the SDK makes
// of the server's answers, never about what the noise of the embedded model means.
//
// Run by `node_sdk.py` as standard input of node, in the folder that holds `node_modules`. Prints a
// line for every check and nothing else; exits with 1 if one failed.

import assert from "node:assert/strict";
import OpenAI from "openai";

const url = process.env.FATHOM_URL;
const constrained = process.env.FATHOM_CONSTRAINED === "1";
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const off = { thinking: { type: "disabled" } };
const basic = {
  model: "deepseek-v4-flash",
  messages: [{ role: "user", content: "Hello?" }],
  max_tokens: 16,
  ...off,
};
const tool = {
  type: "function",
  function: {
    name: "switch_light",
    parameters: {
      type: "object",
      properties: { on: { type: "boolean" } },
      required: ["on"],
      additionalProperties: false,
    },
    strict: true,
  },
};

const checks = {
  async "a whole answer"() {
    const answer = await client.chat.completions.create(basic);
    assert.equal(answer.object, "chat.completion");
    assert.equal(typeof answer.choices[0].message.content, "string");
    const usage = answer.usage;
    assert.equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens);
    assert.equal(usage.prompt_tokens_details.cached_tokens, usage.prompt_cache_hit_tokens);
  },

  async "a stream says what the whole answer says"() {
    const whole = await client.chat.completions.create({ ...basic, seed: 2 });
    const options = { stream: true, stream_options: { include_usage: true } };
    let text = "";
    let usage = null;
    for await (const chunk of await client.chat.completions.create({ ...basic, seed: 2, ...options })) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
  },

  async "the stream helper puts a message together"() {
    const whole = await client.chat.completions.create({ ...basic, seed: 3 });
    const final = await client.chat.completions.stream({ ...basic, seed: 3 }).finalChatCompletion();
    assert.equal(final.choices[0].message.content, whole.choices[0].message.content);
  },

  async "models"() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    assert.equal(ids.length, 1);
    assert.equal((await client.models.retrieve(ids[0])).id, ids[0]);
    assert.equal((await client.models.retrieve(basic.model)).object, "model");
  },

  async "errors have their class, code and field"() {
    const call = client.chat.completions.create({ ...basic, temperature: 9 });
    await assert.rejects(call, (error) => {
      assert.ok(error instanceof OpenAI.BadRequestError);
      assert.deepEqual([error.code, error.param], ["decimal_above_max_value", "temperature"]);
      return true;
    });
    const unknown = client.chat.completions.create({ ...basic, model: "no-such-model" });
    await assert.rejects(unknown, OpenAI.NotFoundError);
  },

  async "an aborted stream is cancelled"() {
    const endless = { ...basic, max_tokens: 20000, ignore_eos: true, stream: true };
    const stream = await client.chat.completions.create(endless);
    for await (const _ of stream) break;
    for (let tries = 0; ; tries += 1) {
      const page = await (await fetch(`${url}/metrics`)).text();
      if (/^fathom_requests_in_flight 0$/m.test(page)) break;
      assert.ok(tries < 500, "the request is still in flight");
      await new Promise((resume) => setTimeout(resume, 10));
    }
  },

  async "the SDK's own tool loop runs"() {
    if (!constrained) return "skipped: no constrained decoding";
    const called = [];
    const switchLight = (args) => (called.push(args), "done");
    const parse = (text) => {
      const args = JSON.parse(text);
      assert.equal(typeof args.on, "boolean");
      return args;
    };
    const runnable = { ...tool, function: { ...tool.function, function: switchLight, parse } };
    const named = { type: "function", function: { name: "switch_light" } };
    const options = { tools: [runnable], tool_choice: named, parallel_tool_calls: false };
    await client.chat.completions.runTools({ ...basic, max_tokens: 300, ...options }).done();
    assert.equal(called.length, 1);
  },
};

let failed = false;
for (const [name, check] of Object.entries(checks)) {
  try {
    console.log(`${name}: ${(await check()) ?? "ok"}`);
  } catch (error) {
    failed = true;
    console.log(`${name}: FAILED\n${error.stack}`);
  }
}
process.exit(failed ? 1 : 0);
