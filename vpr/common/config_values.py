"""Values of a configuration as cards record them."""

from dataclasses import fields, is_dataclass
from typing import Any


def config_values(config: Any) -> dict[str, Any]:
    """Return a configuration dataclass as nested dictionaries, like :func:`dataclasses.asdict`.

    A key that older cards do not have is left out at its default, so that older artifacts stay up to date. A dataclass
    names such keys in ``later_keys()``. Its ``derived_values()`` are added: what the code makes of the configuration,
    where that changed.
    """
    later = config.later_keys() if hasattr(config, "later_keys") else ()
    values = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in later or value != field.default:
            values[field.name] = _convert(value)
    return values | (config.derived_values() if hasattr(config, "derived_values") else {})


def _convert(value: Any) -> Any:
    if is_dataclass(value):
        return config_values(value)
    return type(value)(_convert(item) for item in value) if isinstance(value, list | tuple) else value
