"""What make hands to the command."""

import subprocess

import pytest

from scripts.archive import ROOT


@pytest.mark.parametrize("target", ["predict", "demo"])
@pytest.mark.parametrize("text", ["My dog is cute", """He said "it's $5" and `so on` $(and on) \\ %s"""])
def test_a_text_reaches_the_command_as_it_was_written(target, text):
    printed = "RUN=printf '%s\\0'"
    command = ["make", "--no-print-directory", target, "READY=", printed, f"TEXT={text}"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.split("\0")[-3:-1] == ["--text", text]
