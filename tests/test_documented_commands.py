"""Every command that the documentation shows is one: its module takes the options, its config the keys that are written.

What is tested is the way to the end of argparse, with the real parsers; what the commands then do, their own tests say.
"""

import argparse
import importlib
import re
import shlex

import pytest

from tests.test_layout import FILES, ROOT
from trainer import config

TEXTS = ["README.md", "CONTRIBUTING.md", "docs/*.md", "cluster/monitoring/README.md", "configs/**/*.yaml"]
# python -m room.module WORDS, also behind torchrun, and python cluster/file.py WORDS: to the end of the line or of `code`
COMMAND = re.compile(
    r"(?:(?:python|torchrun [^`\n]*?) -m |python )((?:trainer|cluster|data_pipeline|models)[./][\w./]*)([^`\n#;]*)"
)
PARSERS = ("parse_args", "parse_known_args", "parse_intermixed_args", "parse_known_intermixed_args")


class Parsed(Exception):
    """The end of argparse was reached."""


def documented() -> dict[tuple[str, str], str]:
    """Return (module, words) -> the place that shows it."""
    found = {}
    for path in [*(path for pattern in TEXTS for path in sorted(ROOT.glob(pattern))), *FILES]:
        text = re.sub(r"\\\n\s*#?", " ", path.read_text())  # continued lines
        for line in text.splitlines():
            if path.suffix == ".py" and not line.startswith(("    python ", '"""')):
                continue  # of programs: what their docstrings show
            for module, words in COMMAND.findall(line):
                name = module.removesuffix(".py").replace("/", ".")
                if name != "cluster.requeue":  # inside a job only
                    found.setdefault((name, _tidy(words)), str(path.relative_to(ROOT)))
    return found


def _tidy(words: str) -> str:
    words = re.sub(r"\[[^\]]*\]|\.\.\.", " ", words).rstrip(" .,:)'")  # how usage is written: [optional] and ...
    return words if words.count('"') % 2 == 0 else words.rstrip('"')


COMMANDS = documented()


def test_there_are_commands():
    assert len(COMMANDS) > 50 and len({module for module, _ in COMMANDS}) > 25


@pytest.mark.parametrize(("module", "words"), COMMANDS, ids=lambda value: value.strip()[:60])
def test_a_documented_command_parses(module, words, monkeypatch, capsys):
    originals = {name: getattr(argparse.ArgumentParser, name) for name in PARSERS}
    for name, original in originals.items():

        def parse(self, *args, _original=original, **how):
            for name, inner in originals.items():  # they call each other
                monkeypatch.setattr(argparse.ArgumentParser, name, inner)
            raise Parsed(_original(self, *args, **how))

        monkeypatch.setattr(argparse.ArgumentParser, name, parse)
    main = importlib.import_module(module).main
    try:
        main(shlex.split(words))
    except Parsed as parsed:
        options = parsed.args[0]
        if str(getattr(options, "config", "")).startswith("configs/"):
            config.load(ROOT / options.config, options.overrides)
    except SystemExit as left:
        prose = not words and left.code == 2  # a command mentioned by its name
        assert left.code == 0 or prose, f"{COMMANDS[module, words]}: {capsys.readouterr().err}"
