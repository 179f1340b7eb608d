# SPDX-License-Identifier: Apache-2.0
"""Arguments of upstream's classes that the drop-ins do not support."""


def check_unsupported(name: str, **options: tuple[object, object]) -> None:
    """Raise NotImplementedError for an option, given as (value, default), whose value is not its default."""
    for option, (value, default) in options.items():
        if value is not default and value != default:
            raise NotImplementedError(f"{name}: {option} is not supported, got {option}={value!r}.")
