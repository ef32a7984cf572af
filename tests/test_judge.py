"""check_correctness, which runs generated programs: what deserves to pass passes.

Nothing else does, whatever a program does.
"""

import ctypes
import errno
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import conftest  # noqa: F401, makes the modules importable
import evaluate
from evaluate import check_correctness

# Of evaluate.py's imports those that its judge needs.
IMPORTS = """import builtins, ctypes, errno, json, math, os, pickle, resource, signal, socket
import struct, subprocess, sys, tempfile, time
from contextlib import suppress
from pathlib import Path
import json as np  # any package: where the others are
"""
SYSTEM_PYTHON = pathlib.Path("/usr/bin/python3")  # readable by every user
PROBLEM = {
    "task_id": "Test/0",
    "prompt": "import os, sys\n\n\ndef double(x):\n"
    '    """Return twice x, \u00e9\u4e2d\U0001f600."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n"
    "    assert candidate('a') == 'aa'\n",
}
RIGHT = "    return 2 * x\n"
WRONG = "    return None\n"
LANDLOCK = ctypes.CDLL(None).syscall(444, None, 0, 1) if sys.platform == "linux" else 0  # version
MARK = os.getpid() / 1e8  # added to time limits, by which to find the processes of this run
MEMORY = ["-p", "/dev/shm"] if os.path.isdir("/dev/shm") else []  # quicker than a disk
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
root = pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="needs root")


def run(completion, timeout=3.0, **changes):
    """Return the result of a completion of the toy problem."""
    answer = check_correctness({**PROBLEM, **changes}, completion, timeout)
    assert answer["passed"] == (answer["result"] == "passed")
    assert "\n" not in answer["result"] and len(answer["result"]) <= 80
    return answer["result"]


def body(code):
    """Return a right completion that first runs the code, at each call of the function."""
    return "".join(f"    {line}\n" for line in code.splitlines()) + RIGHT


def processes(marker):
    """Return how many processes have the marker in their command line."""
    count = 0
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            count += marker.encode() in path.read_bytes()
        except OSError:
            pass
    return count


def without(source, call):
    """Return the source code with calls that do nothing but fail."""
    assert call + "(" in source
    return source.replace(call + "(", "(lambda *_: -1)(")


@pytest.fixture(params=["all", "limits only"])
def protection(request, monkeypatch):
    """Run a test twice, the second time as if the system had neither namespaces nor Landlock."""
    if request.param == "limits only":
        runner = without(without(evaluate.RUNNER, "libc.unshare"), "libc.syscall")
        monkeypatch.setattr(evaluate, "RUNNER", runner)


@pytest.fixture
def folders(monkeypatch):
    """Have the temporary folders made in a folder that must be empty again after the test."""
    place = pathlib.Path(subprocess.check_output(["mktemp", "-d", *MEMORY], text=True).strip())
    place.chmod(0o777)
    monkeypatch.setattr(evaluate.tempfile, "tempdir", str(place))
    yield place
    left = list(place.iterdir())
    subprocess.run(["rm", "-rf", place])
    assert left == []


def test_right_and_wrong(protection, folders):
    """The right completion passes, and the wrong and the empty one do not."""
    assert run(RIGHT) == "passed"
    assert run(WRONG) == "failed: AssertionError"
    assert run("") == "failed: AssertionError"
    assert run("    return x + 2\n") == "failed: TypeError"
    assert run("    return [1, 2\n") == "failed: SyntaxError"
    assert run("    yield x\n").startswith("failed")


@pytest.mark.parametrize(
    "expression, expected",
    [
        ("float('inf')", "float('inf')"),
        ("(1, 2.5, True, None, 'x', b'y', {1, 2})", "(1, 2.5, True, None, 'x', b'y', {1, 2})"),
        ("__import__('collections').Counter('aab')", "{'a': 2, 'b': 1}"),
        ("[__import__('collections').OrderedDict(a=(1,))]", "[{'a': (1,)}]"),
        ("'\\ud800'", "'\\ud800'"),
        ("10 ** 5000", "10 ** 5000"),
    ],
)
def test_values(expression, expected):
    """A value reaches the asserts as it was returned."""
    check = f"def check(candidate):\n    assert candidate(1) == {expected}\n    assert True\n"
    assert run(f"    return {expression}\n", test=check) == "passed"


