//! Attacks on the sandbox: programs that try to pass tests without a solution, to leave the sandbox, or to
//! run forever. None succeeds, and each ends within the limits.
//!
//! If the kernel cannot isolate programs, the tests are skipped. With the environment variable
//! `POTSTILL_NEEDS_SANDBOX` they fail instead.
#![expect(clippy::panic, clippy::print_stderr, reason = "helpers of tests")]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use potstill_sandbox::{Example, ExitReason, Limits, Sandbox, SandboxError};

/// Returns a sandbox with short limits, or `None` if this machine cannot isolate programs.
fn sandbox() -> Option<Sandbox> {
    let limits =
        Limits { cpu_s: 2, wall_time: Duration::from_secs(3), output_bytes: 100_000, ..Limits::default() };
    match Sandbox::new(PathBuf::from(env!("CARGO_BIN_EXE_potstill-sandbox")), limits) {
        Ok(sandbox) => Some(sandbox),
        Err(refused @ (SandboxError::NoIsolation(_) | SandboxError::NoPython(_))) => {
            assert!(std::env::var_os("POTSTILL_NEEDS_SANDBOX").is_none(), "{refused}");
            eprintln!("left out: {refused}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Tests of a function that adds two numbers.
const TESTS: &str = "
def check(candidate):
    assert candidate(2, 3) == 5
    assert candidate(-1, 1) == 0
    assert candidate(10**20, 1) == 10**20 + 1
";

/// Name and code of programs that pretend to add two numbers with `add`.
const FORGERIES: &[(&str, &str)] = &[
    ("exit at once", "import sys; sys.exit(0)"),
    ("exit 42", "import os; os._exit(42)"),
    ("raise SystemExit", "raise SystemExit(0)"),
    ("equal to everything", "class A:\n    def __eq__(self, other): return True\ndef add(a, b): return A()"),
    (
        "an int that equals everything",
        "class A(int):\n    def __eq__(self, other): return True\ndef add(a, b): return A()",
    ),
    (
        "a list subclass",
        "class A(list):\n    def __eq__(self, other): return True\ndef add(a, b): return A()",
    ),
    (
        "a string that lies in repr",
        "class A(str):\n    def __repr__(self): return '5'\ndef add(a, b): return A('x')",
    ),
    ("marker on stdout", "print('passed 42 OK\\n' * 9)\ndef add(a, b): return None"),
    (
        "answer before being asked",
        "answer.write(\"('value', 5, [])\\n\"); answer.flush()\ndef add(a, b): return 0",
    ),
    (
        "many answers",
        "import os\n[os.write(fd, b\"('value', 5, [])\\n\" * 9) for fd in range(3, 6)]\ndef add(a, b): return 0",
    ),
    (
        "code as answer",
        "import os\ndef add(a, b):\n    for fd in range(3, 7):\n        try: os.write(fd, b\"__import__('os')._exit(42)\\n\")\n        except OSError: pass",
    ),
    ("a deep answer", "def add(a, b):\n    x = []\n    for _ in range(100000): x = [x]\n    return x"),
    ("an endless answer", "import itertools\ndef add(a, b): return itertools.count()"),
    ("a huge answer", "def add(a, b): return 'x' * (1 << 29)"),
    (
        "replaces len and repr",
        "import builtins\nbuiltins.repr = lambda x: '5'\nbuiltins.len = lambda x: 0\ndef add(a, b): return a - b",
    ),
    (
        "replaces the driver's function",
        "import __main__\n__main__.plain = lambda v, d=0: '5'\ndef add(a, b): return 0",
    ),
    (
        "looks for the expected value",
        "import gc, sys\ndef add(a, b):\n    for o in gc.get_objects():\n        if isinstance(o, str) and 'assert candidate' in o: return 5\n    return 0",
    ),
    (
        "reads the tests' memory",
        "import os\ndef add(a, b):\n    try: return open(f'/proc/{os.getppid()}/cmdline').read()\n    except OSError: return 0",
    ),
    ("no function", "x = 1"),
    ("wrong", "def add(a, b): return a * b"),
    ("right sometimes", "def add(a, b): return 5"),
];

#[test]
fn rejects_programs_that_forge_a_pass() {
    let Some(sandbox) = sandbox() else { return };
    let good = sandbox.check_functions("def add(a, b): return a + b", TESTS, "add").unwrap();
    assert!(good.passed, "{good:?}");
    for (name, program) in FORGERIES {
        let begin = Instant::now();
        let verdict = sandbox.check_functions(program, TESTS, "add").unwrap();
        assert!(!verdict.passed, "{name} passed: {verdict:?}");
        assert!(
            begin.elapsed() < sandbox.limits.wall_time + Duration::from_secs(1),
            "{name} took {:?}",
            begin.elapsed()
        );
    }
}

/// Name and code of programs that print `out` after leaving the sandbox.
const ESCAPES: &[(&str, &str)] = &[
    ("read a secret", "print('out' if open('/etc/shadow').read() else '')"),
    ("read passwd", "print('out' if open('/etc/passwd').read() else '')"),
    ("list the root", "import os; print('out', os.listdir('/'))"),
    (
        "read the environment of others",
        "import os; print('out', open('/proc/1/environ').read(), os.listdir('/proc'))",
    ),
    ("write outside", "open('/var/tmp/potstill-escape', 'w').write('x'); print('out')"),
    ("write into the interpreter", "import os; open(os.__file__, 'a').write('x'); print('out')"),
    (
        "link to a secret",
        "import os; os.symlink('/etc/shadow', '/tmp/s'); print('out', open('/tmp/s').read())",
    ),
    ("hard link", "import os; os.link('/etc/passwd', '/tmp/p'); print('out', open('/tmp/p').read())"),
    ("connect", "import socket; socket.create_connection(('127.0.0.1', 80)); print('out')"),
    ("any socket", "import socket; socket.socket(); print('out')"),
    ("a pair of sockets", "import socket; socket.socketpair(); print('out')"),
    ("fork", "import os; print('out' if os.fork() >= 0 else '')"),
    ("start a program", "import subprocess; print('out', subprocess.check_output(['/bin/id']))"),
    ("become a program", "import os; os.execv('/bin/sh', ['sh', '-c', 'echo out'])"),
    ("a thread", "import threading; t = threading.Thread(target=print, args=('out',)); t.start(); t.join()"),
    ("trace another", "import ctypes; print('out' if ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0 else '')"),
    (
        "mount",
        "import ctypes; print('out' if ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, 0) == 0 else '')",
    ),
    (
        "a namespace of its own",
        "import ctypes; print('out' if ctypes.CDLL(None).unshare(0x10000000) == 0 else '')",
    ),
    ("change root", "import os; os.chroot('/tmp'); print('out')"),
    ("become root", "import os; os.setuid(0); print('out')"),
    (
        "raise the limits",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40)); print('out')",
    ),
    ("signal others", "import os; os.kill(-1, 9); print('out')"),
    ("a new session", "import os; os.setsid(); print('out')"),
    ("a file without an end", "f = open('/tmp/f', 'wb')\nwhile True: f.write(b'x' * 65536)"),
    ("many files", "for n in range(10000): open(f'/tmp/{n}', 'w').close()\nprint('out')"),
    (
        "an executable of its own",
        "import os\nopen('/tmp/x', 'w').write('#!/bin/sh\\necho out')\nos.chmod('/tmp/x', 0o755)\nos.execv('/tmp/x', ['x'])",
    ),
    (
        "keyrings",
        "import ctypes; print('out' if ctypes.CDLL(None).syscall(250, 0, -3, 0, 0, 0) >= 0 else '')",
    ),
    ("bpf", "import ctypes; print('out' if ctypes.CDLL(None).syscall(321, 0, 0, 0) >= 0 else '')"),
    ("io_uring", "import ctypes; print('out' if ctypes.CDLL(None).syscall(425, 8, 0) >= 0 else '')"),
];

#[test]
fn blocks_escapes_from_the_sandbox() {
    let Some(sandbox) = sandbox() else { return };
    for (name, program) in ESCAPES {
        let output = sandbox.run_program(program, b"").unwrap();
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(!printed.contains("out"), "{name}: {printed}");
        assert_ne!(output.ended, ExitReason::Refused, "{name}");
    }
    assert!(!std::path::Path::new("/var/tmp/potstill-escape").exists());
}

#[test]
fn ends_programs_that_exceed_a_limit() {
    let Some(sandbox) = sandbox() else { return };
    let mut longest = Duration::ZERO;
    for (name, program) in [
        ("a loop", "while True: pass"),
        ("sleep", "import time; time.sleep(1000)"),
        ("reads what never comes", "import os; r, w = os.pipe(); os.read(r, 1)"),
        ("fork bomb", "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"),
        ("10 GB", "x = bytearray(10 << 30)"),
        ("memory bit by bit", "x = []\nwhile True: x.append(bytearray(1 << 20))"),
        ("endless output", "while True: print('x' * 1000)"),
        ("endless complaints", "import sys\nwhile True: sys.stderr.write('x' * 1000)"),
        (
            "ignores signals",
            "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
        ),
        ("closes its output and goes on", "import os\nos.close(1); os.close(2)\nwhile True: pass"),
        ("a long sum", "sum(range(10**12))"),
        ("a power", "x = 9 ** 9 ** 9"),
        ("deep recursion", "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()"),
        ("a regular expression", "import re; re.match('(a+)+$', 'a' * 40 + 'b')"),
    ] {
        let begin = Instant::now();
        let output = sandbox.run_program(program, b"").unwrap();
        longest = longest.max(begin.elapsed());
        assert!(
            begin.elapsed() < sandbox.limits.wall_time + Duration::from_secs(1),
            "{name}: {:?}",
            begin.elapsed()
        );
        assert_ne!(output.ended, ExitReason::Exit(0), "{name}");
        assert_ne!(output.ended, ExitReason::Refused, "{name}");
        assert!(output.stdout.len() <= sandbox.limits.output_bytes, "{name}");
    }
    assert!(longest >= Duration::from_secs(1), "the limits were tried");
}

#[test]
fn compares_printed_output_with_examples() {
    let Some(sandbox) = sandbox() else { return };
    let examples = [("3\n1 2 3\n", "6\n"), ("2\n10 -10\n", "0\n")]
        .map(|(input, output)| Example { input: input.to_owned(), output: output.to_owned() });
    let right = "input()\nprint(sum(map(int, input().split())))";
    assert!(sandbox.check_output(right, &examples).unwrap().passed);
    for (wrong, word) in [
        ("print(6)", "test 2"),
        ("import sys; sys.exit(3)", "ended with 3"),
        ("1/0", "ZeroDivisionError"),
        ("print('6'); print('more')", "something else"),
        ("while True: pass", "time"),
        ("def f(:", "SyntaxError"),
    ] {
        let verdict = sandbox.check_output(wrong, &examples).unwrap();
        assert!(!verdict.passed && verdict.why.contains(word), "{wrong}: {verdict:?}");
    }
}

#[test]
fn calls_methods_generators_and_functions_with_side_effects() {
    let Some(sandbox) = sandbox() else { return };
    for (program, tests, entry) in [
        (
            "class Solution:\n    def twice(self, xs): return [2 * x for x in xs]",
            "assert candidate([1, 2]) == [2, 4]",
            "Solution.twice",
        ),
        ("def f(xs): xs.sort()", "a = [3, 1, 2]\nf(a)\nassert a == [1, 2, 3]", "f"),
        ("def f(n): return map(str, range(n))", "assert list(f(3)) == ['0', '1', '2']", "f"),
        (
            "def f(): return {(1, 2): {3}, 'x': (4,), 'e': set(), 'n': None, 'f': -0.5}",
            "assert f() == {(1, 2): {3}, 'x': (4,), 'e': set(), 'n': None, 'f': -0.5}",
            "f",
        ),
        ("def f(): return float('inf')", "import math\nassert math.isinf(candidate())", "f"),
        (
            "def f(x):\n    if x < 0: raise ValueError('neg')\n    return x",
            "try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass",
            "f",
        ),
        ("def g(x): return x + 1\ndef f(x): return g(x)", "assert f(1) == 2 and g(2) == 3", "f"),
        (
            "import math, re, collections, itertools, functools, heapq\ndef f(x): return math.sqrt(x)",
            "assert abs(candidate(2) - 1.41421356) < 1e-6",
            "f",
        ),
        ("def f(s): return s[::-1]", "assert f('a\\nb\"') == '\"b\\na'", "f"),
    ] {
        let verdict = sandbox.check_functions(program, tests, entry).unwrap();
        assert!(verdict.passed, "{program}: {verdict:?}");
    }
}
