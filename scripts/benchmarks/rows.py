"""The rows of the table: which work, whose sides, and what is wanted of the ratio."""

from __future__ import annotations

from functools import partial

import numpy as np

from benchmarks import ours, peers
from benchmarks.harness import Row, Side
from benchmarks.ours import UPDATES

MNIST, SMALL = 60_000, 2_000  # digits; the small table needs no download
IMPORT = "import lightning.pytorch"


def rows(quick: bool) -> list[Row]:
    """All rows; the slow ones are smaller where it must be quick."""
    return [
        *_mini_batches(6_000 if quick else MNIST),
        *_full_batch(6_000 if quick else MNIST),
        _optimum(12_000 if quick else MNIST),
        _flat(10**5 if quick else 10**6),
        *_processes(MNIST),
        _jacobian(1000),
        _linear(10**4 if quick else 10**5),
        *_checks(),
        _command(),
        _file(256 if quick else 1024),
    ]


def _mini_batches(few: int) -> list[Row]:
    work = "{:,} digits, batches of 64, every loss in TensorBoard"
    all_of, some = ({"rows": n, "epochs": 1 if few < MNIST else 3} for n in (MNIST, few))
    lightning = partial(peers.lightning_tensors, **some)
    return [
        Row(
            "minibatch",
            work.format(MNIST),
            (
                Side("fit", partial(ours.mini_batches, **all_of)),
                Side("bare explicit loop", partial(peers.explicit_loop, **all_of), at_most=2.5),
                Side("bare autograd loop", partial(peers.autograd_loop, **all_of)),
            ),
            "s/epoch",
            digits=True,
        ),
        Row(
            "lightning",
            work.format(few),
            (
                Side("fit", partial(ours.mini_batches, **some)),
                Side("Lightning + TensorDataset", lightning, faster=4),
                Side("the same, each 50th loss", partial(lightning, every=50)),
                Side(
                    "Lightning + torchvision",
                    partial(peers.lightning_torchvision, **some),
                    faster=20,
                ),
            ),
            "s/epoch",
            digits=True,
        ),
        Row(
            "huber",
            "the same with a user's formula (Huber), momentum, clipping",
            (
                Side("fit", partial(ours.huber, **all_of)),
                Side("bare explicit loop", partial(peers.huber_loop, **all_of), at_most=3),
            ),
            "s/epoch",
            digits=True,
        ),
        Row(
            "sgdregressor",
            f"{MNIST:,} digits, {all_of['epochs']} epochs to the same accuracy",
            (
                Side("fit, batches of 64", partial(ours.mini_batch_accuracy, **all_of)),
                # The accuracy of 0.88 moves by 0.01 from one order of the rows to another.
                Side(
                    "SGDRegressor, row by row",
                    partial(peers.sgd_regressor, **all_of),
                    tolerance=0.02,
                ),
            ),
            "s/epoch",
            digits=True,
        ),
    ]


def _full_batch(many: int) -> list[Row]:
    work = "{:,} digits, full batch, {} updates, both losses at each"
    found = []
    for name, n, moments, wanted in (
        ("moments", many, True, {"faster": 25}),
        ("formula-2000", SMALL, False, {"at_most": 1.0}),
        ("moments-2000", SMALL, True, {"at_most": 0.4}),
    ):
        fit = Side(
            f"fit by {'moments' if moments else 'the formula'}",
            partial(ours.full_batch, rows=n, moments=moments),
        )
        peer = Side("notebook's loop", partial(peers.notebook, rows=n), **wanted)
        found.append(
            Row(name, work.format(n, UPDATES), (fit, peer), "ms/update", digits=n != SMALL)
        )
    return found


def _optimum(n: int) -> Row:
    ridge = partial(peers.ridge_classifier, rows=n)
    least = partial(peers.linear_regression, rows=n, dtype=np.float64)
    # The default penalty of RidgeClassifier moves the loss in its third digit.
    return Row(
        "optimum",
        f"{n:,} digits, exact least squares",
        (
            Side("moments of the bytes", partial(ours.optimum, rows=n)),
            Side(
                "RidgeClassifier, float32",
                partial(ridge, dtype=np.float32),
                at_most=1.0,
                tolerance=5e-3,
            ),
            Side("RidgeClassifier, float64", partial(ridge, dtype=np.float64), tolerance=5e-3),
            Side("LinearRegression, float64", least, tolerance=1e-9),
        ),
        digits=True,
    )


