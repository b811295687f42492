"""LightningCLI with this package's defaults: logger, checkpoints, progress bar, end table."""

from __future__ import annotations

import importlib
import logging
import pkgutil
import warnings
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_gd import data, models
from lightning_gd.callbacks.curvature_report import CurvatureReport
from lightning_gd.callbacks.gradient_check import GradientCheck
from lightning_gd.callbacks.histograms import WeightHistograms
from lightning_gd.callbacks.pictures import Pictures
from lightning_gd.callbacks.progress import UpdateProgressBar
from lightning_gd.callbacks.report import EndTable
from lightning_gd.checkpoints import RunCheckpoint
from lightning_gd.logger import RunLogger
from lightning_gd.module import GradientDescentModule


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
        super().__init__(
            GradientDescentModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # the model's own settings name them
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            trainer_defaults={
                "enable_model_summary": False,
                "log_every_n_steps": 1,
                "num_sanity_val_steps": 0,
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the name of the experiment, the closing test and the checkpoints."""
        parser.add_argument("--experiment", type=str, default="run", help="Folder of the logs.")
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="Test after the fit."
        )
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(GradientCheck, "gradient_check")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add what the user did not choose himself."""
        config = self.config_init[self.subcommand]
        chosen, callbacks = config["trainer"], [self.table, WeightHistograms(), CurvatureReport(), Pictures()]
        if chosen["enable_progress_bar"] is not False:
            callbacks.append(UpdateProgressBar())
        if chosen["logger"] in (None, True):
            kwargs["logger"] = RunLogger(
                chosen["default_root_dir"] or "lightning_logs", config["experiment"]
            )
        own = chosen["callbacks"] or []
        own = own if isinstance(own, list) else [own]
        keys = self._parser(self.subcommand).callback_keys
        if chosen["enable_checkpointing"] is False or any(
            isinstance(c, ModelCheckpoint) for c in own
        ):
            keys.remove("checkpoint")
        kwargs["callbacks"] = [*own, *callbacks]
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Leave the table open where a test follows."""
        self.table.deferred = self.config["fit"]["test_after_fit"]

    def after_fit(self) -> None:
        """Test with the weights after the last update."""
        if self.table.deferred:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
            self.table.add(self.trainer.callback_metrics)
            self.table.show(self.trainer)


def run() -> None:
    """Parse `sys.argv` and run; every process of a run leaves its group together."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in UNAVOIDABLE:
        warnings.filterwarnings("ignore", message=message)
    CommandLine()
    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # without it a process may abort while another still talks to it
        dist.destroy_process_group()
