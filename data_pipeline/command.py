"""What all commands have in common: a user's mistake is one line and exit status 2, Ctrl-C one line and 130.

Here because this room imports no other; standard library alone, for login nodes.
"""

import functools
import os
import sys

USER_ERROR, INTERRUPTED = 2, 130  # what argparse exits with; what a shell calls a process that SIGINT ended


def command_line(remark: str = "", also: tuple[type[Exception], ...] = ()):
    """Make `main(argv)` a command: it raises ValueError or OSError (`also`: others) for what the user can mend.

    `remark` says after Ctrl-C how things stand. None from the function is status 0.
    """

    def decorate(main):
        @functools.wraps(main)
        def told(argv: list[str] | None = None) -> int:
            try:
                return main(argv) or 0
            except BrokenPipeError:  # the reader has seen enough: `... | head`
                os.dup2(
                    os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
                )  # or the interpreter complains at its end
                return 0
            except (ValueError, OSError, *also) as error:
                print(f"error: {error}", file=sys.stderr)
                return USER_ERROR
            except KeyboardInterrupt:
                print(f"stopped; {remark}" if remark else "stopped", file=sys.stderr)
                return INTERRUPTED

        return told

    return decorate
