"""`lm-eval` beside `potstill eval` on one endpoint: the same GSM8K problems, the same question, greedy.

    pip install "lm_eval[api]"
    python3 load-tests/peers/lm_eval.py --potstill target/release/potstill --endpoint http://127.0.0.1:8000/v1 \
        --model NAME --data gsm8k_test.jsonl --limit 200

`--data` holds rows with `problem` and `answer`. lm-eval takes the number in the last box, else the last number; both scores come
with their 95 % intervals.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time

TASK = """
task: gsm8k_boxed
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: generate_until
test_split: test
doc_to_text: "{{{{problem}}}}\\n\\nPlease reason step by step, and put your final answer within \\\\boxed{{}}."
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    regexes_to_ignore:
      - ","
      - "\\\\$"
      - "\\\\.$"
generation_kwargs:
  until: []
  do_sample: false
  temperature: 0.0
  max_gen_toks: {max_tokens}
num_fewshot: 0
filter_list:
  - name: boxed
    filter:
      - function: regex
        group_select: -1
        regex_pattern: "boxed\\\\{{\\\\\\\\?\\\\$?(-?[0-9][0-9.,]*)"
        fallback: ""
      - function: take_first
  - name: last-number
    filter:
      - function: regex
        group_select: -1
        regex_pattern: "(-?[0-9][0-9.,]*)"
      - function: take_first
metadata:
  version: 1.0
"""


def wilson(right, of):
    share, z = right / of, 1.96
    centre = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return f"{100 * share:.1f} % [{100 * (centre - half):.1f}, {100 * (centre + half):.1f}]"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--potstill", default="target/release/potstill")
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--out", default="runs/lm-eval")
    options = parser.parse_args()
    out = pathlib.Path(options.out)

    started = time.monotonic()
    ours = subprocess.run(
        [options.potstill, "eval", "--endpoint", options.endpoint, "--model", options.model, "--bench", options.data]
        + ["--limit", str(options.limit), "--max-tokens", str(options.max_tokens), "--temperature", "0", "--samples", "1"]
        + ["--concurrency", str(options.concurrency), "--out", str(out / "ours"), "--json"],
        check=True,
        stdout=subprocess.PIPE,
    )
    figures = json.loads(ours.stdout)["benchmarks"][0]
    print(
        f"potstill eval: {figures['accuracy']:.1f} % [{figures['ci_low']:.1f}, {figures['ci_high']:.1f}],"
        f" {figures['undecided']:.1f} % undecided, {figures['truncated']:.1f} % cut off,"
        f" {time.monotonic() - started:.0f} s",
        flush=True,
    )

    with tempfile.TemporaryDirectory() as tasks:
        task = TASK.format(data=pathlib.Path(options.data).resolve(), max_tokens=options.max_tokens)
        (pathlib.Path(tasks) / "gsm8k_boxed.yaml").write_text(task)
        started = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "lm_eval", "run", "--model", "local-chat-completions", "--tasks", "gsm8k_boxed"]
            + ["--include_path", tasks, "--apply_chat_template", "--limit", str(options.limit), "--log_samples"]
            + ["--output_path", str(out / "theirs"), "--model_args"]
            + [
                f"model={options.model},base_url={options.endpoint}/chat/completions,"
                f"num_concurrent={options.concurrency},max_retries=3,tokenized_requests=False,timeout=3600"
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    results = sorted((out / "theirs").rglob("results_*.json"))[-1]
    scores = json.loads(results.read_text())["results"]["gsm8k_boxed"]
    for name in ["boxed", "last-number"]:
        right = round(scores[f"exact_match,{name}"] * options.limit)
        print(f"lm-eval, {name}: {wilson(right, options.limit)}, {time.monotonic() - started:.0f} s")

    # Row by row, where the two disagree.
    rows = sorted((out / "theirs").rglob("samples_gsm8k_boxed_*.jsonl"))[-1].read_text().splitlines()
    theirs = {}
    for row in map(json.loads, rows):
        if row["filter"] == "boxed":
            theirs[row["doc"]["id"]] = (row["exact_match"], row["resps"][0][0])
    stem = pathlib.Path(options.data).name.split(".")[0]
    disagree = same = 0
    for row in map(json.loads, (out / "ours" / f"{stem}.jsonl").read_text().splitlines()):
        right, text = theirs[row["problem"]]
        same += text.strip() == row["text"].strip()
        if bool(row["correct"]) != bool(right):
            disagree += 1
            print(f"  {row['problem']}: ours {row['correct']} ({row['evidence']}), theirs {bool(right)}")
    print(f"{same} of {len(theirs)} answers are the same text; {disagree} verdicts differ")


if __name__ == "__main__":
    main()
