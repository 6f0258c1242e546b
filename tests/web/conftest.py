import pytest

from neo_hf import load_nano


@pytest.fixture(scope="session")
def nano():
    return load_nano()


@pytest.fixture(scope="session")
def page(nano):
    """A page with NEO-nano that is being served."""
    from neo_hf.web import Page

    # Each test is a person, and places are taken for a minute at least.
    page = Page({"nano": nano}, frame_side=64, max_sessions=64)
    _, page.url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield page
    page.blocks.close()
