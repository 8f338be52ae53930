"""`mmoe demo`: opens the gallery in a browser, on this machine only unless told otherwise."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from mmoe.errors import BadInput

if TYPE_CHECKING:
    import gradio as gr

PORT, TRIED = 7860, 100


def demo(
    name: Annotated[str | None, typer.Argument(help="Model or family to show first.", show_default=False)] = None,
    port: Annotated[
        int | None, typer.Option(help=f"Port; {PORT} or the next free one by default.", min=1, max=65535)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    share: Annotated[bool, typer.Option("--share", help="Ask gradio for a public address for a week.")] = False,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the address and open nothing.")] = False,
) -> None:
    """Open the gallery in a browser: try models, see their routing, switch experts off.

    Stop it with Ctrl-C. Without a network everything works but models whose weights have to be downloaded.

    Args:
        name: model or family that is shown first.
        port: explicit ports have to be free.
        host: address to listen on.
        share: opens a tunnel through gradio's servers.
        no_browser: opens nothing.
    """
    if name is not None:
        _check_name(name)
    port = free_port(host) if port is None else free_port(host, port, tried=1)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for ending in (signal.SIGINT, signal.SIGTERM):  # a shell's background job starts with SIGINT ignored
        signal.signal(ending, signal.default_int_handler)
    with _own_temporary_folder():
        app, url = serve(name, host=host, port=port, share=share)
        with contextlib.suppress(KeyboardInterrupt):
            typer.echo(f"The gallery runs at {url}   (Ctrl-C stops it)")
            if share and app.share_url:
                typer.echo(f"Anyone with this address can use it: {app.share_url}")
            if not no_browser and _has_screen():
                import webbrowser

                webbrowser.open(url)
            threading.Event().wait()
        app.close(verbose=False)
        typer.echo("\nstopped")


def serve(name: str | None, *, host: str, port: int, share: bool = False) -> tuple[gr.Blocks, str]:
    """Starts the server in the background; returns the gallery and its address."""
    from demos.app import build, launch_options
    from demos.store import ModelStore

    local = host in ("127.0.0.1", "localhost", "::1") and not share
    app = build(name, store=ModelStore(allow_download=local))
    try:
        _, url, _ = app.launch(
            server_name=host, server_port=port, share=share, prevent_thread_lock=True, **launch_options()
        )
    except OSError as error:
        raise BadInput(f"cannot listen on {host}, port {port}", str(error), "mmoe demo --host 127.0.0.1") from error
    return app, url.replace("://0.0.0.0", "://127.0.0.1")


def free_port(host: str, first: int = PORT, tried: int = TRIED) -> int:
    """The first port from `first` on that nobody listens on.

    Raises:
        BadInput: none of them is free, or the address is not one of this machine.

    >>> free_port("127.0.0.1") >= PORT
    True
    """
    refused = False
    for port in range(first, min(first + tried, 65536)):
        try:
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
            return port
        except OSError as error:
            refused = error.errno == errno.EACCES
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                reason = error.strerror or str(error)
                raise BadInput(f"cannot listen on {host}", reason, "mmoe demo --host 127.0.0.1") from error
    taken = "the port is taken" if tried == 1 else f"ports {first} to {first + tried - 1} are taken"
    wrong = "this user may not open it" if refused else taken
    other = PORT if refused else min(first + tried, 65535)
    raise BadInput(f"cannot listen on {host}, port {first}", wrong, f"mmoe demo --port {other}")


def _check_name(name: str) -> None:
    """Fails on an unknown name before anything heavy is imported."""
    import zoo

    if name not in {card.family for card in zoo.list_models()}:
        zoo.card(name)


def _has_screen() -> bool:
    """False in CI and where a browser would open in the terminal or nowhere."""
    if os.environ.get("CI", "").lower() in ("1", "true", "yes"):
        return False
    desktop = sys.platform in ("darwin", "win32")
    return desktop or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


@contextlib.contextmanager
def _own_temporary_folder() -> Iterator[None]:
    """Uploads go to a folder that is removed at the end, unless GRADIO_TEMP_DIR names one."""
    if "GRADIO_TEMP_DIR" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="mmoe-demo-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield
        finally:
            os.environ.pop("GRADIO_TEMP_DIR", None)
