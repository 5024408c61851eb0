#!/usr/bin/env python3
"""The CoT pipeline with a teacher that answers at once: requests per second, peak memory, and the same work by bespokelabs-curator or
distilabel where they are installed.

    cargo build --release --workspace
    pip install bespokelabs-curator distilabel        # one of them, or neither
    load-tests/peers/pipeline.py --problems 100000 --peer-problems 5000

The teacher is `load-tests node --teacher BYTES`, a process of its own; every problem is asked once, verified by a rule, and sampled.
Both sides start empty, keep every answer on the disk, and share two cores with the teacher.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]


def problems(path, count):
    with open(path, "w") as file:
        for number in range(count):
            row = {"problem": f"Problem {number}: what is the number behind six, for the {number % 97}th time?", "answer": "7"}
            file.write(json.dumps(row) + "\n")


def recipe(path, source, port, concurrency):
    path.write_text(
        f"""name = "throughput"
concurrency = {concurrency}
[gateway]
url = "http://127.0.0.1:{port}/v1"
[collect]
sources = [{{ path = "{source}" }}]
[generate]
teachers = [{{ model = "m", temperatures = [0.7], max_tokens = 4096 }}]
"""
    )


def watched(command, **options):
    """Runs a command; gives its seconds, its peak memory in MiB, and what it said."""
    begun = time.time()
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, **options)
        peak = 0
        while child.poll() is None:
            try:
                for line in pathlib.Path(f"/proc/{child.pid}/status").read_text().splitlines():
                    if line.startswith("VmHWM"):
                        peak = max(peak, int(line.split()[1]) / 1024)
            except (FileNotFoundError, ProcessLookupError):
                pass
            time.sleep(0.02)
        said.seek(0)
        text = said.read()
    if child.returncode != 0:
        sys.exit(f"{command[0]} failed:\n{text[-2000:]}")
    return time.time() - begun, peak, text


CURATOR = """
import json, sys
from bespokelabs import curator
source, port, folder = sys.argv[1:]
class Solver(curator.LLM):
    def prompt(self, row): return row["problem"]
    def parse(self, row, response): return {"problem": row["problem"], "text": response}
solver = Solver(model_name="m", backend="openai", backend_params={
    "base_url": f"http://127.0.0.1:{port}/v1", "api_key": "none", "max_requests_per_minute": 10_000_000,
    "max_tokens_per_minute": 10_000_000_000, "max_concurrent_requests": 256})
rows = [json.loads(line) for line in open(source)]
answers = solver(rows, working_dir=folder)
print("answers", len(getattr(answers, "dataset", answers)))
"""

DISTILABEL = """
import json, sys
from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import TextGeneration
source, port, folder = sys.argv[1:]
rows = [{"instruction": json.loads(line)["problem"]} for line in open(source)]
with Pipeline("throughput", cache_dir=folder) as pipeline:
    load = LoadDataFromDicts(data=rows, batch_size=256)
    solve = TextGeneration(llm=OpenAILLM(model="m", base_url=f"http://127.0.0.1:{port}/v1", api_key="none",
                                         generation_kwargs={"max_new_tokens": 4096}), input_batch_size=256)
    load >> solve
if __name__ == "__main__":
    print("answers", len(pipeline.run(use_cache=False)["default"]["train"]))
"""


def peer(name, script, source, port, folder, count):
    program = folder / f"{name}_work.py"
    program.write_text(script)
    environment = {**os.environ, "OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1", "CURATOR_DISABLE_RICH_DISPLAY": "1",
                   "TELEMETRY_ENABLED": "0"}
    begun = time.time()
    seconds, peak, text = watched([sys.executable, str(program), str(source), str(port), str(folder / name)], env=environment)
    assert f"answers {count}" in text, text[-2000:]
    return {"tool": name, "problems": count, "seconds": round(seconds, 2), "per_second": round(count / seconds, 1),
            "peak_mib": round(peak)}


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--problems", type=int, default=100_000)
    arguments.add_argument("--peer-problems", type=int, default=5_000)
    arguments.add_argument("--concurrency", type=int, default=256)
    arguments.add_argument("--bytes", type=int, default=1024, help="of each chain of thought")
    arguments.add_argument("--port", type=int, default=18431)
    arguments = arguments.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="pipeline-"))
    node = subprocess.Popen([ROOT / "target/release/load-tests", "node", "--port", str(arguments.port), "--teacher",
                             str(arguments.bytes)])
    try:
        for _ in range(500):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{arguments.port}/v1/models").read()
                break
            except OSError:
                threading.Event().wait(0.02)
        source = folder / "problems.jsonl"
        problems(source, arguments.problems)
        recipe(folder / "recipe.toml", source, arguments.port, arguments.concurrency)
        command = [ROOT / "target/release/potstill", "run", folder / "recipe.toml", "--out", folder / "run"]
        for name in ["asked", "resumed"]:
            seconds, peak, text = watched([str(part) for part in command])
            stages = json.loads((folder / "run/run.json").read_text())["stages"]
            assert stages["verify"]["kept"] == arguments.problems, stages
            report = json.loads((folder / "run/report.json").read_text())
            calls = report["teachers"]["calls"]
            read = re.search(r"\[ *([\d.]+) s\] resuming", text)
            print(json.dumps({"tool": "potstill", "run": name, "problems": arguments.problems, "calls": calls,
                              "seconds": round(seconds, 2), "per_second": round(arguments.problems / seconds, 1),
                              "journal_read_after_s": float(read[1]) if read else None, "peak_mib": round(peak)}), flush=True)
        source = folder / "fewer.jsonl"
        problems(source, arguments.peer_problems)
        for name, module, script in [("curator", "bespokelabs", CURATOR), ("distilabel", "distilabel", DISTILABEL)]:
            try:
                __import__(module)
            except ImportError:
                print(json.dumps({"tool": name, "skipped": "not installed"}))
                continue
            print(json.dumps(peer(name, script, source, arguments.port, folder, arguments.peer_problems)), flush=True)
    finally:
        node.kill()
        node.wait()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
