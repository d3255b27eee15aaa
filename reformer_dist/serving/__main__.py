"""The command `reformer-serve`: a trained model behind the protocol of OpenAI's API."""

from __future__ import annotations

import argparse
import ipaddress
import math
import os
import signal
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from reformer_dist.config import TaskKind
from reformer_dist.errors import ConfigError
from reformer_dist.inference.continuation import CollectedTexts, Prompt, generate_texts, text_options
from reformer_dist.process import signals
from reformer_dist.process.command import run_command
from reformer_dist.process.version import add_version
from reformer_dist.run.pretrained import LoadedModel, add_weight_choice, load_model, weight_choice
from reformer_dist.serving.chat import ChatTemplate

API_KEY = "REFORMER_API_KEY"
SPARE_CONNECTIONS = 100  # beyond those of texts: of other paths, and idle ones
INSTALL = "pip install 'reformer_dist[serve]'"
EPILOG = f"""\
A client needs the environment's {API_KEY} as its key if that is set.
example: reformer-serve outputs/quickstart --port 8000
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reformer-serve",
        description="Serves a trained model: OpenAI's completions and chat, /v1/models, /health and /metrics.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    add = parser.add_argument
    add("run", type=Path, help="a run directory (its newest checkpoint), a checkpoint or an export")
    add("overrides", nargs="*", metavar="key=value", help="such as model.n_hashes=8")
    add_weight_choice(parser)
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=int, default=8000, metavar="N", help="0: any that is free (default: 8000)")
    add("--max-streams", type=int, default=64, metavar="N", help="texts generated at a time (default: 64)")
    add("--max-queue", type=int, default=256, metavar="N", help="texts that wait for a stream (default: 256)")
    add("--max-tokens", type=int, default=4096, metavar="N", help="new tokens of a text at most (default: 4096)")
    context = "tokens of a prompt and its continuation at most (default: 131072, or the model's positions)"
    add("--max-context", type=int, default=131072, metavar="N", help=context)
    prefixes = "memory of the states of cached_prefix (default: 1073741824)"
    add("--prefix-cache", type=int, default=2**30, metavar="BYTES", help=prefixes)
    add("--max-body", type=int, default=2**24, metavar="BYTES", help="of a request (default: 16777216)")
    timeout = "for a client to send a request, or to read what was sent to it (default: 60)"
    add("--client-timeout", type=float, default=60.0, metavar="SECONDS", help=timeout)
    grace = "after SIGTERM, for texts in progress (default: 30)"
    add("--grace", type=float, default=30.0, metavar="SECONDS", help=grace)
    template = "text of a chat message, with {role} and {content}; without it, chat takes one message of a user"
    add("--chat-template", metavar="TEXT", help=template)
    return parser


def run_server(arguments: argparse.Namespace) -> None:
    """Validates the options, loads the model and serves it until a signal. Raises UserError."""
    _check(arguments)
    api_key = os.environ.get(API_KEY)
    if api_key is not None and not (
        api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key
    ):
        raise ConfigError(f"{API_KEY}: must be printable ASCII without spaces; unset it to serve without a key")
    template = None if arguments.chat_template is None else ChatTemplate(arguments.chat_template)
    listener = _listen(arguments.host, arguments.port)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(arguments.run, arguments.overrides, device, weight_choice(arguments))
    _try(loaded)
    with listener:
        _serve(loaded, listener, arguments, api_key, template)


def _serve(
    loaded: LoadedModel,
    listener: socket.socket,
    arguments: argparse.Namespace,
    api_key: str | None,
    template: ChatTemplate | None,
) -> None:
    import uvicorn

    from reformer_dist.serving.app import Server, ServerOptions
    from reformer_dist.serving.connection import connection_class
    from reformer_dist.serving.engine import Engine
    from reformer_dist.serving.metrics import Metrics
    from reformer_dist.serving.protocol import RequestLimits

    metrics = Metrics()
    engine = Engine(
        loaded,
        metrics,
        max_streams=arguments.max_streams,
        max_queue=arguments.max_queue,
        prefix_bytes=arguments.prefix_cache,
    )
    options = ServerOptions(
        RequestLimits(arguments.max_streams, arguments.max_tokens),
        arguments.max_context,
        arguments.max_body,
        arguments.client_timeout,
        api_key,
        template,
    )
    name = arguments.run.resolve().name
    config = uvicorn.Config(
        Server(loaded, name, engine, metrics, options).app,
        http=connection_class(arguments.client_timeout),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=arguments.max_streams + arguments.max_queue + SPARE_CONNECTIONS,
        timeout_graceful_shutdown=math.ceil(arguments.grace),
    )
    engine.start()
    _announce(name, listener, api_key)
    with signals.handling([signal.SIGTERM], lambda *_: None):  # uvicorn ends at it, and then raises it again
        uvicorn.Server(config).run(sockets=[listener])
    engine.stop()


def _announce(name: str, listener: socket.socket, api_key: str | None) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    sys.stdout.write(f"serving {name} at http://{shown}:{port}/v1\n")
    sys.stdout.flush()
    if api_key is None and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        sys.stderr.write(
            f"warning: {host} is reached from other machines, and {API_KEY} is not set: no key is asked\n"
        )


def _check(arguments: argparse.Namespace) -> None:
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise ConfigError(f"reformer-serve: its web library is not installed; {INSTALL}")
    for name, least in (
        ("max-streams", 1),
        ("max-queue", 0),
        ("max-tokens", 1),
        ("max-context", 2),
        ("max-body", 1),
        ("prefix-cache", 0),
        ("client-timeout", 0.001),
        ("grace", 0),
    ):
        value = getattr(arguments, name.replace("-", "_"))
        if not least <= value < math.inf:
            raise ConfigError(f"--{name} {value}: must be at least {least}")
    if not 0 <= arguments.port < 2**16:
        raise ConfigError(f"--port {arguments.port}: must be 0 to 65535")


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that a port in use is reported before the model is loaded. Raises ConfigError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"--host {host} --port {port}: can't be listened on ({reason})") from error


def _try(loaded: LoadedModel) -> None:
    """Generates a token, so that a model that can't is refused here; also compiles kernels. Raises UserError."""
    prompt = b"a" if loaded.config.task.kind is TaskKind.sequence_to_sequence else b""
    options = text_options(max_new_tokens=1, temperature=0)
    generate_texts(loaded, [Prompt("--prompt", prompt)], options, CollectedTexts(1))


def main() -> None:
    run_command(lambda: run_server(build_parser().parse_intermixed_args()))


if __name__ == "__main__":
    main()
