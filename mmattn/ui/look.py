"""How the page looks. Fonts are the visitor's own, so that nothing is loaded from elsewhere."""

from __future__ import annotations

from typing import Any

from gradio.themes import Default


def theme() -> Any:
    """Gradio's default with the greens of the maps."""
    return Default(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )


CSS = """
.gradio-container {width: 100% !important; max-width: 1180px !important; margin: 0 auto !important;}
.head h1 {margin: 0 0 2px 0; font-size: 26px;}
.head p {margin: 0; opacity: 0.75;}
.message p {margin: 0; padding: 10px 14px; border-radius: 6px; overflow-wrap: anywhere;
  color: #7f1d1d; background: #fef2f2; border: 1px solid #fca5a5;}
.said textarea {font-size: 18px; line-height: 1.4; opacity: 1; -webkit-text-fill-color: currentColor;}
.map img {width: 100%; object-fit: contain; box-sizing: border-box; padding-top: 26px;}
.drawn img, .preview img {width: 100%; height: 100%; object-fit: contain;}
.field img {cursor: crosshair; object-fit: contain;}
@media (max-width: 480px) {
  .gradio-container {padding-left: 8px !important; padding-right: 8px !important;}
  .drawn {height: 200px !important;}
}
"""