# A loop over the processes of this judge alone: a test must be harmless even if a protection fails.
OTHERS = """
def others():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if pid != os.readlink("/proc/self"):
            try:
                if b"PlainUnpickler" in open(f"/proc/{pid}/cmdline", "rb").read():
                    yield pid
            except OSError:
                pass
for pid in others() if sys.platform == "linux" else ():
"""
CHEATS = {
    "exit 0 at once": WRONG + "os._exit(0)",
    "exit 0 in a call": "    os._exit(0)\n",
    "sys.exit": WRONG + "sys.exit(0)",
    "sys.exit in a call": "    sys.exit(0)\n",
    "raise SystemExit": "    raise SystemExit\n",
    "prints": WRONG + "print('ok'); print('passed', file=sys.stderr); sys.stdout.flush()",
    "redefined check": WRONG + "def check(candidate): pass",
    "asserts in comments": WRONG + '"""',
    "atexit": WRONG + "import atexit; atexit.register(os._exit, 0); os.write(1, b'passed')",
    "builtins": WRONG + "import builtins\nclass E(BaseException): pass\n"
    "builtins.AssertionError = E; builtins.exec = builtins.isinstance = lambda *a: None",
    "no debug": WRONG + "import builtins; builtins.__dict__['__debug__'] = False",
    "equal to all": "    class Same:\n        __eq__ = lambda self, other: True\n"
    "    return Same()\n",
    "equal string": "    class S(str):\n        __eq__ = lambda s, o: True\n"
    "        __hash__ = str.__hash__\n"
    "    return S()\n",
    "killed judge": WRONG + "p = os.getppid()\nfor s in 2, 9, 15: os.kill(p, s)",
    "all descriptors": WRONG + "import pickle\nfor f in range(64):\n"
    "    for data in b'passed', pickle.dumps((True, 4)), b'passed':\n"
    "        try: os.write(f, data)\n        except OSError: pass\nos._exit(0)",
    "descriptors of the judge": WRONG + OTHERS + "    for f in range(16):\n"
    "        try: os.write(os.open(f'/proc/{pid}/fd/{f}', os.O_WRONLY), b'passed')\n"
    "        except OSError: pass\n",
    "environment": "    for p in 'cmdline', 'environ':\n"
    "        os.write(1, open(f'/proc/self/{p}', 'rb').read())\n"
    "    return os.write(1, sys.stdin.read().encode() or b'passed')\n",
    "pickled call": "    class P:\n        def __reduce__(self): return os.write, (1, b'passed')\n"
    "    return P()\n",
    "pickled verdict": "    class P:\n        def __reduce__(self):\n"
    "            return eval, ('next(f for f in __import__(\"gc\").get_objects()'\n"
    "                          ' if getattr(f, \"__name__\", 0) == \"finish\")(\"passed\")',)\n"
    "    return P()\n",
    "frames": "    import gc, inspect\n    frame = sys._getframe()\n    while frame:\n"
    "        for v in [*frame.f_locals.values(), *frame.f_globals.values()]:\n"
    "            if hasattr(v, 'fileno'): os.write(v.fileno(), b'passed')\n"
    "        frame = frame.f_back\n    return [str(o)[:9] for o in gc.get_objects()]\n",
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheat(name, protection):
    """A completion that does not compute the right value cannot pass."""
    assert run(CHEATS[name]).startswith(("failed", "timed out"))


UNFINISHED = {
    "two spaces": ('def double(x):\n  """Twice."""\n', "  return 2 * x\n"),
    "tabs": ('def double(x):\n\t"""Twice."""\n', "\treturn 2 * x\n"),
    "no docstring": ("def double(x):\n", " return 2 * x\n"),
    "a docstring alone": ('"""Write double(x)."""\nimport os\n', "double = lambda x: 2 * x\n"),
    "an open if": ("def double(x):\n    if x:\n", "        return 2 * x\n"),
    "an open line": ("def double(x): return ", "2 * x\n"),
    "an open bracket": ("double = max(\n", "    1, 2) and (lambda x: 2 * x)\n"),
    "a decorator": ("import functools\n@functools.cache\n", "def double(x): return 2 * x\n"),
    "not complete yet": (
        "import functools\n@functools.total_ordering\nclass T:\n    x = 1\n",
        "    def __lt__(self, other): return True\ndef double(x): return 2 * x\n",
    ),
}


@pytest.mark.parametrize("name", UNFINISHED)
def test_a_prompt_ends_anywhere(name):
    """Where a prompt ends decides nothing."""
    prompt, completion = UNFINISHED[name]
    assert run(completion, prompt=prompt) == "passed"


def test_asserts_use_the_prompts_own_functions():
    """A helper that the prompt defines is there for the asserts, not the program's own version."""
    prompt = "def half(x):\n  return x / 2\n\ndef double(x):\n  'Twice.'\n"
    test = "def check(candidate):\n    assert half(candidate(3)) == 3\n"
    assert run("  return 2 * x\n", prompt=prompt, test=test) == "passed"
    cheat = "  return 0\n\ndef half(x): return 3\n"
    assert run(cheat, prompt=prompt, test=test) == "failed: AssertionError"


def test_a_class_as_entry_point():
    """The asserts use a class and its objects; a wrong one, and one that equals all, fail."""
    prompt = "class Stack:\n  def __init__(self):\n"
    stack = """    self.items = []
  def push(self, x):
    self.items.append(x)
    return self
  def pop(self): return self.items.pop()
  def __len__(self): return len(self.items)
  def __eq__(self, other): return True
"""
    test = """def check(candidate):
    stack = candidate()
    assert not stack and stack.push(1).push(2).pop() == 2
    assert len(stack) == 1 and stack.items == [1]
"""
    changes = {"prompt": prompt, "entry_point": "Stack", "test": test}
    assert run(stack, **changes) == "passed"
    assert run(stack.replace("pop()", "pop(0)"), **changes) == "failed: AssertionError"
    changes["test"] = "def check(candidate):\n    assert candidate() == [1]\n"
    assert run(stack, **changes) == "failed: PicklingError"
    method = {"prompt": "class A:\n\tdef double(self, x):\n", "entry_point": "A().double"}
    assert run("\t\treturn 2 * x\n", **method) == "passed"


def test_an_exception_is_the_builtin_one():
    """The asserts may expect an exception, more than once; StopIteration does not end a map()."""
    test = """def check(candidate):
    for _ in range(2):
        try:
            candidate(1)
        except ValueError:
            continue
        assert False
"""
    assert run("    raise ValueError('no')\n", test=test) == "passed"
    assert run("    raise TypeError\n", test=test) == "failed: TypeError"
    test = "def check(candidate):\n    assert all(map(candidate, [1, 2]))\n"
    assert run("    raise StopIteration\n", test=test) == "failed: RuntimeError"


OTHER_VALUES = """def check(candidate):
    from decimal import Decimal
    from fractions import Fraction
    from itertools import count, islice
    assert list(candidate("(i for i in (1, 2))")) == [1, 2]
    assert list(islice(candidate("__import__('itertools').count(5)"), 2)) == [5, 6]
    assert next(candidate("iter('ab')")) == "a"
    assert sorted(candidate("{2: 0, 1: 0}.keys()")) == [1, 2]
    assert candidate("range(3)") == range(3) and len(candidate("range(3)")) == 3
    assert candidate("__import__('decimal').Decimal('1.5')") == Decimal("1.5")
    assert [Fraction(1, 3)] == candidate("[__import__('fractions').Fraction(1, 3)]")
    assert candidate("1 + 2j") == 1 + 2j and candidate("lambda x: x + 1")(1) == 2
"""


def test_values_of_other_kinds():
    """A generator, a range or a Decimal can be judged; what cannot be compared has a word."""
    assert run("    return eval(x)\n", test=OTHER_VALUES) == "passed"
    assert run("    yield 4\n") == "failed: PicklingError"


def test_numpy_is_there_for_the_program_and_the_asserts():
    """Its numbers and arrays reach the asserts as lists and numbers."""
    test = "import numpy as np\n\ndef check(candidate):\n"
    test += "    assert np.allclose(candidate(1), [2, 2])\n"
    test += "    assert candidate(2)[0] == 4.0\n"
    prompt = "import numpy as np\ndef double(x):\n"
    assert run("    return np.full(2, 2.0 * x)\n", prompt=prompt, test=test) == "passed"
    assert run("    return np.full(2, 3.0 * x)\n", prompt=prompt, test=test).startswith("failed")
    test = "def check(candidate):\n    assert candidate(2) == 4 and candidate(1.5) in (3, 5)\n"
    assert run("    return np.int64(2) * x\n", prompt=prompt, test=test) == "passed"


def test_time_is_what_a_program_computes():
    """A program that has to wait for a processor is not late; one that computes too long is."""
    wait = "    import time\n    time.sleep(0.3)\n"
    with ThreadPoolExecutor() as pool:
        endless = pool.submit(run, "    while True: pass\n", timeout=0.9)
        assert run(wait + RIGHT, timeout=0.2) == "passed"
        assert endless.result() == "timed out"


def test_usable_cores_are_those_of_affinity_and_quota(tmp_path, monkeypatch):
    """Not those of the machine."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(evaluate, "Path", lambda path: tmp_path / path.rpartition("/")[2])
    assert evaluate.usable_cores() == 6
    for text, cores in (
        ("max 100000\n", 6),
        ("250000 100000\n", 3),
        ("5000 100000\n", 1),
        ("9900000 100000\n", 6),
    ):
        (tmp_path / "cpu.max").write_text(text)
        assert evaluate.usable_cores() == cores


def test_a_sandbox_that_does_not_work_is_told(monkeypatch, tmp_path):
    """One that calls all programs wrong, or right, or lacks what the problems import."""
    evaluate.check_sandbox([{**PROBLEM, "test": "import numpy as np\n" + PROBLEM["test"]}])
    prose = '"""Write f.\nimport data, then sort\n"""\nfrom __future__ import annotations\n'
    evaluate.check_sandbox([{**PROBLEM, "prompt": prose}])
    with pytest.raises(ValueError, match="from nowhere .*'failed: ModuleNotFoundError'"):
        evaluate.check_sandbox([PROBLEM, {**PROBLEM, "prompt": "from nowhere import a, b\n"}])
    broken = evaluate.RUNNER.replace("os.setsid()", "raise OSError('no setuid')")
    monkeypatch.setattr(evaluate, "RUNNER", broken)
    (tmp_path / "python").write_text("#!/bin/sh\necho no libpython.so >&2\nexit 127\n")
    (tmp_path / "python").chmod(0o755)
    for python, reason in (
        (sys.executable, "failed: OSError"),
        (str(tmp_path / "python"), "no libpython.so"),
        ("/bin/false", "not 'failed'"),
    ):
        monkeypatch.setattr(sys, "executable", python)
        with pytest.raises(ValueError, match=f"programs cannot be judged here.*{reason}"):
            evaluate.check_sandbox([PROBLEM])
    tried = []
    for result in ("passed", "failed: AssertionError"):
        monkeypatch.setattr(
            evaluate, "check_correctness", lambda *args: tried.append(args) or {"result": result}
        )
        with pytest.raises(ValueError, match="programs cannot be judged here"):
            evaluate.check_sandbox([{**PROBLEM, "prompt": prose + "import math\n"}])
    # Among the imports of other problems it would not come first, as it must.
    assert all(problem["prompt"].startswith("import math\ndef") for problem, _ in tried)


@linux
def test_root_of_a_container_without_other_users(monkeypatch, folders):
    """Where the extra user does not exist, programs are judged without one; else they are not."""
    def refuse(number):
        def chown(*_):
            raise OSError(number, "no")
        monkeypatch.setattr(os, "getuid", lambda: 0)
        monkeypatch.setattr(os, "chown", chown)

    refuse(errno.EINVAL)
    assert run(RIGHT) == "passed"
    assert run(WRONG) == "failed: AssertionError"
    refuse(errno.EPERM)
    with pytest.raises(PermissionError):
        run(RIGHT)


@linux
def test_judge_is_out_of_reach(protection):
    """The program cannot open the memory, descriptors or environment of the process that judges."""
    code = """
    seen = True
    for name in "mem", "fd", "environ":
        try:
            os.close(os.open(f"/proc/{pid}/{name}", os.O_RDONLY))
            sys.exit()
        except OSError:
            pass
assert seen
"""
    assert run(body(OTHERS + code)) == "passed"


def test_time(protection, folders):
    """A program that does not end, computing, sleeping or deaf to signals, is stopped in time."""
    deaf = "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
    deaf += "    except (OSError, ValueError): pass\n"
    start = time.time()
    with ThreadPoolExecutor(2) as pool:
        codes = body(deaf + "while True: pass"), body("import time; time.sleep(60)")
        results = list(pool.map(lambda code: run(code, timeout=0.05), codes))
    assert results == ["timed out"] * 2
    assert time.time() - start < 15


def test_endless_reply(folders):
    """A reply without end stops the judge by its limits, and the program with it."""
    code = "while True:\n    for f in range(3, 64):\n        try: os.write(f, b'N0' * 9999)\n"
    start = time.time()
    assert run(body(code + "        except OSError: pass"), timeout=0.05) in ("failed", "timed out")
    assert time.time() - start < 15


@linux
def test_descendants_die(protection):
    """Of a grandchild in a session of its own, and of many children, nothing is left in the end."""
    code = """
import time
read, write = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(write, b"!")
        time.sleep(60)
    os._exit(0)
assert os.read(read, 1) == b"!"
"""
    endings = {"": 0.5 + MARK, "\nos._exit(0)": 0.06 + MARK, "\nwhile True: pass": 0.07 + MARK}

    def judge(ending):
        lines = (code + ending).splitlines()
        program = body("if x == 2:\n" + "\n".join("    " + line for line in lines))
        return run(program, timeout=endings[ending]), processes(repr(endings[ending]))

    with ThreadPoolExecutor(3) as pool:
        passed, left, endless = pool.map(judge, endings)
    assert passed == ("passed", 0) and endless == ("timed out", 0)
    # As long as a grandchild holds the pipe of the worker, its end is not seen.
    assert left in (("failed: EOFError", 0), ("timed out", 0))


@linux
def test_judge_dies(monkeypatch):
    """If the judge itself is killed, which it is if all else fails, its worker dies with it."""
    broken = evaluate.RUNNER.replace('finish("timed out")', "os.kill(os.getpid(), 9)")
    monkeypatch.setattr(evaluate, "RUNNER", broken)
    assert run(body("import time; time.sleep(9)"), timeout=0.04 + MARK) == "failed"
    time.sleep(0.1)
    assert processes(repr(0.04 + MARK)) == 0


@linux
def test_flood(protection):
    """At most as many children as permitted can be started, and all are killed."""
    code = """
import time
started = 0
for _ in range(200):
    try:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        started += 1
    except OSError:
        break
assert started < 10
"""
    assert run(body("if x == 2:\n" + code.replace("\n", "\n    ")), timeout=2 + MARK) == "passed"
    assert processes(repr(2 + MARK)) == 0


@pytest.mark.parametrize(
    "code, expected",
    [
        ("print('x' * 2**20)\n" * 1 + "for _ in range(1000): os.write(1, b'x' * 2**20)", "passed"),
        ("def f(n): return f(n + 1)\ntry: f(0)\nexcept RecursionError: pass", "passed"),
        ("def f(n): return f(n + 1)\nf(0)", "failed: RecursionError"),
        ("input()", "failed: EOFError"),
        (
            "assert all(os.path.samestat(os.fstat(f), os.stat(os.devnull)) for f in range(3))",
            "passed",
        ),
        ("os.closerange(0, 64)", "failed"),
        ("import ctypes; ctypes.string_at(0)", "failed: EOFError"),
        ("os.abort()", "failed: EOFError"),
        ("a\0b", "failed"),
        ("s = '\ud800'", "failed: UnicodeEncodeError"),
        ("\u00fc = '\u4e2d'", "passed"),
        ("raise type('passed\\n' * 99, (Exception,), {})", "failed: passed passed"),
        ("assert not {'torch', 'numpy', 'evaluate', 'data'} & sys.modules.keys()", "passed"),
        ("import typing, hashlib, string, heapq, random, datetime, encodings.cp1252", "passed"),
    ],
)
def test_survives(code, expected, folders):
    """Odd programs get the verdict they deserve."""
    assert run(body(code)).startswith(expected)


@linux
def test_memory_and_files():
    """Memory, the size and the number of files are limited."""
    assert run(body("x = bytearray(100 * 2**30)")) == "failed: MemoryError"
    assert run(body("x = bytearray(2 * 2**30)")) == "failed: MemoryError"
    assert run(body("x = [0] * 2**33")) == "failed: MemoryError"
    assert run(body("open('f', 'wb').write(b'x' * 2**25)")) == "failed: OSError"
    assert run(body("f = [open('f', 'w') for _ in range(99)]")) == "failed: OSError"


def test_folder(protection, folders):
    """The program starts in an empty folder, its home, which goes even if sealed or emptied."""
    inside = "assert os.listdir('.') == [] and os.path.samefile('.', os.path.expanduser('~'))\n"
    inside += "import tempfile; assert os.path.samefile('.', tempfile.gettempdir())\n"
    inside += "assert set(os.environ) <= {'HOME', 'TMPDIR', 'PATH', 'LC_CTYPE', "
    inside += "'OMP_NUM_THREADS'}\nos._exit(0)"
    assert run(WRONG + inside) == "failed: EOFError"
    here = f"assert x != 2 or os.getcwd().startswith('{folders}/')\n"  # or this would do harm
    sealed = (
        here
        + "if x == 2:\n    os.makedirs('a/b'); open('a/b/c', 'w').close(); os.symlink('/', 'a/d')\n"
    )
    sealed += "    os.chmod('a/b', 0); os.chmod('a', 0); os.chmod('.', 0)"
    assert run(body(sealed)) == "passed"
    assert (
        run(body(here + "import shutil; shutil.rmtree(os.path.expanduser('~'), True)")) == "passed"
    )


def test_deep_folder(folders):
    """Folders in one another, more than Python can follow by recursion, are removed too."""
    deep = f"""
if x == 2:
    assert os.getcwd().startswith('{folders}/')
    for _ in range({sys.getrecursionlimit()}):
        os.mkdir('d')
        os.chdir('d')
"""
    assert run(body(deep)) == "passed"


@root
def test_no_harm_to_others(protection, folders):
    """Under root nothing outside of the folder can be changed, and no root's file be read."""
    (folders / "open").mkdir()
    (folders / "shut").mkdir(mode=0o700)
    for name in ("open", "shut"):
        (folders / name / "sentinel").write_text("here")
    code = f"""
import shutil
for name in "open", "shut":
    shutil.rmtree("{folders}/" + name, ignore_errors=True)
    try:
        open("{folders}/" + name + "/sentinel", "w").write("gone")
        sys.exit()
    except OSError:
        pass
try:
    open("{folders}/shut/sentinel").read()
    sys.exit()
except OSError:
    pass
assert os.getuid() and os.geteuid() and os.getgid() and not os.getgroups()
"""
    groups = os.getgroups()
    os.setgroups([4])
    try:
        assert run(body(code)) == "passed"
    finally:
        os.setgroups(groups)
    for name in ("open", "shut"):
        assert (folders / name / "sentinel").read_text() == "here"
        (folders / name / "sentinel").unlink()
        (folders / name).rmdir()


@root
@pytest.mark.skipif(
    bool(subprocess.run(["sh", "-c", "unshare -n true"], capture_output=True).returncode),
    reason="needs network namespaces",
)
def test_no_network():
    """Where the system has network namespaces, not even the machine itself can be reached."""
    with socket.socket(type=socket.SOCK_DGRAM) as udp, socket.create_server(
        ("127.0.0.1", 0)
    ) as tcp:
        udp.bind(("127.0.0.1", 0))
        send = (
            f"import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'', {udp.getsockname()})"
        )
        connect = f"import socket; socket.create_connection({tcp.getsockname()}, 1)"
        assert run(body(send)) == "failed: OSError"
        assert run(body(connect)) in ("failed: OSError", "failed: PermissionError")
        exec(send + "\n" + connect)  # which is possible outside


VARIANTS = ["all", "no namespaces", "no Landlock", "limits only"]


@pytest.fixture(scope="module")
def ordinary():
    """What an ordinary user is told, by the variant: all at the same time, each another user."""
    grandchild = body("""
import time
if x == 2 and os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)""")
    cases = {
        "right": (RIGHT, 3.0),
        "wrong": (WRONG, 3.0),
        "cheat": (CHEATS["descriptors of the judge"], 3.0),
        "loop": (body("while True: pass"), 0.05),
        "exit": ("    os._exit(0)\n", 3.0),
        "grandchild": (grandchild, 3 + MARK),
        "network": (body("import socket; socket.create_connection(('127.0.0.1', 9), 1)"), 3.0),
        "memory": (body("x = bytearray(100 * 2**30)"), 3.0),
        "sealed": (body("if x == 2: os.makedirs('a/b'); os.chmod('a', 0)"), 3.0),
        "home": (
            body(
                "import shutil; home = os.path.expanduser('~'); assert home.startswith(FOLDER)\n"
                "shutil.rmtree(home, True)"
            ),
            3.0,
        ),
        "sentinel": (body("if x == 2: os.remove(SENTINEL)"), 3.0),
        "truncate": (body("os.truncate(SENTINEL, 0)"), 3.0),
        "trace": (body("open(f'/proc/{PARENT}/mem', 'rb')"), 3.0),
        "signal": (body("os.kill(PARENT, 0)"), 3.0),
    }
    script = """
import sys, os, json, tempfile
source, problem, cases = json.load(sys.stdin)
folder = tempfile.mkdtemp()
os.mkdir(folder + "/source")
open(folder + "/source/judge.py", "w").write(source)
sys.path.insert(0, folder + "/source")
import judge  # a file: the judge reads the source of its own functions
tempfile.tempdir = folder
os.mkdir(folder + "/t")
sentinel = tempfile.mkdtemp() + "/sentinel"
open(sentinel, "w").write("here")
tempfile.tempdir = folder + "/t"
results = {}
for name, (completion, timeout) in cases.items():
    completion = completion.replace("SENTINEL", repr(sentinel)).replace("FOLDER", repr(folder))
    completion = completion.replace("PARENT", str(os.getpid()))
    results[name] = judge.check_correctness(problem, completion, timeout)["result"]
results["left"] = os.listdir(tempfile.tempdir)
results["kept"] = os.path.exists(sentinel) and open(sentinel).read() == "here"
__import__("shutil").rmtree(folder)
print(json.dumps(results))
"""
    section = pathlib.Path(evaluate.__file__).read_text()
    start = section.index("LIMITS = {")
    end = section.index("# ----", section.index("def check_correctness"))
    section = IMPORTS + section[start:end]

    def judge(variant):
        source = section
        if variant in ("no namespaces", "limits only"):
            source = without(source, "libc.unshare")
        if variant in ("no Landlock", "limits only"):
            source = without(source, "libc.syscall")
        user = 12345 + VARIANTS.index(variant)
        return subprocess.run(
            [SYSTEM_PYTHON, "-c", script],
            input=json.dumps([source, PROBLEM, cases]),
            text=True,
            capture_output=True,
            cwd="/",
            env={"PATH": os.environ["PATH"]},
            user=user,
            group=user,
            extra_groups=[],
        )

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(VARIANTS, pool.map(judge, VARIANTS)))


