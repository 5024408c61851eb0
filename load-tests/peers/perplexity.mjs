// Perplexity of a GGUF file in llama.cpp (the prebuilt binaries of the npm package node-llama-cpp) on the first 1,024 tokens of a
// text, and a greedy answer: shows that llama.cpp reads what `potstill quantise` wrote. Beside it, `potstill bench --model
// FILE --text TEXT` prints ours of the same file and tokens.
//
//   npm install node-llama-cpp
//   node load-tests/peers/perplexity.mjs MODEL.gguf TEXT

import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
import path from "node:path";

const [file, text] = process.argv.slice(2);
// The package is looked for where this is run.
const require = createRequire(path.join(process.cwd(), "package.json"));
const { getLlama, LlamaChatSession } = await import(pathToFileURL(require.resolve("node-llama-cpp")).href);

const llama = await getLlama({ gpu: false, logLevel: "error" });
const model = await llama.loadModel({ modelPath: file, gpuLayers: 0 });
const context = await model.createContext({ contextSize: 2048, sequences: 2 });
const tokens = model.tokenize(readFileSync(text, "utf8"), false).slice(0, 1024);
const asked = tokens.map((token) => [token, { generateNext: { probabilities: true, options: { temperature: 1, topK: 0, topP: 1, minP: 0 } } }]);
const sequence = context.getSequence();
let loss = 0;
const answers = await sequence.controlledEvaluate(asked.slice(0, -1));
answers.forEach((answer, at) => {
    loss -= Math.log(answer.next.probabilities.get(tokens[at + 1]) ?? 1e-12);
});
console.log(`perplexity ${Math.exp(loss / (tokens.length - 1)).toFixed(3)} over ${tokens.length - 1} tokens`);
const session = new LlamaChatSession({ contextSequence: context.getSequence() });
console.log(await session.prompt("What is the capital of France? Answer in one sentence.", { temperature: 0, maxTokens: 32 }));
await llama.dispose();
