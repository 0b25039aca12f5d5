"""What `interp train` trains, and the settings of each kind."""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from interp.cli.training.lorsa_settings import LorsaRunSettings
from interp.cli.training.settings import TrainRunSettings

SETTINGS: dict[str, Any] = {"sae": TrainRunSettings, "transcoder": TrainRunSettings, "lorsa": LorsaRunSettings}


def kind_of(keys: Iterable[str]) -> Any:
    """The settings that a config is for: a Lorsa's where a key is of these alone, else those of SAEs."""
    lorsa, others = ({row.name for row in fields(SETTINGS[kind])} for kind in ("lorsa", "sae"))
    return SETTINGS["lorsa" if (lorsa - others) & set(keys) else "sae"]
