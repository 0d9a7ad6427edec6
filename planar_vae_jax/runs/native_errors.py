"""What C++ writes on stderr in a run of several processes, passed on by a process of its own.

Where one process has ended, JAX's runtime ends the others, from a thread of its own and with pages of text; only
another process can then say in one line what that means. :mod:`planar_vae_jax.runs.processes` starts this file as a
script: lines from stdin go to stdout until the runtime begins to tell, and then, at the end, the text that last came
after a zero byte.
"""

import re
import signal
import sys

NOISE = re.compile(
    rb"coordination_service|distributed service|preemption_sync_manager|client\.h:\d+\]|DistributedRuntime"
)


def main() -> None:
    """Until the other end closes."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    text, quiet = b"", False
    for line in sys.stdin.buffer:
        line, told, what = line.partition(b"\0")
        text = what if told else text
        quiet = quiet or NOISE.search(line) is not None
        if line and not quiet and b"[Gloo]" not in line:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
    if quiet and text.strip():
        sys.stdout.buffer.write(b"\nerror: " + text)


if __name__ == "__main__":
    main()
