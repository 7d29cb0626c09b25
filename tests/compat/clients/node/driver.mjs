// A client written for Node, driven by lines of JSON: `node driver.mjs NAME`. See ../README.md for the lines.

import { createInterface } from "node:readline";

const name = process.argv[2];
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };

async function openai() {
  const { default: OpenAI } = await import(name);
  const tool = { type: "function", function: { name: "get_weather", description: "The weather in a city.", parameters } };
  return ({ base_url, key, model, words, retries }) => {
    const client = new OpenAI({ baseURL: base_url, apiKey: key, ...(retries ? {} : { maxRetries: 0 }) });
    const usual = { model, messages: [{ role: "user", content: words }] };
    return {
      async whole() {
        const { choices, usage } = await client.chat.completions.create(usual);
        return { text: choices[0].message.content, total: usage.total_tokens };
      },
      async *stream() {
        const asked = { ...usual, stream: true, stream_options: { include_usage: true } };
        for await (const { choices, usage } of await client.chat.completions.create(asked)) {
          if (usage) yield { total: usage.total_tokens };
          yield { text: choices[0]?.delta?.content ?? "" };
        }
      },
      async tools() {
        const { choices } = await client.chat.completions.create({ ...usual, tools: [tool] });
        const [{ function: call }] = choices[0].message.tool_calls;
        return { name: call.name, arguments: JSON.parse(call.arguments) };
      },
      error: (error) => ({ status: error.status ?? null, code: error.code ?? null, message: error.message }),
    };
  };
}

async function vercel() {
  const { generateText, streamText, jsonSchema, tool } = await import("ai");
  const { createOpenAICompatible } = await import("@ai-sdk/openai-compatible");
  return ({ base_url, key, model, words, retries }) => {
    const mesh = createOpenAICompatible({ name: "mesh", baseURL: base_url, apiKey: key, includeUsage: true });
    const usual = { model: mesh(model), prompt: words, ...(retries ? {} : { maxRetries: 0 }) };
    return {
      async whole() {
        const { text, usage } = await generateText(usual);
        return { text, total: usage.totalTokens };
      },
      async *stream() {
        const controller = new AbortController();
        const { fullStream } = streamText({ ...usual, abortSignal: controller.signal, onError() {} });
        try {
          for await (const part of fullStream) {
            if (part.type === "error") throw part.error;
            if (part.type === "text-delta") yield { text: part.text };
            if (part.type === "finish") yield { total: part.totalUsage.totalTokens };
          }
        } finally {
          controller.abort();
        }
      },
      async tools() {
        const get_weather = tool({ description: "The weather in a city.", inputSchema: jsonSchema(parameters) });
        const { toolCalls } = await generateText({ ...usual, tools: { get_weather } });
        return { name: toolCalls[0].toolName, arguments: toolCalls[0].input };
      },
      error(error) {
        const last = error.lastError ?? error; // RetryError wraps what failed last
        const code = last.data?.error?.code ?? last.code ?? null;
        return { status: last.statusCode ?? null, code, message: String(error.message ?? error) };
      },
    };
  };
}

async function answer(client, action) {
  if (action !== "stream") return client[action]();
  const said = { text: "", total: null };
  try {
    for await (const { text = "", total = said.total } of client.stream()) Object.assign(said, { text: said.text + text, total });
  } catch (error) {
    return { ...said, error: client.error(error) };
  }
  return said;
}

async function hangUp(client) {
  for await (const { text } of client.stream()) if (text) return { text }; // leaving a loop closes what it reads
  return { text: "" };
}

const clientOf = await (name === "ai" ? vercel() : openai());
for await (const line of createInterface({ input: process.stdin })) {
  const ask = JSON.parse(line);
  const client = clientOf(ask);
  let said;
  try {
    said = await (ask.do === "hang_up" ? hangUp(client) : answer(client, ask.do));
  } catch (error) {
    said = { error: client.error(error) };
  }
  console.log(JSON.stringify(said));
}
