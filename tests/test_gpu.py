"""One GPU, many GPUs and the CPU end in the same weights: the tests of `test_distributed.py`."""

import functools
import re

import pytest
import torch
import worlds
from any_modules import spoil
from conftest import fit, run, trainer_words
from test_any_module import NAMES, built
from test_any_module import fit as fit_any
from test_direct import CASES, REPLAYED, Sees, trained
from test_distributed import assert_mistakes_found, assert_parted, assert_same, ends_in_processes

from lightning_gd import GradientError, LinearRegression

FOUND = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not FOUND, reason="no GPU: torch.cuda.device_count() is 0"),
]
WORLDS = [
    pytest.param(
        count, marks=pytest.mark.skipif(count > FOUND, reason=f"{FOUND} GPUs of {count} needed")
    )
    for count in (1, 2, 3, 4)
]


@pytest.fixture(scope="module")
def cpu_ends():
    """What one process on the CPU ended with."""
    return [worlds.run_all()]


@pytest.fixture(scope="module")
def gpu_ends(tmp_path_factory):
    """What each process of a world with one GPU per process ended with; each is run once."""
    folder = tmp_path_factory.mktemp("gpus")
    return functools.cache(lambda world: ends_in_processes(world, folder, WORLDS_ACCELERATOR="gpu"))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", worlds.CASES)
def test_the_same_weights_as_on_the_cpu(cpu_ends, gpu_ends, world, case):
    assert_same(cpu_ends, gpu_ends(world), case)


@pytest.mark.parametrize("world", WORLDS[1:])
def test_without_the_reduction_the_gpus_part(gpu_ends, world):
    assert_parted(gpu_ends(1), gpu_ends(world))


@pytest.mark.parametrize("world", WORLDS)
def test_the_gradient_check_names_mistakes_on_every_gpu(gpu_ends, world):
    assert_mistakes_found(gpu_ends(world), world)


@pytest.mark.parametrize("mode", [["--data.moments=true"], [], ["--model.gradient=autograd"]])
def test_the_default_experiment_ends_as_on_the_cpu(tmp_path, mode):
    words, found = trainer_words(max_steps=100, default_root_dir=tmp_path), []
    for accelerator in ("cpu", "gpu"):
        status, out, err = run("--trainer.accelerator", accelerator, *words, *mode)
        assert status == 0, err
        assert re.search(f"processes +1 .{'cuda' if accelerator == 'gpu' else 'cpu'}", out)
        found.append([float(value) for value in re.findall(r"(?:train|test)/loss +(\S+)", out)])
    # float32: sums over 2,000 rows and 784 pixels in another order, 1e-7 each, over 100 updates
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_replayed_update_is_that_of_the_optimizer(make_trainer, name):
    settings, data = CASES[name]
    gpu = {"accelerator": "gpu", "precision": "32-true"}
    sees = Sees()
    found, _ = trained(make_trainer, {**settings, "cuda_graph": True}, data, sees, **gpu)
    usual, _ = trained(make_trainer, settings, data, **gpu)
    assert bool(sees.replays) == (name in REPLAYED)
    # Products of a copy and of a slice of the rows may be added up in another order.
    for name, (steps, values) in usual["curves"].items():
        assert found["curves"][name][0] == steps
        assert found["curves"][name][1] == pytest.approx(values, rel=1e-4, abs=1e-6)


class Waits(LinearRegression):
    def gradients(self, x, y):
        return super().gradients(x, y * float(y.isfinite().all()))


def test_what_cannot_be_recorded_is_named(make_trainer):
    trainer = make_trainer(accelerator="gpu", precision="32-true", max_steps=40)
    with pytest.raises(ValueError, match="cannot be recorded .*set --model.cuda_graph false"):
        fit(trainer, CASES["plain"][1], Waits, num_features=3, cuda_graph=True)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", NAMES)
def test_foreign_modules(make_trainer, name, precision):
    settings = {"accelerator": "gpu", "precision": precision}
    module, batches, layer = built(name)
    _, check = fit_any(make_trainer, module, batches, **settings)
    assert check.checks and any(check.tested.values())
    module, batches, layer = built(name)
    spoil(module, layer)
    with pytest.raises(GradientError, match=f"update 0:(?s:.*){layer}.*; it passes through Double"):
        fit_any(make_trainer, module, batches, **settings)
