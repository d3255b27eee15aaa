"""MlflowTracker: logs metrics to an MLflow server, or to a database in the run directory."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from typing import Any

from reformer_dist.config import TrackerConfig, TrackerKind
from reformer_dist.errors import UserError
from reformer_dist.process.log import logger
from reformer_dist.training.tracker import RowTracker, RunDescription, SavedRun, TrackedStep

DATABASE, ARTIFACTS = "mlflow.db", "mlflow"
MOST_PARAMS = 100  # of a call
LONGEST_PARAM = 500


class MlflowTracker(RowTracker):
    kind = TrackerKind.mlflow

    def __init__(self, config: TrackerConfig, run: RunDescription) -> None:
        """Raises UserError if the server does not answer, or refuses."""
        super().__init__()
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        local = f"sqlite:///{(run.folder / DATABASE).absolute()}"
        uri = local if config.offline else config.uri or os.environ.get("MLFLOW_TRACKING_URI") or local
        saved = SavedRun(run.folder, self.kind)
        try:
            self._client = MlflowClient(tracking_uri=uri)
            self._run_id = saved.read().get("run_id")
            if self._run_id is None:
                self._run_id = self._create_run(config, run, is_local=uri == local)
                saved.write(run_id=self._run_id)
            else:
                self._client.update_run(self._run_id, status="RUNNING")
        except MlflowException as error:
            fix = "check tracker.uri, or set tracker.offline=true"
            raise UserError(f"tracker=mlflow: {uri}: {str(error).splitlines()[0]}; {fix}") from error
        self._stored: dict[str, set[int]] = {}
        logger.info(f"tracker=mlflow: run {self._run_id} in {uri}")

    def _create_run(self, config: TrackerConfig, run: RunDescription, *, is_local: bool) -> str:
        found = self._client.get_experiment_by_name(config.project)
        artifacts = (run.folder / ARTIFACTS).absolute().as_uri() if is_local else None
        experiment = found.experiment_id if found else self._client.create_experiment(config.project, artifacts)
        run_id: str = self._client.create_run(experiment, run_name=run.name).info.run_id
        from mlflow.entities import Param

        params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in _flatten(run.config)]
        for first in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(run_id, params=params[first : first + MOST_PARAMS])
        return run_id

    def _send(self, step: TrackedStep) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = {tag: value for tag, value in step.scalars.items() if step.step not in self._steps(tag)}
        self._client.log_batch(self._run_id, metrics=[Metric(tag, x, now, step.step) for tag, x in new.items()])
        for tag in new:
            self._steps(tag).add(step.step)
        for name, text in step.texts.items():
            self._client.log_text(self._run_id, text, f"{name}/step-{step.step:08d}.txt")

    def _steps(self, tag: str) -> set[int]:
        """The steps of which a metric is stored."""
        if tag not in self._stored:
            history = self._client.get_metric_history(self._run_id, tag)
            self._stored[tag] = {metric.step for metric in history}
        return self._stored[tag]

    def _finish(self) -> None:
        self._client.set_terminated(self._run_id)


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
