"""Runs the tests. Calls of the program's functions go to the other process; the responses are parsed as plain values.

Exits with status 42 if and only if all tests have passed."""
import ast
import builtins
import os
import sys

tests, entry = sys.argv[1], sys.argv[2]
answers = os.fdopen(os.dup(0), "r", encoding="utf-8", errors="replace")
ask = os.fdopen(os.dup(1), "w", encoding="utf-8")
nothing = os.open("/dev/null", os.O_RDWR)
os.dup2(nothing, 0)
os.dup2(nothing, 1)
sys.stdout = open(1, "w", closefd=False)
LONGEST = 4 << 20


def read(node):
    """Returns the plain value of a syntax tree; any other expression is an error."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id == "set" and not node.args:
            return set()
        if node.func.id == "iter" and len(node.args) == 1:
            return iter(read(node.args[0]))
    if isinstance(node, ast.Name) and node.id in ("inf", "nan"):
        return float(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -read(node.operand)
    if isinstance(node, ast.List):
        return [read(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(read(item) for item in node.elts)
    if isinstance(node, ast.Set):
        return {read(item) for item in node.elts}
    if isinstance(node, ast.Dict):
        return {read(key): read(value) for key, value in zip(node.keys, node.values)}
    return ast.literal_eval(node)


def call(name, arguments, named):
    try:
        request = repr((name, arguments, named))
        ast.literal_eval(request)
    except Exception:
        raise AssertionError("the tests pass a value that is no plain value")
    ask.write(request.replace("\n", "\\n") + "\n")
    ask.flush()
    line = answers.readline(LONGEST)
    if not line.endswith("\n"):
        raise AssertionError("the program ended, or its answer is too long")
    kind, value, rest = read(ast.parse(line, mode="eval").body)
    if kind != "value":
        error = getattr(builtins, str(value), None)
        is_error = isinstance(error, type) and issubclass(error, Exception)
        raise (error if is_error else RuntimeError)(str(rest))
    # Copies back lists and dictionaries that the program has changed in place.
    for mine, theirs in zip(arguments, rest):
        if type(mine) is list and type(theirs) is list:
            mine[:] = theirs
        elif type(mine) is dict and type(theirs) is dict:
            mine.clear()
            mine.update(theirs)
    return value


def function(name):
    return lambda *arguments, **named: call(name, arguments, named)


tree = ast.parse(tests)
made = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
names = {"__name__": "tests", "candidate": function(entry)}
for node in ast.walk(tree):
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in made and not hasattr(builtins, node.id):
        names.setdefault(node.id, function(node.id))
names.setdefault(entry.split(".")[-1], function(entry))
try:
    exec(compile(tree, "tests", "exec"), names)
    if "check" in made:
        names["check"](names["candidate"])
except BaseException as error:
    print(f"{type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    sys.exit(1)
sys.exit(42)
