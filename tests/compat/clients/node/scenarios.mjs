// What an application does with npm's `openai`, once, printed as one JSON object: `node scenarios.mjs PACKAGE < places.json`.
// Each scenario's value is what it saw, or `{ threw }`; test_openai_node.py says what that should have been.

import { readFileSync } from "node:fs";

const packageName = process.argv[2];
const { default: OpenAI } = await import(packageName);
const { zodResponseFormat } = await import(`${packageName}/helpers/zod`);
const { z } = await import("zod");

const { baseURL, key, poor, limited } = JSON.parse(readFileSync(0, "utf8"));
const messages = [{ role: "user", content: "Hello there" }];
const model = "openai/gpt-4o";
const weather = {
  type: "function",
  function: {
    name: "get_weather",
    parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
  },
};
const Person = z.object({ name: z.string(), age: z.number() });

const clientOf = (apiKey, options) => new OpenAI({ baseURL, apiKey, maxRetries: 0, ...options });
const client = clientOf(key);
const chat = (fields, options) => client.chat.completions.create({ model, messages, ...fields }, options);
const helpers = client.chat.completions.parse ? client.chat.completions : client.beta.chat.completions; // beta until v5

async function saidBy(stream) {
  let said = "";
  for await (const chunk of stream) said += chunk.choices[0]?.delta?.content ?? "";
  return said;
}

async function errorOf(promise) {
  try {
    await promise;
  } catch (error) {
    const { constructor, status, code, param, type } = error;
    return { name: constructor.name, status, code, param, type, requestID: error.requestID ?? error.request_id };
  }
  return null;
}

const scenarios = {
  async unary() {
    const completion = await chat({ seed: 7 });
    return { content: completion.choices[0].message.content, usage: completion.usage, id: completion._request_id };
  },
  async stream() {
    return await saidBy(await chat({ seed: 7, stream: true }));
  },
  async usage() {
    const chunks = [];
    for await (const chunk of await chat({ stream: true, stream_options: { include_usage: true } })) chunks.push(chunk);
    return { choices: chunks.at(-1).choices, total: chunks.at(-1).usage.total_tokens };
  },
  async hidden_usage() {
    const chunks = [];
    for await (const chunk of await chat({ stream: true })) chunks.push(chunk);
    return chunks.filter((chunk) => chunk.usage || !chunk.choices.length);
  },
  async stream_helper() {
    const stream = helpers.stream({ model, messages, seed: 7 });
    let deltas = "";
    stream.on("content", (delta) => (deltas += delta));
    return { final: await stream.finalContent(), deltas };
  },
  async readable_stream() {
    const stream = await chat({ seed: 7, stream: true });
    let lines = "";
    for await (const bytes of stream.toReadableStream()) lines += Buffer.from(bytes).toString();
    return lines.trim().split("\n").map((line) => JSON.parse(line).choices[0].delta.content ?? "").join("");
  },
  async tools() {
    const stream = helpers.stream({ model, messages, tools: [weather], tool_choice: "required" });
    const [call] = (await stream.finalMessage()).tool_calls;
    return { name: call.function.name, arguments: Object.keys(JSON.parse(call.function.arguments)) };
  },
  async run_tools() {
    const asked = [];
    const tool = {
      type: "function",
      function: { ...weather.function, parse: JSON.parse, function: ({ city }) => (asked.push(typeof city), "rain") },
    };
    const runner = helpers.runTools({
      model,
      messages: [{ role: "user", content: "Use get_weather for Oslo." }],
      tools: [tool],
      stream: true,
    });
    return { content: typeof (await runner.finalContent()), asked };
  },
  async parse() {
    const completion = await helpers.parse({ model, messages, response_format: zodResponseFormat(Person, "person") });
    return Object.keys(completion.choices[0].message.parsed);
  },
  async headers() {
    const { response, request_id } = await chat({}, { headers: { "x-request-id": "mine-1" } }).withResponse();
    const names = ["x-mesh-model", "x-mesh-attempts", "x-ratelimit-limit-requests", "x-ratelimit-remaining-requests"];
    return { request_id, ...Object.fromEntries(names.map((name) => [name, response.headers.get(name)])) };
  },
  async models() {
    const listed = [];
    for await (const { id } of client.models.list()) listed.push(id);
    const retrieved = await client.models.retrieve("vendor/family/model:free");
    return { listed: listed.includes(model), retrieved: retrieved.id };
  },
  async template() {
    await client.post("/templates", { body: { name: `greeter-${packageName}`, system: "Greet {{ name }}." } });
    const asked = { template: `greeter-${packageName}`, variables: { name: "Ada" }, session_id: packageName };
    await chat(asked);
    return (await client.get(`/templates/greeter-${packageName}`)).variables;
  },
  async errors() {
    return {
      401: await errorOf(clientOf("rsk_unknown").models.list()),
      402: await errorOf(clientOf(poor).chat.completions.create({ model, messages })),
      404: await errorOf(chat({ model: "nobody/knows" })),
      422: await errorOf(chat({ temperature: 3 })),
      502: await errorOf(chat({ model: "sim/error-500" })),
      504: await errorOf(chat({ model: "late" })),
    };
  },
  async mid_stream() {
    return await errorOf(chat({ model: "sim/error-mid-stream", stream: true }).then(saidBy));
  },
  async cut_stream() {
    return await errorOf(chat({ model: "sim/die-mid-stream", stream: true }).then(saidBy));
  },
  async retries() {
    const retrying = clientOf(limited, { maxRetries: 1 });
    await retrying.chat.completions.create({ model, messages });
    const began = performance.now();
    const { response } = await retrying.chat.completions.create({ model, messages }).withResponse();
    return { status: response.status, waited: performance.now() - began };
  },
  async no_second_payment() {
    let sent = 0;
    const counting = (...request) => (sent++, fetch(...request));
    const error = await errorOf(
      clientOf(key, { maxRetries: 3, fetch: counting }).chat.completions.create({ model: "late", messages }),
    );
    return { status: error.status, sent };
  },
  async abort() {
    const stream = await chat({ model: "sim/slow", user: "aborted", stream: true });
    for await (const _ of stream) break;
    return stream.controller.signal.aborted;
  },
  async timeout() {
    return await errorOf(chat({ model: "sim/stall", user: "timed-out" }, { timeout: 200 }));
  },
};

const seen = {};
for (const [name, scenario] of Object.entries(scenarios)) {
  try {
    seen[name] = await scenario();
  } catch (error) {
    seen[name] = { threw: String(error?.stack ?? error) };
  }
}
console.log(JSON.stringify(seen));
