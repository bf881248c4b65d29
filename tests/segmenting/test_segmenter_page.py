"""The page on adding a segmenter holds code that runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from segment_anything import SamPredictor

from tests.test_segmenters import crowd, picture
from xmask.edp_sam import generate_masks
from xmask.segmenters import Prompts
from xmask.segmenting import sam
from xmask.segmenting.sam_segmenter import SamSegmenter

PAGE = Path(__file__).parents[2] / "docs" / "add_a_segmenter.md"


def test_the_segmenter_of_the_page_runs_and_equals_ours():
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    assert len(code.splitlines()) < 40
    names = {}
    exec(code, names)
    model, record = sam.load_bundled()
    theirs = names["PredictorSegmenter"](SamPredictor(model), record["sha256"])
    ours = SamSegmenter.from_model(model, max_zoom=1)
    image = picture((60, 90))
    points, coordinates, labels, head, pixel = crowd((60, 90), count=6)
    for segmenter in (theirs, ours):
        segmenter.set_image(image)
    boxes = np.hstack([points, points + 9]).clip(0, (89, 59, 89, 59))
    for prompts in (Prompts(coordinates, labels), Prompts(coordinates, labels, boxes, False)):
        for found, expected in zip(theirs.predict(prompts, head, pixel),
                                   ours.predict(prompts, head, pixel)):
            np.testing.assert_allclose(found, expected, atol=5e-3, rtol=1e-4)
    _, table = generate_masks(image, points, theirs)
    assert (table["area"] > 0).all()
