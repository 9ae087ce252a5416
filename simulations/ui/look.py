"""How the page looks: colours and fonts of the system's own, light and dark."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

FONTS = (
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Roboto",
    "Helvetica Neue",
    "Arial",
    "sans-serif",
)
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
CSS = Path(__file__).with_name("page.css")


def theme() -> gr.themes.Base:
    """Return colours and fonts; nothing is fetched from anywhere."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        secondary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.slate,
        spacing_size=gr.themes.sizes.spacing_md,
        radius_size=gr.themes.sizes.radius_md,
        font=FONTS,
        font_mono=MONO,
    ).set(
        button_primary_background_fill="#0072b2",
        button_primary_background_fill_hover="#005f96",
        button_primary_background_fill_dark="#0072b2",
        button_primary_background_fill_hover_dark="#1a86c4",
        button_primary_text_color="white",
        block_info_text_color="*neutral_500",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_700",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        slider_color="#0072b2",
        slider_color_dark="#56b4e9",
    )
