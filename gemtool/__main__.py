"""`gemtool` and `python -m gemtool` begin here: signals first, then the command line."""

from __future__ import annotations

import signal

# Until there is a handler, Ctrl-C ends the process, as it ends any other program: no traceback.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from gemtool import signals


def main() -> None:
    """Entry point of the `gemtool` command."""
    signals.install()
    from gemtool.cli import main

    main()


if __name__ == "__main__":
    main()
