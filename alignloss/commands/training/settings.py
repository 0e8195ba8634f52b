"""From options, a YAML file and `field=value` to the configuration of a trainer, and to what a run is known by."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError, one_line
from .objective import Objective, known_options, nearest, objective

# options of the command, and the field of TRL's configuration that each one sets
FIELDS = {
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "learning_rate": "learning_rate",
    "max_length": "max_length",
    "save_every": "save_steps",
    "report": "report_to",
    "seed": "seed",
    "cpu": "use_cpu",
}
# fields that the command decides, and what to use in their place
DECIDED = {
    "output_dir": "--out",
    "overwrite_output_dir": "another --out",
    "resume_from_checkpoint": "the same command again, which goes on by itself",
    "restore_callback_states_from_checkpoint": "the same command again, which goes on by itself",
    "loss_type": "--loss",
    "loss_weights": "--loss, or a MixtureLoss in a script of your own",
    "precompute_ref_log_probs": "nothing: references are computed once",
    "precompute_ref_batch_size": "nothing: references are computed by length",
    "sync_ref_model": "a script of your own",
    "ld_alpha": "ld_dpo_token_weights in a script of your own",
    "f_divergence_type": "--loss f_dpo divergence=...",
    "f_alpha_divergence_coef": "--loss f_dpo divergence=alpha divergence_alpha=...",
    "use_weighting": "wpo_pair_weights in a script of your own",
    "discopop_tau": "--loss discopop tau=...",
    "label_smoothing": "a loss that has it: dpo, robust_dpo, cpo, simpo",
    "beta": "a loss that has it",
    "desirable_weight": "--loss kto",
    "undesirable_weight": "--loss kto",
    "label_smoothing_factor": "another loss",
    "model_init_kwargs": "--dtype, --qlora or a script of your own",
    "trust_remote_code": "a script of your own: code that comes with a model is not run",
    "push_to_hub": "the hub's own command, with the folder model/",
    "truncation_mode": "nothing: a completion is cut at its end, in the references too",
    "dataloader_drop_last": "nothing: every row counts",
    "packing": "a script of your own",
    "padding_free": "a script of your own",
    "remove_unused_columns": "nothing",
    "load_best_model_at_end": "the checkpoint that you choose",
    "save_only_model": "nothing: without an optimizer a run could not go on",
    "save_strategy": "--save-every",
    "eval_strategy": "--eval-data and eval_steps=...",
    "eval_on_start": "--eval-data, which is evaluated at the start",
    "eval_delay": "eval_steps=...",
    "do_eval": "--eval-data",
    "do_train": "nothing",
    "do_predict": "a script of your own",
    "ignore_data_skip": "nothing: a run that goes on skips what it has seen",
    "logging_strategy": "logging_steps=...",
    "logging_nan_inf_filter": "nothing: a run stops at a loss that is not finite",
    "disable_tqdm": "nothing: there is a bar where there is a terminal",
}


class Settings(NamedTuple):
    """What a run is made of, before anything is loaded."""

    objective: Objective
    config_class: Any
    fields: dict[str, Any]  # of config_class


def config_class_of(kind: Objective) -> Any:
    import trl

    if kind.loss is None:
        return trl.SFTConfig
    return trl.DPOConfig if kind.loss.paired else trl.KTOConfig


def assignments(arguments: Iterable[str]) -> dict[str, Any]:
    """`field=value` as YAML reads the value."""
    given: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        name = name.strip()
        if not equals or not name:
            raise UserError(f"{argument!r} is neither an option nor field=value")
        if name in given:
            raise UserError(f"{name} is given twice")
        given[name] = read_yaml(text, argument)
    return given


def read_yaml(text: str, where: str) -> Any:
    import yaml

    class Once(yaml.SafeLoader):
        """A loader that takes each entry once, where YAML's takes the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            merged = "tag:yaml.org,2002:merge"  # `<<`, whose entries those of the mapping replace
            names = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merged]
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise UserError(f"{where} has {twice[0]!r} twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Once)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{where}: not YAML: {one_line(error)}") from error


