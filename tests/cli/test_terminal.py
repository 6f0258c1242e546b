"""`neo-hf chat` in a pseudo-terminal, as a person at the keyboard sees it."""

import os
import shutil
import sys

import pytest
from helpers import ROOT
from transformers import GenerationConfig

pexpect = pytest.importorskip("pexpect")
pytestmark = pytest.mark.slow

SCENE = "a red circle at the top left, a blue square at the top right, a yellow star at the bottom left"
CTRL_C, CTRL_D, UP, TAB = "\x03", "\x04", "\x1b[A", "\t"


@pytest.fixture
def chat(tmp_path):
    """Start a chat; answers must come within five minutes, even if the machine is busy."""

    def start(model):
        environment = os.environ | {"XDG_STATE_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
        command = ["-m", "neo_hf_cli", "chat", str(model)]
        child = pexpect.spawn(
            sys.executable, command, env=environment, cwd=ROOT / "src" / "neo_hf", timeout=300, dimensions=(40, 200)
        )
        children.append(child)
        child.expect("/help")
        child.expect(">")
        return child

    children = []
    yield start
    for child in children:
        child.close(force=True)


def leave(child):
    child.send(CTRL_D)
    child.expect(pexpect.EOF)
    child.wait()
    return child.exitstatus


def test_conversation(chat):
    child = chat("nano")
    child.send("/im" + TAB)
    child.send("nano/sc" + TAB + "\r")
    child.expect("nano/scene.png goes with the next question")
    child.send("\r")  # asks nothing
    child.send("Describe the pictureX\x7f.\r")
    child.expect_exact(SCENE)
    child.send("/image none.png\r")
    child.expect("error: Cannot read the image none.png")
    child.send("/video none.mp4\r")
    child.expect("error: Cannot read the video none.mp4")
    child.expect(">")  # before, Ctrl-C would end the chat
    child.send("dropped" + CTRL_C)
    child.send("How many shapes are there?\r")
    child.expect_exact("3\r\n")
    child.send("/clear\r")
    child.expect("starts over")
    child.send("/help\r")
    child.expect("/video PATH")
    assert leave(child) == 0

    child = chat("nano")
    child.send(UP * 2 + "\r")  # past /help, of the chat before
    child.expect("starts over")
    child.send("/exit\r")
    child.expect(pexpect.EOF)


def test_ctrl_c_stops_an_answer(chat, hub_folder, tmp_path):
    """A random model goes on and on, as it may not end its answer."""
    folder = shutil.copytree(hub_folder, tmp_path / "neo")
    GenerationConfig.from_pretrained(folder, min_new_tokens=4096).save_pretrained(folder)
    child = chat(folder)
    for _ in range(2):
        child.send("Go on!\r")
        child.expect("Go on!")
        for _ in range(20):  # well into the answer
            child.expect("[^\x00-\x7f]")
        child.send(CTRL_C)
        child.expect_exact("(stopped)")
        child.expect(">")
    assert leave(child) == 0
