"""The command line of train.run: a YAML file, then key=value. The only file that needs OmegaConf."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smollm2.cli import program
from smollm2.errors import LoadError, UsageError
from train.config import RunConfig
from train.keys import format_value


def describe_keys() -> str:
    """Every key with its meaning and default, one line each, for --help."""
    keys, defaults = dataclasses.fields(RunConfig), RunConfig()
    width = max(len(key.name) for key in keys)
    return "\n".join(
        f"  {key.name:{width}}  {key.metadata['meaning']} [{format_value(getattr(defaults, key.name))}]"
        for key in keys
    )


CONFIGS = Path(__file__).parent / "configs"
HELP = f"""usage: python -m train.run [config.yaml] [key=value ...] [--dry-run] [--debug] [--help]

Trains a SmolLM2. Without a file: train/configs/quickstart.yaml, or, when model= is given, the defaults below.
  --dry-run  build everything and say what would run, without training or writing; where the data cannot be
             read, the estimate of memory and time alone
  --debug    show the traceback of an error

Keys, with their defaults:
{describe_keys()}

example: python -m train.run model=smollm2-135m-instruct data=local paths=notes.txt output_dir=runs/notes"""


def parse(arguments: Sequence[str]) -> tuple[RunConfig, str]:
    """A validated configuration, and where it came from. arguments: at most one YAML file, then key=value.

    Raises UsageError for what is not a key, a value of the wrong type, or a combination that cannot be
    trained.
    """
    files = [argument for argument in arguments if "=" not in argument]
    if len(files) > 1 or any(name.startswith("-") for name in files):
        wrong = next((name for name in files if name.startswith("-")), files[-1])
        example = f"for example: {program('python -m train.run')} steps=60"
        raise UsageError(f"expected one YAML file and key=value pairs, got {wrong!r}; {example}")
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    file = Path(files[0]) if files else None if "model" in given else CONFIGS / "quickstart.yaml"
    if file is not None and not file.is_file() and (CONFIGS / file.name).is_file():
        file = CONFIGS / file.name
    config = _merge(file, given)
    config.validate()
    return config, str(file) if file else "defaults, with " + " ".join(arguments)


def _merge(file: Path | None, given: dict[str, str]) -> RunConfig:
    """RunConfig's defaults, then the file's values, then those of the command line."""
    try:
        from omegaconf import OmegaConf
        from omegaconf.errors import InterpolationValidationError, OmegaConfBaseException
    except ModuleNotFoundError:
        install = "install it with: pip install omegaconf pyyaml"
        raise LoadError(f"the command line of train.run needs omegaconf; {install}") from None

    hints = typing.get_type_hints(RunConfig)
    merged = OmegaConf.structured(RunConfig)

    def set_value(where: str, key: str, value: Any) -> None:
        try:
            OmegaConf.update(merged, key, value)
        except OmegaConfBaseException as error:
            wanted, got = _type_name(hints[key]), f"{format_value(value)!r} ({str(error).splitlines()[0]})"
            raise UsageError(f"{where}: {key}: expected {wanted}, got {got}") from None

    if file is not None:
        try:
            content = OmegaConf.to_container(OmegaConf.load(file))
        except FileNotFoundError:
            known = ", ".join(sorted(path.name for path in CONFIGS.glob("*.yaml")))
            raise UsageError(f"{file}: no such file; expected a YAML file or one of {known}") from None
        except Exception as error:  # the YAML library's own errors pass through OmegaConf
            raise UsageError(f"{file}: not a readable YAML file ({' '.join(str(error).split())})") from None
        if not isinstance(content, dict):
            raise UsageError(f"{file}: expected keys and values, got {type(content).__name__}")
        _check_keys(map(str, content), str(file))
        _check_length(content, str(file))
        for key, value in content.items():
            set_value(str(file), str(key), value)
    _check_keys(given, "command line")
    _check_length(given, "command line")
    if "steps" in given:  # in place of the file's epochs
        given = {"epochs": "0", **given}
    for key, text in given.items():
        set_value("command line", key, _from_text(text, hints[key]))
    # What ${...} stands for is looked up last, and not shown: it may be a secret.
    written = typing.cast(dict[str, Any], OmegaConf.to_container(merged))
    try:
        config = typing.cast(RunConfig, OmegaConf.to_object(merged))
    except InterpolationValidationError as error:
        key = str(error.full_key)
        wanted = _type_name(hints[key]) if key in hints else "a value of the key's type"
        got = f"what {written.get(key, '${...}')} stands for"
        raise UsageError(f"configuration: {key or 'interpolation'}: expected {wanted}, got {got}") from None
    except OmegaConfBaseException as error:
        raise UsageError(f"configuration: {str(error).splitlines()[0]}") from None
    values = dataclasses.asdict(config)
    config.interpolated = {  # type: ignore[misc]
        key: value for key, value in written.items() if value != values[key] and "${" in str(value)
    }
    return config


def _check_keys(names: typing.Iterable[str], where: str) -> None:
    """Raises UsageError for a key that RunConfig does not have, and names the closest one that it has."""
    known = [entry.name for entry in dataclasses.fields(RunConfig)]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            listed = f"{program('python -m train.run')} --help lists them"
            hint = f"did you mean {close[0]!r}?" if close else listed
            raise UsageError(f"{where}: unknown key {name!r}; {hint}")


def _check_length(values: Mapping[typing.Any, Any], where: str) -> None:
    """Raises UsageError where one place asks for epochs and for steps. A saved configuration has epochs 0."""
    if "steps" in values and values.get("epochs", 0) not in (0, "0"):
        raise UsageError(f"{where}: expected epochs or steps, got both")


def _from_text(text: str, hint: Any) -> Any:
    """The value of key=text before its type is checked: [a,b] or a,b is a list, null stands for no value."""
    if hint == list[dict[str, Any]]:
        import yaml

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text  # refused by its type
    if typing.get_origin(hint) is list:
        inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
        if hint == list[str] and os.path.exists(text):  # a file whose name has commas or brackets
            return [text]
        parts = re.split(r',(?=(?:[^"]*"[^"]*")*[^"]*$)', inner)  # at commas outside of double quotes
        return [_unquoted(part.strip()) for part in parts] if inner else []
    if text.lower() in ("null", "none") and type(None) in typing.get_args(hint):
        return None
    return text


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _type_name(hint: Any) -> str:
    if hint == list[dict[str, Any]]:
        return "a list of {key: value, ...}"
    if typing.get_origin(hint) is list:
        return "a list, as [a,b]"
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return " or ".join(names[option] for option in typing.get_args(hint) or (hint,))
