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
from interp.report.features import feature_sections, write_feature_page
from interp.report.heads import head_sections
from interp.report.heatmap import overlay
from interp.report.lorsa import write_lorsa_page
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
    "feature_sections",
    "head_sections",
    "overlay",
    "write_feature_page",
    "write_lorsa_page",
    "write_report",
]
