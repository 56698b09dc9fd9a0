"""Runs the ``proxytune`` command within a test."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from proxytune_kernels.cli.app import app


def invoke(*arguments: Any, stdin: str = "", **env: str) -> Any:
    result = CliRunner().invoke(app, [*map(str, arguments)], input=stdin, env=env)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def assert_fails(result: Any, code: int, *words: str) -> None:
    """Check the exit code, and that standard error alone says what is wrong."""
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def assert_one_sentence(result: Any, code: int, *words: str, logs: bool = False) -> None:
    """Check that a mistake is one line; ``logs`` lets what libraries log stand before it."""
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.stderr.splitlines()[-1:] == errors
    assert all(word in errors[0] for word in words)
    assert logs or result.stderr.count("\n") == 1
