// Owns how a Node driver runs and tells: the same as steps.py.
import { readFileSync } from "node:fs";

export const FLOW = JSON.parse(readFileSync(new URL("../flow.json", import.meta.url)));
export const [url, model, ...only] = process.argv.slice(2);

export async function run(steps) {
  for (const [name, step] of Object.entries(steps)) {
    if (only.length && !only.includes(name)) continue;
    const line = { step: name, begun: Date.now() / 1000 };
    try {
      line.saw = await step();
    } catch (error) {
      console.error(error);
      line.error = `${error.name}: ${error.message}`;
    }
    line.ended = Date.now() / 1000;
    console.log(JSON.stringify(line));
  }
}
