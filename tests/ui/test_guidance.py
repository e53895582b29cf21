"""The field of the guidance scale."""

import pytest

pytest.importorskip("gradio")

from mmattn.ui.text_to_image_tab import guidance_slider


@pytest.mark.parametrize(("own", "shown"), [(5.0, 5.0), (0.0, 1.0), (1.25, 1.25), (7.5, 7.5), (30.0, 30.0)])
def test_it_begins_with_the_models_own_scale_and_takes_it(own, shown):
    slider = guidance_slider(own)
    assert slider.value == shown
    assert slider.preprocess(slider.value) == shown
    assert round((slider.value - slider.minimum) / slider.step, 6).is_integer()
    assert slider.maximum >= 20
