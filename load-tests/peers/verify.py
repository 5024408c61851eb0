"""Answer verification beside the Math-Verify package, on the same pairs, each on one core, in turn.

Needs `math-verify` in the Python that runs this, and a built `potstill`:
    python3 load-tests/peers/verify.py target/release/potstill [PAIRS.jsonl]
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from math_verify import parse, verify

PEER = 600  # pairs that the package gets; it needs about a second for sixty
OURS = 200_000  # pairs that we get
ROUNDS = 3


def main() -> None:
    program = sys.argv[1]
    here = pathlib.Path(__file__).resolve().parents[2]
    source = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else here / "trainer/verify/tests/math_verify.jsonl"
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pairs = [json.loads(line) for line in source.read_text().splitlines()]
    simple = [{"gold": str(n * 7), "answer": f"so the answer is \\boxed{{{n * 7 + n % 2}}}"} for n in range(1000)]
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in [("mixed pairs", pairs), ("simple pairs", simple)]:
            peer_rows = (rows * (PEER // len(rows) + 1))[:PEER]
            our_rows = (rows * (OURS // len(rows) + 1))[:OURS]
            file = pathlib.Path(folder) / "pairs.jsonl"
            file.write_text("".join(json.dumps({"gold": r["gold"], "answer": r["answer"]}) + "\n" for r in our_rows))
            rates = {"math-verify": [], "compat": [], "strict": []}
            for _ in range(ROUNDS):
                begin = time.perf_counter()
                for row in peer_rows:
                    verify(parse(row["gold"]), parse(row["answer"]))
                rates["math-verify"].append(PEER / (time.perf_counter() - begin))
                for profile in ("compat", "strict"):
                    begin = time.perf_counter()
                    command = [program, "verify", "--pairs", str(file), "--profile", profile]
                    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                    rates[profile].append(OURS / (time.perf_counter() - begin))
            for who, values in rates.items():
                low, high = min(values), max(values)
                ratio = max(values) / max(rates["math-verify"])
                print(f"{name:13} {who:12} {low:10,.0f} to {high:10,.0f} pairs/s   {ratio:8.1f}x")


main()