def _flat(largest: int) -> Row:
    sizes = [10**k for k in range(3, 7) if 10**k < largest]
    prepare = {n: partial(ours.moments_updates, rows=n) for n in (largest, *sizes)}
    others = [Side(f"{n:,} rows", prepare[n], at_most=1.5) for n in sizes]
    return Row(
        "flat",
        "an update from the moments of more and more rows of 784",
        (Side(f"{largest:,} rows", prepare[largest]), *others),
        "ms/update",
    )


def _processes(n: int) -> list[Row]:
    updates = partial(ours.distributed_full_batch, rows=n, updates=20)
    moments = partial(ours.distributed_moments, rows=n)
    return [
        Row(
            "processes",
            f"{n:,} digits, full batch, 20 updates by the formula",
            (
                Side("2 processes × 1 thread", updates, processes=2, threads=1),
                Side("1 × 1", updates, faster=1.3, threads=1),
            ),
            "ms/update",
            digits=True,
        ),
        Row(
            "processes-moments",
            f"{n:,} digits, their moments",
            (
                Side("2 processes × 1 thread", moments, processes=2, threads=1),
                Side("1 × 1", moments, faster=1.7, tolerance=1e-12, threads=1),
            ),
            digits=True,
        ),
    ]


def _jacobian(n: int) -> Row:
    full = partial(peers.full_jacobian, rows=n)
    return Row(
        "jacobian",
        f"Jacobian of each of {n:,} samples, 3 → 3",
        (
            Side("per_sample_jacobian", partial(ours.jacobian, rows=n)),
            Side("functional.jacobian", partial(full, vectorize=False), faster=100),
            Side("the same, vectorize=True", partial(full, vectorize=True)),
            Side("vmap of jacrev", partial(peers.mapped_jacobian, rows=n)),
        ),
        "µs/sample",
    )


def _linear(largest: int) -> Row:
    sizes = [10**k for k in range(3, 5) if 10**k < largest]
    prepare = {n: partial(ours.jacobian, rows=n) for n in (largest, *sizes)}
    others = [Side(f"{n:,} samples", prepare[n], at_most=1.5) for n in sizes]
    return Row(
        "jacobian-linear",
        "Jacobian of each of more and more samples",
        (Side(f"{largest:,} samples", prepare[largest]), *others),
        "µs/sample",
    )


def _checks() -> list[Row]:
    full = partial(ours.full_batch, rows=SMALL, moments=False)
    mini = partial(ours.mini_batches, rows=MNIST, epochs=3)
    return [
        Row(
            name,
            work,
            (
                Side("with GradientCheck", partial(prepare, check=True)),
                Side("without", prepare, at_most=1.05, tolerance=0.0),
            ),
            unit,
            digits=digits,
        )
        for name, work, prepare, unit, digits in (
            ("check-full", f"{SMALL:,} digits, {UPDATES} updates", full, "ms/update", False),
            ("check-minibatch", f"{MNIST:,} digits, batches of 64", mini, "s/epoch", True),
        )
    ]


def _command() -> Row:
    prepare = {
        name: partial(ours.command, arguments=arguments)
        for name, arguments in (
            ("train.py, no pictures", ("-c", ours.WITHOUT_PICTURES)),
            ("import lightning.pytorch", ("-c", IMPORT)),
            ("train.py with pictures", (ours.TRAIN,)),
        )
    }
    wanted = {"import lightning.pytorch": 1.6}
    return Row(
        "command",
        "whole processes",
        tuple(Side(name, p, at_most=wanted.get(name)) for name, p in prepare.items()),
    )


def _file(mebibytes: int) -> Row:
    prepare = [partial(ours.mapped_file, mebibytes=m) for m in (mebibytes, mebibytes // 4)]
    return Row(
        "file",
        f"moments of a mapped file, with {ours.SPARE >> 20} MiB to allocate",
        (
            Side(f"{mebibytes} MiB", prepare[0]),
            Side(f"{mebibytes // 4} MiB", prepare[1], at_most=1.1, tolerance=1e-12),
        ),
        memory=True,
    )
