"""Every command tells a user's mistake in one line and exits with 2, leaves after Ctrl-C with 130, and bears a reader that goes."""

import ast
import subprocess
import sys

import pytest

from data_pipeline.command import command_line
from tests.test_layout import FILES, ROOT

# what is no command of a user's: it runs in a job, or ends with statuses of its own
OTHERS = {
    "cluster/encode_task.py",
    "cluster/preflight.py",
    "cluster/requeue.py",
    "models/import_edm2.py",  # imports no other room
    "trainer/metrics_table.py",  # takes no arguments
    "trainer/train.py",
}


class Unforeseen(Exception):
    pass


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (None, 0, ""),
        (ValueError("--steps 0: must be at least 1"), 2, "error: --steps 0: must be at least 1\n"),
        (FileNotFoundError(2, "No such file", "x.yaml"), 2, "error: [Errno 2] No such file: 'x.yaml'\n"),
        (ZeroDivisionError("by zero"), 2, "error: by zero\n"),
        (KeyboardInterrupt(), 130, "stopped; nothing was written\n"),
    ],
)
def test_what_is_raised_is_a_line_and_a_status(raised, status, said, capsys):
    @command_line("nothing was written", also=(ZeroDivisionError,))
    def main(argv=None):
        """Do it."""
        if raised:
            raise raised

    assert main() == status and main.__doc__ == "Do it."
    assert capsys.readouterr().err == said


def test_an_error_of_ours_keeps_its_traceback():
    @command_line()
    def main(argv=None):
        raise Unforeseen

    with pytest.raises(Unforeseen):
        main()


def test_a_reader_that_has_seen_enough_is_no_error():
    program = "import sys\nfrom data_pipeline.command import command_line\n"
    program += "@command_line()\ndef main(argv=None):\n    for i in range(10**6): print(i)\nsys.exit(main())"
    child = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout.readline() == b"0\n"
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait(60) == 0


def test_every_command_is_one():
    commands, plain = set(), set()
    for path in FILES:
        tree = ast.parse(path.read_text())
        if any(isinstance(n, ast.If) and "__name__ == '__main__'" in ast.unparse(n.test) for n in tree.body):
            marks = [ast.unparse(d) for n in tree.body if getattr(n, "name", "") == "main" for d in n.decorator_list]
            (commands if any("command_line" in m for m in marks) else plain).add(str(path.relative_to(ROOT)))
    assert plain == OTHERS and len(commands) > 25
