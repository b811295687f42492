"""LightningCLI with this package's callbacks and logger, and a way to continue a run."""

import atexit
import inspect
import logging
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from jsonargparse.typing import lazy_instance
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden

import lightning_gd
from lightning_gd import ending, verbs
from lightning_gd.arguments import CALLBACKS
from lightning_gd.checkpoints import OURS, check_class, check_shapes, class_name, read
from lightning_gd.data.tensors import tensor_data
from lightning_gd.export import check_target
from lightning_gd.loggers import for_run, run_folder, run_logger, with_names, without
from lightning_gd.module import GradientDescentModule
from lightning_gd.resume import find, run_of, settings_in, start_of
from lightning_gd.settings import check_precision, number
from lightning_gd.widths import class_of, infer

TRAINER = {"enable_model_summary": False, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
OPTIONAL = {"enable_checkpointing": Checkpoint, "enable_progress_bar": ProgressBar}
LOGS = "lightning_logs"
UNAVOIDABLE = (  # warnings that no setting of the user would avoid
    ".*LeafSpec.* is deprecated",  # raised inside Lightning by a newer torch
    "`torch.jit.script` is deprecated",  # raised inside torch when torch.func is first used
    "Guards may run slower on Python 3.13.0",  # raised inside torch when a model is exported
    ".*log\\('train/loss'",  # asks for a mean over processes of what is such a mean already
)
for name in dir(lightning_gd):  # what is imported can be given by its short name
    getattr(lightning_gd, name)


class SaveConfig(SaveConfigCallback):
    """Writes the resolved `config.yaml` into the folder of the run."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if (folder := run_folder(trainer)) is None:  # a file elsewhere may be the user's
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = str(folder / self.config_filename)
        self.parser.save(self.config, path, skip_none=False, overwrite=True, multifile=False)


class CommandLine(LightningCLI):
    """The parser of a verb's arguments, and the model, data and Trainer that it builds."""

    def __init__(self, verb: str, words: list[str]) -> None:
        self.verb = verb
        self.checkpoint: dict[str, Any] = {}  # what the run starts from
        self.continued: tuple[str, str, int] | None = None  # the run whose folder it writes in
        super().__init__(
            LightningModule if verb == "check" else GradientDescentModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # the model's own settings name them
            load_from_checkpoint_support=False,  # checkpoints hold plain settings only
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            parser_kwargs={"exit_on_error": False, "description": "All options of this command."},
            seed_everything_default=0,
            trainer_defaults=TRAINER,
            run=False,
            args=words,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run, and one for each callback."""
        parser.add_argument("--experiment", default="run", help="Folder of the logs.")
        parser.add_argument("--test_after_fit", type=bool, default=False, help="Test at the end.")
        text = "Checkpoint to start from: last, best, a file or the folder of a run."
        parser.add_argument("--ckpt_path", type=str | None, help=text)
        text = "Seconds after which a process that does not answer ends the run."
        parser.add_argument("--process_timeout", type=float, default=120.0, help=text)
        if self.verb == "export":
            parser.add_argument("--to", type=str | None, help="The file: NAME.onnx or NAME.pt2.")
            parser.add_argument("--overwrite", type=bool, default=False, help="Replace the file.")
        for key, name in CALLBACKS.items():
            cls = getattr(lightning_gd, name)
            text = " ".join(str(inspect.getdoc(cls)).split()).replace("%", "%%")
            text += f" (null switches it off; --{key}.NAME sets an argument)"
            parser.add_argument(f"--{key}", type=cls | None, default=lazy_instance(cls), help=text)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments; the settings of a checkpoint come before what is typed."""
        if self.verb != "check":
            verbs.refuse_foreign(args)
        if args != (others := without(args)):
            config = parser.parse_args(others)
            args = with_names(args, config.trainer.default_root_dir or LOGS, config.experiment)
        self.config = config = parser.parse_args(args)
        parts = Path(config.experiment).parts
        if not parts or ".." in parts or Path(config.experiment).is_absolute():
            raise ValueError(f"experiment={config.experiment!r} must be a folder below the logs")
        if self.verb == "export":
            check_target(config.to, config.overwrite)
            if config.ckpt_path is None:
                raise ValueError("export needs trained weights: --ckpt_path last, best or a file")
        if config.ckpt_path in (None, "hpc"):  # that of a SLURM job which was requeued
            return
        runs = Path(config.trainer.default_root_dir or LOGS, config.experiment)
        file = find(config.ckpt_path, runs)
        self.checkpoint = read(file)
        check_class(self.checkpoint, class_of(config.model))
        theirs = settings_in(self.checkpoint, class_of(config.data))
        below = {p: {"class_path": config[p].class_path, "init_args": v} for p, v in theirs.items()}
        typed = 2 * args.count("--config") + 2  # after the experiment and the files
        words = [*args[:typed], "--config", yaml.safe_dump(below), *args[typed:]]
        self.config = parser.parse_args([*words, "--ckpt_path", file])
        self.continued = run_of(file) if self.verb == "fit" else None
        new = self.verb == "fit" and self.continued is None
        rank_zero_only(print)(start_of(self.checkpoint, file, theirs, self.config, new))

    def before_instantiate_classes(self) -> None:
        """Infer num_features of the model from the data if it was not set."""
        infer(self.config.model, self.config.data, self._other_data)

    def after_instantiate_classes(self) -> None:
        """Refuse weights of another shape before any work."""
        if self.checkpoint:
            check_shapes(self.checkpoint, self.model, self._other_data)

    @property
    def _other_data(self) -> str:
        """What is said of data other than those of the checkpoint, where the model fits neither."""
        theirs = self.checkpoint.get(OURS, {}).get("data", "NoneType")
        other = "NoneType" not in theirs and theirs != class_name(class_of(self.config.data))
        return f"; the checkpoint is of --data {theirs}" if other else ""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the logger, the callbacks that are on, and the timeout of processes."""
        config: Any = self.config_init
        check_precision(config.trainer.precision)
        number("process_timeout", config.process_timeout, above=0, most=1e6)
        for entry in StrategyRegistry.values():  # where `auto` looks, too
            if entry["strategy"] is DDPStrategy:
                entry["init_params"]["timeout"] = timedelta(seconds=config.process_timeout)
        if config.trainer.logger is not False:
            place = config.trainer.default_root_dir or LOGS, config.experiment, None
            kwargs["logger"] = for_run(config.trainer.logger, self.continued, place)
        own = config.trainer.callbacks or []
        callbacks = list(own) if isinstance(own, list) else [own]
        callbacks += [config[key] for key in CALLBACKS if config[key] is not None]
        for flag, kind in OPTIONAL.items():
            if config.trainer[flag] is False:
                callbacks = [c for c in callbacks if not isinstance(c, kind)]
            kwargs[flag] = any(isinstance(c, kind) for c in callbacks)
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

    def execute(self) -> None:
        """Run the verb."""
        if self.verb == "check":
            verbs.check(self.model, self.datamodule)
            return
        if self.verb == "export":
            file = Path(self.config.to)
            verbs.export_trained(self.model, self.datamodule, self.checkpoint, file)
            return
        start = {"datamodule": self.datamodule, "ckpt_path": self.config.ckpt_path}
        if self.verb == "fit":
            self._fit(**start)
            return
        if not self.checkpoint:
            words = "the model is not trained; --ckpt_path last takes that of the last run"
            rank_zero_only(print)(f"WARNING: {words}")
        getattr(self.trainer, self.verb)(self.model, **start)

    def _fit(self, **start: Any) -> None:
        """Train, test where that is asked for, and print the table."""
        logger, files = run_logger(self.trainer), self.checkpoint.get("curve_files")
        if logger is not None:
            logger.lock()
            shown: Any = logger.hparams
            shown["model"] = type(self.model).__name__
            if self.continued is not None and files:
                logger.cut({name: size for sizes in files for name, size in sizes.items()})
        table: Any = self.config_init["end_table"]
        if table is not None:
            table.deferred = True  # until the progress bar has ended, and the test if there is one
        self.trainer.fit(self.model, **start)
        metrics = {}
        if self.config.test_after_fit and self._has_test() and not self.interrupted:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
            metrics = self.trainer.callback_metrics
        if table is not None:
            table.add(metrics)
            table.show(self.trainer)
        if self.interrupted and self.trainer.is_global_zero:
            print(ending.interrupted(self.interrupted, self.trainer.global_step))

    @property
    def interrupted(self) -> int:
        """The number of the signal that ended the fit; 0 for none."""
        return getattr(self.config_init["interrupt"], "received", 0)

    def _has_test(self) -> bool:
        tables = tensor_data(self.trainer)
        overridden = is_overridden("test_dataloader", self.datamodule, LightningDataModule)
        return overridden if tables is None else "test" in tables.tables


def run(verb: str, words: list[str]) -> None:
    """Parse and run; every process of a run leaves its group together."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in UNAVOIDABLE:
        warnings.filterwarnings("ignore", message=message)
    command = CommandLine(verb, words)
    try:
        command.execute()
    except BaseException as error:
        atexit.register(ending.end_processes, command.trainer)  # when the error has been printed
        reason = ending.reason(error, command.config.ckpt_path)
        if reason is not None:
            raise reason from error
        raise
    ending.leave_together()
    if command.interrupted:
        raise SystemExit(128 + command.interrupted)
