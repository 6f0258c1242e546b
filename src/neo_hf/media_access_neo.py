"""What a server's clients may name as an image or a video: `allowed_media` of the processor."""

import base64
import ipaddress
import os
import socket
from collections.abc import Collection

from huggingface_hub import get_session

MEDIA_KINDS = ("path", "url", "data")
MAX_REDIRECTS = 10
MAX_BYTES = 256 * 2**20


def admit_media(media, allowed: Collection[str]):
    """
    Images or videos, nested in lists or not, if they are of the kinds allowed. URLs are downloaded here, where each
    redirect and the size are checked.

    Raises:
        ValueError: if a medium is of another kind, its host has an address that is not public, or it is larger than
            `MAX_BYTES`.
    """
    if isinstance(media, (list, tuple)):
        return [admit_media(medium, allowed) for medium in media]
    if not isinstance(media, (str, os.PathLike)):
        return media
    source = os.fspath(media)
    if source.startswith(("http://", "https://")):
        kind = "url"
    elif source.startswith("data:"):
        kind = "data"
    else:
        kind = "data" if _is_base64(source) else "path"
    if kind not in allowed:
        raise ValueError(
            f"The medium {source[:100]!r} is a {kind}; allowed_media permits {', '.join(allowed) or 'none'}."
        )
    if kind == "url":
        source = f"data:;base64,{base64.b64encode(_download(source)).decode()}"
    elif kind == "data" and not source.startswith("data:"):
        source = f"data:;base64,{source}"  # or it could still be taken for a path
    return source


def _is_base64(source: str) -> bool:
    try:
        return len(source) >= 200 and bool(
            base64.b64decode("".join(source.split()), validate=True)
        )  # as in load_image
    except ValueError:
        return False


def _download(url: str) -> bytes:
    """What is at a public address. Each redirect is checked like the URL itself."""
    session = get_session()
    request = session.build_request("GET", url, timeout=60)
    for _ in range(MAX_REDIRECTS):
        # Connects to the address that was checked: looked up once more, the name could have another.
        host, request.url = request.url.host, request.url.copy_with(host=_public_address(request.url.host))
        request.extensions["sni_hostname"] = host
        response = session.send(request, stream=True, follow_redirects=False)
        try:
            if not response.is_redirect:
                return _read(response.raise_for_status(), url)
            location = request.url.copy_with(host=host).join(response.headers["Location"])
        finally:
            response.close()
        request = session.build_request("GET", location, timeout=60)
    raise ValueError(f"Cannot download {url:.200}: more than {MAX_REDIRECTS} redirects.")


def _read(response, url: str) -> bytes:
    content = bytearray()
    for chunk in response.iter_bytes():
        content += chunk
        if len(content) > MAX_BYTES:
            raise ValueError(f"Cannot download {url:.200}: it is larger than {MAX_BYTES:,} bytes.")
    return bytes(content)


def _public_address(host: str) -> str:
    """The address of a host, all of whose addresses must be public."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"Cannot find the host {host!r}: {error}") from error
    for *_, address in found:
        ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
        if not ip.is_global or ip.is_multicast:
            raise ValueError(f"The host {host!r} has the address {ip}, which is not public; allowed_media forbids it.")
    return str(found[0][-1][0])
