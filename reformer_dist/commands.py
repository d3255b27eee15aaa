"""Entry points of the installed commands: call `main`, which imports PyTorch."""

from __future__ import annotations

from importlib import import_module

from reformer_dist.process.signals import exit_on_interrupt


def train() -> None:
    from reformer_dist.train import main

    main()


def _run_main(module: str) -> None:
    with exit_on_interrupt():
        main = import_module(module).main
    main()


def evaluate() -> None:
    _run_main("reformer_dist.evaluate")


def generate() -> None:
    _run_main("reformer_dist.generate")


def predict() -> None:
    _run_main("reformer_dist.predict")


def convert() -> None:
    _run_main("reformer_dist.convert")


def doctor() -> None:
    _run_main("reformer_dist.doctor.__main__")


def checkpoints() -> None:
    _run_main("reformer_dist.checkpoints")


def runs() -> None:
    _run_main("reformer_dist.runs.__main__")


def shards() -> None:
    _run_main("reformer_dist.shards.__main__")


def serve() -> None:
    _run_main("reformer_dist.serving.__main__")
