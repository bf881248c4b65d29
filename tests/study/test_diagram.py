"""The picture of the method: computed panels, two themes, the same bytes each time."""

import numpy as np
from PIL import Image

from xmask.study import diagram


def test_both_themes_show_what_was_computed(tmp_path, monkeypatch):
    pictures, points, radii = diagram.panels()
    shapes = {picture.shape for _, picture in pictures}
    assert len(pictures) == 8 and shapes == {(96, 128, 3)} and len(points) == len(radii)
    photo, masks = pictures[4][1], pictures[7][1]
    assert (photo != masks).any(2).mean() > 0.1, "the network finds heads in the window"
    monkeypatch.setattr(diagram, "panels", lambda: (pictures, points, radii))
    light, dark = diagram.write(tmp_path)
    before = light.read_bytes()
    grounds = [np.asarray(Image.open(path))[0, 0, :3].mean() for path in (light, dark)]
    assert grounds[0] > 250 and grounds[1] < 30
    assert diagram.write(tmp_path)[0].read_bytes() == before
