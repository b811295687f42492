"""The number of features of a model, from its data."""

import inspect
from pydoc import locate
from typing import Any

from lightning_gd.data.tensors import TensorDataModule


def class_of(config: Any) -> Any:
    """Return the class that a part of the settings names."""
    return locate(config.class_path)


def infer(model: Any, data: Any, hint: str) -> None:
    """Set num_features of the model to that of the data if it was not set.

    Raises:
        ValueError: If it was set to another number; the hint is added.
    """
    kind, default = class_of(data), _default(class_of(model))
    if default is None or not issubclass(kind, TensorDataModule):
        return
    width = model.init_args["num_features"]
    wanted = kind(**data.init_args.as_dict()).num_features or width
    if width not in (default, wanted):
        raise ValueError(
            f"num_features={width} does not fit the data, whose x is [N, {wanted}]: set "
            f"--model.num_features {wanted}, or leave it out{hint}"
        )
    model.init_args["num_features"] = wanted


def _default(model: type) -> int | None:
    """Return the default of `num_features`, of the class or of the one that takes its kwargs."""
    own = (inspect.signature(cls.__init__).parameters for cls in model.__mro__)
    return next((p["num_features"].default for p in own if "num_features" in p), None)
