"""Wrong arguments and failing files: the cases of `test_bad_inputs.py`.

Each is `name: (words of the command line, regular expression of the answer)`. The words come
after those of a run of three updates of the line y = 2x, in a folder with the files of `written`.
"""

import io
from itertools import pairwise

import numpy as np
import pandas
from test_mnist_files import idx, small_files

# Every option that takes a number, with values that it must refuse and the word for it.
WHOLE = "-1 1.5 true"
NUMBERS = {
    "--model.lr": "0 -1 .nan .inf -.inf true much",
    "--model.momentum": "-0.1 1 .nan true",
    "--model.gradient_clip_val": "0 -1 .nan .inf true",
    "--model.accumulate_grad_batches": f"0 {WHOLE}",
    "--model.num_features": f"0 {WHOLE} null much",
    "--model.start_seed": f"{WHOLE} 1e22 9223372036854775808",
    "--model.intercept": ".nan .inf true",
    "--data.batch_size": f"0 {WHOLE} .nan .inf much",
    "--data.passes_per_epoch": f"0 {WHOLE}",
    "--data.num_val": WHOLE,
    "--data.updates_per_step": f"0 {WHOLE}",
    "--test_curve.every_n_updates": f"0 {WHOLE}",
    "--data.seed": f"{WHOLE} 9223372036854775808",
    "--checkpoint.every_n_updates": f"0 {WHOLE}",
    "--gradient_check.every_n_updates": f"0 {WHOLE}",
    "--gradient_check.rows": f"0 {WHOLE}",
    "--process_timeout": "0 .nan 1e300 true",
}
LIGHTNINGS = {
    "--seed_everything": "-1 1.5 4294967296",
    "--trainer.max_steps": "-5 1.5 true",
    "--trainer.max_epochs": "-2 1.5",
    "--trainer.limit_train_batches": "-1 1.5",
}
# The answer names the value as Python writes it, or as it was typed.
WRITTEN = {
    ".nan": "nan",
    ".inf": "inf",
    "-.inf": "-inf",
    "true": "[Tt]rue",
    "null": "([Nn]one|null)",
}


def of_numbers(numbers, answer):
    """A case for each option and each value."""
    return {
        f"{option} {value}": (
            [f"{option}={value}"],
            answer.format(
                name=option.rpartition(".")[2].strip("-"),
                value=WRITTEN.get(value, value.replace("1e", "1e.?")),
            ),
        )
        for option, values in numbers.items()
        for value in values.split()
    }


RIDGE, MLP = ["--model", "lightning_gd.RidgeRegression"], ["--model", "lightning_gd.ParityMLP"]
LINE, DIGITS = ["--config", "linear"], ["--config", "parity"]
TABLE = ["--config", "table", "--data.target", "y", "--data.path"]
ARRAYS = ["--config", "arrays.yaml"]
BORING = "lightning.pytorch.demos.boring_classes.BoringModel"
MINI = ["--data.batch_size", "2", "--data.passes_per_epoch", "1"]

