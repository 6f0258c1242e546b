"""
`neo-hf web`: a page to chat with a model, show it live video and look at what it sees. Needs Gradio (extra `web`).

`page.py` lays out the page, `sessions.py` keeps what each person has, `conversation.py` and `live.py` are what they
have, and `media.py` reads what they send.
"""

try:
    import gradio  # noqa: F401
except ImportError as error:
    raise ImportError("The web page needs Gradio: pip install 'neo-hf[web]'.") from error

from neo_hf.web.page import Page

__all__ = ["Page"]
