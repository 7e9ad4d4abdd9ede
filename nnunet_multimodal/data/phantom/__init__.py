"""A digital abdomen in several contrasts: the only one of the same patient that anybody can have offline.

``anatomy`` draws a subject, ``tissues`` says what it is made of, ``signal`` what a sequence makes of that, ``acquire``
what scanner and patient do to the image, ``write`` puts data sets on disk.
"""

from nnunet_multimodal.data.phantom.anatomy import EXTRA_ORGANS, ORGANS
from nnunet_multimodal.data.phantom.signal import CONTRASTS
from nnunet_multimodal.data.phantom.write import PhantomOptions, scan_subject, subject_name, write_phantom

__all__ = ["CONTRASTS", "EXTRA_ORGANS", "ORGANS", "PhantomOptions", "scan_subject", "subject_name", "write_phantom"]
