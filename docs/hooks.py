"""What the site does to pages and docstrings, which are written to be read on GitHub and in an editor."""

import re
import textwrap

import griffe


def on_page_markdown(markdown, page, config, files):
    """MkDocs: relative links to files outside docs/ become links to GitHub."""
    return re.sub(r"\]\(\.\./(?!\.)([^)]+)\)", rf"]({config.repo_url}/blob/main/\1)", markdown)


class TransformersArguments(griffe.Extension):
    """mkdocstrings: lists of arguments as Transformers checks them, at the margin, are sections of their own."""

    def on_instance(self, *, obj, **kwargs):
        heading = re.compile(r"^([\w, ]+ \()(`.*)(\):)$", flags=re.MULTILINE)  # name (`type`, *optional*):
        if obj.docstring and (first := heading.search(obj.docstring.value)):
            text, start = obj.docstring.value, first.start()
            arguments = heading.sub(lambda match: match[1] + re.sub("[`*]", "", match[2]) + match[3], text[start:])
            obj.docstring.value = f"{text[:start]}Args:\n{textwrap.indent(arguments, '    ')}"
