// Owns what the AI SDK is asked to do: through its OpenAI provider's default (responses), and through .chat().
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, jsonSchema, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { FLOW, model, run, url } from "./steps.mjs";

const provider = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const Plant = z.object({ plant: z.enum(["oak", "fern", "moss"]), edible: z.boolean() });
const ask = { system: FLOW.system, prompt: FLOW.question, temperature: 0, maxOutputTokens: FLOW.max_tokens, maxRetries: 0 };
const askTool = { prompt: FLOW.tool_question, temperature: 0, maxOutputTokens: FLOW.max_object_tokens, maxRetries: 0 };

function weather(results) {
  return {
    get_weather: tool({
      description: FLOW.tool.description,
      inputSchema: jsonSchema(FLOW.tool.parameters),
      execute: async (input) => { results.push(input); return JSON.parse(FLOW.tool_result); },
    }),
  };
}

function flow(prefix, llm) {
  return {
    async [`${prefix}text`]() {
      const { text, finishReason, usage } = await generateText({ model: llm, ...ask });
      return { text, finish_reason: finishReason, usage: [usage.inputTokens, usage.outputTokens] };
    },
    async [`${prefix}stream`]() {
      let failure = null;
      const result = streamText({ model: llm, ...ask, onError: ({ error }) => { failure = error; } });
      let text = "";
      for await (const piece of result.textStream) text += piece;
      if (failure) throw failure;
      return { text };
    },
    async [`${prefix}sent_back`]() {
      const first = await generateText({ model: llm, ...ask });
      const messages = [{ role: "user", content: FLOW.question }, ...first.response.messages, { role: "user", content: FLOW.follow_up }];
      const { prompt: _, ...rest } = ask;
      return { text: (await generateText({ model: llm, ...rest, messages })).text };
    },
    async [`${prefix}structured`]() {
      const result = await generateText({ model: llm, ...ask, maxOutputTokens: FLOW.max_object_tokens, output: Output.object({ schema: Plant }) });
      return { object: result.output };
    },
    async [`${prefix}tool`]() {
      const results = [];
      const result = await generateText({ model: llm, ...askTool, tools: weather(results), toolChoice: "required" });
      return { name: result.toolCalls[0].toolName, arguments: result.toolCalls[0].input, results };
    },
    async [`${prefix}tool_round_trip`]() {
      // Every answer must call, so the loop of calls is ended after two.
      const results = [];
      const result = await generateText({
        model: llm, ...askTool, tools: weather(results), toolChoice: "required", stopWhen: stepCountIs(2),
      });
      return { results, steps: result.steps.length };
    },
    async [`${prefix}tool_stream`]() {
      const results = [];
      let failure = null;
      const result = streamText({
        model: llm, ...askTool, tools: weather(results), toolChoice: { type: "tool", toolName: "get_weather" },
        onError: ({ error }) => { failure = error; },
      });
      for await (const _ of result.fullStream);
      if (failure) throw failure;
      const [call] = await result.toolCalls;
      return { name: call.toolName, arguments: call.input };
    },
    async [`${prefix}tool_auto`]() {
      const result = await generateText({ model: llm, ...askTool, tools: weather([]) });
      return { finish_reason: result.finishReason };
    },
  };
}

await run({ ...flow("", provider(model)), ...flow("chat_", provider.chat(model)) });
