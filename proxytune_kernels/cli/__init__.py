"""The ``proxytune`` command."""

import signal
import sys

from proxytune_kernels import leave


def main() -> None:
    """Run the command line: see :func:`proxytune_kernels.cli.app.main`."""
    try:
        from proxytune_kernels.cli import app  # takes seconds

        if signal.getsignal(signal.SIGINT) is leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        app.main()
    except KeyboardInterrupt:
        sys.exit(130)
