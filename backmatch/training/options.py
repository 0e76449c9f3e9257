"""The options of ``backmatch train``: one table for flags, config files and the help text.

Every value, from a flag or from a config file, goes through the same reader, so the same
mistake gets the same sentence. Nothing here imports torch or NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .failures import show
from .readers import Reader, choice, damping, folder, integer, number, switch, widths

CIFAR = ("cifar10", "cifar100")
DATA = ("digits", "synthetic", *CIFAR)
MODELS = (
    "mlp",
    "cnn",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg11_bn",
    "vgg13_bn",
    "vgg16_bn",
    "resnet20",
)
METHODS = ("backmatch", "bp")
SOLVERS = ("auto", "cholesky", "cg", "scalar", "gradient")
INPUT_SOLVERS = (*SOLVERS, "layer-inverse")
#: Of the hidden layers of mlp; the names are those of torch's functions.
ACTIVATIONS = ("relu", "leaky_relu", "tanh", "sigmoid", "softplus", "elu", "gelu", "silu")
#: Activations that ``--inputs layer-inverse`` can invert.
INVERTIBLE = ("leaky_relu", "tanh", "sigmoid", "softplus", "elu")
#: Divide gradients by scalars of the local Hessians (:mod:`backmatch.optim`).
SCALED_OPTIMIZERS = ("scale-amended", "layerwise-adaptive")
OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop", *SCALED_OPTIMIZERS)
SCHEDULES = ("constant", "cosine", "step")


def data_source(raw: Any) -> str:
    """A data set's name or the path of an ``.npz`` file."""
    if not isinstance(raw, str) or not (raw in DATA or raw.endswith(".npz")) or "\0" in raw:
        raise ValueError(f"one of {', '.join(DATA)} or FILE.npz")
    return raw


@dataclass(frozen=True)
class Option:
    """One option: its name in config files, and the flag ``--name`` with dashes.

    Attributes:
        name: key in config files.
        group: heading in the help text.
        help: one sentence, default included.
        metavar: what stands for the value in the help text.
        read: reader of a raw value.
        default: value when not given; ``None`` if :mod:`.config` derives it from other options.
    """

    name: str
    group: str
    help: str
    metavar: str
    read: Reader
    default: Any = None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def value(self, raw: Any, where: str) -> Any:
        """Read ``raw``; the error names ``where`` it stood, what was expected and what came."""
        try:
            return self.read(raw)
        except ValueError as error:
            raise ValueError(f"{where}: expected {error}, got {show(raw)}") from None


def _choices(names: tuple[str, ...]) -> dict[str, Any]:
    return {"metavar": "{" + ",".join(names) + "}", "read": choice(*names)}


_DATA, _METHOD, _OPTIMIZER, _MACHINE = "data and model", "method", "optimisation", "machine"

#: Options that only the scaled optimizers read.
SCALE_OPTIONS: tuple[Option, ...] = (
    Option(
        "scale_kind",
        _OPTIMIZER,
        "scalar of a local Hessian: its mean eigenvalue (trace), its largest (spectral) or its "
        "quotient along the gradient (rayleigh); default trace",
        **_choices(("trace", "spectral", "rayleigh")),
    ),
    Option(
        "scale_estimate",
        _OPTIMIZER,
        "exact, or estimated: traces by hutchinson, spectral scalars by the power iteration; "
        "default exact",
        **_choices(("exact", "hutchinson", "power")),
    ),
    Option(
        "scale_probes",
        _OPTIMIZER,
        "probes of hutchinson, or steps of power; default 8",
        "N",
        integer(1),
    ),
    Option(
        "scale_damping",
        _OPTIMIZER,
        "added to every scalar; default 0",
        "X",
        number(0, included=True),
    ),
    Option(
        "scale_every",
        _OPTIMIZER,
        "steps per measurement of the scalars; default 10",
        "K",
        integer(1),
    ),
    Option(
        "scale_average",
        _OPTIMIZER,
        "beta of an exponential moving average of the scalars; default 0",
        "B",
        number(0, included=True, below=1),
    ),
    Option(
        "normalize",
        _OPTIMIZER,
        "give the divided gradients the norm of the plain ones, so that usual learning rates "
        "work; default on",
        "{on,off}",
        switch,
    ),
)

