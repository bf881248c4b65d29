"""Drawn crowds with an exact mask per head: truth for what no crowd dataset annotates.

The paper scores masks against annotated instances (section 7); the public crowd datasets have
dots only. Here a scene is painted person by person, back to front, so the visible head (hair,
hat and face: the thing a dot marks) of everybody is known to the pixel. `draw_scene` paints one
picture, `write_dataset` a dataset in the layout of ShanghaiTech A, UCF-QNRF or JHU-CROWD++.

Every picture depends on its own seed alone. Nothing here claims to replace photographs.
"""

from xmask.synthetic.datasets import write_dataset
from xmask.synthetic.drawing import draw_scene

__all__ = ["draw_scene", "write_dataset"]