def read_config(path: Path) -> dict[str, Any]:
    """The entries of a YAML file, with underscores for hyphens."""
    try:
        content = read_yaml(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path} must hold entries of the form name: value")
    entries = {name.replace("-", "_"): value for name, value in content.items()}
    if len(entries) != len(content):
        raise UserError(f"{path} has an entry twice, with a hyphen and with an underscore")
    return entries


def settle(
    loss: str,
    options: dict[str, Any],
    explicit: set[str],
    file: dict[str, Any],
    given: dict[str, Any],
    commands: Iterable[str] = (),
) -> Settings:
    """Sort options and fields into a loss and a configuration.

    Args:
        loss: its name.
        options: of the command, by the names of FIELDS and `beta`; None where none was given and there is no default.
        explicit: those that the command line named.
        file: entries of the YAML file that are no options of the command.
        given: `field=value`, which win over the file.
        commands: the names of all options of the command.
    """
    known = known_options(loss)
    by_field = {field: name for name, field in FIELDS.items()}
    for name in given:
        option = by_field.get(name, name)
        if option in explicit:
            raise UserError(f"{name}={given[name]} and --{option.replace('_', '-')} are both given; leave one out")
    explicit_fields = {FIELDS[name] for name in explicit if name in FIELDS} | explicit | given.keys()
    for name, option in by_field.items():
        if name in file and name != option and options.get(option) is not None and option not in explicit:
            raise UserError(f"the file has both {option} and {name}")
    more = {name: value for name, value in file.items() if name not in explicit_fields} | given
    of_loss = {name: more.pop(name) for name in known.keys() & more}
    if options.get("beta") is not None:
        if "beta" not in known:
            raise UserError(f"--loss {loss} has no beta; its options are: {', '.join(known) or 'none'}")
        of_loss.setdefault("beta", options["beta"])
    made = objective(loss, of_loss)
    config_class = config_class_of(made)
    fields = {f.name for f in dataclasses.fields(config_class) if f.init}
    for name in more:
        if name in DECIDED:
            raise UserError(f"{name} is not set here; use {DECIDED[name]}")
        if name not in fields:
            if name.replace("-", "_") in commands:
                raise UserError(f"{name} is an option of the command: --{name.replace('_', '-')}")
            raise UserError(f"unknown option {name!r}{nearest(name, [*fields - DECIDED.keys(), *known, *commands])}")
    values = {field: options[name] for name, field in FIELDS.items() if options.get(name) is not None} | more
    lengths = {FIELDS["steps"], FIELDS["epochs"]}
    if lengths <= values.keys():
        named = lengths & explicit_fields  # the command line goes before the file
        if len(named) != 1:
            raise UserError("--steps and --epochs are both given; leave one out")
        values = {name: value for name, value in values.items() if name not in lengths or name in named}
    return Settings(made, config_class, values)


def configured(config_class: Any, fields: dict[str, Any]) -> Any:
    """A configuration, each value converted as the command line of transformers does it.

    Raises:
        UserError: for a value that its field does not take.
    """
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise UserError(message.replace("argument --", ""))

    arguments: list[str] = []
    for name, value in fields.items():
        if value is None:
            if config_class.__dataclass_fields__[name].default is not None:
                raise UserError(f"{name} cannot be null")
            continue
        if isinstance(value, (list, tuple)):
            arguments += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            arguments += [f"--{name}", json.dumps(value, default=str)]
        else:
            arguments += [f"--{name}={value}"]
    try:
        (config,) = Parser(config_class, allow_abbrev=False).parse_args_into_dataclasses(arguments)
    except UserError:
        raise
    except Exception as error:  # whatever the class makes of values
        raise UserError(one_line(error)) from error
    return config
