"""LightningCLI with this package's defaults: logger, checkpoints, progress bar, end table."""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
import sys
import warnings
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from pydoc import locate
from subprocess import TimeoutExpired
from typing import Any

import torch.distributed as dist
import yaml
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from lightning_gd import data, models
from lightning_gd.callbacks.coefficients import Coefficients
from lightning_gd.callbacks.curvature_report import CurvatureReport
from lightning_gd.callbacks.gradient_check import GradientCheck
from lightning_gd.callbacks.histograms import WeightHistograms
from lightning_gd.callbacks.pictures import Pictures
from lightning_gd.callbacks.predictions import Predictions
from lightning_gd.callbacks.progress import UpdateProgressBar
from lightning_gd.callbacks.report import EndTable
from lightning_gd.checkpoints import RunCheckpoint
from lightning_gd.data.tensors import TensorDataModule
from lightning_gd.distributed import world_size
from lightning_gd.loading import OURS, check_class, check_shapes, read
from lightning_gd.logger import RunLogger
from lightning_gd.module import GradientDescentModule
from lightning_gd.refusals import check_precision, number
from lightning_gd.resuming import differences, find, run_of, settings

# Warnings of Lightning that nothing a user could write would change.
UNAVOIDABLE = (
    ".*LeafSpec.* is deprecated",  # raised inside Lightning by a newer torch
    "`torch.jit.script` is deprecated",  # raised inside torch when torch.func is first used
    "Using ModelCheckpoint with manual optimization",  # the state after the update is meant
)

# What has been imported is known to --model and --data by its short name.
for package in (models, data):
    for found in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{found.name}")