@root
@pytest.mark.skipif(not SYSTEM_PYTHON.exists(), reason="needs an interpreter outside of /root")
@pytest.mark.parametrize("variant", VARIANTS)
def test_ordinary_user(variant, ordinary):
    """An ordinary user gets the same verdicts, and no program outlives them or signals another."""
    done = ordinary[variant]
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["right"] == results["home"] == results["sealed"] == "passed"
    assert results["wrong"] == results["cheat"] == "failed: AssertionError"
    assert results["loop"] == "timed out"
    assert results["exit"] == "failed: EOFError"
    assert results["memory"] == "failed: MemoryError"
    assert results["left"] == []
    assert results["grandchild"] in ("passed", "failed: BlockingIOError")
    assert processes(repr(3 + MARK)) == 0
    if variant in ("all", "no namespaces") and LANDLOCK > 0:
        assert results["sentinel"] == results["truncate"] == "failed: PermissionError"
        assert results["kept"] and results["trace"] == "failed: PermissionError"
    if variant in ("all", "no namespaces") and LANDLOCK >= 6:
        assert results["network"] == "failed: PermissionError"
        assert results["signal"].startswith("failed")


def test_two_at_once():
    """Two threads can judge at the same time."""
    completions = [RIGHT, WRONG] * 6
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, completions))
    assert results == ["passed", "failed: AssertionError"] * 6