WRONG = {
    **of_numbers(NUMBERS, r"(?s)\b{name}\b.*{value}"),
    **of_numbers(LIGHTNINGS, "{value}"),
    # Words
    "verb": (["fitt"], "unknown verb 'fitt': did you mean 'fit'"),
    "experiment": (["--config", "liner"], "unknown experiment 'liner': did you mean 'linear'"),
    "no experiment": (["--config", "no.yaml"], "no.yaml: there is no such file"),
    "stray word": (["stray"], "stray"),
    "unknown setting": (["--model.lrr", "1"], "model has no setting 'lrr': did you mean 'lr'"),
    "unknown option": (["--trainer.max_stepz", "1"], "did you mean 'max_steps'"),
    "no part": (["--lr", "0.1"], "unknown option --lr: did you mean --model.lr"),
    "part of the data": (["--batch_size=2"], "did you mean --data.batch_size"),
    "part of the trainer": (["--max_steps", "2"], "did you mean --trainer.max_steps"),
    "far from any": (["--data.zzz", "2"], "data has no setting 'zzz': known: x, y, .*batch_size"),
    "number": (["--model.lr", "ten"], "--model.lr=ten must be a number or 'auto'"),
    "of init_args": (["--model.init_args.lr=x"], "lr=x must be a number or 'auto'"),
    "whole": (["--trainer.max_epochs", "many"], "max_epochs=many must be an integer or null"),
    "mode misspelt": (["--model.gradient=explict"], "did you mean 'explicit'"),
    "mode": (["--model.gradient", "numeric"], "numeric must be 'explicit' or 'autograd'"),
    "start": (
        ["--model.start", "ones"],
        "--model.start=ones must be 'zeros' or 'uniform' or 'linear'",
    ),
    "interval": (["--model.scheduler_interval", "day"], "day must be 'update' or 'epoch'"),
    "clipping": (["--model.gradient_clip_algorithm", "max"], "max must be 'norm' or 'value'"),
    "on_error": (["--gradient_check.on_error", "shout"], "shout must be 'stop' or 'warn'"),
    "flag": (["--model.bias", "7"], "bias=7 must be true or false"),
    "not a mapping": (["--model.optimizer_args", "[1]"], r"optimizer_args.*\[1\]"),
    "model": (["--model", "own.Nothing"], "own.Nothing: there is no module 'own'"),
    "model misspelt": (["--model", "Ridge"], "did you mean 'RidgeRegression'.*module.Model"),
    "model of ours": (["--model", "lightning_gd.Parity"], "unknown model 'Parity': did you mean"),
    "data misspelt": (["--data", "Tabel"], "did you mean 'TableData'.*module.Data"),
    "data": (["--data", "Nothing"], "unknown data 'Nothing': .*PointsData"),
    "callback": (["--trainer.callbacks", "Nothing"], "Nothing"),
    "pictures": ([*LINE, "--config", "pictures.yaml"], "worst=-1 must be an integer of at least 1"),
    "callback's": (["--pictures.wurst", "1"], "did you mean 'worst'"),
    "callback off": (["--pictures", "off"], "off"),
    "alpha": ([*RIDGE, "--model.alpha", "-1"], "alpha=-1.0 must be a finite number of at least 0"),
    "alpha nan": ([*RIDGE, "--model.alpha", ".nan"], "alpha=nan"),
    "hidden": ([*MLP, "--model.hidden", "0"], "hidden=0"),
    "activation": ([*MLP, "--model.activation", "gelu"], "gelu must be 'relu' or 'tanh'"),
    "mlp's loss": ([*MLP, "--model.loss", "hinge"], "hinge must be 'squared' or 'logistic'"),
    "mlp's seed": ([*MLP, "--model.start_seed", "-1"], "start_seed=-1"),
    # What does not go together
    "no device": (["--trainer.devices=0"], "devices='0'"),
    "devices": (["--trainer.devices=-1"], "devices.* should be an int > 0"),
    "device word": (["--trainer.devices=much"], "devices.* should be an int > 0"),
    "strategy": (["--trainer.strategy", "sharded"], "sharded"),
    "16-mixed": (["--trainer.precision", "16-mixed"], "precision 16-mixed .*32-true, 64-true"),
    "16-true": (["--trainer.precision", "16-true"], "precision 16-true .*32-true, 64-true"),
    "barebones": (["--trainer.barebones", "true"], "barebones=True"),
    "folder of logs": (["--experiment", "../evil"], "experiment='../evil' must be a folder below"),
    "switched off": (["--pictures", "false"], "--pictures false: null switches it off"),
    "moments": ([*MINI, "--data.moments", "true"], r"moments=True .*got 2\)"),
    "weights": (["--model.weight", "[1, 2]"], r"weight=\[1.0, 2.0\] .*num_features=1"),
    "weight nan": (["--model.weight", "[.nan]"], "weight=nan must be a finite number"),
    "weight true": (["--model.weight", "[true]"], "True"),
    "intercept": (["--model.intercept", "1"], "intercept=1.0 needs bias=True"),
    "width": (["--model.num_features", "2"], r"num_features=2 .*\[N, 1\].*num_features 1"),
    "width of digits": ([*DIGITS, "--model.num_features", "9"], r"num_features=9 .*\[N, 784\]"),
    "width, at predict": (["predict", "--model.num_features", "2"], "num_features=2 .*1"),
    # Points
    "counts": (["--data.x", "[1, 2]"], r"x and y .*same number of rows; got x \[2, 1\], y \[4\]"),
    "widths": (["--data.x", "[[1, 2], [3], [4], [5]]"], r"entries of one form: .*2.*1"),
    "no points": (["--data.x", "[]", "--data.y", "[]"], r"at least one row .*x \[0, 1\], y \[0\]"),
    "word": (["--data.x", "word"], "word"),
    "columns of targets": (["--data.y", "[[2], [4], [6], [8]]"], r"\[2\]"),
    # Digits
    "source": ([*DIGITS, "--data.source", "kaggle"], "kaggle must be 'offline' or 'torchvision'"),
    "scaling": ([*DIGITS, "--data.scaling", "z"], "z must be 'unit' or 'symmetric' or 'standard'"),
    "num_train 0": ([*DIGITS, "--data.num_train", "0"], "num_train=0"),
    # Tables
    "empty file": ([*TABLE, "empty.csv"], "empty.csv has no header"),
    "bytes": ([*TABLE, "bytes.csv"], "bytes.csv is not a text file in UTF-8"),
    "twice": ([*TABLE, "twice.csv"], "twice.csv, line 1: 2 columns are named 'a'"),
    "target": ([*TABLE, "good.csv", "--data.target", "z"], "good.csv has no column 'z'.*a, y"),
    "features": ([*TABLE, "good.csv", "--data.features", "[b]"], "no column 'b'.*a, y"),
    "no list": ([*TABLE, "good.csv", "--data.features", "a"], r"features=a must be a list such"),
    "index": ([*TABLE, "index.csv"], r"column 1 of index.csv has no name \(the index of a pandas"),
    "letters": ([*TABLE, "good.csv", "--data.features", "[A]"], "no column 'A': did you mean 'a'"),
    "foreign": (["--model", f"{BORING}"], "BoringModel is not a GradientDescentModule: train"),
    "separator": ([*TABLE, "good.csv", "--data.separator", "::"], "separator='::'"),
    "other separator": ([*TABLE, "good.csv", "--data.separator", ";"], "separator right"),
    "not Parquet": ([*TABLE, "mine.parquet"], "mine.parquet is no Parquet file"),
    "fraction": ([*TABLE, "good.csv", "--data.test_fraction", "1"], "test_fraction=1.0"),
    "fraction nan": ([*TABLE, "good.csv", "--data.test_fraction", ".nan"], "test_fraction=nan"),
    "table's width": ([*TABLE, "good.csv", "--model.num_features", "3"], "num_features=3 .*1"),
    # Arrays
    "object array": ([*ARRAYS, "--data.x", "objects.npy"], "objects.npy is no array of numbers"),
    "archive": ([*ARRAYS, "--data.x", "x.npz"], "x.npz is an archive of arrays"),
    "Fortran": ([*ARRAYS, "--data.x", "fortran.npy"], "fortran.npy .*Fortran order.*ascontig"),
    "complex": ([*ARRAYS, "--data.x", "complex.npy"], "complex.npy .*complex64.* must be real"),
    "0 rows": ([*ARRAYS, "--data.x", "none.npy"], r"none.npy has shape \[0, 2\] .*one row"),
    "rows of arrays": ([*ARRAYS, "--data.y", "short.npy"], "got 4 in x.npy and 3 in short.npy"),
    "test_y": ([*ARRAYS, "--data.test_x", "x.npy"], "test_x='x.npy', test_y=None .*set both"),
    # Export
    "no file": (["export"], "--to is missing: it must be a file that ends in .onnx or .pt2"),
    "ending": (["export", "--to", "model.pt"], "--to model.pt must be .* ends in .onnx or .pt2"),
    "no weights": (["export", "--to", "m.pt2"], "export needs trained weights: --ckpt_path last"),
    "not a verb's": (["fit", "--to", "m.pt2"], "--to m.pt2"),
    # Loggers
    "logger": (["--trainer.logger", "CSVLoger"], "unknown logger 'CSVLoger': did you mean 'CSVL"),
    "second logger": (["--trainer.logger", "[CSVLogger, None]"], "unknown logger 'None': known: "),
    "logger's number": (["--trainer.logger", "7"], "unknown logger '7': known: CSVLogger, "),
    "loggers": (["--trainer.logger", "[CSVLogger"], r"--trainer.logger \[CSVLogger is not YAML"),
    "logger's": (["--trainer.logger=CSVLogger", "--trainer.logger.dir", "x"], "'dir' is not accep"),
    "logger's arguments": (
        ["--trainer.logger", "{class_path: CSVLogger, init_args: [1]}"],
        r"--trainer.logger: the init_args \[1\] of CSVLogger must map names to values",
    ),
    # YAML
    "broken YAML": (["--config", "broken.yaml"], "broken.yaml is not YAML: .* line 2, column 1"),
    "tab": (["--config", "tab.yaml"], "tab.yaml is not YAML: .* line 2, column 1"),
    "binary YAML": (["--config", "binary.yaml"], "binary.yaml is not YAML"),
    "empty YAML": (["--config", "empty.yaml"], "empty.yaml must map keys"),
    "list": (["--config", "list.yaml"], "list.yaml must map keys"),
    "a billion laughs": (["--config", "laughs.yaml"], "holds more than 10,000,000 values where"),
    "unknown key": (["--config", "unknown.yaml"], "'modle'"),
    "unknown init arg": (["--config", "lrr.yaml"], "lrr.yaml: .*did you mean 'lr'"),
    "type in a file": (["--config", "type.yaml"], "type.yaml: .*lr=ten must be a number or 'auto'"),
    "list in a file": (["--config", "args.yaml"], r"init_args=\[1\] must map settings to values"),
    "class in a file": (["--config", "class.yaml"], "did you mean 'RidgeRegression'"),
    # Checkpoints
    "URL": (["--ckpt_path", "http://127.0.0.1/x.ckpt"], "is a URL: only local files"),
    "not a checkpoint": (["--ckpt_path", "mine.txt"], "mine.txt is refused: it is damaged"),
}

