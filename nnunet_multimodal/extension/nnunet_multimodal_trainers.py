"""What nnU-Net imports to find our trainers; nnUNet_extTrainer names the folder of this file.

nnU-Net puts each folder in nnUNet_extTrainer on sys.path, imports every module in it, and afterwards removes all
modules that lie below it from sys.modules. Were the folder the package itself, each lookup would make new classes that
no longer pickle, and unrelated modules would be imported. So this folder holds this one module and nothing else: it
is forgotten after each lookup, and the classes it hands out belong to the installed package, which stays.
"""

from nnunet_multimodal.trainers import __dir__, __getattr__

__all__ = ["__dir__", "__getattr__"]
