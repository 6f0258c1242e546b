import pytest

pytest.importorskip("gradio", reason="needs Gradio: make test-web, or pip install 'neo-hf[web]'")

from neo_hf import load_nano
from neo_hf.web import Page


@pytest.fixture(scope="session")
def nano():
    return load_nano()


@pytest.fixture(scope="session")
def page(nano):
    """A page with NEO-nano that is being served."""
    page = Page({"nano": nano}, frame_side=64)
    _, page.url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield page
    page.blocks.close()