# What only the start of a run can tell: answered before the first update.
READ = {
    "x nan": (["--data.x", "[1, .nan, 3, 4]"], r"x\[1, 0\] of the train rows is nan"),
    "y infinite": (["--data.y", "[1, 2, 3, -.inf]"], r"y\[3\] of the train rows is -inf"),
    "beyond float32": (["--data.x", "[1e300, 2, 3, 4]"], r"x\[0, 0\] of the train rows is inf"),
    "optimizer": (["--model.optimizer", "SDG"], "unknown optimizer 'SDG': did you mean 'SGD'"),
    "no optimizer": (
        ["--model.optimizer", "os.system"],
        "unknown optimizer 'os.system'",
    ),
    "no module": (["--model.optimizer", "no.such"], "optimizer='no.such' cannot be imported"),
    "closure": (["--model.optimizer", "LBFGS"], "optimizer='LBFGS' .*closure"),
    "nesterov": (["--model.optimizer_args", "{nesterov: true}"], "'nesterov': True.* momentum"),
    "decay": (["--model.optimizer_args", "{weight_decay: -1}"], "'weight_decay': -1"),
    "decay nan": (["--model.optimizer_args", "{weight_decay: .nan}"], "args .*weight_decay=nan"),
    "lr twice": (["--model.optimizer_args", "{lr: 1}"], "lr=1: set lr itself"),
    "optimizer's": (["--model.optimizer_args", "{foo: 1}"], "'foo'.*accepts lr, momentum"),
    "scheduler": (["--model.scheduler", "Step"], "unknown scheduler 'Step': did you mean 'StepLR'"),
    "scheduler's": (["--model.scheduler", "StepLR"], "'step_size'.*accepts step_size"),
    "trainer clips": (["--trainer.gradient_clip_val", "1"], "set --model.gradient_clip_val"),
    "trainer adds": (["--trainer.accumulate_grad_batches", "2"], "--model.accumulate_grad_batches"),
    "auto": ([*MINI, "--model.lr", "auto"], "lr='auto' .*batch_size=2"),
    "auto Adam": (
        ["--model.lr", "auto", "--model.optimizer", "Adam"],
        "lr='auto' .*with SGD; got .*optimizer=Adam",
    ),
    "num_val": (["--data.num_val", "4"], "num_val=4 leaves no row"),
    "validate": (["validate"], "num_val=0 .*--data.num_val"),
    "too small to learn": (
        ["--data.x", "[1e-22, 0, 0, 0]", "--model.lr", "auto"],
        r"lr='auto' is 1/λmax, which is above 3.4e\+38 .*: scale x, or set --model.lr",
    ),
    "nothing to learn": (["--data.x", "[0, 0, 0, 0]"], "every x is 0"),
    "num_train": ([*DIGITS, "--data.num_train", "2001"], "num_train=2001 .*2000 .*offline"),
    "num_test": ([*DIGITS, "--data.num_test", "3001"], "num_test=3001 .*3000 .*offline"),
    "cell": ([*TABLE, "cell.csv"], "cell.csv, line 3, column 'a': 'two' is not a finite number"),
    "nan cell": ([*TABLE, "nan.csv"], "nan.csv, line 2, column 'a'"),
    "empty cell": ([*TABLE, "hole.csv"], "hole.csv, line 3, column 'y': the cell is empty"),
    "no rows": ([*TABLE, "header.csv"], "header.csv has a header and no rows"),
    "ragged": ([*TABLE, "ragged.csv"], "ragged.csv cannot be read as a table"),
    "null": (
        [*TABLE, "null.parquet", "--data.features=[a]"],
        "null.parquet, row 1, column 'a': the cell is empty",
    ),
    "one row": ([*TABLE, "one.csv"], "test_fraction=0.2 leaves no row of one.csv"),
    "whole file": ([*ARRAYS, "--data.buffer_rows", "3"], "batch_size=None would read the 4 rows"),
    "nan on disk": (
        [*ARRAYS, "--data.x", "nan.npy", "--data.buffer_rows", "3", "--data.batch_size", "2"],
        r"x\[1, 0\] of nan.npy, y.npy is nan",
    ),
    "no loss": (["--model", "bad_own.NoLoss"], "NoLoss must define loss"),
    "no formula": (["--model", "bad_own.NoFormula"], "NoFormula must define gradients"),
    "own width": (["--model", "bad_own.Wide"], r"Wide cannot take the data, whose x is \[N, 1\]"),
    "column": (["--model", "bad_own.Column"], r"forward returns \[N, 1\] .*with y \[N\]"),
    "no moments": ([*MLP, *DIGITS, "--data.moments", "true"], "moments=True .* ParityMLP"),
    "within a step": (["--checkpoint.every_n_updates", "7"], "every_n_updates=7 .*per_step must"),
    "float64": (["--data", "bad_own.Doubles"], "x is torch.float64 .*weights are torch.float3"),
    "own column": (["--data", "bad_own.Columns"], r"returns \[N\] .*broadcast with y \[N, 1\]"),
    "own vector": (["--data", "bad_own.Vector"], r"cannot take the data, whose x is \[N\]"),
}

