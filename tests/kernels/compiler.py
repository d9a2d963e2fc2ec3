"""A second process, in which kernels are compiled for GPUs that need not be there: one for all the tests of a session.

Whether Triton interprets a kernel or compiles it is settled where the kernel is defined, and tests interpret. To start
a process takes seconds; with that behind it a kernel takes a fraction of one.

As a script it reads lines of JSON, [module, function, arguments], and answers each by [result, null] or [null, error].
"""

import atexit
import importlib
import json
import os
import subprocess
import sys
import traceback
from typing import Any

_process: subprocess.Popen[str] | None = None


def call_in_compiler(module: str, function: str, *arguments: Any) -> Any:
    """`module.function(*arguments)` where kernels are compiled; arguments and result are what JSON can hold."""
    global _process
    if _process is None:
        environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        _process = subprocess.Popen([sys.executable, __file__], env=environment, text=True, **pipes)
    assert _process.stdin is not None
    assert _process.stdout is not None
    try:
        _process.stdin.write(json.dumps([module, function, arguments]) + "\n")
        _process.stdin.flush()
        answer = _process.stdout.readline()
        result, error = json.loads(answer)
    except BaseException:  # a time limit among them: what is still to be answered must not answer the next question
        _stop()
        raise
    assert error is None, error
    return result


@atexit.register
def _stop() -> None:
    global _process
    if _process is not None:
        _process.kill()
        _process.communicate()
        _process = None


def _main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        module, function, arguments = json.loads(line)
        try:
            answer = [getattr(importlib.import_module(module), function)(*arguments), None]
        except Exception:
            answer = [None, traceback.format_exc()]
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _main()
