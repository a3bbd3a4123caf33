"""One process of a search that `launch.py` starts: it mends KerasTuner once the script has imported it.

It is run by its path, since `-m` would import kopt, and with it Keras, before the script can choose Keras's backend.
"""

import ctypes
import importlib.abc
import importlib.util
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path


def die_with(launcher: int):
    """Have the kernel end this process when the launcher ends, in whatever way it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != launcher:
        sys.exit("The launcher has ended.")


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function after a module has been imported."""

    def __init__(self, name: str, then: Callable[[], None]):
        self.name, self.then = name, then

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec:
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (run(module), self.then())
        return spec


def mend_worker():
    """A worker wipes no project, and opens one only when the chief, which may wipe it, has done so."""
    from kopt.tuner import mends

    def keep(project: str, overwrite: bool) -> bool:
        address = os.environ["KERASTUNER_ORACLE_IP"], int(os.environ["KERASTUNER_ORACLE_PORT"])
        while True:
            try:
                socket.create_connection(address).close()
            except OSError:
                time.sleep(0.1)
            else:
                return False

    mends.around_new_tuners(keep, mends.outlast_chief)


def mend_chief(launch: str, workers: int):
    """A chief wipes a project once in a launch, however often it is started, and ends when all workers have."""
    from kopt.tuner import mends

    def again(project: str) -> bool:
        mark = Path(project, "launch.txt")
        return mark.exists() and mark.read_text() == launch

    def adopt(tuner):
        if again(tuner.project_dir) and tuner.oracle.trials:
            mends.leave_trials_to_workers(tuner.oracle)
            mends.restore_grid(tuner.oracle)
        Path(tuner.project_dir, "launch.txt").write_text(launch)
        mends.serve_until(lambda: os.read(workers, 1))

    mends.stop_after_failures()
    mends.around_new_tuners(lambda project, overwrite: overwrite and not again(project), adopt)


def main(launcher: str, launch: str, script: str, *arguments: str):
    die_with(int(launcher))
    workers = os.dup(0)  # the launcher closes it when all workers have ended
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    chief = os.environ["KERASTUNER_TUNER_ID"] == "chief"
    mend = (lambda: mend_chief(launch, workers)) if chief else mend_worker
    sys.meta_path.insert(0, AfterImport("keras_tuner", mend))
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.abspath(script))
    sys.path.append(str(Path(__file__).parents[2]))  # kopt, where it is not installed
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