FULL = ["--config", "parity_full", "--data.download", "false", "--data.root"]
FAILED = {
    "no data": ([*FULL, "nowhere"], "nowhere/MNIST/raw/train-images-idx3-ubyte is missing"),
    "no table": ([*TABLE, "nowhere.csv"], "nowhere.csv"),
    "a device for a table": ([*TABLE, "/dev/zero"], "/dev/zero is a folder, a pipe or a device"),
    "no array": ([*ARRAYS, "--data.x", "nowhere.npy"], "nowhere.npy"),
    "no Parquet": ([*TABLE, "no/*.parquet"], "no/[*].parquet: there is no such file"),
    "a folder for a table": ([*TABLE, "."], r"\."),
    "no checkpoint": (["--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt"),
    "logs in a file": (["--trainer.default_root_dir", "mine.txt"], "mine.txt"),
    "logs in no folder": (["--trainer.default_root_dir", "/proc/none"], "/proc/none"),
    "CSV in a file": (
        ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "mine.txt"],
        "mine.txt",
    ),
    "checkpoints in no folder": (["--checkpoint.dirpath", "/proc/none"], "/proc/none"),
    "checkpoints in a file": (["--checkpoint.dirpath", "mine.txt"], "mine.txt"),
    "export into no folder": (["export", "--to", "none/m.pt2"], "there is no folder none"),
    "export over a file": (["export", "--to", "mine.pt2"], "mine.pt2 exists already.*--overwrite"),
    "export of no run": (["export", "--to", "m.pt2", "--ckpt_path", "last"], "no run in .*linear"),
    "no GPU backend": (["--trainer.accelerator", "tpu"], "torch_xla"),
}