OPTIONS: tuple[Option, ...] = (
    Option(
        "data",
        _DATA,
        "digits (scikit-learn's 8x8 images, 1437 train / 360 test), synthetic (Gaussian "
        "clusters, nothing to install), cifar10 or cifar100 (from files in --data-dir) or an .npz "
        "file with x_train, y_train, x_test and y_test (inputs are used as they are, labels are "
        "0, 1, ..); default digits",
        "{digits,synthetic,cifar10,cifar100,FILE.npz}",
        data_source,
        "digits",
    ),
    Option(
        "data_dir",
        _DATA,
        "folder with CIFAR's files: the binary or the python version, unpacked there or in its "
        "usual subfolder, or the original .tar.gz; default data",
        "DIR",
        folder,
    ),
    Option(
        "augment",
        _DATA,
        "standard: every training image is cropped at random after padding by 4 pixels and "
        "mirrored at random; default standard for cifar10 and cifar100, else none",
        **_choices(("none", "standard")),
    ),
    Option(
        "model",
        _DATA,
        "network; mlp (Linear + activation) takes any data, the others images: cnn (small, batch "
        "norm) of 4x4 and more, resnet20 of 5x5 and more, vgg (bn: with batch norm) of 32x32; "
        "default mlp",
        default="mlp",
        **_choices(MODELS),
    ),
    Option(
        "hidden",
        _DATA,
        "sizes of the hidden layers of mlp, or none; default 128,128",
        "N,N,..",
        widths,
    ),
    Option(
        "activation",
        _DATA,
        "activation of the hidden layers of mlp; default relu",
        **_choices(ACTIVATIONS),
    ),
    Option(
        "method",
        _METHOD,
        "backmatch solves a least-squares problem per block, bp is back-propagation; "
        "default backmatch",
        default="backmatch",
        **_choices(METHODS),
    ),
    Option(
        "blocks",
        _METHOD,
        "a block is a Linear or convolution with the norm, activation and pooling after it, or "
        "every layer is one (a residual block always is); with bp only for scale-amended and "
        "layerwise-adaptive; default activation",
        **_choices(("activation", "layer")),
    ),
    Option("weights", _METHOD, "solver of the weight problems; default auto", **_choices(SOLVERS)),
    Option(
        "inputs",
        _METHOD,
        "solver of the input problems; layer-inverse inverts the activation, then the affine part "
        f"(mlp with {', '.join(INVERTIBLE)}); default auto",
        **_choices(INPUT_SOLVERS),
    ),
    Option(
        "cg_steps",
        _METHOD,
        "exactly K steps of conjugate gradient where a solver is cg; default: to convergence",
        "K",
        integer(1, 2**31 - 1),
    ),
    Option(
        "weight_damping",
        _METHOD,
        "damping of the weight problems: absolute, or rel:C times the mean diagonal of the "
        "system; default rel:0.1 (scalar: 0)",
        "X|rel:C",
        damping,
    ),
    Option(
        "input_damping",
        _METHOD,
        "damping of the input problems; default rel:0.01 (scalar: 0)",
        "X|rel:C",
        damping,
    ),
    Option("damping", _METHOD, "sets both dampings", "X|rel:C", damping),
    Option(
        "target_step",
        _METHOD,
        "length of the gradient step on the output that defines the top target; default 1",
        "S",
        number(0, included=False),
    ),
    Option(
        "order",
        _METHOD,
        "pose the input problem before (simultaneous) or after (sequential) the block's weights "
        "have moved; default simultaneous",
        **_choices(("simultaneous", "sequential")),
    ),
    Option(
        "optimizer",
        _OPTIMIZER,
        "scale-amended and layerwise-adaptive need --method bp: they divide each block's gradient "
        "by scalars of the local Hessians; default sgd",
        default="sgd",
        **_choices(OPTIMIZERS),
    ),
    Option(
        "lr",
        _OPTIMIZER,
        "step size; default 1 for backmatch with sgd (the exact step) and with --normalize off, "
        "0.1 for bp with sgd, scale-amended or layerwise-adaptive, 0.001 for the others",
        "LR",
        number(0, included=False),
    ),
    Option(
        "momentum",
        _OPTIMIZER,
        "momentum of sgd, rmsprop, scale-amended and layerwise-adaptive; default 0.9 for bp with "
        "any but rmsprop unless --normalize off, else 0",
        "M",
        number(0, included=True, below=1),
    ),
    *SCALE_OPTIONS,
    Option(
        "weight_decay",
        _OPTIMIZER,
        "weight decay as torch's optimizers have it (adamw: decoupled); default 0, adamw 0.01",
        "W",
        number(0, included=True),
    ),
    Option(
        "schedule",
        _OPTIMIZER,
        "what becomes of the lr: constant, cosine (to 0 at the last step) or step (a tenth from "
        "half of the steps on, a hundredth from three quarters on); default constant",
        default="constant",
        **_choices(SCHEDULES),
    ),
    Option(
        "batch_size",
        _OPTIMIZER,
        "samples per step, the last partial batch of an epoch is dropped; default 128",
        "N",
        integer(1),
        128,
    ),
    Option("epochs", _OPTIMIZER, "passes over the training data; default 5", "N", integer(1), 5),
    Option(
        "seed",
        _OPTIMIZER,
        "seed of initial weights and sample order; default 0",
        "N",
        integer(0),
        0,
    ),
    Option(
        "probe",
        _OPTIMIZER,
        "look at every K-th step: what it does at each block, beside other methods' steps (rows "
        "of kind probe in metrics.jsonl, drawn by backmatch plot); 0 for never; default 0",
        "K",
        integer(0),
        0,
    ),
    Option(
        "device",
        _MACHINE,
        "auto takes a CUDA device if there is one; default auto",
        default="auto",
        **_choices(("auto", "cpu", "cuda")),
    ),
    Option(
        "dtype",
        _MACHINE,
        "precision of data, weights and solves; default float32",
        default="float32",
        **_choices(("float32", "float64")),
    ),
    Option("threads", _MACHINE, "CPU threads; default as torch chooses", "N", integer(1, 4096)),
)

BY_NAME: dict[str, Option] = {option.name: option for option in OPTIONS}
