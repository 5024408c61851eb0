// A GGUF model in llama.cpp (the prebuilt binaries of the npm package node-llama-cpp) and behind `potstill serve`, over the same
// text: the same tokens, how often both hold the same next token likeliest, and how far their distributions are apart
// (Kullback-Leibler divergence in nats of ours from llama.cpp's; what is beyond our 20 likeliest counts as one).
//
//   npm install node-llama-cpp
//   node --max-old-space-size=12000 load-tests/peers/agreement.mjs target/release/potstill MODEL.gguf TEXT.txt

import { spawn } from "node:child_process";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createServer } from "node:net";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [program, file, textFile] = process.argv.slice(2);
const TOKENS = 512;
const TOP = 20;

const require = createRequire(path.join(process.cwd(), "package.json"));
const { getLlama } = await import(pathToFileURL(require.resolve("node-llama-cpp")).href);
const llama = await getLlama({ gpu: false, maxThreads: 2, logLevel: "error" });
const model = await llama.loadModel({ modelPath: file, gpuLayers: 0 });
const text = readFileSync(textFile, "utf8");
const tokens = model.tokenize(text).slice(0, TOKENS);
const context = await model.createContext({ contextSize: 1024, batchSize: 1024 });
const unchanged = { temperature: 1, topK: 0, topP: 1, minP: 0 };
const asked = tokens.map((token) => [token, { generateNext: { probabilities: true, options: unchanged } }]);
const theirs = (await context.getSequence().controlledEvaluate(asked)).map((output) => output.next.probabilities);
await llama.dispose();

const port = await new Promise((resolve) => {
    const probe = createServer().listen(0, "127.0.0.1", () => {
        const { port } = probe.address();
        probe.close(() => resolve(port));
    });
});
const node = spawn(program, ["serve", "--model", file, "--name", "m", "--port", String(port)],
    { stdio: ["ignore", "ignore", "inherit"] });
const post = async (route, body) => {
    const answer = await fetch(`http://127.0.0.1:${port}${route}`,
        { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
};
try {
    while (!await fetch(`http://127.0.0.1:${port}/health`).then((answer) => answer.ok, () => false)) {
        if (node.exitCode !== null) throw new Error(`${program} ended with ${node.exitCode}`);
        await new Promise((resolve) => setTimeout(resolve, 100));
    }
    const own = (await post("/tokenize", { model: "m", prompt: text })).tokens.slice(0, TOKENS);
    const same = own.length === tokens.length && own.every((token, at) => token === tokens[at]);
    console.log(`${path.basename(file)}: ${tokens.length} tokens, ${same ? "the same" : "NOT the same"} from both tokenizers`);
    const echoed = await post("/v1/completions",
        { model: "m", prompt: [...tokens], max_tokens: 0, echo: true, logprobs: TOP, return_tokens_as_token_ids: true });
    const ours = echoed.choices[0].logprobs.top_logprobs;
    let [agree, count, divergence, worst] = [0, 0, 0, 0];
    for (let at = 1; at < tokens.length; at++) {
        const id = (name) => Number(name.split(":")[1]);
        const mine = Object.entries(ours[at]).map(([name, logProb]) => [id(name), Math.exp(logProb)]);
        const likeliest = (entries) => entries.reduce((best, one) => one[1] > best[1] ? one : best);
        agree += likeliest(mine)[0] === likeliest([...theirs[at - 1]])[0];
        let [here, restOurs, restTheirs] = [0, 1, 1];
        for (const [token, p] of mine) {
            const q = theirs[at - 1].get(token) ?? 0;
            if (q > 0) here += q * Math.log(q / p);
            restOurs -= p;
            restTheirs -= q;
        }
        if (restTheirs > 0 && restOurs > 0) here += restTheirs * Math.log(restTheirs / restOurs);
        divergence += here;
        worst = Math.max(worst, here);
        count += 1;
    }
    console.log(`the same token likeliest: ${agree} of ${count} (${(100 * agree / count).toFixed(1)} %)`);
    console.log(`divergence: mean ${(divergence / count).toFixed(5)}, largest ${worst.toFixed(4)} nats`);
} finally {
    node.kill();
}
process.exit(0);