class CommandLine(LightningCLI):
    """The parser and the run behind `scripts/train.py`."""

    def __init__(self) -> None:
        self.table = EndTable()
        self.checkpoint: dict[str, Any] | None = None  # where the run starts from
        self.run: tuple[str, str, int] | None = None  # the run that it goes on with
        super().__init__(
            GradientDescentModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # the model's own settings name them
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"exit_on_error": False, sys.argv[1]: {"exit_on_error": False}},
            seed_everything_default=0,
            trainer_defaults={
                "enable_model_summary": False,
                "log_every_n_steps": 1,
                "num_sanity_val_steps": 0,
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verb that is asked for, alone: each takes a while to build."""
        return {sys.argv[1]: LightningCLI.subcommands()[sys.argv[1]]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the name of the experiment, the closing test and the checkpoints."""
        parser.add_argument("--experiment", type=str, default="run", help="Folder of the logs.")
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="Test after the fit."
        )
        parser.add_argument(
            "--process_timeout",
            type=float,
            default=120.0,
            help="Seconds after which a process that does not answer ends the run.",
        )
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(GradientCheck, "gradient_check")

    def _parse_ckpt_path(self) -> None:
        """Fill in the settings of the checkpoint beneath what is typed; Lightning's fills above."""
        config = self.config[self.config.subcommand]
        word = config.get("ckpt_path")
        if word in (None, "hpc"):  # that of a SLURM job which Lightning put back into the queue
            return
        file = find(
            str(word), Path(config.trainer.default_root_dir or "lightning_logs", config.experiment)
        )
        self.checkpoint = checkpoint = read(file)
        classes: dict[str, Any] = {p: locate(config[p].class_path) for p in ("model", "data")}
        check_class(checkpoint, classes["model"])
        theirs = settings(checkpoint, classes["data"])
        below = {p: {"class_path": config[p].class_path, "init_args": v} for p, v in theirs.items()}
        # Files come first in the arguments, so this one goes behind them; the processes that
        # Lightning starts see where the word led to.
        words = sys.argv[1:]
        at = 1 + max((i + 1 for i, word in enumerate(words) if word == "--config"), default=0)
        sys.argv[1:] = words = [*words, "--ckpt_path", file]
        self.config = self.parser.parse_args(
            [*words[:at], "--config", yaml.safe_dump(below), *words[at:]]
        )
        self.run = run_of(file) if self.config.subcommand == "fit" else None
        self._say(file, theirs, _init_args(config), _init_args(self.config[self.config.subcommand]))

    @rank_zero_only
    def _say(self, file: str, theirs: dict, before: dict, now: dict) -> None:
        """Name in one line where the run starts, and whose settings won."""
        assert self.checkpoint is not None
        parts = [f"from {file}, update {self.checkpoint['global_step']}"]
        if self.config.subcommand == "fit" and self.run is None:
            parts.append("in a new run folder")
        if "data" not in theirs:
            parts.append(f"data not those of the checkpoint, {self.checkpoint[OURS].get('data')}")
        typed = differences(now, theirs)
        parts += [f"typed: {line} of the checkpoint" for line in typed]
        names = {line.split()[0] for line in typed}
        kept = [line for line in differences(theirs, before) if line.split()[0] not in names]
        parts += [f"of the checkpoint: {line}" for line in kept]
        print("; ".join(parts))

    def before_instantiate_classes(self) -> None:
        """Make the model as wide as the data, where nobody said how wide it is."""
        chosen = self.config[str(self.subcommand)]
        model, data = chosen["model"], chosen["data"]
        table: Any = locate(data.class_path)
        width, default = model.init_args.get("num_features"), _default_width(model.class_path)
        if issubclass(table, TensorDataModule) and width == default:
            wanted = table(**data.init_args.as_dict()).num_features
            model.init_args["num_features"] = wanted or default

    def after_instantiate_classes(self) -> None:
        """Refuse weights of another shape before any work."""
        if self.checkpoint is not None:
            check_shapes(self.checkpoint, self.model)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add what the user did not choose himself."""
        config = self.config_init[str(self.subcommand)]
        chosen, callbacks = (
            config["trainer"],
            [self.table, WeightHistograms(), CurvatureReport(), Pictures()],
        )
        callbacks += [Coefficients(), Predictions()]
        if chosen["enable_progress_bar"] is not False:
            callbacks.append(UpdateProgressBar())
        if chosen["logger"] in (None, True):
            new = (chosen["default_root_dir"] or "lightning_logs", config["experiment"], None)
            save_dir, name, version = self.run or new
            kwargs["logger"] = RunLogger(save_dir, name, version)
        own = chosen["callbacks"] or []
        own = own if isinstance(own, list) else [own]
        keys = self._parser(self.subcommand).callback_keys
        unwanted = chosen["enable_checkpointing"] is False or chosen["fast_dev_run"]
        if unwanted or any(isinstance(c, ModelCheckpoint) for c in own):
            keys.remove("checkpoint")
        kwargs["callbacks"] = [*own, *callbacks]
        number("process_timeout", config["process_timeout"], above=0, most=1e6)
        check_precision(chosen["precision"])
        if chosen["barebones"]:
            raise ValueError(
                "--trainer.barebones true takes away the logs, checkpoints and figures that this "
                "command is for: leave it out, and set what you do not want to false, such as "
                "--trainer.logger false --trainer.enable_checkpointing false"
            )
        trainer = super().instantiate_trainer(**kwargs)
        if isinstance(trainer.strategy, DDPStrategy):  # also where Lightning chose it
            trainer.strategy._timeout = timedelta(seconds=config["process_timeout"])
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run, and leave no process behind that Lightning started here, not even a stopped one."""
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            if world_size() > 1 and dist.get_backend() == "gloo":
                dist.destroy_process_group()  # the others hear of it now, not seconds later
            for process in getattr(self.trainer.strategy.launcher, "procs", []):
                with suppress(TimeoutExpired):
                    process.wait(2)  # time to say what happened to it
                process.kill()
            raise

    def before_fit(self) -> None:
        """Leave the table open; cut off the curves after the checkpoint."""
        self.table.deferred = True  # behind the progress bar, and behind the test if there is one
        if self.run is not None and self.checkpoint is not None:
            warnings.filterwarnings("ignore", message="Checkpoint directory .* is not empty")
            for logger in self.trainer.loggers:
                if isinstance(logger, RunLogger):
                    logger.cut(self.checkpoint[OURS]["events"])

    def after_fit(self) -> None:
        """Test with the last weights where that is asked for, and show the table."""
        tested = "test" in getattr(self.datamodule, "tables", {"test"})
        if self.config["fit"]["test_after_fit"] and tested:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
            self.table.add(self.trainer.callback_metrics)
        self.table.show(self.trainer)


def _init_args(config: Any) -> dict[str, dict[str, Any]]:
    """The settings of the model and the data, as plain dictionaries."""
    parts = {part: config[part].get("init_args") for part in ("model", "data")}
    return {part: values.as_dict() if values else {} for part, values in parts.items()}


def _lost(text: str) -> str:
    """What a process says whose collective failed because another one is not there."""
    did = "did not answer within --process_timeout" if "imed out" in text else "has ended"
    detail = text.rpartition("] ")[2].partition(". This is")[0]  # without gloo's own file names
    return f"another process of this run {did} ({detail})"


def _default_width(class_path: str) -> int:
    """The default of `num_features`, of the class itself or of the one that takes its kwargs."""
    model: Any = locate(class_path)
    own = (inspect.signature(cls.__init__).parameters for cls in model.__mro__)
    return next((p["num_features"].default for p in own if "num_features" in p), -1)


def run() -> None:
    """Parse `sys.argv` and run; every process of a run leaves its group together."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in UNAVOIDABLE:
        warnings.filterwarnings("ignore", message=message)
    try:
        CommandLine()
    except Exception as error:
        if type(error).__name__.startswith("Dist") or "gloo" in str(error):
            raise RuntimeError(_lost(str(error))) from error
        raise
    if world_size() > 1:
        dist.barrier()  # without it a process may abort while another still talks to it
        dist.destroy_process_group()
