"""Commands that must come to an end."""

import os
import signal
import subprocess
import tempfile


def run_limited(command, seconds, cwd=None, env=None):
    """Run command, and kill it and all that it started after so many seconds.

    Returns (returncode, lines of its output and errors); the returncode is None if it was killed.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as log:  # a pipe outlives the command in
        process = subprocess.Popen(  # processes that it leaves
            command, cwd=cwd, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            returncode = process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            returncode = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        return returncode, log.read().splitlines()
