// A GGUF model in llama.cpp (the prebuilt binaries of the npm package node-llama-cpp) and in `potstill bench`, in turn, on the
// same prompt lengths and threads. Ratios count; both are given by processor time and by wall clock.
//
//   npm install node-llama-cpp
//   node load-tests/peers/llama.mjs target/release/potstill MODEL.gguf [threads]

import { execFileSync } from "node:child_process";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import path from "node:path";

const [program, file, threadsGiven] = process.argv.slice(2);
const threads = Number(threadsGiven ?? 1);
const PROMPTS = [128, 512];
const GENERATE = 64;
const BATCHES = [1, 16];
const ROUNDS = 3;

// The package is looked for where this is run.
const require = createRequire(path.join(process.cwd(), "package.json"));
const { getLlama } = await import(pathToFileURL(require.resolve("node-llama-cpp")).href);

const llama = await getLlama({ gpu: false, maxThreads: threads, logLevel: "error" });
const model = await llama.loadModel({ modelPath: file, gpuLayers: 0 });
const vocabulary = 49_000;
const prompt = (length, sequence) => Array.from({ length }, (_, at) => (at * 7919 + sequence * 104_729 + 11) % vocabulary);

async function measure(tokens, work) {
    let [wall, cpu] = [Infinity, Infinity];
    for (let round = 0; round < ROUNDS; round++) {
        const [begin, used] = [performance.now(), process.cpuUsage()];
        await work(round);
        const spent = process.cpuUsage(used);
        wall = Math.min(wall, (performance.now() - begin) / 1e3);
        cpu = Math.min(cpu, (spent.user + spent.system) / 1e6);
    }
    return { tokens_per_s: tokens / wall, tokens_per_cpu_s: tokens / cpu };
}

const peer = [];
for (const length of PROMPTS) {
    const context = await model.createContext({ contextSize: 1024, batchSize: 1024, sequences: 1, threads });
    const sequence = context.getSequence();
    const repeats = Math.max(1, Math.floor(1024 / length));
    const measured = await measure(length * repeats, async (round) => {
        for (let repeat = 0; repeat < repeats; repeat++) {
            await sequence.clearHistory();
            await sequence.evaluateWithoutGeneratingNewTokens(prompt(length, round * repeats + repeat));
        }
    });
    peer.push({ work: "prefill", prompt: length, batch: 1, ...measured });
    await context.dispose();
}
for (const batch of BATCHES) {
    const context = await model.createContext({ contextSize: 512, batchSize: 512, sequences: batch, threads });
    const sequences = Array.from({ length: batch }, () => context.getSequence());
    let [wall, cpu] = [Infinity, Infinity];
    for (let round = 0; round < ROUNDS; round++) {
        for (const [at, sequence] of sequences.entries()) {
            await sequence.clearHistory();
            await sequence.evaluateWithoutGeneratingNewTokens(prompt(PROMPTS[0], at));
        }
        const [begin, used] = [performance.now(), process.cpuUsage()];
        await Promise.all(sequences.map(async (sequence, at) => {
            let count = 0;
            for await (const _ of sequence.evaluate([at + 5], { temperature: 0, yieldEogToken: true })) {
                count += 1;
                if (count === GENERATE) break;
            }
        }));
        const spent = process.cpuUsage(used);
        wall = Math.min(wall, (performance.now() - begin) / 1e3);
        cpu = Math.min(cpu, (spent.user + spent.system) / 1e6);
    }
    const all = GENERATE * batch;
    peer.push({ work: "decode", prompt: PROMPTS[0], batch, tokens_per_s: all / wall, tokens_per_cpu_s: all / cpu });
    await context.dispose();
}
await llama.dispose();

const ours = JSON.parse(execFileSync(program, ["bench", "--json", "--model", file, "--threads", String(threads),
    "--prompt", PROMPTS.join(","), "--gen", String(GENERATE), "--batch", BATCHES.join(","), "--rounds", String(ROUNDS)]));
console.log(`${path.basename(file)}, ${threads} threads: tokens per CPU second (and per second)`);
for (const row of ours.measured) {
    const other = peer.find((one) => one.work === row.work && one.prompt === row.prompt && one.batch === row.batch);
    const show = (one) => `${one.tokens_per_cpu_s.toFixed(0)} (${one.tokens_per_s.toFixed(0)})`.padStart(14);
    console.log(`${row.work.padEnd(8)} prompt ${String(row.prompt).padStart(4)} batch ${String(row.batch).padStart(2)}  `
        + `llama.cpp ${show(other)}  potstill ${show(row)}  ratio ${(row.tokens_per_cpu_s / other.tokens_per_cpu_s).toFixed(2)} `
        + `(${(row.tokens_per_s / other.tokens_per_s).toFixed(2)})`);
}
process.exit(0);
