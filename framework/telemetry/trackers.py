"""Loggers of a recipe that give a run's reports to others: Weights & Biases, MLflow, clu's metric writers.

    from meshway.framework.telemetry import trackers
    train.train.loggers = [@trackers.WeightsAndBiases(), @trackers.MLflow(), @trackers.Clu()]

A run that resumes goes on in the same run of theirs, whose id `MODEL_DIR/trackers.json` has, and gives no step twice.
"""

import base64
import importlib
import inspect
import io
import os
import re
import struct
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from meshway.framework.errors import UserError
from meshway.framework.files import in_bucket
from meshway.framework.interfaces import Attempt
from meshway.framework.telemetry.tracker import Tracker, Values, hyperparameters
from meshway.framework.web_page import escape

_FILE_STORE = "MLFLOW_ALLOW_FILE_STORE"  # MLflow refuses folders unless this says that they are meant


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases: each report, hyperparameters (the macros of the recipe), texts, images, sounds and
    histograms, and the last values as its summary. Evaluations beside training have a run of their own."""

    kind, extra, module = "wandb", "wandb", "wandb"

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        mode: str | None = None,
        folder: str | None = None,
    ) -> None:
        """
        Args:
          project, entity, name, group: as `wandb.init` has them; None for the environment's (WANDB_PROJECT, ...), and
            the run directory's name as `name`.
          mode: 'online' or 'offline', which keeps files for `wandb sync`; None for WANDB_MODE.
          folder: where files are kept, in `wandb/`; by default the run directory.

        Raises:
          UserError: the package is not installed, or there is no such mode.
        """
        super().__init__()
        if mode not in (None, "online", "offline", "disabled"):
            raise UserError(f"WeightsAndBiases.mode = {mode!r}: it is 'online' or 'offline', or 'disabled'")
        self._named = {"project": project, "entity": entity, "group": group}
        self._name, self._mode, self._folder = name, mode, folder
        self._run: Any = None
        self._unordered = False

    def _begin(self, attempt: Attempt, run_id: str | None) -> str:
        import wandb

        mode = self._mode or os.environ.get("WANDB_MODE") or "online"
        if in_bucket(attempt.directory) and self._folder is None:
            raise UserError("MODEL_DIR is a bucket: bind WeightsAndBiases.folder to a local folder")
        folder = Path(self._folder or attempt.directory)
        folder.mkdir(parents=True, exist_ok=True)
        run_id, name = run_id or uuid.uuid4().hex[:12], self._name or attempt.directory.name
        self._unordered = attempt.evaluation
        self._run = wandb.init(
            **self._named,
            id=run_id,
            name=f"{name} evaluations" if attempt.evaluation else name,
            job_type="eval" if attempt.evaluation else "train",
            dir=str(folder.absolute()),
            mode=mode,
            resume=None if mode == "offline" else "allow",  # offline, `wandb sync` joins the attempts by their id
            config=hyperparameters(attempt.recipe),
            settings=wandb.Settings(console="off", silent=True),
        )
        if self._unordered:
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        return run_id

    def _last_step(self, attempt: Attempt) -> int | None:
        """Returns what the service says; offline, what files hold: W&B writes them from time to time, and a killed
        process leaves out the last seconds."""
        if self._run.settings._offline:
            files = Path(self._run.settings.wandb_dir).glob(f"offline-run-*/run-{self._run.id}.wandb")
            records = (record for file in files for record in wandb_records(file))
            return max((record.history.step.num for record in records if record.HasField("history")), default=-1)
        return self._run.starting_step - 1

    def _log(self, step: int, scalars: Mapping[str, float], values: Values) -> None:
        content: dict[str, Any] = dict(scalars) | {name: self._media(value) for name, value in values.items()}
        content = {name: value for name, value in content.items() if value is not None}
        if self._unordered:
            self._run.log(content | {"step": step})
        else:
            self._run.log(content, step=step)

    def _media(self, value: Mapping[str, Any]) -> Any:
        """Returns a value as W&B shows it; None for tensors of plugins, which it does not."""
        import wandb

        if value["kind"] == "text":
            return wandb.Html(f"<pre>{escape(value['text'])}</pre>")
        if value["kind"] == "image":
            return [wandb.Image(image) for image in images(value)]
        if value["kind"] == "histogram":
            return wandb.Histogram(np_histogram=(np.asarray(value["counts"]), np.asarray(value["edges"])))
        return None

    def _end(self) -> None:
        self._run.finish()
        self._run = None


class MLflow(Tracker):
    """A run of MLflow: each report, the macros of the recipe as parameters, `config.gin`, texts and images as
    artifacts. Evaluations beside training have a run of their own."""

    kind, extra, module = "mlflow", "mlflow", "mlflow"

    def __init__(self, experiment: str = "meshway", name: str | None = None, uri: str | None = None) -> None:
        """
        Args:
          experiment: the experiment's name, made where it is missing.
          name: the run's name; by default the run directory's.
          uri: the tracking server or store (`http://host:5000`, `file:/data/mlruns`); by default MLFLOW_TRACKING_URI,
            or else the folder `mlruns` in the run directory.

        Raises:
          UserError: the package is not installed.
        """
        super().__init__()
        self._experiment, self._name, self._uri = experiment, name, uri
        self._client: Any = None
        self._id = ""

    def _begin(self, attempt: Attempt, run_id: str | None) -> str:
        uri = self._uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None and in_bucket(attempt.directory):
            raise UserError("name its server or store by MLflow.uri, or MLFLOW_TRACKING_URI: MODEL_DIR is a bucket")
        uri = uri or (attempt.directory / "mlruns").absolute().as_uri()
        if uri.startswith("file:") or ":" not in uri:
            os.environ.setdefault(_FILE_STORE, "true")
        from mlflow import MlflowClient

        self._client = client = MlflowClient(uri)
        if run_id is None:
            name = self._name or attempt.directory.name
            found = client.get_experiment_by_name(self._experiment)
            experiment = found.experiment_id if found else client.create_experiment(self._experiment)
            name = f"{name} evaluations" if attempt.evaluation else name
            run_id = client.create_run(experiment, run_name=name).info.run_id
            self._describe(run_id, attempt.recipe)
        else:
            client.update_run(run_id, status="RUNNING")
        self._id = run_id
        return run_id

    def _describe(self, run_id: str, recipe: str) -> None:
        from mlflow.entities import Param

        params = [Param(name, str(value)[:6000]) for name, value in hyperparameters(recipe).items()]
        for first in range(0, len(params), 100):  # what one request may hold
            self._client.log_batch(run_id, params=params[first : first + 100])
        if recipe:
            self._client.log_text(run_id, recipe, "config.gin")

    def _log(self, step: int, scalars: Mapping[str, float], values: Values) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(_mlflow_name(name), float(value), now, step) for name, value in scalars.items()]
        for first in range(0, len(metrics), 1000):
            self._client.log_batch(self._id, metrics=metrics[first : first + 1000])
        for name, value in values.items():
            path = f"{_mlflow_name(name)}/{step:08d}"
            if value["kind"] == "text":
                self._client.log_text(self._id, value["text"], f"{path}.txt")
            for index, image in enumerate(images(value)):
                self._client.log_image(self._id, image, f"{path}-{index}.png")

    def _end(self) -> None:
        self._client.set_terminated(self._id)


class Clu(Tracker):
    """A `clu.metric_writers.MetricWriter`: scalars, texts, images and hyperparameters. It imports TensorFlow, where the
    writer does, in process 0 and not before the run begins."""

    kind, module = "clu", "clu"

    def __init__(self, writer: str | Callable[..., Any] = "clu.metric_writers.create_default_writer") -> None:
        """
        Args:
          writer: what makes the writer, or where that is; it gets `logdir`, `MODEL_DIR/clu`, if it takes that.

        Raises:
          UserError: it is no dotted name.
        """
        super().__init__()
        if isinstance(writer, str) and "." not in writer:
            raise UserError(f"Clu.writer = {writer!r}: write it with its module, as clu.metric_writers.SummaryWriter")
        self._make = writer
        self._writer: Any = None

    def _begin(self, attempt: Attempt, run_id: str | None) -> str:
        make = self._make
        if isinstance(make, str):
            module, _, name = make.rpartition(".")
            try:
                make = getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError) as error:
                lacks = getattr(error, "name", None) == "tensorboard"
                hint = "; clu's writers need it: pip install 'meshway[board]'" if lacks else ""
                raise UserError(f"Clu.writer = {self._make!r} is not there: {error}{hint}") from error
        folder = str(attempt.directory / ("clu-evaluations" if attempt.evaluation else "clu"))
        takes = "logdir" in inspect.signature(make).parameters
        self._writer = make(logdir=folder) if takes else make()
        if not run_id:
            # Not all writers take all types; gin's other values are shown as text.
            self._writer.write_hparams({name: _plain(value) for name, value in hyperparameters(attempt.recipe).items()})
            self._writer.write_texts(attempt.start, {"recipe": attempt.recipe})
        return "clu"

    def _log(self, step: int, scalars: Mapping[str, float], values: Values) -> None:
        writer = self._writer
        if scalars:
            writer.write_scalars(step, dict(scalars))
        texts = {name: value["text"] for name, value in values.items() if value["kind"] == "text"}
        if texts:
            writer.write_texts(step, texts)
        for name, value in values.items():
            for index, image in enumerate(images(value)):
                writer.write_images(step, {f"{name}/{index}" if index else name: image[None]})
        writer.flush()

    def _end(self) -> None:
        self._writer.close()


def images(value: Mapping[str, Any]) -> list[np.ndarray]:
    """Returns the images of a value, uint8 [height, width, channels]; none where it is something else."""
    if value["kind"] != "image":
        return []
    from PIL import Image  # matplotlib brings it

    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each))).convert("RGB")) for each in value["png"]]


def wandb_records(path: Path) -> Iterator[Any]:
    """Yields the records of a transaction log of W&B's: 7 bytes, then LevelDB's log, in blocks of 32 KiB (checksum,
    length and kind, content), each record a protocol buffer; the last may be cut off."""
    from wandb.proto import wandb_internal_pb2

    data, at, content = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        if at + 7 + size > len(data):
            return
        content += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(content)
            content = b""


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float)) else str(value)
