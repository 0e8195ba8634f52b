"""What `--loss NAME` means: a loss of ours in one of TRL's trainers, and what its data set must hold."""

import difflib
import functools
import inspect
from typing import Any, NamedTuple

import torch

from ...losses import LOSSES, divergences
from ...losses.divergences import Divergence
from ...modules.named import CPOLoss, DPOLoss, IPOLoss, KTOLoss, ORPOLoss, SimPOLoss
from ...modules.preference import PreferenceLoss
from ..errors import UserError

# with the defaults of their papers
MODULES: dict[str, Any] = {
    "dpo": DPOLoss,
    "ipo": IPOLoss,
    "kto": KTOLoss,
    "cpo": CPOLoss,
    "orpo": ORPOLoss,
    "simpo": SimPOLoss,
}
NAMES = sorted(LOSSES)
DIVERGENCES: dict[str, Any] = {
    "reverse_kl": divergences.reverse_kl,
    "forward_kl": divergences.forward_kl,
    "js": divergences.js_divergence,
    "alpha": divergences.alpha_divergence,
}
DEFAULT_BETA = 0.1


class Objective(NamedTuple):
    """A loss by its name, with its options."""

    name: str
    kind: str  # of `rows.COLUMNS`
    loss: PreferenceLoss | None  # None: the NLL of TRL's SFTTrainer
    options: dict[str, Any]  # that are not as without them

    @property
    def numbers(self) -> list[str]:
        """Columns of the data set that are the loss's own."""
        from ...trl.trainers import FROM_TRAINER

        return [] if self.loss is None else [name for name in self.loss.data if name not in FROM_TRAINER]

    @property
    def needs_reference(self) -> bool:
        return self.loss is not None and self.loss.needs_reference

    @property
    def needs_reference_model(self) -> bool:
        """Whether log-probabilities of the reference are not enough."""
        return self.loss is not None and "chosen_seq_kl" in self.loss.data

    def data_fault(self, row: dict[str, Any]) -> str | None:
        """What is wrong with the loss's own columns of a pair: the loss is no number at any log-probabilities."""
        if self.loss is None or not self.loss.paired or not self.numbers:
            return None
        values = {name: row[name] for name in self.numbers}
        data = {name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()}
        zeros = torch.zeros(2, 1, 1, dtype=torch.float64)
        references = {"ref_logps": zeros.flatten()} if self.needs_reference else {}
        loss = self.loss(zeros, zeros[:, 0], torch.zeros(2, 1, dtype=torch.int64), **references, **data).loss
        if loss.isfinite():
            return None
        return f"wrong data: {self.name} has no finite loss of " + ", ".join(f"{n} {v:g}" for n, v in values.items())


def known_options(name: str) -> dict[str, bool]:
    """The options of a loss, and whether each must be given."""
    if name not in LOSSES:
        raise UserError(f"--loss must be one of {', '.join(NAMES)}; got {name!r}{nearest(name, NAMES)}")
    made: Any = MODULES.get(name, LOSSES[name])
    parameters = inspect.signature(made).parameters.values()
    known = {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}
    if "beta" in known:
        known["beta"] = False
    paired = "chosen_logps" in inspect.signature(LOSSES[name]).parameters
    if paired:
        known.setdefault("nll_weight", False)
    if name == "f_dpo":
        known["divergence_alpha"] = False
    return known


def objective(name: str, given: dict[str, Any]) -> Objective:
    """The loss of a name with options that are given, numbers or text.

    Raises:
        UserError: for an unknown name, or options that are missing or out of their range.
    """
    known = known_options(name)
    missing = sorted(option for option, needed in known.items() if needed and option not in given)
    if missing:
        raise UserError(f"--loss {name} needs {' and '.join(missing)}: add {' '.join(f'{m}=...' for m in missing)}")
    options = {option: _value(name, option, value) for option, value in given.items()}
    if name == "sft":
        return Objective(name, "unlabelled", None, options)
    parameters = inspect.signature(MODULES.get(name, LOSSES[name])).parameters
    defaults = {option: parameters[option].default for option in known.keys() & parameters.keys()}
    made = dict(options)
    if "beta" in known and name not in MODULES:
        defaults["beta"] = DEFAULT_BETA
        made.setdefault("beta", DEFAULT_BETA)
    options = {option: value for option, value in options.items() if value != defaults.get(option)}
    if name == "f_dpo":
        made["divergence"] = _divergence(made["divergence"], made.pop("divergence_alpha", None))
    try:
        loss = MODULES[name](**made) if name in MODULES else PreferenceLoss(name, **made)
    except ValueError as error:
        raise UserError(f"--loss {name}: {error}") from error
    kind = "paired" if loss.paired else "unpaired" if "desirable" in loss.data else "unlabelled"
    return Objective(name, kind, loss, options)


def _value(name: str, option: str, value: Any) -> Any:
    if option == "divergence":
        return value
    try:
        if isinstance(value, bool):  # which is a number in Python
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise UserError(f"{option} of --loss {name} must be a number, got {value!r}") from None


def _divergence(name: Any, alpha: float | None) -> Divergence:
    if name not in DIVERGENCES:
        raise UserError(f"divergence must be one of {', '.join(DIVERGENCES)}; got {name!r}")
    if (name == "alpha") != (alpha is not None):
        raise UserError("divergence_alpha=NUMBER belongs to divergence=alpha, and only there")
    return functools.partial(DIVERGENCES[name], divergence_alpha=alpha) if alpha is not None else DIVERGENCES[name]


def nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""
