"""Commands in processes of their own, some to be killed at a moment that was meant; and what runs below a process."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor

import psutil
import torch

from sparsesoup.cli.main import main
from sparsesoup.runs.progress import ProgressLogger

FORKS = multiprocessing.get_context("forkserver")  # a real process each, without four seconds of imports
FORKS.set_forkserver_preload(["sparsesoup.runs.run"])


def _run_command(words, code, cwd, environment, out, errors):
    """In a process of FORKS: become the command, as far as it can see, and leave with its exit code."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    os.dup2(out.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    sys.argv, names, result = ["sparsesoup", *words], {}, 1
    try:
        exec(code, names)
        result = names["main"]()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(result)


def _append_to(path, words, code, environment):
    """In a process of FORKS: become the command; what it says is added to a file."""
    with open(path, "a", encoding="utf-8") as said:
        _run_command(words, code, os.path.dirname(path), environment, said, said)


class ForkedCommand:
    """The command line in a process that has its imports already, with the calls of `subprocess.Popen`."""

    def __init__(self, words, code, environment, said):
        self.process = FORKS.Process(target=_append_to, args=(os.path.abspath(said), words, code, environment))
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout):
        self.process.join(timeout)
        return self.process.exitcode


def _text(end):
    with os.fdopen(os.dup(end.fileno()), encoding="utf-8") as file:
        return file.read()


def run_command(words, code, cwd, environment):
    """As `subprocess.run` of the command line; `code` sets its process up and gives it `main`."""
    (out, out_end), (errors, errors_end) = FORKS.Pipe(duplex=False), FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_run_command, args=(words, code, str(cwd), environment, out_end, errors_end))
    process.start()
    out_end.close()
    errors_end.close()
    with ThreadPoolExecutor() as pool:
        said = list(pool.map(_text, (out, errors)))
    process.join(120)
    return subprocess.CompletedProcess(words, process.exitcode, *said)


def slowly(line, errors):
    """The command line in a process of its own, slowed down so that a kill hits the moment that was meant."""
    plain = ProgressLogger.step

    def step(self, record):
        plain(self, record)
        if record:
            time.sleep(0.03)

    ProgressLogger.step = step
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
    torch.set_num_threads(1)
    with open(errors, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 2)
        os._exit(main(line))


def start_command(line, folder):
    """The process that runs this command, and where its errors go."""
    folder.mkdir(parents=True, exist_ok=True)
    errors = folder / "errors.txt"
    process = FORKS.Process(target=slowly, args=(line, str(errors)))
    process.start()
    return process, errors


def wait_until(process, happened):
    """Wait until something has happened, or the process has ended."""
    last = time.monotonic() + 100
    while process.is_alive() and not happened() and time.monotonic() < last:
        time.sleep(0.002)


def kill_after(line, out, after):
    """Start the command, kill it without warning once its log has `after` lines; how it ended."""
    process, errors = start_command(line, out.parent)
    wait_until(process, lambda: sum(log.read_bytes().count(b"\n") for log in out.glob("*/*/seed-*/log.jsonl")) >= after)
    process.kill()
    process.join(100)
    assert "sparsesoup:" not in errors.read_text()
    return process.exitcode


def children(pid):
    """The process ids of all that runs below a process."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def command_of(pid):
    """The words of a process's command line, or nothing once it has ended."""
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""
