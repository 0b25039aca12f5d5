"""The HTML page: results, pictures and where they came from, in one file that opens without a network."""

from interp.report.blocks import (
    Figure,
    Folded,
    KeyValues,
    Panel,
    Panels,
    Picture,
    Pictures,
    Prompts,
    Provenance,
    Scale,
    Section,
    Table,
    Text,
)
from interp.report.heads import head_sections
from interp.report.page import write_report

__all__ = [
    "Figure",
    "Folded",
    "KeyValues",
    "Panel",
    "Panels",
    "Picture",
    "Pictures",
    "Prompts",
    "Provenance",
    "Scale",
    "Section",
    "Table",
    "Text",
    "head_sections",
    "write_report",
]