OWN_CODE = """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset
from lightning_gd import GradientDescentModule
from lightning_gd.data.tables import Table
from lightning_gd.data.tensors import TensorDataModule


class NoLoss(GradientDescentModule):
    def __init__(self, num_features: int = 1, bias: bool = False, start: str = "", **kwargs):
        super().__init__(**kwargs)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x @ self.weight


class NoFormula(NoLoss):
    def loss(self, x, y):
        return (self(x) - y).square().mean()


class Wide(NoFormula):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.weight = torch.nn.Parameter(torch.zeros(5))


class Column(NoFormula):
    def forward(self, x):
        return x * self.weight


class Columns(TensorDataModule):
    x, y = torch.ones(4, 1), torch.ones(4, 1)

    def load(self):
        table = Table(self.x, self.y)
        return {"train": table, "test": table}


class Vector(Columns):
    x, y = torch.ones(4), torch.ones(4)


class Doubles(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(4, 1).double(), torch.ones(4).double()))

    test_dataloader = val_dataloader = train_dataloader
"""

FILES = {
    "bad_own.py": OWN_CODE,
    "mine.txt": "mine",
    "mine.pt2": "mine",
    "broken.yaml": "model: [1\n",
    "tab.yaml": "model:\n\tlr: 1\n",
    "binary.yaml": b"\xff\xfe\x00\x01",
    "empty.yaml": "",
    "list.yaml": "- 1\n",
    "laughs.yaml": "a: &a [1]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in pairwise("abcdefghi")),
    "unknown.yaml": "modle: 1\n",
    "lrr.yaml": "model: {class_path: lightning_gd.LinearRegression, init_args: {lrr: 1}}\n",
    "type.yaml": "model: {class_path: LinearRegression, init_args: {lr: ten}}\n",
    "args.yaml": "model: {class_path: LinearRegression, init_args: [1]}\n",
    "class.yaml": "model: {class_path: lightning_gd.Ridge}\n",
    "pictures.yaml": "pictures: {worst: -1}\n",
    "good.csv": "a,y\n1,2\n2,4\n3,6\n",
    "cell.csv": "a,y\n1,2\ntwo,4\n3,6\n",
    "nan.csv": "a,y\nnan,2\n2,4\n3,6\n",
    "hole.csv": "a,y\n1,2\n2,\n3,6\n",
    "header.csv": "a,y\n",
    "empty.csv": "",
    "bytes.csv": b"a,y\n\xff\xfe,2\n" + bytes(range(128, 160)),
    "ragged.csv": "a,y\n1,2,3\n2,4\n",
    "index.csv": ",a,y\n0,1,2\n1,3,4\n",
    "twice.csv": "a,a,y\n1,2,3\n",
    "one.csv": "a,y\n1,2\n",
    "mine.parquet": "mine",
    "null.parquet": pandas.DataFrame({"a": [1, None], "b": ["x", "y"], "y": [1, 2]}).to_parquet(),
    "arrays.yaml": """
model: {class_path: lightning_gd.LinearRegression}
data: {class_path: lightning_gd.ArrayData, init_args: {x: x.npy, y: y.npy}}
""",
}


