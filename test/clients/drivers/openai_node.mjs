// Owns what OpenAI's Node client is asked to do.
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { FLOW, model, run, url } from "./steps.mjs";

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const chat = [
  { role: "system", content: FLOW.system },
  { role: "user", content: FLOW.question },
];
const greedy = { model, temperature: 0, max_tokens: FLOW.max_tokens };
const respond = { model, temperature: 0, max_output_tokens: FLOW.max_tokens };
const toolChat = [{ role: "user", content: FLOW.tool_question }];
const tools = [{ type: "function", function: FLOW.tool }];
const responseTools = [{ type: "function", strict: true, ...FLOW.tool }];
const Plant = z.object({ plant: z.enum(["oak", "fern", "moss"]), edible: z.boolean() });

function call(message) {
  const { id, function: called } = message.tool_calls[0];
  return { id, name: called.name, arguments: called.arguments };
}

await run({
  async models() {
    const ids = [];
    for await (const one of client.models.list()) ids.push(one.id);
    return ids;
  },
  async chat() {
    const answer = await client.chat.completions.create({ messages: chat, ...greedy });
    return { text: answer.choices[0].message.content, finish_reason: answer.choices[0].finish_reason, usage: answer.usage };
  },
  async chat_stream() {
    let text = "";
    let usage = null;
    const options = { stream: true, stream_options: { include_usage: true } };
    for await (const chunk of await client.chat.completions.create({ messages: chat, ...greedy, ...options })) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    return { text, usage };
  },
  async chat_stream_helper() {
    const final = await client.chat.completions.stream({ messages: chat, ...greedy }).finalChatCompletion();
    return { text: final.choices[0].message.content };
  },
  async chat_sent_back() {
    const first = await client.chat.completions.create({ messages: chat, ...greedy });
    const messages = [...chat, first.choices[0].message, { role: "user", content: FLOW.follow_up }];
    return { text: (await client.chat.completions.create({ messages, ...greedy })).choices[0].message.content };
  },
  async completion() {
    return { text: (await client.completions.create({ prompt: FLOW.prompt, ...greedy })).choices[0].text };
  },
  async tool_required() {
    const answer = await client.chat.completions.create({
      messages: toolChat, tools, tool_choice: "required", ...greedy, max_tokens: FLOW.max_object_tokens,
    });
    return { ...call(answer.choices[0].message), finish_reason: answer.choices[0].finish_reason };
  },
  async tool_stream() {
    const stream = client.chat.completions.stream({
      messages: toolChat, tools, tool_choice: { type: "function", function: { name: FLOW.tool.name } }, ...greedy,
      max_tokens: FLOW.max_object_tokens,
    });
    return call((await stream.finalChatCompletion()).choices[0].message);
  },
  async tool_runner() {
    // The helper calls the function, sends the result back and goes on until there is a text: with "required" there
    // always is another call, so it ends after two answers.
    const results = [];
    const tool = {
      type: "function",
      function: { ...FLOW.tool, parse: JSON.parse, function: (input) => { results.push(input); return FLOW.tool_result; } },
    };
    const runner = client.chat.completions.runTools(
      { messages: toolChat, tools: [tool], tool_choice: "required", ...greedy, max_tokens: FLOW.max_object_tokens },
      { maxChatCompletions: 2 },
    );
    await runner.done();
    return { results, roles: runner.messages.map((message) => message.role) };
  },
  async tool_auto() {
    const answer = await client.chat.completions.create({ messages: toolChat, tools, tool_choice: "auto", ...greedy });
    return { finish_reason: answer.choices[0].finish_reason };
  },
  async structured() {
    const response_format = zodResponseFormat(Plant, "plant");
    const answer = await client.chat.completions.parse({ messages: chat, response_format, ...greedy, max_tokens: FLOW.max_object_tokens });
    return { object: answer.choices[0].message.parsed };
  },
  async response() {
    const answer = await client.responses.create({ input: FLOW.question, instructions: FLOW.system, ...respond });
    return { text: answer.output_text, status: answer.status };
  },
  async response_stream() {
    let text = "";
    const kinds = [];
    for await (const event of await client.responses.create({ input: chat, stream: true, ...respond })) {
      kinds.push(event.type);
      if (event.type === "response.output_text.delta") text += event.delta;
    }
    return { text, kinds };
  },
  async response_previous() {
    const first = await client.responses.create({ input: chat, ...respond });
    const answer = await client.responses.create({ input: FLOW.follow_up, previous_response_id: first.id, ...respond });
    return { text: answer.output_text };
  },
  async response_tool() {
    const answer = await client.responses.create({
      model, temperature: 0, input: toolChat, tools: responseTools, tool_choice: "required",
    });
    const called = answer.output.find((item) => item.type === "function_call");
    return { id: called.call_id, name: called.name, arguments: called.arguments };
  },
  async response_structured() {
    const answer = await client.responses.parse({
      model, temperature: 0, input: chat, text: { format: zodTextFormat(Plant, "plant") },
    });
    return { object: answer.output_parsed };
  },
});
