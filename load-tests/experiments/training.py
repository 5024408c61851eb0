"""Training effects on the demonstration's task, several seeds each: what the rewards of GRPO change (the paper's Table 4 in
small), and what the order of the lessons does. Nothing but a built `potstill`:

    python3 load-tests/experiments/training.py target/release/potstill rewards|curriculum [--seeds 3] [--out FOLDER]

Every arm is a recipe in the output folder; started again, what is finished is not repeated.
"""

import argparse
import json
import pathlib
import statistics
import subprocess

HERE = pathlib.Path(__file__).resolve().parents[2]
ASSETS = HERE / "trainer/recipes"


# GRPO from the fine-tuned student of demo-reward.toml, with its reward models.
PRACTICE = """
name = "{name}"
seed = {seed}
[collect.builtin]
task = "arithmetic"
problems = 2000
seed = {problems}
[student]
name = "practised"
base = "{base}/models/reward-student-distilled"
export = "f32"
[grpo]
{models}
[grpo.train]
learning_rate = 3e-4
prompts = 16
group = 8
max_tokens = 320
rv = {{ low = 0.3333333, high = 0.5555556, lambda = 0.5 }}
cd = {{ low = 0.2222222, high = 0.6666667, lambda = 0.5 }}
[grpo.train.run]
micro_batch_tokens = 8192
max_steps = 60
warmup_ratio = 0.1
weight_decay = 0.0
beta2 = 0.98
checkpoint_every = 1000
[evaluate]
builtin = {{ task = "arithmetic", problems = 300, seed = 2002 }}
samples = 4
temperature = 0.6
top_p = 0.95
max_tokens = 320
compare = ["raw"]
"""


def run(program: str, recipe: str, folder: pathlib.Path) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe-in.toml"
    path.write_text(recipe)
    out = subprocess.run([program, "run", str(path), "--out", str(folder / "run"), "--json"],
                         check=True, stdout=subprocess.PIPE, stderr=(folder / "log").open("w")).stdout
    return json.loads(out)


def table(title: str, arms: dict) -> None:
    levels = ["easy", "medium", "hard"]
    print(f"\n{title}\n\n| arm | steps | accuracy by seed | mean | spread | {' | '.join(levels)} | mean tokens |")
    print("|" + "---|" * (6 + len(levels)))
    for arm, students in arms.items():
        values = [student["accuracy"] for student in students]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        by_level = [statistics.mean(s["details"]["accuracy_by_level"][level] for s in students) for level in levels]
        tokens = statistics.mean(s["details"]["mean_tokens"] for s in students)
        steps = [str(student["steps"]) for student in students if student.get("steps")]
        print(f"| {arm} | {', '.join(steps)} | {', '.join(f'{v:.1f}' for v in values)} | {statistics.mean(values):.1f} | {spread:.1f} | "
              + " | ".join(f"{v:.1f}" for v in by_level) + f" | {tokens:.0f} |", flush=True)


def rewards(program: str, seeds: int, out: pathlib.Path) -> None:
    base = out / "base"
    if not (base / "report.json").exists():
        subprocess.run([program, "run", str(ASSETS / "demo-reward.toml"), "--out", str(base)], check=True)
    rv = f'rv = "{base}/models/reward-student-rv"'
    cd = f'cd = "{base}/models/reward-student-cd"'
    arms = {"vanilla": "", "+RV": rv, "+CD": cd, "+RV +CD": f"{rv}\n{cd}"}
    found = {"before": []}
    for arm, models in arms.items():
        found[arm] = []
        for seed in range(1, seeds + 1):
            name = "".join(c for c in arm if c.isalnum()).lower()
            recipe = PRACTICE.format(name=f"{name}-{seed}", seed=seed, problems=5000 + seed, base=base, models=models)
            report = run(program, recipe, out / f"{name}-{seed}")
            students = {student["name"]: student for student in report["students"]}
            found[arm].append(students["grpo"])
            found["before"] = [students["raw"]]
        table("GRPO, 60 steps of 16 x 8 completions", found)


def curriculum(program: str, seeds: int, out: pathlib.Path) -> None:
    found = {}
    base = (ASSETS / "demo.toml").read_text().replace('compare = ["raw", "answers_only"]', "")
    for folder in ("demo-prompts", "demo-teacher"):
        base = base.replace(f'"{folder}"', f'"{ASSETS / folder}"', 1) if folder == "demo-prompts" else base.replace(
            f'path = "{folder}"', f'path = "{ASSETS / folder}"')
    for order in ("difficulty", "cd", "shuffled"):
        found[order] = []
        for seed in range(1, seeds + 1):
            recipe = base.replace("[sft.curriculum]", f'[sft.curriculum]\norder = "{order}"')
            if order == "cd":
                # Three windows, each with what it replays: as many steps in all as the others take.
                recipe = recipe.replace("medium_epochs = 20", "medium_epochs = 5.4")
            if order == "shuffled":
                steps = found["difficulty"][seed - 1]["steps"]
                recipe = recipe.replace("[sft.run]", f"[sft.run]\nmax_steps = {steps}")
            recipe = recipe.replace('name = "demo"', f'name = "{order}-{seed}"').replace("seed = 7", f"seed = {seed}")
            recipe = recipe.replace("problems = 3000", "problems = 2000").replace("medium_epochs = 20", "medium_epochs = 12")
            folder = out / f"order-{order}-{seed}"
            first = out / f"order-difficulty-{seed}" / "run" / "journal.log"
            target = folder / "run" / "journal.log"
            if first.exists() and not target.exists():
                # The teacher's answers are the same for every order.
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(first.read_bytes())
            student = run(program, recipe, folder)["students"][-1]
            state = json.loads((folder / "run/train/distilled/trainer_state.json").read_text())
            found[order].append(student | {"steps": state["global_step"]})
        table("Order of the lessons, equal steps", found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("experiment", choices=["rewards", "curriculum"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("experiments"))
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    {"rewards": rewards, "curriculum": curriculum}[args.experiment](str(pathlib.Path(args.program).resolve()), args.seeds, out)


main()