def saved(values, save=np.save):
    """The bytes of a file that NumPy writes."""
    file = io.BytesIO()
    save(file, values)
    return file.getvalue()


X = np.array([[1, 0], [2, 1], [3, 0], [4, 1]], np.float32)
FILES |= {
    "x.npy": saved(X),
    "y.npy": saved(X[:, 0]),
    "short.npy": saved(X[:3, 0]),
    "none.npy": saved(X[:0]),
    "nan.npy": saved(np.where(X == 2, np.nan, X)),
    "fortran.npy": saved(np.asfortranarray(X)),
    "complex.npy": saved(X * np.complex64(1j)),
    "objects.npy": saved(np.array([[1, None]] * 4)),
    "x.npz": saved(X, np.savez),
}

# Folders with the four files of MNIST, one of them damaged.
IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
DAMAGED = {
    "short images": (IMAGES, lambda content: content[:-1]),
    "no images": (IMAGES, lambda content: b""),
    "magic of images": (IMAGES, lambda content: b"\1" + content[1:]),
    "count of images": (IMAGES, lambda content: content[:7] + b"\x1f" + content[8:]),
    "altered images": (IMAGES, lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    "short labels": (LABELS, lambda content: content[:-1]),
    "magic of labels": (LABELS, lambda content: content[:3] + b"\3" + content[4:]),
    "count of labels": (LABELS, lambda content: content[:7] + b"\x0d" + content[8:]),
    "a label of 10": (LABELS, lambda content: idx(np.full(12, 10, np.uint8))),
}
for number, (case, (file, damage)) in enumerate(DAMAGED.items()):
    FAILED[case] = ([*FULL, f"digits{number}"], f"{file} is truncated or altered.*offline")
    content = small_files()
    content[file] = damage(content[file])
    FILES.update({f"digits{number}/MNIST/raw/{name}": data for name, data in content.items()})


def write(folder):
    """Write `FILES` into `folder`."""
    for name, text in FILES.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
