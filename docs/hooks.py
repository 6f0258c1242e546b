"""What the site does to pages and docstrings, which are written to be read on GitHub and in an editor."""

import re
import shutil
import textwrap
from pathlib import Path

import griffe

WEB = Path(__file__).parents[1] / "web"
# What NEO-nano's page in the browser consists of. `make browser` fetches the packages and exports the model.
PAGE = (
    "*.html",
    "*.css",
    "*.js",
    "node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs",
    "node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
    "node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
    "model/*.json",
    "model/scene.png",
    "model/onnx/model.onnx",
)
FRAME = '<iframe class="nano" src="nano/" title="NEO-nano in the browser" allow="camera" loading="lazy"></iframe>'


def on_page_markdown(markdown, page, config, files):
    """MkDocs: relative links out of docs/ become links to GitHub; NEO-nano's page is shown if it is built."""
    markdown = markdown.replace("<!-- nano -->", FRAME if copies() else "")
    return re.sub(r"\]\(\.\./(?!\.)([^)]+)\)", rf"]({config.repo_url}/blob/main/\1)", markdown)


def on_post_build(config):
    """MkDocs: copy NEO-nano's page."""
    for file in copies():
        target = Path(config.site_dir) / "nano" / file.relative_to(WEB)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def copies():
    """The files of NEO-nano's page; none if some are missing, as where there is no npm."""
    found = [sorted(WEB.glob(pattern)) for pattern in PAGE]
    return [file for files in found for file in files] if all(found) else []


class TransformersArguments(griffe.Extension):
    """mkdocstrings: lists of arguments as Transformers checks them, at the margin, are sections of their own."""

    def on_instance(self, *, obj, **kwargs):
        heading = re.compile(r"^([\w, ]+ \()(`.*)(\):)$", flags=re.MULTILINE)  # name (`type`, *optional*):
        if obj.docstring and (first := heading.search(obj.docstring.value)):
            text, start = obj.docstring.value, first.start()
            arguments = heading.sub(lambda match: match[1] + re.sub("[`*]", "", match[2]) + match[3], text[start:])
            obj.docstring.value = f"{text[:start]}Args:\n{textwrap.indent(arguments, '    ')}"
